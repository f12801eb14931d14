"""Conversion both ways: the same bytes, loaded by Transformers without a missing or unexpected key."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from flaxqwen.convert import CheckpointError, Progress, convert, open_checkpoint, save_params, to_path
from flaxqwen.convert.names import to_linen
from flaxqwen.convert.save import parse_size
from tests.convert.samples import assert_same, expected_of, random_tensors, read_all, save_model

BF16 = ml_dtypes.bfloat16
ROUTES = [
    {"format": "safetensors"},
    {"format": "safetensors", "max_shard_size": "10KB"},
    {"format": "safetensors", "layout": "linen"},
    {"format": "msgpack"},
    {"format": "msgpack", "layout": "linen"},
]
needs_torch = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
    reason="the oracle is Transformers with torch",
)


def source(folder: Path, tensors: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """A checkpoint with what stands beside it."""
    folder.mkdir(exist_ok=True)
    tensors = random_tensors() if tensors is None else tensors
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "qwen2", "torch_dtype": "bfloat16"}')
    for name in ("generation_config.json", "tokenizer.json", "merges.txt", "LICENSE", "notes.md", ".gitattributes"):
        (folder / name).write_text(name)
    return tensors


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_there_and_back_is_the_same_file(tmp_path: Path, route: dict[str, Any]):
    # float32 norms among bfloat16 weights: the writer has to put the wider dtype first.
    tensors = random_tensors(layers=11)
    tensors |= {k: v.astype(np.float32) for k, v in tensors.items() if "norm" in k}
    source(tmp_path / "src", tensors)
    convert(tmp_path / "src", tmp_path / "flax", **route)
    with open_checkpoint(tmp_path / "flax") as checkpoint:
        assert (checkpoint.format, checkpoint.layout) == ("flax", route.get("layout", "checkpoint"))
    assert_same(read_all(tmp_path / "flax"), tensors)
    convert(tmp_path / "flax", tmp_path / "back", to="pytorch")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "src/model.safetensors").read_bytes()
    assert_same(safetensors.numpy.load_file(tmp_path / "back/model.safetensors"), tensors)


@needs_torch
@pytest.mark.parametrize("route", ROUTES[1:4], ids=str)
@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        ("Qwen2ForCausalLM", False),
        ("Qwen2ForCausalLM", True),
        ("Qwen2Model", False),
        ("Qwen2ForSequenceClassification", False),
        ("Qwen2ForTokenClassification", False),
        ("Qwen2ForQuestionAnswering", False),
    ],
)
def test_transformers_loads_what_comes_back(tmp_path: Path, kind: str, tied: bool, route: dict[str, Any]):
    import torch
    import transformers

    model = save_model(tmp_path / "src", kind, tied=tied)
    convert(tmp_path / "src", tmp_path / "flax", **route)
    convert(tmp_path / "flax", tmp_path / "back", to="pytorch", max_shard_size=route.get("max_shard_size"))
    loaded, info = getattr(transformers, kind).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    state = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == state[name].dtype == torch.bfloat16
        assert torch.equal(tensor, state[name]), name
    if "max_shard_size" not in route:
        assert (tmp_path / "src/model.safetensors").read_bytes() == (tmp_path / "back/model.safetensors").read_bytes()
    else:
        index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
        model.save_pretrained(tmp_path / "theirs", max_shard_size=route["max_shard_size"])
        theirs = json.loads((tmp_path / "theirs/model.safetensors.index.json").read_text())
        assert index["metadata"] == theirs["metadata"]
        assert set(index["weight_map"]) == set(theirs["weight_map"])


@needs_torch
def test_bin_becomes_safetensors(tmp_path: Path):
    import torch

    model = save_model(tmp_path / "src")
    (tmp_path / "src/model.safetensors").rename(tmp_path / "theirs.safetensors")
    torch.save(model.state_dict(), tmp_path / "src/pytorch_model.bin")
    convert(tmp_path / "src", tmp_path / "out", to="pytorch")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_flax_names_are_paths(tmp_path: Path):
    tensors = source(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "flax")
    path = tmp_path / "flax/flax_model.safetensors"
    assert_same(safetensors.numpy.load_file(path), {"/".join(to_path(k)): v for k, v in tensors.items()})
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "flax", "layout": "checkpoint"}


@pytest.mark.parametrize("shape", [(5, 3), (3000, 1500), (7, 5, 3)])
def test_linen_layout_is_what_flax_computes_with(tmp_path: Path, rng: np.random.Generator, shape: tuple[int, ...]):
    weight = rng.standard_normal(shape, np.float32)
    tensors = random_tensors() | {"model.x_proj.weight": weight}
    source(tmp_path / "src", tensors)
    convert(tmp_path / "src", tmp_path / "flax", layout="linen")
    stored = safetensors.numpy.load_file(tmp_path / "flax/flax_model.safetensors")
    for name, tensor in tensors.items():
        path, is_reversed = to_linen(to_path(name))
        assert np.array_equal(stored["/".join(path)], tensor.T if is_reversed else tensor)
    assert_same({"k": stored["model/x_proj/kernel"]}, {"k": np.ascontiguousarray(weight.T)})
    if weight.ndim == 2:
        import flax.linen as nn

        x = rng.standard_normal((2, shape[1]), np.float32)
        y = nn.Dense(shape[0], use_bias=False).apply({"params": {"kernel": stored["model/x_proj/kernel"]}}, x)
        np.testing.assert_allclose(y, x @ weight.T, rtol=1e-4, atol=1e-4)
    with open_checkpoint(tmp_path / "flax") as checkpoint:
        assert np.array_equal(checkpoint.read_rows("model.x_proj.weight", 1, 4), weight[1:4])


def test_companions_go_with_the_weights(tmp_path: Path):
    source(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "flax")
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "merges.txt", "LICENSE"}
    assert set(files(tmp_path / "flax")) == wanted | {"flax_model.safetensors", "checksums.json"}
    for name in wanted:
        assert (tmp_path / "flax" / name).read_bytes() == (tmp_path / "src" / name).read_bytes()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, {"torch_dtype": "float32"}),
        ({"dtype": "bfloat16", "n": 1}, {"dtype": "float32", "n": 1}),
        ({}, {"dtype": "float32"}),
        ({"text_config": {"dtype": "float16"}}, {"text_config": {"dtype": "float32"}}),
    ],
)
def test_a_cast_is_in_the_config(tmp_path: Path, config: dict, expected: dict):
    tensors = source(tmp_path / "src")
    (tmp_path / "src/config.json").write_text(json.dumps(config))
    convert(tmp_path / "src", tmp_path / "out", dtype="float32")
    assert json.loads((tmp_path / "out/config.json").read_text()) == expected
    assert_same(read_all(tmp_path / "out"), {k: v.astype(np.float32) for k, v in tensors.items()})


def test_linen_and_a_cast_at_once(tmp_path: Path):
    tensors = source(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "out", dtype="float32", layout="linen", format="msgpack")
    convert(tmp_path / "out", tmp_path / "back", dtype="bfloat16", to="pytorch")
    assert_same(read_all(tmp_path / "back"), tensors)


def test_progress_reaches_the_end(tmp_path: Path):
    tensors = source(tmp_path / "src")
    seen: list[tuple[int, int]] = []
    convert(tmp_path / "src", tmp_path / "out", progress=lambda *done: seen.append(done))
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


# What is refused, and leaves everything as it was


def test_an_existing_destination_needs_force(tmp_path: Path):
    source(tmp_path / "src")
    dst = tmp_path / "dst"
    source(dst, {"a.weight": np.ones(2, np.float32)})
    before = files(dst)
    with pytest.raises(FileExistsError, match="is not empty; choose another folder, or --force to replace it"):
        convert(tmp_path / "src", dst)
    assert files(dst) == before
    (dst / "pytorch_model.bin").touch()
    (dst / "model-00001-of-00002.safetensors").touch()
    (dst / "model.safetensors.index.json").touch()
    convert(tmp_path / "src", dst, force=True)
    assert set(files(dst)) == set(before) - {"model.safetensors"} | {"flax_model.safetensors", "checksums.json"}


def test_an_empty_folder_or_what_a_killed_run_left_is_no_destination_yet(tmp_path: Path):
    source(tmp_path / "src")
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst/.flax_model-00001-of-00003.safetensors.flaxqwen").touch()
    convert(tmp_path / "src", tmp_path / "dst")
    assert not [name for name in files(tmp_path / "dst") if name.endswith(".flaxqwen")]


@pytest.mark.parametrize("dst", ["src", "src/../src", "link"])
def test_the_source_is_no_destination(tmp_path: Path, dst: str):
    source(tmp_path / "src")
    (tmp_path / "link").symlink_to(tmp_path / "src")
    before = files(tmp_path / "src")
    for path in (tmp_path / "src", tmp_path / "src/model.safetensors"):
        with pytest.raises(FileExistsError, match="the destination is the source"):
            convert(path, tmp_path / dst, force=True)
    assert files(tmp_path / "src") == before


def test_a_file_is_no_destination(tmp_path: Path):
    source(tmp_path / "src")
    with pytest.raises(FileExistsError, match="is a file, expected a folder"):
        convert(tmp_path / "src", tmp_path / "src/notes.md")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "onnx"}, "to='onnx' is not one of flax, pytorch"),
        ({"format": "pickle"}, "format='pickle'"),
        ({"layout": "haiku"}, "layout='haiku'"),
        ({"to": "pytorch", "layout": "linen"}, "PyTorch checkpoints are safetensors"),
        ({"to": "pytorch", "format": "msgpack"}, "PyTorch checkpoints are safetensors"),
        ({"format": "msgpack", "max_shard_size": "1GB"}, "does not apply to msgpack"),
        ({"max_shard_size": "5 apples"}, "is not a size"),
        ({"dtype": "int8"}, "dtype int8 is not supported"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict, message: str):
    source(tmp_path / "src")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "src", tmp_path / "dst", **options)
    assert not (tmp_path / "dst").exists()


def test_sizes_are_those_of_transformers():
    sizes = {"5GB": 5 * 10**9, "200mb": 2 * 10**8, " 1.5 KB": 1500, 7: 7, "1TB": 10**12}
    assert {size: parse_size(size) for size in sizes} == sizes
    for wrong in ("5000", "", "GB", "-1GB", "nanGB", "infGB", "5GiB"):
        with pytest.raises(ValueError, match="is not a size: expected a positive number with KB, MB, GB, TB, such as"):
            parse_size(wrong)
    with pytest.raises(ValueError, match="0 is not a size: expected a positive number of bytes"):
        parse_size(0)


@pytest.mark.parametrize("text", ["{", "[" * 100_000], ids=["open", "deep"])
def test_a_broken_config_is_one_line(tmp_path: Path, text: str):
    source(tmp_path / "src")
    (tmp_path / "src/config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON: [^\n]*$"):
        convert(tmp_path / "src", tmp_path / "dst", dtype="float32")


def test_a_checkpoint_that_does_not_fit_the_model_is_not_converted(tmp_path: Path):
    tensors = source(tmp_path / "src")
    expected = expected_of(tensors)
    convert(tmp_path / "src", tmp_path / "good", expected=expected)
    expected["model", "extra", "weight"] = (3,)
    with pytest.raises(CheckpointError, match=r"missing model\.extra\.weight \[3\]"):
        convert(tmp_path / "src", tmp_path / "dst", expected=expected)
    assert not (tmp_path / "dst").exists()


def test_quantized_tensors_are_refused_by_name(tmp_path: Path):
    source(tmp_path / "src", random_tensors() | {"model.layers.0.mlp.up_proj.qweight": np.ones(4, np.int32)})
    with pytest.raises(CheckpointError, match=r"not supported: model\.layers\.0\.mlp\.up_proj\.qweight is int32"):
        convert(tmp_path / "src", tmp_path / "dst")


def test_nan_is_warned_of_by_name(tmp_path: Path):
    tensors = random_tensors()
    tensors["model.norm.weight"][3] = np.nan
    source(tmp_path / "src", tensors)
    with pytest.warns(UserWarning, match=r"^model\.norm\.weight holds NaN or inf$"):
        convert(tmp_path / "src", tmp_path / "dst")
    assert_same(read_all(tmp_path / "dst"), tensors)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("options", [{}, {"format": "msgpack"}, {"to": "pytorch", "max_shard_size": 3000}], ids=str)
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, existing: bool, options: dict):
    """A limit on the size of files stands for the full disk: the same error of the same call, in another process."""
    source(tmp_path / "src", random_tensors() | {"model.big.weight": np.ones(4000, BF16)})
    dst = tmp_path / "new" / "dst"
    if existing:
        dst.parent.mkdir()
        source(dst, {"a.weight": np.ones(2, np.float32)})
    before = files(dst)
    code = """
