"""Flax's msgpack: what `flax.serialization.msgpack_serialize(params)` writes, read and written tensor by tensor.

A tree is a map of maps. An array is the extension type 1 around (shape, dtype name, bytes); an array of more than 1 GiB
is a map {"__msgpack_chunked_array__": True, "shape": {"0": ..}, "chunks": {"0": array, ..}} of flat pieces.
Source: `_ndarray_to_bytes` and `_chunk` in flax/serialization.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import msgpack
import numpy as np

from flaxqwen.convert.dtypes import BY_NAME
from flaxqwen.convert.errors import CheckpointError
from flaxqwen.convert.names import Path
from flaxqwen.convert.tensors import MappedFile, StoredTensor, Tensor
from flaxqwen.convert.writer import Writer

ARRAY = 1  # flax's extension type of an array
CHUNKED = "__msgpack_chunked_array__"
MAX_ARRAY = 1 << 30  # bytes; flax splits larger arrays

# First byte -> (kind, bytes of the length or number that follows). Lengths within the first byte are in `_token`.
# https://github.com/msgpack/msgpack/blob/master/spec.md
_KINDS = {
    **{0xC4 + i: ("bytes", 1 << i) for i in range(3)},
    **{0xC7 + i: ("ext", 1 << i) for i in range(3)},
    **{0xCC + i: ("int", 1 << i) for i in range(4)},
    **{0xD9 + i: ("str", 1 << i) for i in range(3)},
    **{0xDE + i: ("map", 2 << i) for i in range(2)},
    **{0xDC + i: ("list", 2 << i) for i in range(2)},
}


def read_msgpack(file: MappedFile) -> dict[Path, StoredTensor]:
    """The arrays of a msgpack tree by their paths, in its order; their values stay in the file until they are read.

    Raises:
      CheckpointError: the file is truncated, is not msgpack, or its tree holds anything but arrays.
    """
    reader = _Reader(file)
    try:
        tree = reader.node()
    except (IndexError, RecursionError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file.path}: corrupt msgpack at byte {reader.at}: {error}") from None
    if reader.at != file.size:
        raise CheckpointError(f"{file.path}: corrupt msgpack: {file.size - reader.at} bytes after the end of its tree")
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file.path}: holds {type(tree).__name__}, expected a tree of parameters")
    return dict(_leaves(file, tree, ()))


def _leaves(file: MappedFile, tree: dict[str, Any], path: Path) -> Iterator[tuple[Path, StoredTensor]]:
    for key, node in tree.items():
        if isinstance(node, dict) and CHUNKED in node:
            node = _join_chunks(file, (*path, key), node)
        if isinstance(node, dict):
            yield from _leaves(file, node, (*path, key))
        elif isinstance(node, StoredTensor):
            yield (*path, key), node
        else:
            raise CheckpointError(f"{file.path}: {'/'.join((*path, key))} is {node!r}, expected an array")


def _join_chunks(file: MappedFile, path: Path, node: dict[str, Any]) -> StoredTensor:
    """One tensor of the pieces that flax makes of a large array."""
    try:
        shape = tuple(node["shape"][str(i)] for i in range(len(node["shape"])))
        pieces = [node["chunks"][str(i)] for i in range(len(node["chunks"]))]
        extents = tuple(extent for piece in pieces for extent in piece.extents)
        (dtype,) = {piece.dtype for piece in pieces}
        if math.prod(shape) * dtype.itemsize != sum(size for _, size in extents):
            raise ValueError("the sizes do not add up")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{file.path}: {'/'.join(path)} is not a valid array in chunks") from None
    return StoredTensor(file, extents, shape, dtype)


class _Reader:
    """Walks over a msgpack file without touching the arrays' values."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.at = 0

    def node(self) -> Any:
        """The object at this place: dicts and lists of str, int, bool and None, with arrays as StoredTensor."""
        kind, n = self._token()
        if kind == "map":
            found = {}
            for _ in range(n):
                key = self.node()
                if not isinstance(key, str):
                    raise CheckpointError(f"{self.file.path}: {key!r} is a key of the tree, expected a string")
                if key in found:
                    raise CheckpointError(f"{self.file.path}: the key {key!r} stands twice in a map of the tree")
                found[key] = self.node()
            return found
        if kind == "list":
            return [self.node() for _ in range(n)]
        if kind == "str":
            return self._take(n).decode()
        if kind == "ext":
            return self._array(n)
        return n

    def _take(self, size: int) -> bytes:
        if self.at + size > self.file.size:
            raise IndexError(f"{size} bytes expected, the file ends after {self.file.size - self.at}: truncated")
        self.at += size
        return self.file.read(self.at - size, size)

    def _token(self) -> tuple[str, Any]:
        """The kind of the object at this place, and its length or value."""
        first = self._take(1)[0]
        if first in _KINDS:
            kind, width = _KINDS[first]
            return kind, int.from_bytes(self._take(width), "big")
        if 0xD4 <= first <= 0xD8:
            return "ext", 1 << (first - 0xD4)
        if first in (0xC0, 0xC2, 0xC3):
            return "value", {0xC0: None, 0xC2: False, 0xC3: True}[first]
        for low, high, kind in ((0x00, 0x7F, "int"), (0x80, 0x8F, "map"), (0x90, 0x9F, "list"), (0xA0, 0xBF, "str")):
            if low <= first <= high:
                return kind, first - low
        raise IndexError(f"unexpected byte 0x{first:02x}")

    def _expect(self, wanted: str) -> int:
        """The length or value of the object at this place, which is of the kind `wanted`."""
        kind, n = self._token()
        if kind != wanted:
            raise IndexError(f"{kind} in an array, expected {wanted}")
        return int(n)

    def _array(self, size: int) -> StoredTensor:
        """The array in an extension object of this size, whose type comes first."""
        code = self._take(1)[0]
        if code != ARRAY:
            raise CheckpointError(f"{self.file.path}: extension type {code} at byte {self.at}, expected an array (1)")
        end = self.at + size
        self._expect("list")
        shape = tuple(self._expect("int") for _ in range(self._expect("list")))
        name = self._take(self._expect("str")).decode()
        nbytes = self._expect("bytes")
        if name not in BY_NAME:
            raise CheckpointError(f"{self.file.path}: dtype {name!r} is not one of {', '.join(BY_NAME)}")
        if self.at + nbytes != end or math.prod(shape) * BY_NAME[name].itemsize != nbytes:
            raise IndexError(f"an array of dtype {name} and shape {shape} in {nbytes} bytes")
        if end > self.file.size:
            raise IndexError(f"the array ends at byte {end}, the file after {self.file.size}: truncated")
        extent = (self.at, nbytes)
        self.at = end
        return StoredTensor(self.file, (extent,), shape, BY_NAME[name])


