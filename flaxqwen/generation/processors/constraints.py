"""Constraints: tokens that must, or must not, come at some length; and scores put in order.

Axes: B batch, S columns of the sequence buffer, V vocabulary, E ids in a list.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flaxqwen.generation.processors.base import (
    force,
    is_list,
    length_of,
    pad_eos,
    pad_ids,
    processor,
    require_integer,
    suppress,
)


@processor
class MinLengthLogitsProcessor:
    """No end of sequence before min_length tokens, the prompt included."""

    min_length: ArrayLike
    eos_token_id: Any

    def __post_init__(self) -> None:
        require_integer("min_length", self.min_length, 0)
        object.__setattr__(self, "eos_token_id", pad_eos(self.eos_token_id))

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        return suppress(scores, self.eos_token_id, length_of(input_ids, cur_len) < jnp.asarray(self.min_length))


@processor
class MinNewTokensLengthLogitsProcessor:
    """No end of sequence before min_new_tokens tokens after the prompt."""

    prompt_length_to_skip: ArrayLike
    min_new_tokens: ArrayLike
    eos_token_id: Any

    def __post_init__(self) -> None:
        require_integer("prompt_length_to_skip", self.prompt_length_to_skip, 0)
        require_integer("min_new_tokens", self.min_new_tokens, 0)
        object.__setattr__(self, "eos_token_id", pad_eos(self.eos_token_id))

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        new = length_of(input_ids, cur_len) - jnp.asarray(self.prompt_length_to_skip)
        return suppress(scores, self.eos_token_id, new < self.min_new_tokens)


@processor
class ForcedBOSTokenLogitsProcessor:
    """The second token of a sequence, after a prompt of one, is bos_token_id."""

    bos_token_id: ArrayLike

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        return force(scores, self.bos_token_id, length_of(input_ids, cur_len) == 1)


@processor
class ForcedEOSTokenLogitsProcessor:
    """The last token before max_length, prompt included, is one of eos_token_id."""

    max_length: ArrayLike
    eos_token_id: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "eos_token_id", pad_eos(self.eos_token_id))

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        last = length_of(input_ids, cur_len) == jnp.asarray(self.max_length) - 1
        return force(scores, self.eos_token_id, last)


@processor
class SuppressTokensLogitsProcessor:
    """-inf for the listed tokens."""

    suppress_tokens: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "suppress_tokens", _pad_list(self.suppress_tokens))

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        return suppress(scores, self.suppress_tokens)


@processor
class SuppressTokensAtBeginLogitsProcessor:
    """-inf for the listed tokens where the sequence is begin_index tokens long."""

    begin_suppress_tokens: Any
    begin_index: ArrayLike

    def __post_init__(self) -> None:
        object.__setattr__(self, "begin_suppress_tokens", _pad_list(self.begin_suppress_tokens))

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        begins = length_of(input_ids, cur_len) == jnp.asarray(self.begin_index)
        return suppress(scores, self.begin_suppress_tokens, begins)


def _pad_list(ids: Any) -> Any:
    """A user's own list of ids in a length of which there are few: a power of two."""
    if not is_list(ids):
        return ids
    return pad_ids(ids, multiple=max(4, 1 << (len(ids) - 1).bit_length()) if len(ids) else 4)


@processor
class InfNanRemoveLogitsProcessor:
    """0 for NaN, the largest and smallest finite numbers for the infinities."""

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        return jnp.nan_to_num(scores)


@processor
class LogitNormalization:
    """Scores that are log-probabilities: their exponentials add up to 1."""

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        return jax.nn.log_softmax(scores, axis=-1)
