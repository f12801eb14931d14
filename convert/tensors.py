"""Tensors that are read when they are needed: from a place in a file, or from an array."""

from __future__ import annotations

import math
import mmap
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flaxqwen.convert.dtypes import all_finite, is_weight_dtype
from flaxqwen.convert.errors import CheckpointError

# Bytes read and written at once. They stay in the core's own cache between the read, the check, which takes as much
# again, and the write: 1 GB takes 0.49 s; in pieces of 1 MiB, which fill a cache of 2 MiB, 0.56 s.
CHUNK = 1 << 18


class Tensor(Protocol):
    """What can be loaded or written: a shape, a dtype, and values that come in chunks of bounded size."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def T(self) -> Tensor:
        """The same values with the axes reversed."""

    def chunks(self, into: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """The values in C order, as 1-D arrays; each is valid until the next. They fill `into`, 1-D, if given."""


class MappedFile:
    """A file opened for reading, once for all its tensors: pread for streams, a mapping for views."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        self.size = os.fstat(self._file.fileno()).st_size
        self._map: mmap.mmap | None = None

    def map(self) -> mmap.mmap:
        """The whole file as memory, mapped at the first call; pages are read when they are touched."""
        if self._map is None:
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map

    def read_into(self, out: np.ndarray, offset: int) -> None:
        """Fill `out`, uint8, with the bytes from `offset` on."""
        done = 0
        while done < out.size:
            try:
                count = os.preadv(self._file.fileno(), [out[done:].data], offset + done)
            except OSError as error:
                raise OSError(error.errno, f"{error.strerror} at offset {offset + done}", str(self.path)) from error
            if not count:
                raise CheckpointError(f"{self.path}: the file ends at byte {offset + done}, while it is being read")
            done += count

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on."""
        out = np.empty(size, np.uint8)
        self.read_into(out, offset)
        return out.tobytes()

    def release(self, offset: int, size: int) -> None:
        """Give back the mapped pages of a range; touched again, they are read again."""
        if self._map is not None and size:
            start = offset - offset % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, offset + size - start)

    def close(self) -> None:
        """Close the file; views that are still in use keep the mapping."""
        self._map = None
        self._file.close()


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    file: where it is.
    extents: (offset, size) in bytes of the pieces that make up its values; most formats have one.
    stored_shape, dtype: as the file has it.
    strides: of the stored values, in bytes; None for C order.
    is_transposed: whether the tensor is the stored one with its axes reversed.
    """

    file: MappedFile
    extents: tuple[tuple[int, int], ...]
    stored_shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...] | None = None
    is_transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored_shape[::-1] if self.is_transposed else self.stored_shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.stored_shape) * self.dtype.itemsize

    @property
    def T(self) -> StoredTensor:
        return replace(self, is_transposed=not self.is_transposed)

    def chunks(self, into: np.ndarray | None = None) -> Iterator[np.ndarray]:
        if self.strides is not None or (self.is_transposed and len(self.stored_shape) > 1):
            # Values in another order than the file's: read once, whole, rather than once per chunk.
            yield from array_chunks(self._arrange(self._read_range(0, self._stored_bytes)), into)
            return
        places = _Places(self.dtype, into)
        step = CHUNK // self.dtype.itemsize
        size = math.prod(self.stored_shape)
        for start in range(0, size, step):
            piece = places.take(min(step, size - start))
            self.fill(piece.view(np.uint8), start * self.dtype.itemsize)
            yield piece

    def view(self) -> np.ndarray:
        """The values as a read-only array on the mapped file (a fresh array where they lie in several pieces)."""
        if len(self.extents) != 1:
            return self._arrange(self._read_range(0, self._stored_bytes))
        offset, size = self.extents[0]
        return self._arrange(np.frombuffer(self.file.map() if size else b"", np.uint8, size, offset if size else 0))

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of the first axis, without reading the others; a view where `view` gives one."""
        if len(self.extents) == 1:
            return self.view()[start:stop]
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        if self.is_transposed or stop <= start:
            return self.view()[start:stop]
        row = self.nbytes // self.shape[0]
        return self._read_range(start * row, stop * row).view(self.dtype).reshape(-1, *self.shape[1:])

    def release(self) -> None:
        """Give back the memory of the pages that views have read."""
        for offset, size in self.extents:
            self.file.release(offset, size)

    @property
    def _stored_bytes(self) -> int:
        return sum(size for _, size in self.extents)

    def _arrange(self, data: np.ndarray) -> np.ndarray:
        """The stored bytes as an array of the tensor's shape."""
        array: np.ndarray = np.ndarray(self.stored_shape, self.dtype, data, strides=self.strides)
        return array.T if self.is_transposed else array

    def _read_range(self, start: int, stop: int) -> np.ndarray:
        data = np.empty(stop - start, np.uint8)
        self.fill(data, start)
        return data

    def fill(self, out: np.ndarray, start: int) -> None:
        """Fill `out`, uint8, with the stored bytes from `start` on, across pieces."""
        done = 0
        for offset, size in self.extents:
            take = min(size - start, out.size - done)
            if take > 0:
                self.file.read_into(out[done : done + take], offset + start)
                done += take
            start = max(0, start - size)


