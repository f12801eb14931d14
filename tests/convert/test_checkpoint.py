"""Every format opens under the same names; broken files end in one line that names the file."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import flax.serialization
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from flaxqwen.convert import CheckpointError, open_checkpoint, save_params, to_path
from flaxqwen.convert import msgpack_file as msgpack_module
from tests.convert.samples import assert_same, random_tensors, read_all

BF16 = ml_dtypes.bfloat16
CHUNKED = "__msgpack_chunked_array__"


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: Any = (2,), dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]} | more


BROKEN = {
    "empty": (b"", "truncated: 0 bytes"),
    "short": (b"\x01\x02", "truncated: 2 bytes"),
    "header cut": (raw({"a": entry(0, 8)}, b"", 4000), "claims a header of 4000 bytes"),
    "huge length": (raw(b"{}", b"", 2**63), f"claims a header of {2**63} bytes"),
    "not json": (raw(b"{nope"), "header is not valid"),
    "not utf-8": (raw(b'{"\xff": 1}'), "header is not valid"),
    "deep": (raw(b"[" * 100_000), "header is not valid"),
    "not an object": (raw([1]), "not an object"),
    "twice": (raw(b'{"a":{},"a":{}}'), "'a' stands twice"),
    "metadata": (raw({"__metadata__": 3}), "__metadata__"),
    "values cut": (raw({"a": entry(0, 8)}, bytes(7)), "truncated: "),
    "too long": (raw({"a": entry(0, 8)}, bytes(9)), "longer than its header says"),
    "overlap": (raw({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "tensor 'b' overlaps"),
    "gap": (raw({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)), "tensor 'b' leaves a gap"),
    "size": (raw({"a": entry(0, 8, [3])}, bytes(8)), "takes 12 bytes"),
    "backwards": (raw({"a": entry(8, 0)}, bytes(8)), "span -8"),
    "dtype": (raw({"a": entry(0, 8, dtype="F4")}, bytes(8)), "dtype 'F4'"),
    "dtype list": (raw({"a": entry(0, 8, dtype=["F32"])}, bytes(8)), "dtype ['F32']"),
    "negative": (raw({"a": entry(0, 8, [-2])}, bytes(8)), "shape [-2]"),
    "shape": (raw({"a": entry(0, 8, "2")}, bytes(8)), "shape '2'"),
    "offsets": (raw({"a": entry(0, 8, data_offsets=[0])}, bytes(8)), "data_offsets [0]"),
    "keys": (raw({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "no proper dtype, shape and data_offsets"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_safetensors(tmp_path: Path, case: str):
    data, message = BROKEN[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(Exception, match=r".+"):  # the format's own reader refuses it as well
        safetensors.numpy.load_file(path)


def test_every_dtype_is_read_as_safetensors_does(tmp_path: Path, rng: np.random.Generator):
    kinds = ["f8", "f4", "f2", BF16, "i8", "i4", "i2", "i1", "u1", "?"]
    tensors = {f"t{i}": rng.integers(0, 2, (3, 4)).astype(kind) for i, kind in enumerate(kinds)}
    tensors |= {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 3), np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    assert_same(read_all(tmp_path), tensors)


def test_float8_is_read(tmp_path: Path):
    header = {"a": entry(0, 2, dtype="F8_E4M3"), "b": entry(2, 4, dtype="F8_E5M2")}
    (tmp_path / "model.safetensors").write_bytes(raw(header, bytes([0x38, 0xB8, 0x3C, 0xBC])))
    tensors = read_all(tmp_path)
    assert tensors["a"].astype(float).tolist() == tensors["b"].astype(float).tolist() == [1, -1]


def test_tensors_are_views_and_rows_are_parts(tmp_path: Path):
    tensors = random_tensors()
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path / "model.safetensors") as checkpoint:
        assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
        view = checkpoint.read("lm_head.weight")
        assert not view.flags.owndata
        assert not view.flags.writeable
        assert np.array_equal(checkpoint.read_rows("lm_head.weight", 3, 7), tensors["lm_head.weight"][3:7])
        checkpoint.release("lm_head.weight")
    assert np.array_equal(view, tensors["lm_head.weight"])  # still there after close and release


def test_a_missing_checkpoint_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in this folder: expected one of"):
        open_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent: no such file or folder"):
        open_checkpoint(tmp_path / "absent")
    (tmp_path / "x.gguf").touch()
    with pytest.raises(CheckpointError, match=r"x\.gguf: not a checkpoint"):
        open_checkpoint(tmp_path / "x.gguf")


def shard(folder: Path) -> dict[str, np.ndarray]:
    """A checkpoint in several shards, all of PyTorch's."""
    tensors = random_tensors()
    save_params(tensors, folder, to="pytorch", max_shard_size=400)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    return tensors