import resource, sys
from flaxqwen.convert import convert
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
try:
    convert(sys.argv[1], sys.argv[2], force=True, **eval(sys.argv[3]))
except OSError as error:
    print(error.errno, error)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "src"), str(dst), repr(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{errno.EFBIG} ")
    assert "model" in done.stdout
    assert "at byte" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert files(dst) == before
    assert (tmp_path / "new").exists() == existing


EVERY_DIRECTION = [*ROUTES, {"to": "pytorch"}, {"dtype": "float32"}, {"quantize": "int8"}, {"to": "orbax"}]


@pytest.mark.parametrize("options", EVERY_DIRECTION, ids=str)
@pytest.mark.parametrize("disk", ["fails", "has lost the end"])
def test_an_error_while_reading_names_the_file_and_the_offset_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict, disk: str
):
    """Values are read by calls that return errors, not through a mapping, where a broken disk ends the process."""
    tensors = random_tensors() | {"model.layers.9.up_proj.weight": np.ones((600, 800), BF16)}
    source(tmp_path / "src", tensors)
    with open_checkpoint(tmp_path / "src") as checkpoint:
        (start, size) = checkpoint.tensors["model.layers.9.up_proj.weight"].extents[0]
    preadv, broken = os.preadv, start + size // 2

    def read(fd: int, buffers: list[Any], offset: int) -> int:
        if disk == "fails" and offset + sum(map(len, buffers)) > broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset)

    def report(done: int, total: int) -> None:
        if disk != "fails":
            os.truncate(tmp_path / "src/model.safetensors", broken)

    monkeypatch.setattr(os, "preadv", read)
    message = r"Input/output error at offset (\d+).*model\.safetensors" if disk == "fails" else r"ends at byte (\d+)"
    with pytest.raises((OSError, CheckpointError), match=message) as caught:
        convert(tmp_path / "src", tmp_path / "dst", progress=report, **options)
    offset = int(re.search(message, str(caught.value))[1])
    assert start <= offset <= broken if disk == "fails" else offset == broken
    assert str(tmp_path / "src/model.safetensors") in str(caught.value)
    assert not (tmp_path / "dst").exists()


