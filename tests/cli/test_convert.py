"""`flaxqwen convert`: round trips, and every checkpoint that it must refuse."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flaxqwen import AutoModelForCausalLM
from flaxqwen.cli.convert import expected_shapes
from flaxqwen.convert import CheckpointError, convert, open_checkpoint, to_name, to_path
from flaxqwen.convert.orbax_folder import plan_orbax
from tests.cli.conftest import Run, assert_refused
from tests.cli.test_app import change_config
from tests.convert.samples import save_sparse

WEIGHTS = "model.safetensors"


def edit(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Let `change` alter the checkpoint's tensors in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def shard(folder: Path, **moved: str) -> None:
    """An index over the one file, with some tensors said to be in other files."""
    weight_map = {name: moved.get(name.split(".")[0], WEIGHTS) for name in load_file(folder / WEIGHTS)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    ("options", "file"),
    [
        ([], "flax_model.safetensors"),
        (["--format", "msgpack"], "flax_model.msgpack"),
        (["--layout", "linen"], "flax_model.safetensors"),
        (["--layout", "linen", "--max-shard-size", "40KB"], "flax_model.safetensors.index.json"),
    ],
)
def test_round_trip_is_byte_identical(run: Run, random_model: Path, tmp_path: Path, options: list[str], file: str):
    flax, back = tmp_path / "flax", tmp_path / "back"
    result = run("convert", random_model, flax, *options)
    assert result.code == 0, result.err
    assert (flax / file).is_file()
    assert run("convert", flax, back, "--to", "pytorch").code == 0
    ours, theirs = load_file(back / WEIGHTS), load_file(random_model / WEIGHTS)
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].tobytes()) == (tensor.dtype, tensor.tobytes())
    for path in random_model.iterdir():
        assert (back / path.name).is_file()


def test_orbax_there_and_back(run: Run, copied: Path, tmp_path: Path):
    """A model that is not tied, whatever its config says: from_pretrained finds its head in orbax's folder, too."""
    pytest.importorskip("orbax.checkpoint", reason="pip install 'flaxqwen[orbax]'")
    change_config(copied, tie_word_embeddings=True)
    orbax, back = tmp_path / "orbax", tmp_path / "back"
    result = run("convert", copied, orbax, "--to", "orbax")
    assert result.code == 0, result.err
    assert re.search(r"^  orbax_model +\d+\.\d kB$", result.out, re.MULTILINE)
    assert f"{orbax}: 27 tensors as the config says, " in run("convert", "--check", orbax).out
    assert run("convert", orbax, back, "--to", "pytorch").code == 0
    assert (back / WEIGHTS).read_bytes() == (copied / WEIGHTS).read_bytes()
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (copied, orbax)]
    assert not models[1].config.tie_word_embeddings
    assert jax.tree.all(jax.tree.map(np.array_equal, *(model.params for model in models)))
    ours, theirs = (run("generate", folder, "--ids", "1 2 3", "--max-new-tokens", "4") for folder in (orbax, copied))
    assert (ours.code, ours.out) == (0, theirs.out)
    assert_refused(run("convert", copied, tmp_path / "int8", "--to", "orbax", "--quantize", "int8"), "quantized")


def test_prints_what_is_there_now(run: Run, random_model: Path, tmp_path: Path):
    dst = tmp_path / "new" / "flax"
    first, *lines = run("convert", random_model, dst).out.splitlines()
    files = {path.name: path.stat().st_size for path in dst.iterdir()}
    assert first.startswith(f"{dst}: {len(files)} files, {sum(files.values()) / 1e3:.1f} kB, in ")
    assert [line.split()[0] for line in lines] == sorted(files)


def test_cast(run: Run, random_model: Path, tmp_path: Path):
    assert run("convert", random_model, tmp_path / "half", "--to", "pytorch", "--dtype", "float16").code == 0
    ours, theirs = load_file(tmp_path / "half" / WEIGHTS), load_file(random_model / WEIGHTS)
    assert all(np.array_equal(ours[name], tensor.astype(np.float16)) for name, tensor in theirs.items())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"


def test_a_file_as_source(run: Run, random_model: Path, tmp_path: Path):
    assert run("convert", random_model / WEIGHTS, tmp_path / "flax").code == 0


