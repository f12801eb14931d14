"""No n-gram twice: a comparison of the newest n - 1 tokens with every window before them, O(n S), n traced.

Axes: B batch, S columns of the sequence buffer, P columns of the prompts, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flaxqwen.generation.processors.base import (
    ban,
    column,
    length_of,
    pad_prompt,
    processor,
    repeat_rows,
    require_integer,
)


def _follows_newest(ids: jax.Array, input_ids: jax.Array, length: jax.Array, size: jax.Array) -> jax.Array:
    """[B, P] bool: which tokens of ids [B, P] follow size - 1 tokens that equal the newest of input_ids [B, S]."""

    def compare(k: jax.Array, equal: jax.Array) -> jax.Array:
        return equal & (jnp.roll(ids, k, axis=1) == column(input_ids, length - k))

    place = jnp.arange(ids.shape[1])[None]
    enough = (place >= size - 1) & (length >= size - 1)
    return jax.lax.fori_loop(1, size, compare, jnp.broadcast_to(enough, ids.shape))


@processor
class NoRepeatNGramLogitsProcessor:
    """-inf for the tokens that would complete an n-gram which the sequence, prompt included, already holds."""

    ngram_size: ArrayLike

    def __post_init__(self) -> None:
        require_integer("ngram_size", self.ngram_size, 1)

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        length = length_of(input_ids, cur_len)
        repeats = _follows_newest(input_ids, input_ids, length, jnp.asarray(self.ngram_size))
        return ban(scores, input_ids, repeats & (jnp.arange(input_ids.shape[1]) < length))


@processor
class EncoderNoRepeatNGramLogitsProcessor:
    """-inf for the tokens that would complete an n-gram of the prompt.

    encoder_input_ids: [P] or [B, P] int, or [B / copies, P]: each row stands for as many rows of scores.
    """

    encoder_ngram_size: ArrayLike
    encoder_input_ids: Any

    def __post_init__(self) -> None:
        require_integer("encoder_ngram_size", self.encoder_ngram_size, 1)
        object.__setattr__(self, "encoder_input_ids", pad_prompt(self.encoder_input_ids))

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        prompts = repeat_rows(self.encoder_input_ids, scores)
        size = jnp.asarray(self.encoder_ngram_size)
        return ban(scores, prompts, _follows_newest(prompts, input_ids, length_of(input_ids, cur_len), size))
