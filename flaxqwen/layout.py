"""Arrays whose axes a mesh does not divide: how each is made of the checkpoint's, block by block.

Axes: N query heads, K key/value heads, G = N / K, H head dim.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from flaxqwen.config import Qwen2AudioConfig, Qwen2Config
from flaxqwen.convert.names import Path
from flaxqwen.convert.quantize import SCALE

TOWER = "audio_tower"  # of Qwen2-Audio: its heads are never padded or repeated


@dataclasses.dataclass(frozen=True)
class Source:
    """What one axis of an array on a mesh is made of.

    axis: counted from the last, -1: stacked layers have one more in front.
    blocks: the checkpoint's block in each place, ascending; -1: zeros.
    size: of a block.
    """

    axis: int
    blocks: tuple[int, ...]
    size: int

    def laid_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape on the mesh of an array that has `shape` in the checkpoint."""
        axis = len(shape) + self.axis
        return (*shape[:axis], len(self.blocks) * self.size, *shape[axis + 1 :])

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the checkpoint of an array that has `shape` on the mesh."""
        axis = len(shape) + self.axis
        return (*shape[:axis], (max(self.blocks) + 1) * self.size, *shape[axis + 1 :])

    def apply(self, array: jax.Array) -> jax.Array:
        """The array on the mesh, from the checkpoint's. Its gradient sums over the copies of a block."""
        axis, places = array.ndim + self.axis, np.asarray(self.blocks)
        taken = jnp.take(self._split(array, axis), np.maximum(places, 0), axis=axis)
        keep = (places >= 0).reshape((-1,) + (1,) * (taken.ndim - axis - 1))
        return jnp.where(keep, taken, 0).astype(array.dtype).reshape(self.laid_shape(array.shape))

    def undo(self, array: jax.Array) -> jax.Array:
        """The checkpoint's array, from the one on the mesh; the inverse of `apply`."""
        axis = array.ndim + self.axis
        first = np.asarray([self.blocks.index(block) for block in range(max(self.blocks) + 1)])
        taken = jnp.take(self._split(array, axis), first, axis=axis)
        return taken.reshape(self.stored_shape(array.shape))

    def _split(self, array: jax.Array, axis: int) -> jax.Array:
        """[..., blocks * size, ...] -> [..., blocks, size, ...]."""
        return array.reshape(*array.shape[:axis], -1, self.size, *array.shape[axis + 1 :])


@dataclasses.dataclass(frozen=True)
class HeadLayout:
    """Attention heads as they lie on a tensor axis that the checkpoint's numbers may not fit.

    Each key/value head is repeated, next to itself, until the axis divides their number; the query heads of a group are
    padded with heads of zeros until the repeats divide their number. The columns of o_proj for those are zero too, so
    that nothing changes: 28 query and 4 key/value heads become 32 and 8 on 8 devices. Unpadded, the partitioner moves
    activations from device to device in every layer (18 all-gathers and 24 all-to-alls in 4 layers).

    queries: the checkpoint's head in each place; -1: a head of zeros. keys: likewise of key/value heads; none is zero.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    head_dim: int

    @classmethod
    def fit(cls, config: Qwen2Config, parts: int) -> HeadLayout:
        """The layout of a config's heads on a tensor axis of `parts` devices."""
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        group, repeats = heads // kv_heads, math.lcm(kv_heads, parts) // kv_heads
        padded = -(-group // repeats) * repeats
        queries = [k * group + g if g < group else -1 for k in range(kv_heads) for g in range(padded)]
        return cls(tuple(queries), tuple(k for k in range(kv_heads) for _ in range(repeats)), int(config.head_dim))

    @cached_property
    def own_queries(self) -> tuple[int, ...]:
        """The places of the checkpoint's query heads, in its order."""
        return tuple(place for place, head in enumerate(self.queries) if head >= 0)

    @property
    def is_padded(self) -> bool:
        """Whether any query head is one of zeros."""
        return len(self.own_queries) < len(self.queries)

    @property
    def repeats(self) -> int:
        """How many times each key/value head is there."""
        return len(self.keys) // (max(self.keys) + 1)

    @property
    def is_identity(self) -> bool:
        """Whether heads are just as in the checkpoint."""
        return not self.is_padded and self.repeats == 1

    def replace_in(self, config: Qwen2Config | Qwen2AudioConfig) -> Qwen2Config | Qwen2AudioConfig:
        """The config of a module whose decoder has the heads of this layout."""
        if self.is_identity:
            return config
        heads, kv_heads = len(self.queries), len(self.keys)
        text = dataclasses.replace(
            config.get_text_config(), num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=self.head_dim
        )
        return text if isinstance(config, Qwen2Config) else dataclasses.replace(config, text_config=text)

    def heads_of(self, path: Path) -> tuple[int, tuple[int, ...]] | None:
        """The axis of a parameter that heads lie on, and the checkpoint's head in each place; None where none does."""
        owner, leaf = path[-2:] if len(path) > 1 else ("", "")
        if self.is_identity or TOWER in path or leaf not in ("weight", "bias", SCALE):
            return None
        if owner == "o_proj":
            return (-1, self.queries) if leaf == "weight" else None
        axis = -1 if leaf == "bias" else -2
        places = {"q_proj": self.queries, "k_proj": self.keys, "v_proj": self.keys}
        return (axis, places[owner]) if owner in places else None

    def source(self, path: Path, stored: tuple[int, ...]) -> Source | None:
        """What a parameter of `stored` shape in the checkpoint becomes; None: it stays as it is."""
        if (found := self.heads_of(path)) is None:
            return None
        axis, heads = found
        return Source(axis, heads, stored[axis] // (max(heads) + 1))

    def stored_shape(self, path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the checkpoint of a parameter of `shape`."""
        if (found := self.heads_of(path)) is None:
            return shape
        axis, heads = len(shape) + found[0], found[1]
        return (*shape[:axis], shape[axis] // len(heads) * (max(heads) + 1), *shape[axis + 1 :])