def edit_index(folder: Path, **changes: str | None) -> dict[str, str]:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {k: v for k, v in (index["weight_map"] | changes).items() if v is not None}
    path.write_text(json.dumps(index))
    return index["weight_map"]


def test_shards_are_one_checkpoint(tmp_path: Path):
    assert_same(shard(tmp_path), read_all(tmp_path))


def test_a_hub_cache_of_links_opens(tmp_path: Path):
    tensors = shard(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for path in (tmp_path / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert_same(read_all(snapshot), tensors)


def test_a_shard_that_is_not_there_is_named(tmp_path: Path):
    shard(tmp_path)
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"shard '{gone.name}', which it names, is not there"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("path", ["../../x", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", "."])
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, path: str):
    shard(tmp_path)
    edit_index(tmp_path, **{"model.norm.weight": path})
    with pytest.raises(CheckpointError, match="outside the folder: refused"):
        open_checkpoint(tmp_path)


def test_index_and_shards_must_agree(tmp_path: Path):
    shard(tmp_path)
    some = next(iter(edit_index(tmp_path).values()))
    edit_index(tmp_path, **{"not.there": some})
    with pytest.raises(CheckpointError, match=r"tensors that the index puts here are not: not\.there"):
        open_checkpoint(tmp_path)
    edit_index(tmp_path, **{"not.there": None, "model.norm.weight": None})
    with pytest.raises(CheckpointError, match=r"does not put here: model\.norm\.weight"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{", "[" * 100_000], ids=range(7)
)
def test_a_broken_index_is_one_line(tmp_path: Path, text: str):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: (has no weight_map|not valid JSON)[^\n]*$"):
        open_checkpoint(tmp_path)


# PyTorch's .bin


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason=".bin files are torch's")


def to_torch(torch: Any, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    return {k: torch.from_numpy(v.view(np.int16).copy()).view(torch.bfloat16) for k, v in tensors.items()}


def test_bin_single(tmp_path: Path, torch: Any):
    tensors = random_tensors()
    torch.save(to_torch(torch, tensors), tmp_path / "pytorch_model.bin")
    assert_same(read_all(tmp_path), tensors)


def test_bin_sharded(tmp_path: Path, torch: Any):
    tensors = random_tensors()
    weight_map = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save(to_torch(torch, {k: v for k, v in tensors.items() if weight_map[k] == file}), tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(read_all(tmp_path), tensors)


def test_bin_of_views_parameters_and_other_dtypes(tmp_path: Path, torch: Any):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {
        "transposed": base.T,
        "offset": base[1:, 2:],
        "every_other": base[:, ::2],
        "tied": base,
        "parameter": torch.nn.Parameter(base.half()),
        "expanded": torch.ones(3, 1).expand(3, 4),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 3),
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same(read_all(tmp_path), {name: tensor.detach().numpy() for name, tensor in state.items()})
    save_params(read_all(tmp_path) | {"scalar": np.float32(3).reshape(())}, tmp_path / "out", to="pytorch")
    with open_checkpoint(tmp_path) as checkpoint:  # streams, too
        for name, tensor in checkpoint.tensors.items():
            streamed = b"".join(chunk.tobytes() for chunk in tensor.chunks())
            assert streamed == state[name].detach().numpy().tobytes(), name


class RunsCode:
    def __reduce__(self) -> Any:
        return os.system, ("touch was_run",)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path, torch: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2), "b": RunsCode()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: refused: [^\n]* run code, \w+\.system; [^\n]*$"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "was_run").exists()


def test_other_bin_files_are_refused(tmp_path: Path, torch: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps(RunsCode()))
    with pytest.raises(CheckpointError, match="not a zip file"):
        open_checkpoint(path)
    assert not (tmp_path / "was_run").exists()
    for state, message in ((torch.ones(2), "expected a dict of tensors"), ({"a": 3}, "'a' is int, expected a tensor")):
        torch.save(state, path)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"corrupt \.bin checkpoint"):
        open_checkpoint(path)


def rewrite(path: Path, compression: int = zipfile.ZIP_STORED, reverse: bool = False, **changes: bytes) -> None:
    """Write a zip file again, record by record, as a tool that knows nothing of torch does."""
    with zipfile.ZipFile(path) as old:
        records = {info.filename: old.read(info) for info in old.infolist()}
    names = sorted(records, reverse=reverse)
    with zipfile.ZipFile(path, "w", compression) as new:
        for name in names:
            new.writestr(name, changes.get(name.rpartition("/")[2], records[name]))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_bin_that_another_tool_has_written_again_is_the_same(tmp_path: Path, torch: Any, reverse: bool):
    tensors = random_tensors(layers=11)  # so that the order of the records' names is not that of the numbers
    path = tmp_path / "pytorch_model.bin"
    torch.save(to_torch(torch, tensors), path)
    rewrite(path, reverse=reverse)
    assert_same(read_all(tmp_path), tensors)


def test_a_bin_whose_zip_is_not_torchs_is_refused(tmp_path: Path, torch: Any):
    """Compressed, of another byte order, with a record that is too small or stands twice: one line each."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(1000)}, path)
    whole = path.read_bytes()

    def repeat() -> None:
        with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("pytorch_model/data/0", bytes(4000))

    for spoil, message in (
        (lambda: rewrite(path, zipfile.ZIP_DEFLATED), "data/0 is compressed or encrypted"),
        (lambda: rewrite(path, byteorder=b"big"), "its byteorder is b'big', expected b'little'"),
        (lambda: rewrite(path, **{"0": bytes(3996)}), "tensor 'a' ends at byte 4000 of data/0, which has 3996"),
        (repeat, "stands twice"),
    ):
        path.write_bytes(whole)
        spoil()
        with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin: [^\n]*{message}[^\n]*$"):
            open_checkpoint(path)


def test_tensors_without_plain_values_are_refused(tmp_path: Path, torch: Any):
    for tensor, message in (
        (torch.eye(3).to_sparse(), "'a' is torch.sparse_coo, expected a dense tensor"),
        (torch.ones(2, device="meta"), "'a' has no values in the file"),
        (torch.ones(2).untyped_storage(), "'a' is TypedStorage, expected a dense tensor"),
    ):
        torch.save({"a": tensor}, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin: {message}[^\n]*$"):
            open_checkpoint(tmp_path)


def test_without_torch_the_extra_is_named(tmp_path: Path, torch: Any):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    code = "import sys; sys.modules['torch'] = None; from flaxqwen.convert import open_checkpoint; open_checkpoint('.')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "pip install 'flaxqwen[torch]'" in done.stderr.splitlines()[-1]


# Flax's msgpack


def nest(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *modules, leaf = to_path(name)
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = tensor
    return tree


def test_msgpack_is_flax_own_both_ways(tmp_path: Path, rng: np.random.Generator):
    # Sizes on both sides of every length of msgpack's headers.
    sizes = [0, 1, 2, 3, 5, 100, 117, 118, 125, 126, 127, 128, 250, 255, 256, 300, 32_700, 32_760, 32_768, 70_000]
    tensors = random_tensors(layers=12) | {f"m.x{n}.bias": rng.standard_normal(n).astype(BF16) for n in sizes}
    tensors |= {"m.f32.weight": np.ones((2, 3, 4), np.float32), "m.scalar.weight": np.array(1, np.float16)}
    theirs = flax.serialization.msgpack_serialize(nest(tensors))
    (tmp_path / "flax_model.msgpack").write_bytes(theirs)
    assert_same(read_all(tmp_path), tensors)
    save_params(tensors, tmp_path / "ours", format="msgpack")
    assert (tmp_path / "ours/flax_model.msgpack").read_bytes() == theirs


def test_msgpack_of_arrays_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 130)
    monkeypatch.setattr(msgpack_module, "MAX_ARRAY", 130)
    tensors = random_tensors()
    theirs = flax.serialization.msgpack_serialize(nest(tensors))
    assert CHUNKED.encode() in theirs
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(theirs)
    assert_same(read_all(tmp_path), tensors)
    with open_checkpoint(path) as checkpoint:
        for start, stop in ((0, 24), (3, 17), (20, 24), (5, 5), (-3, 24)):
            rows = checkpoint.read_rows("lm_head.weight", start, stop)
            assert rows.tobytes() == tensors["lm_head.weight"][start:stop].tobytes()
            assert rows.shape == tensors["lm_head.weight"][start:stop].shape
    save_params(tensors, tmp_path / "ours", format="msgpack")
    assert (tmp_path / "ours/flax_model.msgpack").read_bytes() == theirs


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": 3}, "a is 3, expected an array"),
        ({"a": {"b": None}}, "a/b is None, expected an array"),
        ({"a": [np.ones(2)]}, "expected an array"),
        ([np.ones(2)], "holds list, expected a tree"),
        ({"a": np.float32(3)}, "extension type 3"),
        ({"a": np.ones(2, np.complex64)}, "dtype 'complex64' is not one of"),
        (
            {"a": {CHUNKED: True, "shape": {"0": 3}, "chunks": {"0": np.ones(2)}}},
            "a is not a valid",
        ),
        (  # whose sizes add up in the dtype of the first piece
            {"a": {CHUNKED: True, "shape": {"0": 6}, "chunks": {"0": np.ones(2, "f4"), "1": np.ones(2, "f8")}}},
            "a is not a valid",
        ),
    ],
)
def test_msgpack_of_something_else(tmp_path: Path, tree: Any, message: str):
    (tmp_path / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_broken_msgpack(tmp_path: Path):
    whole = flax.serialization.msgpack_serialize(nest(random_tensors()))
    path = tmp_path / "flax_model.msgpack"
    for data in (b"", whole + b"\0", b"\xc1", b"\x81" * 100_000, *(whole[:n] for n in range(1, len(whole), 7))):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"flax_model\.msgpack: corrupt msgpack[^\n]*$"):
            open_checkpoint(path)


def test_a_key_that_stands_twice_in_msgpack(tmp_path: Path):
    one, two = (flax.serialization.msgpack_serialize({"a": np.full(2, value)})[1:] for value in (1, 2))
    (tmp_path / "flax_model.msgpack").write_bytes(b"\x82" + one + two)
    with pytest.raises(CheckpointError, match=r"flax_model\.msgpack: the key 'a' stands twice[^\n]*$"):
        open_checkpoint(tmp_path)


def test_a_parameter_in_both_layouts_is_refused(tmp_path: Path):
    """Its kernel and its weight; which of them counts, nobody knows."""
    tensors = {f"model/layers_0/mlp/up_proj/{leaf}": np.ones((2, 3), np.float32) for leaf in ("kernel", "weight")}
    safetensors.numpy.save_file(tensors, tmp_path / "flax_model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight stands twice[^\n]*/weight$"):
        open_checkpoint(tmp_path)


def test_pytorchs_safetensors_come_first(tmp_path: Path):
    tensors = random_tensors()
    save_params(tensors, tmp_path / "flax")
    safetensors.numpy.save_file({"a.weight": np.ones(2, np.float32)}, tmp_path / "flax" / "model.safetensors")
    with open_checkpoint(tmp_path / "flax") as checkpoint:
        assert (checkpoint.format, list(checkpoint.tensors)) == ("pytorch", ["a.weight"])
    with open_checkpoint(tmp_path / "flax" / "flax_model.safetensors") as checkpoint:
        assert (checkpoint.format, checkpoint.layout) == ("flax", "checkpoint")
        assert set(checkpoint.tensors) == set(tensors)


def test_flipped_bytes_never_end_in_a_traceback(tmp_path: Path, rng: np.random.Generator):
    """Corruption is an error of ours, or it lies in the values or names, which nothing tells from others."""
    for path in (tmp_path / "flax_model.msgpack", tmp_path / "flax_model.safetensors"):
        save_params(random_tensors(), tmp_path, format=path.suffix[1:])
        whole = path.read_bytes()
        for _ in range(300):
            data = bytearray(whole)
            data[rng.integers(min(len(data), 900))] = rng.integers(256)
            path.write_bytes(data)
            try:
                with open_checkpoint(path) as checkpoint:
                    for tensor in checkpoint.tensors.values():
                        assert sum(chunk.nbytes for chunk in tensor.chunks()) == tensor.nbytes
            except CheckpointError:
                continue


def test_values_come_in_small_chunks(tmp_path: Path, rng: np.random.Generator):
    weight = rng.standard_normal((1000, 700), np.float32)
    save_params({"a.weight": weight}, tmp_path / "plain")
    save_params({"a.weight": weight}, tmp_path / "linen", layout="linen")
    for folder in (tmp_path / "plain", tmp_path / "linen"):
        with open_checkpoint(folder) as checkpoint:
            chunks = [chunk.copy() for chunk in checkpoint.tensors["a.weight"].chunks()]
        assert max(chunk.nbytes for chunk in chunks) <= 1 << 20
        assert np.array_equal(np.concatenate(chunks), weight.reshape(-1))
