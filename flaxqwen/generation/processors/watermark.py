"""The green-list watermark: a bias for tokens that a hash of the text before them calls green.

Axes: B batch, S columns of the sequence buffer, V vocabulary, C candidates.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flaxqwen.generation.processors.base import column, is_number, length_of, processor, require, require_integer
from flaxqwen.generation.processors.torch_random import permutation_starts_with, permutation_starts_with_value, randperm

SCHEMES = ("selfhash", "lefthash")
TABLE_SIZE = 1_000_003  # of selfhash's table of hashes
CANDIDATES = 40  # highest scores that selfhash looks at, in Transformers

Wide = tuple[jax.Array, jax.Array]  # 64 bits as two uint32, the high one first


@processor
class WatermarkLogitsProcessor:
    """Add a bias to "green" tokens, drawn anew for each token from the tokens before it (Kirchenbauer et al. 2023).

    The green lists are those that Transformers draws on a CPU, so that its WatermarkDetector(device="cpu") finds them.

    vocab_size: of the model. device: Transformers' argument, not used. greenlist_ratio: of green tokens.
    bias: added to their scores. hashing_key: a secret integer of 64 bits.
    seeding_scheme: "lefthash" draws from the token before; "selfhash" from that, context_width - 2 more and the
      candidate itself, for the 40 highest scores.
    context_width: tokens that the scheme looks at; nothing is added where the text is shorter.
    """

    vocab_size: int = flax.struct.field(pytree_node=False)
    device: Any = flax.struct.field(pytree_node=False, default=None)
    greenlist_ratio: ArrayLike = 0.25
    bias: ArrayLike = 2.0
    hashing_key: Any = 15485863
    seeding_scheme: str = flax.struct.field(pytree_node=False, default="lefthash")
    context_width: ArrayLike = 1
    # What follows from the others: green tokens, and how many steps of a permutation find them, an eighth of V or more.
    greenlist_size: ArrayLike = 0
    steps: int = flax.struct.field(pytree_node=False, default=0)
    table: Any = None

    def __post_init__(self) -> None:
        require(self.seeding_scheme in SCHEMES, "seeding_scheme", self.seeding_scheme, f"one of {', '.join(SCHEMES)}")
        require_integer("context_width", self.context_width, 1)
        object.__setattr__(self, "device", None)
        if self.steps == 0:
            ratio = float(np.asarray(self.greenlist_ratio))
            require(0 < ratio < 1, "greenlist_ratio", ratio, "between 0 and 1, exclusively")
            size, eighth = int(self.vocab_size * ratio), -(-self.vocab_size // 8)
            object.__setattr__(self, "greenlist_size", size)
            object.__setattr__(self, "steps", min(-(-max(size, 1) // eighth) * eighth, self.vocab_size))
        if is_number(self.hashing_key):
            self._set_key(int(self.hashing_key))

    def _set_key(self, key: int) -> None:
        selfhash = self.seeding_scheme == "selfhash"
        top = 2**63 if selfhash else 2**64
        require(-(2**63) <= key < top, "hashing_key", key, f"from -2**63 to 2**{63 if selfhash else 64} - 1")
        if selfhash:  # its products wrap around, those of lefthash are taken modulo 2**64 - 1
            object.__setattr__(self, "table", randperm(TABLE_SIZE, key)[: self.vocab_size])
        wide = key % (2**64 if selfhash else 2**64 - 1)
        object.__setattr__(self, "hashing_key", np.asarray([wide >> 32, wide % 2**32], np.uint32))

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        length = length_of(input_ids, cur_len)
        draw = self._add_selfhash if self.seeding_scheme == "selfhash" else self._add_lefthash
        return jnp.where(length >= self.context_width, draw(input_ids, scores, length), scores)

    def _add_lefthash(self, input_ids: jax.Array, scores: jax.Array, length: jax.Array) -> jax.Array:
        seeds = self._left_seed(column(input_ids, length - 1)[:, 0].astype(jnp.uint32))

        def green(seed: jax.Array) -> jax.Array:
            return permutation_starts_with(seed, self.vocab_size, self.greenlist_size, self.steps)

        bias = jnp.where(jax.vmap(green)(seeds), self.bias, 0.0)
        return scores.at[:, : self.vocab_size].add(bias)

    def _left_seed(self, token: jax.Array) -> jax.Array:
        """uint32: the low half of key * token mod 2**64 - 1. A carry out of 64 bits comes back at the bottom."""
        high, low = self.hashing_key
        carry, lowest = _product(low, token)
        above, middle = _product(high, token)
        middle += carry
        above += middle < carry
        full = (middle == np.uint32(2**32 - 1)) & (lowest >= ~above)
        return lowest + above + full

    def _add_selfhash(self, input_ids: jax.Array, scores: jax.Array, length: jax.Array) -> jax.Array:
        candidates = jax.lax.top_k(scores, min(CANDIDATES, scores.shape[-1]))[1]  # [B, C]
        seeds = self._self_seed(input_ids, candidates, length)

        def green(seed: jax.Array, token: jax.Array) -> jax.Array:
            return permutation_starts_with_value(seed, token, self.vocab_size, self.greenlist_size, self.steps)

        chosen = green(seeds.ravel(), candidates.ravel()).reshape(candidates.shape)
        rows = jnp.arange(scores.shape[0])[:, None]
        return scores.at[rows, candidates].add(jnp.where(chosen, self.bias, 0.0))

    def _self_seed(self, input_ids: jax.Array, candidates: jax.Array, length: jax.Array) -> jax.Array:
        """[B, C] uint32: the low half of the least of key * hash(token) * hash(candidate), signed, mod 2**64 - 1.

        The tokens are the candidate itself and the context_width - 1 newest.
        """
        hashes = self._hash(candidates)

        def least(k: jax.Array, smallest: Wide) -> Wide:
            wide = self._self_product(self._hash(column(input_ids, length - k)), hashes)
            smaller = (wide[0] < smallest[0]) | ((wide[0] == smallest[0]) & (wide[1] < smallest[1]))
            return jnp.where(smaller, wide[0], smallest[0]), jnp.where(smaller, wide[1], smallest[1])

        high, low = jax.lax.fori_loop(1, jnp.asarray(self.context_width), least, self._self_product(hashes, hashes))
        return low - (high < np.uint32(2**31))  # the sign bit is flipped: this is a negative number

    def _hash(self, tokens: jax.Array) -> jax.Array:
        return (jnp.asarray(self.table)[tokens % TABLE_SIZE] + 1).astype(jnp.uint32)

    def _self_product(self, left: jax.Array, right: jax.Array) -> Wide:
        """key * left * right mod 2**64, with the sign bit flipped: unsigned order is then that of signed numbers."""
        high, low = self.hashing_key
        left, right = jnp.broadcast_arrays(left, right)
        above, below = _product(left, right)
        carry, lowest = _product(low, below)
        return (carry + low * above + high * below) ^ np.uint32(2**31), lowest


def _product(left: jax.Array, right: jax.Array) -> Wide:
    """The 64 bits of a product of two uint32, from products of their halves."""
    mask = np.uint32(0xFFFF)
    low = (left & mask) * (right & mask)
    cross = (left >> 16) * (right & mask) + (low >> 16)
    other = (left & mask) * (right >> 16) + (cross & mask)
    return (left >> 16) * (right >> 16) + (cross >> 16) + (other >> 16), left * right
