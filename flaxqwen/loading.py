"""Checkpoints onto a mesh: each process reads the bytes of its own shards."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
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
from flaxqwen.convert.shards import Box, Counter, read_box
from flaxqwen.convert.tensors import StoredTensor, array_chunks
from flaxqwen.sharding import HeadLayout, Sharding


@dataclass(frozen=True)
class ShardReader:
    """Loads tensors as arrays on a mesh, one shard in host memory at a time.

    dtype: that floating tensors are cast to. counter: of the bytes read.
    """

    sharding: Sharding
    dtype: np.dtype
    counter: Counter = field(default_factory=Counter)

    def load(
        self, checkpoint: Checkpoint, expected: Mapping[Path, tuple[int, ...]], progress: Report | None = None
    ) -> dict[str, Any]:
        """The parameters of a model, as convert.load_params, for shapes as they are on the mesh.

        Raises:
          CheckpointError: as convert.load_params.
        """
        heads = self.sharding.heads
        tensors = match(checkpoint, {path: heads.stored_shape(path, shape) for path, shape in expected.items()})
        total, done = sum(tensor.nbytes for tensor in tensors.values()), 0
        leaves: dict[Path, jax.Array] = {}
        for path, tensor in tensors.items():
            assert isinstance(tensor, StoredTensor)
            leaves[path] = self._array(path, tensor, expected[path])
            done += tensor.nbytes
            if progress:
                progress(done, total)
        return flax.traverse_util.unflatten_dict(leaves)

    def _array(self, path: Path, tensor: StoredTensor, shape: tuple[int, ...]) -> jax.Array:
        """One parameter. Devices that hold the same part share one read of it."""
        sharding = self.sharding.of_parameter(path, shape)
        devices: dict[Box, list[jax.Device]] = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            assert index is not None
            box = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
            devices.setdefault(box, []).append(device)
        arrays = []
        for box, holders in devices.items():
            part = read_part(tensor, box, self.sharding.heads, path, self.counter)
            if is_weight_dtype(part.dtype):
                if not all(map(all_finite, array_chunks(part))):
                    warnings.warn(f"{to_name(path)} holds NaN or inf", stacklevel=2)
                part = part.astype(self.dtype, copy=False)
            arrays += jax.block_until_ready([jax.device_put(part, device) for device in holders])
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def read_part(tensor: StoredTensor, box: Box, heads: HeadLayout, path: Path, counter: Counter | None) -> np.ndarray:
    """The values in a box of a parameter in the layout of `heads`; heads of zeros are not read."""
    found = heads.sources(path)
    if found is None:
        return read_box(tensor, box, counter)
    axis, sources = found
    start, stop = box[axis]
    out = np.zeros([last - first for first, last in box], tensor.dtype)
    for place, source, count in _runs(sources):
        first, last = max(start, place * heads.head_dim), min(stop, (place + count) * heads.head_dim)
        if source >= 0 and first < last:
            shift = (source - place) * heads.head_dim
            inner = (*box[:axis], (first + shift, last + shift), *box[axis + 1 :])
            where = (*(slice(None),) * axis, slice(first - start, last - start))
            out[where] = read_box(tensor, inner, counter)
    return out


def _runs(sources: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(place, source, count) of stretches whose sources follow each other."""
    runs: list[tuple[int, int, int]] = []
    for place, source in enumerate(sources):
        if runs and source >= 0 and runs[-1][1] >= 0 and source == runs[-1][1] + runs[-1][2]:
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((place, source, 1))
    return runs