@dataclass(frozen=True)
class ArrayTensor:
    """An array as a tensor to be written; a jax array comes to the host when its chunks are asked for."""

    array: Any  # numpy.ndarray or jax.Array
    is_transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.array.shape)
        return shape[::-1] if self.is_transposed else shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.array.dtype)

    @property
    def nbytes(self) -> int:
        return math.prod(self.array.shape) * self.dtype.itemsize

    @property
    def T(self) -> ArrayTensor:
        return replace(self, is_transposed=not self.is_transposed)

    def chunks(self, into: np.ndarray | None = None) -> Iterator[np.ndarray]:
        # A jax array keeps the host copy that it gives away; that of a copy goes with the copy.
        array = self.array if isinstance(self.array, np.ndarray) else np.asarray(self.array.copy())
        yield from array_chunks(array.T if self.is_transposed else array, into)


def array_chunks(array: np.ndarray, into: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """The values of an array in C order, as 1-D arrays of bounded size; copied into `into`, 1-D and whole, if given."""
    bits = array.view(f"u{array.itemsize}")  # numpy moves integers several times faster than ml_dtypes
    step = max(1, CHUNK // array.itemsize)
    if array.flags.c_contiguous:
        flat = bits.reshape(-1)
        pieces = (flat[start : start + step] for start in range(0, array.size, step))
    else:
        rows = max(1, step * len(array) // array.size) if array.size else 1
        pieces = (np.ascontiguousarray(bits[i : i + rows]).reshape(-1) for i in range(0, len(array), rows))
    places = _Places(bits.dtype, None if into is None else into.view(bits.dtype))
    for piece in pieces:
        if into is not None:
            place = places.take(piece.size)
            place[...] = piece
            piece = place
        yield piece.view(array.dtype)


class _Places:
    """Where chunks go: one after the other into a given array, or each into the same buffer."""

    def __init__(self, dtype: np.dtype, into: np.ndarray | None) -> None:
        self._into = into
        self._done = 0
        self._buffer = np.empty(0, dtype)

    def take(self, size: int) -> np.ndarray:
        """The place of the next `size` values."""
        if self._into is not None:
            self._done += size
            return self._into[self._done - size : self._done]
        if self._buffer.size < size:
            self._buffer = np.empty(size, self._buffer.dtype)
        return self._buffer[:size]


@dataclass(frozen=True)
class CastTensor:
    """A tensor in another floating dtype, rounded to the nearest chunk by chunk."""

    source: Tensor
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def T(self) -> CastTensor:
        return CastTensor(self.source.T, self.dtype)

    def chunks(self, into: np.ndarray | None = None) -> Iterator[np.ndarray]:
        places = _Places(self.dtype, into)
        for chunk in self.source.chunks():
            out = places.take(chunk.size)
            with np.errstate(over="ignore", invalid="ignore"):  # a CheckedTensor warns, with the name
                out[...] = chunk
            yield out


def cast(tensor: Tensor, dtype: np.dtype) -> Tensor:
    """The tensor in `dtype`, if it is a floating one; others, such as counters, keep theirs."""
    return tensor if tensor.dtype == dtype or not is_weight_dtype(tensor.dtype) else CastTensor(tensor, dtype)


@dataclass(frozen=True)
class CheckedTensor:
    """A tensor whose chunks are looked at as they pass: a warning with its name, once, if there is NaN or inf.

    Chunk by chunk, since there they are in the core's cache: 0.02 s per GB.
    """

    source: Tensor
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> np.dtype:
        return self.source.dtype

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    @property
    def T(self) -> CheckedTensor:
        return CheckedTensor(self.source.T, self.name)

    def chunks(self, into: np.ndarray | None = None) -> Iterator[np.ndarray]:
        is_finite = True
        for chunk in self.source.chunks(into):
            is_finite = is_finite and (not is_weight_dtype(chunk.dtype) or all_finite(chunk))
            yield chunk
        if not is_finite:
            warnings.warn(f"{self.name} holds NaN or inf", stacklevel=2)