def test_force_replaces(run: Run, random_model: Path, tmp_path: Path):
    dst = tmp_path / "flax"
    assert run("convert", random_model, dst).code == 0
    assert_refused(run("convert", random_model, dst, "--format", "msgpack"), "--force")
    assert run("convert", random_model, dst, "--format", "msgpack", "--force").code == 0
    assert [path.name for path in dst.glob("flax_model*")] == ["flax_model.msgpack"]


def test_a_tied_model_with_a_head_of_its_own_keeps_it(run: Run, copied: Path, tmp_path: Path):
    """Transformers 5 goes by the weights: what differs from the embedding is not tied, whatever config.json says."""
    change_config(copied, tie_word_embeddings=True)
    assert run("convert", copied, tmp_path / "back", "--to", "pytorch").code == 0
    assert "lm_head.weight" in load_file(tmp_path / "back" / WEIGHTS)


@pytest.mark.filterwarnings("default::UserWarning")
def test_nan_is_a_warning_with_the_name(run: Run, copied: Path, tmp_path: Path):
    edit(copied, lambda tensors: tensors["model.norm.weight"].fill(np.nan))
    result = run("convert", copied, tmp_path / "flax")
    assert result.code == 0
    assert "warning: model.norm.weight holds NaN or inf" in result.err.splitlines()


def truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def garble(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\xff" * 64)


def unbalance(tensors: dict[str, np.ndarray]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.7.extra.weight"] = np.zeros(3, np.float32)
    tensors["model.norm.weight"] = np.zeros(5, np.float32)


SPOILT: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "truncated": (truncate, (WEIGHTS,)),
    "corrupt": (garble, (WEIGHTS,)),
    "absent": (lambda folder: (folder / WEIGHTS).unlink(), ("no checkpoint",)),
    "misfit": (
        lambda folder: edit(folder, unbalance),
        (
            "missing model.layers.1.mlp.up_proj.weight",
            "unexpected model.layers.7.extra.weight",
            "model.norm.weight has",
        ),
    ),
    "integers": (
        lambda folder: edit(folder, lambda tensors: tensors.update({"model.norm.weight": np.zeros(32, np.int32)})),
        ("model.norm.weight", "int32"),
    ),
    "other architecture": (lambda folder: change_config(folder, model_type="llama"), ("'llama'", "qwen2")),
    "without module": (
        lambda folder: change_config(folder, model_type="qwen2_audio_encoder"),
        ("qwen2_audio_encoder",),
    ),
    "quantized": (lambda folder: change_config(folder, quantization_config={"quant_method": "awq"}), ("'awq'",)),
    "impossible": (lambda folder: change_config(folder, num_attention_heads=5), ("num_attention_heads", "config.json")),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), ("config.json",)),
    "no config": (lambda folder: (folder / "config.json").unlink(), ("config.json",)),
}


@pytest.mark.parametrize("name", SPOILT)
def test_bad_checkpoints_are_refused(run: Run, copied: Path, tmp_path: Path, name: str):
    spoil, words = SPOILT[name]
    spoil(copied)
    dst = tmp_path / "new" / "dst"
    assert_refused(run("convert", copied, dst), *words)
    assert not dst.parent.exists()
    assert_refused(run("generate", copied, "--ids", "1 2 3"), *words)


@pytest.mark.parametrize(("where", "word"), [("model-2.safetensors", "not there"), ("../../x.safetensors", "outside")])
def test_bad_indexes_are_refused(run: Run, copied: Path, tmp_path: Path, where: str, word: str):
    shard(copied, lm_head=where)
    index = f"{WEIGHTS}.index.json"
    assert_refused(run("convert", copied / index, tmp_path / "dst"), index, where, word)
    assert not (tmp_path / "dst").exists()


def test_occupied_destinations_stay_as_they_are(run: Run, random_model: Path, tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("mine")
    assert_refused(run("convert", random_model, tmp_path), "not empty", "--force")
    assert_refused(run("convert", random_model, file, "--force"), "is a file")
    assert_refused(run("convert", random_model, random_model, "--force"), "is the source")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    "options",
    [
        ["--to", "pytorch", "--format", "msgpack"],
        ["--to", "pytorch", "--layout", "linen"],
        ["--format", "msgpack", "--max-shard-size", "1GB"],
        ["--max-shard-size", "much"],
        ["--to", "tensorflow"],
        ["--dtype", "int8"],
    ],
)
def test_options_that_cannot_be(run: Run, random_model: Path, tmp_path: Path, options: list[str]):
    assert_refused(run("convert", random_model, tmp_path / "dst", *options))
    assert not (tmp_path / "dst").exists()