# save_params


def test_jax_arrays_are_saved(tmp_path: Path):
    import jax

    tensors = random_tensors()
    params: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *modules, leaf = to_path(name)
        node = params
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = jax.device_put(tensor)
    save_params(params, tmp_path / "pt", to="pytorch")
    assert_same(safetensors.numpy.load_file(tmp_path / "pt/model.safetensors"), tensors)
    save_params(params, tmp_path / "linen", layout="linen", dtype="float32")
    assert_same(read_all(tmp_path / "linen"), {k: v.astype(np.float32) for k, v in tensors.items()})


def test_a_save_replaces_the_shards_of_the_last_one(tmp_path: Path):
    save_params(random_tensors(), tmp_path, to="pytorch", max_shard_size=300)
    (tmp_path / "notes.md").touch()
    tensors = random_tensors(seed=1)
    save_params(tensors, tmp_path, to="pytorch")
    assert set(files(tmp_path)) == {"model.safetensors", "notes.md"}
    assert_same(read_all(tmp_path), tensors)


@pytest.mark.parametrize(("first", "second"), [("flax", "pytorch"), ("pytorch", "flax")])
def test_a_save_beside_weights_of_the_other_framework_is_refused(tmp_path: Path, first: Any, second: Any):
    save_params(random_tensors(), tmp_path, to=first)
    with pytest.raises(FileExistsError, match="which would no longer be the same model"):
        save_params(random_tensors(), tmp_path, to=second)


