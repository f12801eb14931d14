"""Orbax checkpoints, both ways: what we write, orbax restores, whole and sharded; what orbax writes, we read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest

from flaxqwen import AutoModelForCausalLM, Qwen2Config
from flaxqwen.convert import CheckpointError, check, convert, open_checkpoint, orbax_folder, save_params, to_path
from flaxqwen.convert.staging import ORBAX
from tests.convert.samples import assert_same, expected_of, flatten, random_tensors, read_all

ocp = pytest.importorskip("orbax.checkpoint", reason="pip install 'flaxqwen[orbax]'")

BF16 = ml_dtypes.bfloat16
# Of every rank, in every dtype, with sizes that no grid divides.
SHAPES = {
    "model.embed_tokens.weight": ((1003, 64), BF16),
    "model.layers.0.self_attn.q_proj.weight": ((40, 24), BF16),
    "model.layers.10.mlp.down_proj.weight": ((7, 5), np.float16),
    "model.layers.2.mlp.up_proj.weight": ((1, 17), np.float32),
    "model.conv1.weight": ((20, 16, 3), BF16),
    "model.norm.weight": ((65,), np.float32),
}


@pytest.fixture
def tensors(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Random tensors; chunks, and what is read at once, are so small that each has many."""
    monkeypatch.setattr(orbax_folder, "CHUNK_BYTES", 256)
    monkeypatch.setattr(orbax_folder, "BAND", 1000)
    return {name: rng.standard_normal(shape).astype(dtype) for name, (shape, dtype) in SHAPES.items()}


@pytest.fixture
def src(tmp_path: Path, tensors: dict[str, np.ndarray]) -> Path:
    save_params(tensors, tmp_path / "src", to="pytorch")
    (tmp_path / "src/config.json").write_text('{"model_type": "qwen2", "dtype": "bfloat16"}')
    return tmp_path / "src"


def tree(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    return flax.traverse_util.unflatten_dict({to_path(name): tensor for name, tensor in tensors.items()})


def restored(folder: Path, like: Any = None) -> dict[tuple[str, ...], Any]:
    with ocp.StandardCheckpointer() as checkpointer:
        return flatten(checkpointer.restore((folder / ORBAX).absolute(), like))


def test_orbax_restores_what_is_written(tmp_path: Path, src: Path, tensors: dict[str, np.ndarray]):
    convert(src, tmp_path / "orbax", to="orbax")
    expected = {to_path(name): tensor for name, tensor in tensors.items()}
    assert_same(restored(tmp_path / "orbax"), expected)
    with ocp.PyTreeCheckpointer() as checkpointer:
        assert_same(flatten(checkpointer.restore((tmp_path / "orbax" / ORBAX).absolute())), expected)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {path: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype, sharding=here) for path, tensor in expected.items()}
    arrays = restored(tmp_path / "orbax", flax.traverse_util.unflatten_dict(like))
    assert all(isinstance(array, jax.Array) for array in arrays.values())
    assert_same({path: np.asarray(array) for path, array in arrays.items()}, expected)


SHARDED = """
import sys
import jax, numpy as np, orbax.checkpoint as ocp
from pathlib import Path
from flaxqwen import AutoModelForCausalLM, make_mesh
from flaxqwen.convert import convert
folder = Path(sys.argv[1])
one = AutoModelForCausalLM.from_pretrained(folder / "src")
for sizes in ((8, 1, 1), (1, 1, 8), (1, 4, 2), (2, 2, 2)):
    model = AutoModelForCausalLM.from_pretrained(folder / "dst", mesh=make_mesh(*sizes))
    assert model.dtype == one.dtype == "bfloat16"
    kept = AutoModelForCausalLM.from_pretrained(folder / "src", mesh=make_mesh(*sizes))
    for (path, left), right in zip(jax.tree.leaves_with_path(model.params), jax.tree.leaves(kept.params), strict=True):
        assert left.sharding == right.sharding, path
        for a, b in zip(left.addressable_shards, right.addressable_shards, strict=True):
            assert np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes(), path
    kept.save_pretrained(folder / str(sizes), to="orbax")
    convert(folder / str(sizes), folder / "back", to="pytorch", force=True)
    assert (folder / "back/model.safetensors").read_bytes() == (folder / "src/model.safetensors").read_bytes()
"""


