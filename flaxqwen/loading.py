"""Checkpoints onto a mesh: each process reads the bytes of its own shards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from flaxqwen.convert import Checkpoint
from flaxqwen.convert.dtypes import all_finite, is_weight_dtype
from flaxqwen.convert.load import match
from flaxqwen.convert.names import Path, to_name
from flaxqwen.convert.progress import Report
from flaxqwen.convert.quantize import SCALE, QuantizedTensor
from flaxqwen.convert.shards import Box, Counter, read_box
from flaxqwen.convert.tensors import StoredTensor, Tensor, array_chunks
from flaxqwen.layout import Source
from flaxqwen.quantization import quantize_onto
from flaxqwen.sharding import Sharding


@dataclass(frozen=True)
class ShardReader:
    """Loads tensors as arrays on a mesh, one shard in host memory at a time.

    dtype: that floating tensors are cast to. counter: of the bytes read.
    """

    sharding: Sharding
    dtype: np.dtype
    counter: Counter = field(default_factory=Counter)

    def load(
        self, checkpoint: Checkpoint, stored: Mapping[Path, tuple[int, ...]], progress: Report | None = None
    ) -> dict[str, Any]:
        """The parameters of a model, as convert.load_params.

        A checkpoint that is quantized as it is read is so on the devices, weight by weight: the largest value of a row
        is that of all its parts, and no process reads but its own.

        Args:
          stored: the shape of every parameter in the checkpoint.

        Raises:
          CheckpointError: as convert.load_params.
        """
        tensors = match(checkpoint, stored)
        total, done = sum(tensor.nbytes for tensor in tensors.values()), 0
        leaves: dict[Path, jax.Array] = {}
        for path, tensor in tensors.items():
            if not isinstance(tensor, QuantizedTensor):
                leaves[path] = self._array(path, tensor, self.sharding.source(path, stored), self.dtype)
            elif not tensor.is_scale:
                weight = self._array(path, tensor.source, None, tensor.source.dtype)
                leaves |= quantize_onto(self.sharding, path, weight, tensor.scheme)
            done += tensor.nbytes
            if progress:
                progress(done, total)
        return flax.traverse_util.unflatten_dict(leaves)

    def _array(self, path: Path, tensor: Tensor, source: Source | None, dtype: np.dtype) -> jax.Array:
        """One parameter. Devices that hold the same part share one read of it."""
        assert isinstance(tensor, StoredTensor)
        shape = tensor.shape if source is None else source.laid_shape(tensor.shape)
        sharding = self.sharding.of_parameter(path, shape)
        devices: dict[Box, list[jax.Device]] = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            assert index is not None
            box = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
            devices.setdefault(box, []).append(device)
        arrays = []
        for box, holders in devices.items():
            part = read_part(tensor, box, source, self.counter)
            if is_weight_dtype(part.dtype):
                if not all(map(all_finite, array_chunks(part))):
                    warnings.warn(f"{to_name(path)} holds NaN or inf", stacklevel=2)
                part = part if path[-1] == SCALE else part.astype(dtype, copy=False)
            arrays += jax.block_until_ready([jax.device_put(part, device) for device in holders])
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def read_part(tensor: StoredTensor, box: Box, source: Source | None, counter: Counter | None) -> np.ndarray:
    """The values in a box of a parameter that is made of `tensor` by `source`; blocks of zeros are not read."""
    if source is None:
        return read_box(tensor, box, counter)
    axis = len(box) + source.axis
    start, stop = box[axis]
    pieces = list(_pieces(source, start, stop))
    # Blocks ascend: between the first and the last there is none that is not in the box.
    first = min((taken for _, _, taken in pieces), default=0)
    last = max((taken + end - place for place, end, taken in pieces), default=0)
    inner = read_box(tensor, (*box[:axis], (first, last), *box[axis + 1 :]), counter)
    if last - first == stop - start and all(taken - first == place - start for place, _, taken in pieces):
        return inner
    out = np.zeros([last - first for first, last in box], tensor.dtype)
    before = (slice(None),) * axis
    for place, end, taken in pieces:
        out[*before, place - start : end - start] = inner[*before, taken - first : taken - first + end - place]
    return out


def _pieces(source: Source, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, the checkpoint's start) of the blocks between two places of the axis; without zeros."""
    for index in range(start // source.size, -(-stop // source.size)):
        if source.blocks[index] >= 0:
            first, last = max(start, index * source.size), min(stop, (index + 1) * source.size)
            yield first, last, first + (source.blocks[index] - index) * source.size