def test_a_dtype_that_no_checkpoint_holds_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"a\.weight has dtype int4, which no checkpoint can hold"):
        save_params({"a.weight": np.zeros(3, ml_dtypes.int4)}, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


# Memory and progress


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux's /proc")
def test_memory_stays_small_in_every_direction(tmp_path: Path):
    """120 MB go through each direction in 1.2 times the largest tensor, which is 20 MB, and 40 MB more.

    From orbax's format it is 300 MB, of which 40 are tensorstore itself.
    """
    code = """
import sys, ml_dtypes, numpy as np, safetensors.numpy
from flaxqwen.convert import convert, save_params
from flaxqwen.convert.tensors import ArrayTensor
tile = np.broadcast_to(np.ones(1024, ml_dtypes.bfloat16), (10240, 1024))  # 20 MB, of 2 KB of memory
save_params({f"model.layers.{i}.x_proj.weight": tile for i in range(6)}, "src", to="pytorch")
# Not ru_maxrss: it begins with the peak of the process that forked this one, which is larger than anything here.
peak = lambda: int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
convert("src", "warm", max_shard_size="30MB")
print("start", peak())
for i, options in enumerate(eval(sys.argv[1])):
    src = options.pop("src", "src")
    convert(src, str(i), **options)
    print(options, peak())
"""
    routes: list[dict[str, Any]] = [{"layout": "linen"}, {"format": "msgpack"}]
    routes += [{"to": "pytorch", "src": str(i)} for i in range(2)]
    routes += [{"dtype": "float32", "max_shard_size": "50MB"}, {"to": "orbax"}]
    if importlib.util.find_spec("tensorstore"):
        routes += [{"to": "pytorch", "src": "5"}]
    command = [sys.executable, "-c", code, repr(routes)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    peaks = [int(line.split()[-1]) * 1024 for line in done.stdout.splitlines()]
    assert len(peaks) == 1 + len(routes)
    assert peaks[6] - peaks[0] < 1.2 * 20 * 2**20 + 40 * 10**6, done.stdout
    assert peaks[-1] - peaks[0] < 1.2 * 20 * 2**20 + 300 * 10**6, done.stdout
    oracle = (tmp_path / "src/model.safetensors").read_bytes()
    for i in (2, 3, 6)[: len(routes) - 4]:
        assert (tmp_path / str(i) / "model.safetensors").read_bytes() == oracle


def test_progress_prints_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    with Progress("Converting", out) as report:
        for done in range(0, 10_000_001, 1000):
            report(done, 10_000_000)
        for _ in range(3):  # as where headers and small files are not in the sum
            report(10_000_000, 10_000_000)
    assert len(out.getvalue().splitlines()) == 1
    assert out.getvalue().startswith("Converting: 100% of 10 MB, ")


def test_progress_is_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with Progress("Converting", out) as report:
        report(5_000_000, 10_000_000)
        report(10_000_000, 10_000_000)
    assert "10.0/10.0 MB" in out.getvalue()
