"""Parts of a checkpoint's tensors, read without the rest: what a device of a mesh needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from flaxqwen.convert.tensors import StoredTensor

Box = tuple[tuple[int, int], ...]  # (start, stop) of each axis


@dataclass
class Counter:
    """Bytes that have been asked of files."""

    nbytes: int = 0


def read_box(tensor: StoredTensor, box: Box, counter: Counter | None = None) -> np.ndarray:
    """The values in a box as a fresh array; of the file, only its bytes are read.

    Of a tensor in a stranger order than reversed axes, as some pickles have, all of it is.
    """
    if tensor.is_transposed:  # Flax's usual kernels
        return np.ascontiguousarray(read_box(tensor.T, box[::-1], counter).T)
    shape = tuple(stop - start for start, stop in box)
    out = np.empty(shape, tensor.dtype)
    if counter is not None:
        counter.nbytes += out.nbytes
    if tensor.strides is not None:
        whole = np.empty(tensor.shape, tensor.dtype)
        for _ in tensor.chunks(whole.reshape(-1)):
            pass
        out[...] = whole[tuple(slice(*ends) for ends in box)]
        return out
    flat = out.reshape(-1).view(np.uint8)
    done = 0
    for start, size in _extents(tensor.shape, box):
        count = size * tensor.dtype.itemsize
        tensor.fill(flat[done : done + count], start * tensor.dtype.itemsize)
        done += count
    return out


def _extents(shape: Sequence[int], box: Box) -> Iterator[tuple[int, int]]:
    """(start, size) in values of the pieces of a box that lie in one stretch, in C order."""
    whole = len(shape)  # the first axis from which on the box is the whole tensor
    while whole and box[whole - 1] == (0, shape[whole - 1]):
        whole -= 1
    if not whole:
        yield 0, int(np.prod(shape))
        return
    strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
    outer = [range(*ends) for ends in box[: whole - 1]]
    first, last = box[whole - 1]
    for index in np.ndindex(*map(len, outer)):
        offset = sum(outer[axis][i] * strides[axis] for axis, i in enumerate(index))
        yield offset + first * strides[whole - 1], (last - first) * strides[whole - 1]
