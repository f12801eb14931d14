"""SynthID text: a watermark that reweighs the distribution by pseudo-random bits, one layer for each key.

Axes: B batch, S columns of the sequence buffer, V vocabulary, M entries of the table of bits, K keys,
R neighbouring tokens, of whose bits those of all others are copies.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flaxqwen.generation.processors.base import column, is_list, length_of, processor, require, require_integer
from flaxqwen.generation.processors.torch_random import host_draws

MULTIPLIER = 6364136223846793005  # of the hash, a linear congruential generator of 64 bits
LARGEST_TABLE = 2**24
SMALLEST_PERIOD = 2**15  # a smaller table is repeated, so that V is a few periods at most


@processor
class SynthIDTextWatermarkLogitsProcessor:
    """Reweigh tokens, in a tournament for each key, by bits hashed from them in context (Dathathri et al. 2024).

    Transformers' object counts its calls and remembers the contexts; here both follow from input_ids and prompt_length,
    so that rows may be reordered, as a beam search does.

    ngram_len: tokens hashed together, the new one included. keys: [K] int, a layer each.
    sampling_table_size: a power of two (any number in Transformers), up to 2**24. sampling_table_seed: of its bits.
    context_history_size: how many earlier contexts are looked at: none is marked twice.
    device: Transformers' argument, not used.
    skip_first_ngram_calls: leave the first ngram_len - 1 tokens unmarked. debug_mode: mark a uniform distribution.
    prompt_length: columns of input_ids before the first token of the text; None: all, this is the first token.
    """

    ngram_len: ArrayLike
    keys: Any
    sampling_table_size: Any
    sampling_table_seed: Any
    context_history_size: ArrayLike
    device: Any = flax.struct.field(pytree_node=False, default=None)
    skip_first_ngram_calls: bool = flax.struct.field(pytree_node=False, default=False)
    debug_mode: bool = flax.struct.field(pytree_node=False, default=False)
    prompt_length: ArrayLike | None = None
    bits: Any = None  # [M] int8, made of the size and the seed, which it replaces

    def __post_init__(self) -> None:
        require_integer("ngram_len", self.ngram_len, 1)
        require_integer("context_history_size", self.context_history_size, 1)
        object.__setattr__(self, "device", None)
        size = self.sampling_table_size
        if size is None or self.bits is not None:
            return
        power = isinstance(size, int) and 0 < size <= LARGEST_TABLE and size.bit_count() == 1
        require(power, "sampling_table_size", size, "a power of two, up to 2**24")
        require(is_list(self.keys) and len(self.keys) > 0, "keys", self.keys, "a non-empty list of integers")
        # The bit of a token v is table[a * a * v + offset], modulo M, as M divides 2**64. With the table permuted by
        # a * a, which is odd, that is a row of neighbours from an offset on: no gather of V x K hashes.
        square = MULTIPLIER * MULTIPLIER % size
        table = host_draws(size, self.sampling_table_seed) % 2
        bits = table[np.arange(max(size, SMALLEST_PERIOD), dtype=np.int64) * square % size].astype(np.int8)
        inverse = pow(square, -1, size) if size > 1 else 0
        offsets = [(MULTIPLIER * (1 + int(key)) + 1) * inverse % size for key in self.keys]
        for name, value in (("bits", bits), ("keys", np.asarray(offsets, np.uint32))):
            object.__setattr__(self, name, value)
        for name in ("sampling_table_size", "sampling_table_seed"):
            object.__setattr__(self, name, None)

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        length = length_of(input_ids, cur_len)
        start = length if self.prompt_length is None else jnp.asarray(self.prompt_length)
        if self.debug_mode:
            scores = jnp.ones_like(scores)
        plain = self._is_repeated(input_ids, length, start)
        if self.skip_first_ngram_calls:
            plain |= length - start < jnp.asarray(self.ngram_len) - 1
        return jnp.where(plain, scores, self._reweigh(scores, self._hash_context(input_ids, length, start)))

    def _hash_context(self, input_ids: jax.Array, length: jax.Array, start: jax.Array) -> jax.Array:
        """[B] uint32: the hash of the ngram_len - 1 newest tokens, 0 in place of the prompt's; 32 of its 64 bits."""

        def add(k: jax.Array, value: jax.Array) -> jax.Array:
            at = length - size + k
            token = jnp.where(at >= start, column(input_ids, at), 0)[:, 0].astype(jnp.uint32)
            return (value + token) * np.uint32(MULTIPLIER % 2**32) + np.uint32(1)

        size = jnp.asarray(self.ngram_len)
        return jax.lax.fori_loop(1, size, add, jnp.ones(input_ids.shape[0], jnp.uint32))

    def _is_repeated(self, input_ids: jax.Array, length: jax.Array, start: jax.Array) -> jax.Array:
        """[B, 1] bool: whether the newest context was that of an earlier token of the text, not too long ago."""
        place = jnp.arange(input_ids.shape[1])[None]

        def compare(k: jax.Array, equal: jax.Array) -> jax.Array:
            then = jnp.where(place - k >= start, jnp.roll(input_ids, k, axis=1), 0)
            return equal & (then == jnp.where(length - k >= start, column(input_ids, length - k), 0))

        size = jnp.asarray(self.ngram_len)
        first = start + (size - 1 if self.skip_first_ngram_calls else 0)
        marked = (place >= first) & (place < length) & (place >= length - self.context_history_size)
        equal = jax.lax.fori_loop(1, size, compare, jnp.broadcast_to(marked, input_ids.shape))
        return jnp.any(equal, axis=-1, keepdims=True)

    def _reweigh(self, scores: jax.Array, context: jax.Array) -> jax.Array:
        """Log-probabilities after K layers, in which tokens whose bit is 1 win against those whose bit is 0."""
        V, M = scores.shape[-1], self.bits.shape[0]
        probs = jax.nn.softmax(scores, axis=-1)
        # Bits repeat after M tokens, so tokens M apart keep their ratio through all layers, which run on the sums of
        # such tokens. 30 layers take 2.1 ms on a CPU at V = 151,936 and M = 65,536; on single tokens 5.
        R = min(M, V)
        periods = [jnp.pad(probs[:, i : i + R], ((0, 0), (0, max(i + R - V, 0)))) for i in range(0, V, R)]
        first = reduce(jnp.add, periods)
        bits = jnp.concatenate([self.bits, self.bits]).astype(probs.dtype)

        def layer(folded: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
            offset = ((context + key) % np.uint32(M)).astype(jnp.int32)
            won = jax.vmap(lambda at: jax.lax.dynamic_slice_in_dim(bits, at, R))(offset)
            # A product in place of a sum along the row, which takes 6 times as long on a CPU.
            mass = jnp.einsum("bv,bv->b", won, folded, precision=jax.lax.Precision.HIGHEST)
            return folded * (1 + won - mass[:, None]), None

        last, _ = jax.lax.scan(layer, first, jnp.asarray(self.keys))
        ratio = last / jnp.maximum(first, jnp.finfo(probs.dtype).tiny)
        log_probs = jnp.log(probs * jnp.concatenate([ratio[:, : V - i] for i in range(0, V, R)], axis=1))
        return jnp.where(jnp.isfinite(log_probs), log_probs, jnp.finfo(log_probs.dtype).min)