def test_any_mesh_restores_it(tmp_path: Path):
    """On 8 simulated devices, bfloat16: each shard is that of the source; heads are padded and repeated.

    And what such a mesh saves comes back, byte for byte.
    """
    config = Qwen2Config(
        vocab_size=151, hidden_size=56, intermediate_size=80, num_hidden_layers=2, num_attention_heads=14,
        num_key_value_heads=2, head_dim=8, dtype="bfloat16",
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, seed=int.from_bytes(os.urandom(3), "little")).save_pretrained(
        tmp_path / "src", to="pytorch"
    )
    convert(tmp_path / "src", tmp_path / "dst", to="orbax")
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", SHARDED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", [{"to": "pytorch"}, {}, {"layout": "linen"}, {"format": "msgpack"}], ids=str)
def test_what_comes_back_is_byte_identical(tmp_path: Path, src: Path, options: dict[str, Any]):
    convert(src, tmp_path / "orbax", to="orbax")
    convert(tmp_path / "orbax", tmp_path / "back", **options)
    convert(src, tmp_path / "direct", **options)
    file = next((tmp_path / "direct").glob("*model.*"))
    assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
    convert(tmp_path / "back", tmp_path / "again", to="orbax")
    assert contents(tmp_path / "again") == contents(tmp_path / "orbax")


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("_METADATA", "checksums.json")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "how", [{}, {"use_ocdbt": False}, {"use_zarr3": True}, {"use_ocdbt": False, "use_zarr3": True}]
)
@pytest.mark.parametrize("chunk_bytes", [None, 300])
def test_what_orbax_writes_is_read(
    tmp_path: Path, tensors: dict[str, np.ndarray], how: dict[str, bool], chunk_bytes: int | None
):
    params, folder = tree(tensors), tmp_path / "100% of it"
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk_bytes), params)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**how)) as checkpointer:
        checkpointer.save((folder / ORBAX).absolute(), args=ocp.args.PyTreeSave(params, save_args=chunks))
    with open_checkpoint(folder) as checkpoint:
        assert (checkpoint.format, checkpoint.layout) == ("orbax", "checkpoint")
        for name, tensor in tensors.items():
            assert np.array_equal(checkpoint.read_rows(name, 1, 4), tensor[1:4])
            assert np.array_equal(checkpoint.tensors[name].T.rows(0, 3), tensor.T[:3])
    convert(folder, tmp_path / "back", to="pytorch")
    assert_same(read_all(tmp_path / "back"), tensors)


def test_a_model_that_is_saved_comes_back(tmp_path: Path):
    config = Qwen2Config(
        vocab_size=1510, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, dtype="bfloat16",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, seed=int.from_bytes(os.urandom(3), "little"))
    model.save_pretrained(tmp_path / "pytorch", to="pytorch")
    model.save_pretrained(tmp_path / "orbax", to="orbax")
    convert(tmp_path / "orbax", tmp_path / "back", to="pytorch")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "pytorch" / name).read_bytes()
    for first, second in (("orbax", "flax"), ("flax", "orbax")):
        model.save_pretrained(tmp_path / f"{first} first", to=first)
        with pytest.raises(FileExistsError, match="which would no longer be the same model"):
            model.save_pretrained(tmp_path / f"{first} first", to=second)


def test_a_cast(tmp_path: Path, src: Path, tensors: dict[str, np.ndarray]):
    convert(src, tmp_path / "orbax", to="orbax", dtype="float32")
    assert json.loads((tmp_path / "orbax/config.json").read_text())["dtype"] == "float32"
    single = {to_path(name): tensor.astype(np.float32) for name, tensor in tensors.items()}
    assert_same(restored(tmp_path / "orbax"), single)


