"""The KV cache: a pytree of static capacity with a length per row.

Axes: B batch, T new tokens, S cache capacity, K key/value heads, H head dim.
"""

from __future__ import annotations

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from flaxqwen.config import Qwen2Config

Arrays = tuple[jax.Array, ...]


class LayerCache(flax.struct.PyTreeNode):
    """Rotated keys, and values, of one layer: each [B, K, S, H].

    Two arrays per layer, written by dynamic_update_slice along S: with [B, S, K, H], or with keys and values in one
    array, XLA copies the whole cache once per chunk of steps.

    key_scale, value_scale: [B, K, S, 1] float32, what the integers are times where keys and values are int8; else None.
    """

    key: jax.Array
    value: jax.Array
    key_scale: jax.Array | None = None
    value_scale: jax.Array | None = None

    @property
    def scales(self) -> tuple[jax.Array, jax.Array] | None:
        """Those of keys and values, where they are int8."""
        return None if self.key_scale is None or self.value_scale is None else (self.key_scale, self.value_scale)

    def append(
        self,
        key: jax.Array,
        value: jax.Array,
        at: jax.Array,
        is_sharded: bool = False,
        is_cut: bool = False,
        is_taken_whole: bool = False,
    ) -> LayerCache:
        """Write key and value [B, K, T, H] from slots `at` ([] or [B]) on. In place when the cache is donated.

        is_sharded: whether it lies on a mesh; is_cut: whether that cuts its slots.
        is_taken_whole: whether attention takes all its slots, and no slice of them.
        """
        if self.scales is None:
            new = LayerCache(key.astype(self.key.dtype), value.astype(self.value.dtype))
        else:
            (key, key_scale), (value, value_scale) = _to_int8(key), _to_int8(value)
            new = LayerCache(key, value, key_scale, value_scale)
        old, structure = jax.tree.flatten(self)
        arrays = (tuple(old), tuple(jax.tree.leaves(new)), at.reshape(()) if at.size == 1 else at)
        if is_sharded:  # a loop over heads or rows would bring them all to each device
            write = _write_where_they_are if is_cut and key.shape[2] > 1 else _write
            return jax.tree.unflatten(structure, write(*arrays))
        write = _write if is_taken_whole and at.size == 1 else _write_in_loop
        written = jax.lax.platform_dependent(*arrays, cpu=write, default=_write)
        return jax.tree.unflatten(structure, written)