def write_msgpack(out: Writer, tensors: Mapping[Path, Tensor]) -> None:
    """Write a tree as flax does, byte for byte, tensor by tensor."""
    tree: dict[str, Any] = {}
    for path in sorted(tensors):  # flax goes through jax.tree_util, which sorts the keys of dicts
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = path
    _write_node(out, tree, tensors)


def _write_node(out: Writer, node: Any, tensors: Mapping[Path, Tensor]) -> None:
    if isinstance(node, tuple):
        _write_tensor(out, tensors[node])
        return
    pack = msgpack.Packer()
    out.write(pack.pack_map_header(len(node)))
    for key, child in node.items():
        out.write(pack.pack(key))
        _write_node(out, child, tensors)


def _write_tensor(out: Writer, tensor: Tensor) -> None:
    """One array, in the pieces that flax makes of a large one."""
    size, item = math.prod(tensor.shape), tensor.dtype.itemsize
    chunks = (chunk.view("u1") for chunk in tensor.chunks())
    if size * item <= MAX_ARRAY:
        out.write(_array_header(tensor.shape, tensor.dtype))
        for chunk in chunks:
            out.write(chunk.data)
        return
    step = max(1, MAX_ARRAY // item)
    count = -(-size // step)
    pack = msgpack.Packer()
    out.write(pack.pack_map_header(3) + pack.pack(CHUNKED) + pack.pack(True))
    out.write(pack.pack("shape") + pack.pack({str(i): n for i, n in enumerate(tensor.shape)}))
    out.write(pack.pack("chunks") + pack.pack_map_header(count))
    rest = np.empty(0, np.uint8)
    for i in range(count):
        length = min(step, size - i * step)
        out.write(pack.pack(str(i)) + _array_header((length,), tensor.dtype))
        left = length * item
        while left:
            if not rest.size:
                rest = next(chunks)
            out.write(rest[:left].data)
            left, rest = left - len(rest[:left]), rest[left:]


def _array_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """What stands before an array's values."""
    pack = msgpack.Packer()
    nbytes = math.prod(shape) * dtype.itemsize
    inner = pack.pack_array_header(3) + pack.pack(shape) + pack.pack(dtype.name) + _bytes_header(nbytes)
    return _ext_header(len(inner) + nbytes) + inner


def _bytes_header(size: int) -> bytes:
    width = 1 if size < 1 << 8 else 2 if size < 1 << 16 else 4
    return bytes([{1: 0xC4, 2: 0xC5, 4: 0xC6}[width]]) + size.to_bytes(width, "big")


def _ext_header(size: int) -> bytes:
    if size in (1, 2, 4, 8, 16):
        return bytes([0xD4 + size.bit_length() - 1, ARRAY])
    width = 1 if size < 1 << 8 else 2 if size < 1 << 16 else 4
    return bytes([{1: 0xC7, 2: 0xC8, 4: 0xC9}[width]]) + size.to_bytes(width, "big") + bytes([ARRAY])