def test_the_names_are_those_of_the_model(tmp_path: Path):
    """orbax restores a whole tree: what is no parameter of the model stays behind, and prefixes are the model's."""
    tensors = random_tensors()
    expected = expected_of(tensors)
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_params(
        bare | {"layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}, tmp_path / "src", to="pytorch"
    )
    convert(tmp_path / "src", tmp_path / "dst", to="orbax", expected=expected)
    assert_same(restored(tmp_path / "dst"), {to_path(name): tensor for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "msgpack"}, "an orbax checkpoint has a file for each tensor"),
        ({"layout": "linen"}, "an orbax checkpoint has a file for each tensor"),
        ({"max_shard_size": "1GB"}, "an orbax checkpoint has a file for each tensor"),
        ({"quantize": "int8"}, "quantized weights are in Flax's format"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, src: Path, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        convert(src, tmp_path / "dst", to="orbax", **options)
    assert not (tmp_path / "dst").exists()


def test_quantized_weights_need_a_dtype(tmp_path: Path):
    save_params(random_tensors(), tmp_path / "src", to="pytorch")
    (tmp_path / "src/config.json").write_text("{}")
    convert(tmp_path / "src", tmp_path / "int8", quantize="int8")
    with pytest.raises(CheckpointError, match="the weights are quantized: give the dtype to bring them back to"):
        convert(tmp_path / "int8", tmp_path / "dst", to="orbax")
    convert(tmp_path / "int8", tmp_path / "dst", to="orbax", dtype="bfloat16")
    assert set(restored(tmp_path / "dst")) == set(map(to_path, random_tensors()))


def test_force_replaces_all_of_it(tmp_path: Path, src: Path, tensors: dict[str, np.ndarray]):
    dst = tmp_path / "dst"
    save_params({"model.other.weight": np.ones((3, 3), np.float32)}, dst, to="orbax")
    with pytest.raises(FileExistsError, match="is not empty"):
        convert(src, dst, to="orbax")
    for to in ("orbax", "flax", "orbax"):
        convert(src, dst, to=to, force=True)
        assert (dst / ORBAX).exists() == (to == "orbax")
        assert (dst / "flax_model.safetensors").exists() == (to == "flax")
        assert_same(read_all(dst), tensors)
        check(dst)
        assert not list(dst.glob(".*"))


def test_a_dry_run_says_what_would_be_written(tmp_path: Path, src: Path):
    sizes = convert(src, tmp_path / "dst", to="orbax", dry_run=True)
    assert not (tmp_path / "dst").exists()
    assert convert(src, tmp_path / "dst", to="orbax") == sizes | {
        "checksums.json": (tmp_path / "dst/checksums.json").stat().st_size
    }
    found = [path for path in (tmp_path / "dst").rglob("*") if path.is_file()]
    sizes["checksums.json"] = (tmp_path / "dst/checksums.json").stat().st_size
    assert {path.relative_to(tmp_path / "dst").as_posix(): path.stat().st_size for path in found} == sizes


VALUES = f"{ORBAX}/model.embed_tokens.weight/c.0.0"


def spoil_byte(folder: Path) -> None:
    data = bytearray((folder / VALUES).read_bytes())
    data[1234] ^= 1
    (folder / VALUES).write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_byte, rf"{VALUES} has crc32 "),
        (lambda folder: (folder / VALUES).unlink(), rf"{VALUES} is missing"),
        (lambda folder: (folder / ORBAX / "more").touch(), rf"{ORBAX}/more is not in checksums\.json"),
        (lambda folder: (folder / ORBAX / "_METADATA").unlink(), r"_METADATA: not there"),
        (lambda folder: (folder / ORBAX / "_METADATA").write_text("{"), r"_METADATA: not the metadata of an orbax"),
        (lambda folder: (folder / ORBAX / "_METADATA").write_text("[]"), r"_METADATA: not the metadata of an orbax"),
        (lambda folder: (folder / ORBAX / "_METADATA").write_text("[" * 10**5), r"_METADATA: not the metadata of an"),
        (
            lambda folder: (folder / VALUES).with_name("zarr.json").unlink(),
            r"model\.embed_tokens\.weight cannot be read",
        ),
        (
            lambda folder: (folder / VALUES).with_name("zarr.json").write_text("{"),
            r"model\.embed_tokens\.weight cannot be read",
        ),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, src: Path, spoil: Callable[[Path], Any], message: str):
    convert(src, tmp_path / "dst", to="orbax")
    check(tmp_path / "dst")
    spoil(tmp_path / "dst")
    with pytest.raises(CheckpointError, match=message) as caught:
        check(tmp_path / "dst")
    assert len(str(caught.value).splitlines()) == 1


def test_values_that_end_too_soon(tmp_path: Path, src: Path):
    convert(src, tmp_path / "orbax", to="orbax")
    path = tmp_path / "orbax" / VALUES
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight cannot be read: .*c\.0\.0") as caught:
        convert(tmp_path / "orbax", tmp_path / "back", to="pytorch")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "back").exists()


def test_other_trees_are_refused(tmp_path: Path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((tmp_path / ORBAX).absolute(), {"step": 3, "params": {"weight": np.ones(3)}})
    with pytest.raises(CheckpointError, match=r"expected arrays alone: step is scalar"):
        open_checkpoint(tmp_path)


def test_without_orbax_it_is_written_and_not_read(tmp_path: Path, src: Path, monkeypatch: pytest.MonkeyPatch):
    for module in ("tensorstore", "orbax", "orbax.checkpoint"):
        monkeypatch.setitem(sys.modules, module, None)
    convert(src, tmp_path / "orbax", to="orbax")
    with pytest.raises(ImportError, match=r"orbax checkpoints need orbax: pip install 'flaxqwen\[orbax\]'"):
        convert(tmp_path / "orbax", tmp_path / "back", to="pytorch")