def _to_int8(x: jax.Array) -> Arrays:
    """[B, K, T, H] as integers and their scales [B, K, T, 1]: off by half a scale, 1/254 of the largest, at most."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    scale = jnp.where(scale == 0, 1, scale)
    return jnp.rint(x / scale).astype(jnp.int8), scale


def _write(old: Arrays, new: Arrays, at: jax.Array) -> Arrays:
    """[B, K, S, H] and the new [B, K, T, H] of each: one slice where rows are aligned, else one per row."""
    if at.ndim == 0:
        return tuple(jax.lax.dynamic_update_slice(a, piece, (0, 0, at, 0)) for a, piece in zip(old, new, strict=True))
    per_row = jax.vmap(lambda row, piece, slot: jax.lax.dynamic_update_slice(row, piece, (0, slot, 0)))
    return tuple(per_row(a, piece, at) for a, piece in zip(old, new, strict=True))


def _write_where_they_are(old: Arrays, new: Arrays, at: jax.Array) -> Arrays:
    """The same for slots that a mesh cuts: a slice of several would bring all to each device; this reads them all."""
    T, S = new[0].shape[2], old[0].shape[2]
    token = jnp.arange(S) - at[..., None]  # [S] or [B, S], of each slot
    index, is_new = (x.reshape(-1, 1, S, 1) for x in (jnp.clip(token, 0, T - 1), (token >= 0) & (token < T)))
    taken = (jnp.take_along_axis(a, index, axis=2, mode="clip") for a in new)
    return tuple(jnp.where(is_new, piece, a) for a, piece in zip(old, taken, strict=True))


def _write_in_loop(old: Arrays, new: Arrays, at: jax.Array) -> Arrays:
    """The same for XLA's CPU backend, in a loop over heads (rows, where they are not aligned).

    Outside a loop the backend fuses the update into the slice that attention reads, does it a second time for the
    result, and so copies the whole cache at every step; where attention takes it whole there is no such slice, and a
    decoding program of 24 layers compiles in 1.7 s in place of 2.3. A scatter, which per-row slices become, compiles 3x
    slower.
    """
    axis = 1 if at.ndim == 0 else 0

    def step(i: jax.Array, arrays: Arrays) -> Arrays:
        slot = at if at.ndim == 0 else at[i]
        start = (0, i, slot, 0) if axis == 1 else (i, 0, slot, 0)
        pieces = (jax.lax.dynamic_slice_in_dim(a, i, 1, axis) for a in new)
        return tuple(jax.lax.dynamic_update_slice(a, piece, start) for a, piece in zip(arrays, pieces, strict=True))

    return jax.lax.fori_loop(0, old[0].shape[axis], step, old)


class KVCache(flax.struct.PyTreeNode):
    """What the model remembers of the tokens it has seen.

    layers: one LayerCache a layer.
    length: [B] int32, how many slots of each row are filled: the slot of the row's next token. Or a scalar, when it is
        the same for all rows and stays so.
    bound: static; attention reads slots below it only. The caller promises that no row grows past it.
        None reads the whole capacity.
    """

    layers: tuple[LayerCache, ...]
    length: jax.Array
    bound: int | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def capacity(self) -> int:
        """Slots per row, S."""
        return self.layers[0].key.shape[2]

    @property
    def readable(self) -> int:
        """Slots that attention reads: `bound`, or the capacity."""
        return min(self.bound or self.capacity, self.capacity)

    def get_seq_length(self) -> jax.Array:
        """The longest row's length, an int32 scalar. (Transformers' name; there every row has the same.)"""
        return jnp.max(self.length)

    def grow(self, capacity: int) -> KVCache:
        """A copy with room for `capacity` slots per row; itself when it has that already."""
        missing = capacity - self.capacity
        if missing <= 0:
            return self
        return self.replace(
            layers=jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, missing), (0, 0))), self.layers)
        )

    def repeat(self, n: int) -> KVCache:
        """Each row n times, next to itself: [B, ...] -> [B n, ...]."""
        if n == 1:
            return self
        layers = jax.tree.map(lambda a: jnp.repeat(a, n, axis=0), self.layers)
        length = jnp.repeat(self.length, n) if self.length.ndim else self.length  # after a part of a prompt: a scalar
        return self.replace(layers=layers, length=length)


@partial(jax.jit, static_argnames="capacity")
def grow_cache(cache: KVCache, *, capacity: int) -> KVCache:
    """`KVCache.grow` as one program."""
    return cache.grow(capacity)


@partial(jax.jit, static_argnames=("rows", "skip"))
def cut_cache(cache: KVCache, *, rows: int, skip: int) -> KVCache:
    """The first `rows` rows, without their first `skip` slots."""
    layers = jax.tree.map(lambda a: a[:rows, :, skip:], cache.layers)
    return cache.replace(layers=layers, length=cache.length[:rows])


@partial(jax.jit, static_argnames="copies")
def repeat_cache(cache: KVCache, *, copies: int) -> KVCache:
    """`KVCache.repeat` as one program."""
    return cache.repeat(copies)


def init_cache(config: Qwen2Config, batch_size: int, capacity: int, dtype: DTypeLike) -> KVCache:
    """An empty cache for batch_size rows of up to `capacity` tokens, in the model's compute dtype.

    Takes 2 * layers * batch_size * K * capacity * H * itemsize bytes: 12 KB a token in bfloat16 at Qwen2.5-0.5B's
    geometry, 56 KB at 7B's. int8 is about half of that, with 8 bytes of scales for each key/value head.
    """
    shape = (batch_size, config.num_key_value_heads, capacity, config.head_dim)
    is_quantized = np.dtype(dtype) == np.int8

    def layer() -> LayerCache:
        scales = [jnp.zeros((*shape[:-1], 1), jnp.float32) if is_quantized else None for _ in range(2)]
        return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *scales)

    layers = tuple(layer() for _ in range(config.num_hidden_layers))
    return KVCache(layers, jnp.zeros((batch_size,), jnp.int32))
