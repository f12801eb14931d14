"""Grouped-query attention over a cache, and who sees whom.

Axes: B batch, T new tokens, S cache slots, N query heads, K key/value heads, G = N // K query heads per key/value
head, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from flaxqwen.ops.cpu import as_flat_row
from flaxqwen.ops.linear import block_of_rows

# Large and finite: a row with every slot masked gives a uniform softmax, as in PyTorch, and never NaN.
MASKED = float(jnp.finfo(jnp.float32).min)

# Queries are taken in blocks of this many when there are more than twice as many, and of fewer where a head would have
# more scores than MOST_SCORES, so that those of a long prompt never stand in memory whole: 8,192 tokens of a 7B take
# 0.94 GB in blocks of 512, 17 GB at once; 32,768 as much in blocks of 128.
QUERY_BLOCK, MOST_SCORES = 512, 512 * 8192

# Queries, and slots, of a block of attend_to_seen_blocks. A layer of 0.5B, 1,024 tokens on 2 cores of a Zen 5: 10 ms;
# 10.5 in blocks of 256, 17 of 64; 87 by attend. Fewer scores of a head are not worth the loops.
SEEN_BLOCK, FEWEST_SCORES = 128, 512 * 512

Scales = tuple[jax.Array, jax.Array]


class Visibility(flax.struct.PyTreeNode):
    """Which cache slots each new token may see, in parts that broadcast: [T, S] is formed a block at a time.

    query_slot: [B, T] (or [1, T]) int32, the slot of each new token; it sees its own slot and those before.
    slot_mask: [B, S] bool, False at padding. None: no padding.
    query_segment, slot_segment: [B, T] and [B, S] int32 for packed rows; tokens see their own segment only.
    full: [B, 1 or N, T, S], the caller's own 4D mask, bool (True: visible) or additive; it replaces all of the above.
    """

    query_slot: jax.Array
    slot_mask: jax.Array | None = None
    query_segment: jax.Array | None = None
    slot_segment: jax.Array | None = None
    full: jax.Array | None = None

    def block(self, start: jax.Array | int, size: int) -> Visibility:
        """The same for `size` queries from `start` on."""

        def cut(a: jax.Array | None, axis: int) -> jax.Array | None:
            return None if a is None else jax.lax.dynamic_slice_in_dim(a, start, size, axis)

        return self.replace(
            query_slot=cut(self.query_slot, 1),
            query_segment=cut(self.query_segment, 1),
            full=cut(self.full, 2),
        )

    def tile(self, row: jax.Array, query: jax.Array, slot: jax.Array | int, size: int) -> Visibility:
        """The same for one row, and `size` queries and slots from these on. There is no mask of 4 dimensions."""

        def cut(a: jax.Array | None, start: jax.Array | int) -> jax.Array | None:
            return None if a is None else jax.lax.dynamic_slice(a, (jnp.minimum(row, len(a) - 1), start), (1, size))

        return self.replace(
            query_slot=cut(self.query_slot, query),
            slot_mask=cut(self.slot_mask, slot),
            query_segment=cut(self.query_segment, query),
            slot_segment=cut(self.slot_segment, slot),
        )

    def apply(self, scores: jax.Array, window: int | None) -> jax.Array:
        """Mask float32 scores [B, K, G, T, S]; a token sees at most the last `window` slots, its own included."""
        B, K, G, T, S = scores.shape
        if self.full is not None:
            heads = self.full.shape[1]
            full = self.full.reshape(self.full.shape[0], *((1, 1) if heads == 1 else (K, G)), *self.full.shape[2:])
            return jnp.where(full, scores, MASKED) if full.dtype == bool else scores + full.astype(scores.dtype)
        return jnp.where(self.visible(S, window)[:, None, None], scores, MASKED)

    def visible(self, S: int, window: int | None, first: jax.Array | int = 0) -> jax.Array:
        """[B or 1, T, S] bool of the slots from `first` on, where there is no mask of 4 dimensions."""
        slots, query_slot = first + jnp.arange(S), self.query_slot[:, :, None]
        visible = slots <= query_slot
        if window is not None:
            visible &= slots > query_slot - window
        if self.slot_mask is not None:
            visible &= self.slot_mask[:, None]
        if self.query_segment is not None and self.slot_segment is not None:
            visible &= self.query_segment[:, :, None] == self.slot_segment[:, None]
        return visible


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visibility: Visibility,
    window: int | None = None,
    scales: Scales | None = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention with grouped heads.

    Args:
      query: [B, T, N, H].
      key, value: [B, K, S, H]; N is a multiple of K. Heads are never repeated in memory. May be of a wider dtype than
        query: the products are the same.
      visibility: which slots each new token may see.
      window: sliding window in slots; None for full attention.
      scales: of int8 keys and values, each [B, K, S, 1] float32. They come after the products, so that no wider copy of
        the cache is needed.
      dropout: applied to the attention weights.

    Returns:
      (output [B, T, N, H], weights [B, N, T, S]), in query's dtype. The softmax is float32, cast back before the second
      product, as `eager_attention_forward` in transformers/models/qwen2/modeling_qwen2.py.
    """
    B, T, N, H = query.shape
    K, S = key.shape[1:3]
    if scales is not None:
        key, value = key.astype(query.dtype), value.astype(query.dtype)
    grouped = query.reshape(B, T, K, N // K, H).astype(key.dtype)  # heads of one group are adjacent
    scores = jnp.einsum("BTKGH,BKSH->BKGTS", grouped, key, preferred_element_type=jnp.float32) * H**-0.5
    if scales is not None:
        scores = scores * scales[0][:, :, None, None, :, 0]
    weights = jax.nn.softmax(visibility.apply(scores, window), axis=-1).astype(query.dtype)
    if dropout is not None:
        weights = dropout(weights)
    scaled = weights if scales is None else weights * scales[1][:, :, None, None, :, 0].astype(weights.dtype)
    output = jnp.einsum("BKGTS,BKSH->BKGTH", scaled.astype(value.dtype), value, preferred_element_type=jnp.float32)
    # Not in the einsum: XLA's CPU backend has no bfloat16 dot whose result is in another order.
    output = output.transpose(0, 3, 1, 2, 4).reshape(B, T, N * H)
    if B * T == 1:
        output = as_flat_row(output)
    return output.astype(query.dtype).reshape(B, T, N, H), weights.reshape(B, N, T, S)


def attend_in_blocks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visibility: Visibility,
    window: int | None = None,
    scales: Scales | None = None,
) -> jax.Array:
    """`attend` for long prompts, at most QUERY_BLOCK queries at a time and without the weights: [B, T, N, H].

    In a gradient the scores of each block are computed again: those of 2,048 tokens of a 7B are 0.47 GB a row.
    """
    T, most = query.shape[1], max(min(QUERY_BLOCK, MOST_SCORES // key.shape[2]), 1)
    if 2 * most >= T:
        return attend(query, key, value, visibility, window, scales)[0]

    def block(start: jax.Array | int, size: int = most) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(query, start, size, axis=1)
        return attend(part, key, value, visibility.block(start, size), window, scales)[0]

    whole = T - T % most
    blocks = jax.lax.map(jax.checkpoint(block), jnp.arange(0, whole, most))  # [blocks, B, most, N, H]
    output = jnp.moveaxis(blocks, 0, 1).reshape(query.shape[0], whole, *query.shape[2:])
    if whole == T:
        return output
    rest = jax.checkpoint(partial(block, size=T - whole))(whole)
    return jnp.concatenate([output, rest], axis=1)


def attend_to_seen_blocks(
    query: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility, window: int | None, interpret: bool
) -> jax.Array:
    """`attend_in_blocks` for CPUs: a block's scores stay in the CPU's cache, and what no query sees is left out.

    Maximum and sums go on from block to block (Milakov and Gimelshein 2018, Online normalizer calculation for
    softmax). Scores are [slots, queries of all heads], and the sum a column of values, as in _attend_by_head. Masks are
    formed in that shape: broadcast from those of one head, they keep XLA from vectorising the loops (32 ms a layer of
    0.5B and 1,024 tokens, in place of 10, on a Zen 5). The arithmetic is float32. There is no kernel: `interpret` is
    not looked at.
    """
    B, T, N, H = query.shape
    K, S = key.shape[1:3]
    G, size, parts = N // K, SEEN_BLOCK, T // SEEN_BLOCK
    scaled = (query.astype(jnp.float32) * H**-0.5).reshape(B, parts, size, K, G, H)
    blocks = scaled.transpose(0, 3, 1, 5, 4, 2).reshape(B * K * parts, H, G * size)
    ones = jnp.ones((size, 1), jnp.float32)

    def block(index: jax.Array) -> jax.Array:
        row, head, part = jnp.unravel_index(index, (B, K, parts))
        queries, tile = blocks[index], visibility.tile(row, part * size, 0, size)
        own = jnp.tile(tile.query_slot, G)
        segment = None if tile.query_segment is None else jnp.tile(tile.query_segment, G)
        oldest = 0 if window is None else tile.query_slot.min() - window + 1
        newest = tile.query_slot.max()

        def add(state: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[jax.Array, jax.Array]:
            highest, sums = state
            at = (row, head, start, 0)
            k, v = (jax.lax.dynamic_slice(a, at, (1, 1, size, H))[0, 0].astype(jnp.float32) for a in (key, value))
            seen = visibility.tile(row, part * size, start, size).replace(query_slot=own, query_segment=segment)
            scores = jnp.where(seen.visible(size, window, start)[0].T, jnp.matmul(k, queries), MASKED)
            higher = jnp.maximum(highest, scores.max(axis=0))
            more = jnp.matmul(jnp.concatenate([v, ones], axis=1).T, jnp.exp(scores - higher))  # no copy of all values
            return higher, sums * jnp.exp(highest - higher) + more

        def step(state: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            is_seen = (start + size > oldest) & (start <= newest)
            return jax.lax.cond(is_seen, add, lambda state, _: state, state, start), None

        nothing = jnp.full(G * size, MASKED), jnp.zeros((H + 1, G * size))
        _, sums = jax.lax.scan(step, nothing, jnp.arange(0, S, size))[0]
        return sums[:-1] / sums[-1]

    output = jax.lax.map(block, jnp.arange(len(blocks))).reshape(B, K, parts, H, G, size)
    return output.transpose(0, 2, 5, 1, 4, 3).reshape(B, T, N, H).astype(query.dtype)


def seen_blocks_serve(query: jax.Array, key: jax.ShapeDtypeStruct, visibility: Visibility, window: int | None) -> bool:
    """Lengths that blocks divide, and prompts that are not short."""
    T, S = query.shape[1], key.shape[2]
    return T % SEEN_BLOCK == S % SEEN_BLOCK == 0 and T * S >= FEWEST_SCORES


def attend_to_all(query: jax.Array, key: jax.Array, value: jax.Array, slot_mask: jax.Array | None) -> jax.Array:
    """Attention of an encoder: every token sees all slots that slot_mask [B, S] has True; None: all.

    Args:
      query: [B, T, N, H]. key, value: [B, N, S, H].

    Returns:
      [B, T, N, H].
    """

    def by_blocks(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array) -> jax.Array:
        last = jnp.full((1, query.shape[1]), key.shape[2] - 1, jnp.int32)
        return attend_in_blocks(query, key, value, Visibility(last, None if slot_mask is None else visible))

    visible = jnp.ones((query.shape[0], key.shape[2]), bool) if slot_mask is None else slot_mask
    heads = (query, key, value, visible)
    if query.dtype != jnp.float32:
        return by_blocks(*heads)
    return jax.lax.platform_dependent(*heads, cpu=_attend_by_head, default=by_blocks)


def _attend_by_head(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array) -> jax.Array:
    """One head after the other, a few hundred queries at a time, divided by the sum last.

    Scores are [S, T]: their maximum over slots is then one of whole vectors, which XLA vectorises on a CPU, and their
    sum comes with the product, from a column of ones beside the values. A clip of 30 s, 20 heads on one core: 0.84 of
    the time with scores [T, S]; on two busy ones half of it in blocks of 375 queries.
    """
    B, T, N, H = query.shape
    size = block_of_rows(T) or T
    value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)

    def head(index: jax.Array) -> jax.Array:
        row, n = index // N, index % N
        k, v = key[row, n], value[row, n].T

        def block(q: jax.Array) -> jax.Array:
            scores = jnp.where(visible[row][:, None], jnp.matmul(k, q.T), MASKED)
            weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=0)))
            sums = jnp.matmul(v, weights)  # [H + 1, size]
            return sums[:-1] / sums[-1]

        return jax.lax.map(block, (query[row, :, n] * H**-0.5).reshape(-1, size, H))

    # In a gradient the scores of each head are computed again.
    heads = jax.lax.map(jax.checkpoint(head), jnp.arange(B * N))  # [B * N, T / size, H, size]
    return heads.reshape(B, N, -1, H, size).transpose(0, 2, 4, 1, 3).reshape(B, T, N, H)