def test_checks_what_it_wrote(run: Run, random_model: Path, tmp_path: Path):
    dst = tmp_path / "flax"
    assert run("convert", random_model, dst, "--max-shard-size", "40KB").code == 0
    result = run("convert", "--check", dst)
    assert result.code == 0, result.err
    files = len(list(dst.iterdir())) - 1
    assert f"{dst}: 27 tensors as the config says, {files} files as checksums.json says, in " in result.out
    assert "no checksums.json to compare bytes with" in run("convert", random_model, "--check").out
    shard = sorted(dst.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert_refused(run("convert", "--check", dst), "not as it was written", f"{shard.name} has crc32")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert_refused(run("convert", "--check", dst), "truncated", shard.name)
    assert_refused(run("convert", "--check", random_model, tmp_path / "dst"), "takes one folder")
    assert_refused(run("convert", random_model), "say where to")


def test_check_takes_names_and_no_other_options(run: Run, random_model: Path):
    assert run("convert", "--check", "demo").out.startswith("demo: ")
    assert_refused(run("convert", "--check", "no/such/folder"), "no/such/folder: no such folder")
    others = ["--quantize", "int8", "--dtype", "float32", "--max-shard-size", "1GB", "--force", "--dry-run"]
    refused = run("convert", "--check", random_model, *others, "--to", "flax", "--format", "safetensors")
    names = "--quantize, --dtype, --max-shard-size, --force, --dry-run, --to, --format"
    assert_refused(refused, f"--check converts nothing: drop {names}")


def save_sparse_orbax(folder: Path) -> None:
    """The checkpoint in src as one of orbax, whose values are holes."""
    with open_checkpoint(folder / "src") as checkpoint:
        tensors = {to_path(name): tensor for name, tensor in checkpoint.tensors.items()}
    (folder / "orbax").mkdir()
    shutil.copy(folder / "src/config.json", folder / "orbax")
    for name, file in plan_orbax(tensors).items():
        path = folder / "orbax" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.content if isinstance(file.content, bytes) else b"")
        os.truncate(path, file.nbytes)


# Options of a direction -> (bytes of its weights over those of the source, its files).
DIRECTIONS: list[tuple[dict[str, Any], float, int]] = [
    ({"to": "pytorch"}, 1, 33),
    ({"layout": "linen"}, 1, 33),
    ({"format": "msgpack"}, 1, 2),
    ({"dtype": "float32"}, 2, 66),
    ({"quantize": "int8"}, 0.5, 17),
    ({"quantize": "int4"}, 0.2737, 11),
    ({"to": "orbax"}, 1, 2 * 963 + 3),  # two a tensor, two of the tree, config.json
]


def test_a_dry_run_of_72b_reads_headers_alone(run: Run, shared: Path, tmp_path: Path):
    """The real config, in 37 shards that are holes: 145 GB that are nowhere."""
    config = shared / "data/configs/Qwen2.5-72B-Instruct/config.json"
    expected = expected_shapes(config)
    save_sparse(tmp_path / "src", {to_name(path): shape for path, shape in expected.items()}, shards=37)
    (tmp_path / "src/config.json").write_bytes(config.read_bytes())
    result = run("convert", tmp_path / "src", tmp_path / "dst", "--dry-run", "--max-shard-size", "10GB")
    assert result.code == 0, result.err
    assert f"{tmp_path / 'dst'}: 17 files, 145.4 GB, not written" in result.out
    nbytes = 2 * sum(math.prod(shape) for shape in expected.values())
    for options, ratio, files in DIRECTIONS:
        sizes = convert(tmp_path / "src", tmp_path / "dst", expected=expected, dry_run=True, **options)
        assert len(sizes) == files, options
        assert sum(sizes.values()) == pytest.approx(ratio * nbytes, rel=0.01), options
    if importlib.util.find_spec("tensorstore"):
        save_sparse_orbax(tmp_path)
        assert len(convert(tmp_path / "orbax", tmp_path / "dst", to="pytorch", expected=expected, dry_run=True)) == 33
    assert not (tmp_path / "dst").exists()
    del expected["model", "norm", "weight"]
    with pytest.raises(CheckpointError, match=r"unexpected model\.norm\.weight \[8192\]"):
        convert(tmp_path / "src", tmp_path / "dst", expected=expected, dry_run=True)
