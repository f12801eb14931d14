"""Orbax checkpoints of parameters: written tensor by tensor, and read by tensorstore, which orbax stores arrays with.

What is written is one of orbax's own formats (`use_ocdbt=False, use_zarr3=True`): _METADATA names the leaves of the
tree; each leaf is a folder with a Zarr array, whose values are one file of uncompressed chunks and their index
(https://zarr-specs.readthedocs.io, "sharding_indexed"). So the bytes are the same each time, and a file can be taken
over from a process that was killed; orbax's default, a database of compressed chunks, gives neither.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flaxqwen.convert.dtypes import BY_NAME
from flaxqwen.convert.errors import CheckpointError
from flaxqwen.convert.names import Path as ParameterPath
from flaxqwen.convert.names import to_name
from flaxqwen.convert.staging import ORBAX, PlannedFile
from flaxqwen.convert.tensors import Tensor, array_chunks
from flaxqwen.convert.writer import Writer

NEEDED = "orbax checkpoints need orbax: pip install 'flaxqwen[orbax]'"
METADATA = "_METADATA"
# A chunk is what is read at once, whichever part of it is wanted: at most so many bytes, and each axis is cut in so
# many parts at least, so that the shards of a mesh are read with little beside them.
CHUNK_BYTES = 1 << 20
PARTS = 8
HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
DICT_KEY = 2  # orbax's KeyType.DICT
# Bytes of rows that are read at once.
BAND = 1 << 24


def import_orbax() -> Any:
    """orbax.checkpoint, which takes 1.2 s, and is wanted by few."""
    try:
        import orbax.checkpoint
    except ImportError:
        raise ImportError(NEEDED) from None
    return orbax.checkpoint


# Writing


@dataclass(frozen=True)
class Grid:
    """How an array is cut into chunks, which all have one shape; the last ones may reach beyond its last row."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: np.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Grid:
        """The grid of a tensor: a vector is one chunk; of what has more axes, the first two are cut."""
        shape = tensor.shape
        if len(shape) < 2:
            return cls(shape, shape, tensor.dtype)
        rest = (shape[1] // math.gcd(shape[1], PARTS), *shape[2:])
        rows = -(-shape[0] // PARTS)
        cuts = -(-rows * math.prod(rest) * tensor.dtype.itemsize // CHUNK_BYTES)
        return cls(shape, (-(-rows // cuts), *rest), tensor.dtype)

    @property
    def counts(self) -> tuple[int, ...]:
        """Chunks along each axis."""
        return tuple(-(-size // part) for size, part in zip(self.shape, self.chunk, strict=True))

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk) * self.dtype.itemsize

    @property
    def index(self) -> bytes:
        """Where the chunks lie, at the end of the file: (offset, size) of each, and the sum of these."""
        offsets = np.arange(math.prod(self.counts), dtype="<u8") * self.chunk_bytes
        places = np.stack([offsets, np.full_like(offsets, self.chunk_bytes)], axis=1).tobytes()
        return places + crc32c(places).to_bytes(4, "little")

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return math.prod(self.counts) * (self.chunk_bytes + 16) + 4

    def to_json(self) -> dict[str, Any]:
        """The array's metadata, Zarr's zarr.json."""
        little = [{"name": "bytes", "configuration": {"endian": "little"}}]
        index = [*little, {"name": "crc32c"}]
        shard = {"chunk_shape": self.chunk, "codecs": little, "index_codecs": index, "index_location": "end"}
        whole = [count * part for count, part in zip(self.counts, self.chunk, strict=True)]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": self.shape,
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": whole}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": 0.0,
            "codecs": [{"name": "sharding_indexed", "configuration": shard}],
        }


def crc32c(data: bytes) -> int:
    """CRC-32C, of another polynomial than zlib's: 15,000 chunks of a 7B have 240 KB of index, which takes 30 ms."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _crc32c_of_byte(crc: int) -> int:
    for _ in range(8):
        crc = (crc >> 1) ^ (0x82F63B78 * (crc & 1))
    return crc


_CRC32C = tuple(map(_crc32c_of_byte, range(256)))


def plan_orbax(tensors: Mapping[ParameterPath, Tensor]) -> dict[str, PlannedFile]:
    """The files of an orbax checkpoint by name, in the order that they are written in; no value is read."""
    files: dict[str, PlannedFile] = {}
    for path, tensor in tensors.items():
        folder = f"{ORBAX}/{'.'.join(path)}"
        grid = Grid.of(tensor)
        values = ".".join(("c", *"0" * len(tensor.shape)))  # the one file of an array
        files[f"{folder}/{values}"] = PlannedFile(grid.nbytes, partial(_write_values, tensor=tensor, grid=grid))
        files[f"{folder}/zarr.json"] = _planned(grid.to_json())
    files[f"{ORBAX}/_CHECKPOINT_METADATA"] = _planned({"item_handlers": HANDLER})
    files[f"{ORBAX}/{METADATA}"] = _planned(_tree_metadata(tensors))
    return files


def _planned(content: dict[str, Any]) -> PlannedFile:
    text = json.dumps(content).encode()
    return PlannedFile(len(text), text)


def _tree_metadata(tensors: Mapping[ParameterPath, Tensor]) -> dict[str, Any]:
    """The leaves of the tree, as orbax notes them in _METADATA: of no device, so that they are restored anywhere."""
    leaves = {
        str(path): {
            "key_metadata": [{"key": key, "key_type": DICT_KEY} for key in path],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for path in tensors
    }
    return {
        "tree_metadata": leaves,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _write_values(out: Writer, tensor: Tensor, grid: Grid) -> None:
    """Write the chunks of an array in C order, and their index. A band of chunks, of all columns, is in memory."""
    columns = grid.counts[1] if len(grid.shape) > 1 else 1
    rows = grid.chunk[0] if grid.shape else 1
    for band in _bands(tensor, columns * math.prod(grid.chunk)):
        parts = band.reshape(-1, columns, math.prod(grid.chunk) // rows)
        for column in range(columns):
            part = np.ascontiguousarray(parts[:, column])
            out.write(part.reshape(-1).view(np.uint8).data)
            out.write(bytes(grid.chunk_bytes - part.nbytes))
    out.write(grid.index)


def _bands(tensor: Tensor, size: int) -> Iterator[np.ndarray]:
    """The bits of a tensor in C order, in 1-D arrays of `size` values, the last of what is left."""
    bits = np.dtype(f"u{tensor.dtype.itemsize}")  # numpy moves integers several times faster than ml_dtypes
    band, filled = np.empty(size, bits), 0
    for chunk in tensor.chunks():
        values = chunk.view(bits)
        while values.size:
            count = min(size - filled, values.size)
            band[filled : filled + count] = values[:count]
            values, filled = values[count:], filled + count
            if filled == size:
                yield band
                filled = 0
    if filled:
        yield band[:filled]


# Reading


def open_orbax(folder: Path) -> dict[ParameterPath, OrbaxTensor]:
    """The arrays of an orbax checkpoint by their paths in the tree; no value is read.

    Raises:
      CheckpointError: the checkpoint is corrupt, or holds something else than arrays in dicts.
      ImportError: tensorstore, which comes with orbax, is not installed.
    """
    try:
        import tensorstore
    except ImportError:
        raise ImportError(NEEDED) from None
    metadata, paths = _read_tree(folder / METADATA)
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    files, is_database = {"driver": "file", "path": f"{folder.absolute()}/"}, (folder / "manifest.ocdbt").exists()
    opening = {}
    for path in paths:
        name = ".".join(path) + "/"
        where = (
            {"driver": "ocdbt", "base": files, "path": name} if is_database else files | {"path": files["path"] + name}
        )
        spec = {"driver": driver, "kvstore": where, "fill_missing_data_reads": False}
        opening[path] = tensorstore.open(spec, open=True, read=True)
    return {path: OrbaxTensor(_result(store, folder, path), folder, path) for path, store in opening.items()}


def _read_tree(path: Path) -> tuple[dict[str, Any], list[ParameterPath]]:
    """What _METADATA says, and the paths of the leaves."""
    try:
        metadata = json.loads(path.read_bytes())
        leaves = metadata["tree_metadata"].values()
        kinds = {
            tuple(str(key["key"]) for key in leaf["key_metadata"]): leaf["value_metadata"]["value_type"]
            for leaf in leaves
        }
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not there; expected an orbax checkpoint of a tree of arrays") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not the metadata of an orbax checkpoint: {error!r}") from None
    wrong = [f"{'.'.join(leaf)} is {kind}" for leaf, kind in kinds.items() if kind not in ("jax.Array", "np.ndarray")]
    if wrong:
        raise CheckpointError(f"{path}: expected arrays alone: {', '.join(wrong[:5])}")
    return metadata, list(kinds)


@dataclass(frozen=True)
class OrbaxTensor:
    """An array of an orbax checkpoint, which comes in whole chunks; with what others wrote, one may be all of it.

    store: the tensorstore.TensorStore. folder, path: of the checkpoint, and of the leaf.
    """

    store: Any
    folder: Path
    path: ParameterPath
    is_transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.store.shape)
        return shape[::-1] if self.is_transposed else shape

    @property
    def dtype(self) -> np.dtype:
        return BY_NAME.get(self.store.dtype.name, self.store.dtype.numpy_dtype)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def T(self) -> OrbaxTensor:
        return replace(self, is_transposed=not self.is_transposed)

    def chunks(self, into: np.ndarray | None = None) -> Iterator[np.ndarray]:
        if not self.shape or (self.is_transposed and len(self.shape) > 1):
            yield from array_chunks(self.view(), into)
            return
        done = 0
        for start in range(0, self.shape[0], self._band):
            values = self.rows(start, start + self._band)
            yield from array_chunks(values, None if into is None else into[done : done + values.size])
            done += values.size

    def view(self) -> np.ndarray:
        """The values as an array, which is fresh."""
        array = self._read(...)
        return array.T if self.is_transposed else array

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of the first axis, without reading the others."""
        start, stop, _ = slice(start, stop).indices(self.shape[0])  # tensorstore refuses what reaches beyond
        if self.is_transposed:
            return self._read((..., slice(start, stop))).T
        return self._read(slice(start, stop))

    def release(self) -> None:
        """Nothing is held."""

    @property
    def _band(self) -> int:
        """Rows that are read at once: whole chunks."""
        rows = self.store.chunk_layout.read_chunk.shape[0]
        row_bytes = max(1, self.nbytes // max(1, self.shape[0]))
        return max(rows, BAND // row_bytes // rows * rows)

    def _read(self, index: Any) -> np.ndarray:
        return _result(self.store[index].read(), self.folder, self.path)


def _result(future: Any, folder: Path, path: ParameterPath) -> Any:
    """What tensorstore's future gives; errors by the name of the tensor."""
    try:
        return future.result()
    except Exception as error:  # tensorstore raises ValueError, KeyError, OSError and others, by the status it met
        raise CheckpointError(f"{folder}: {to_name(path)} cannot be read: {error}") from error
