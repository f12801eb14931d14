"""Penalties and biases: scores moved by what the sequence, or the prompt, already holds.

Axes: B batch, S columns of the sequence buffer, P columns of the prompts, V vocabulary, N listed sequences, W tokens
of their prefixes, E end-of-sequence ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flaxqwen.generation.processors.base import (
    NO_ID,
    is_number,
    length_of,
    pad_eos,
    pad_prompt,
    processor,
    repeat_rows,
    require,
)


def _penalise(scores: jax.Array, ids: jax.Array, penalty: ArrayLike) -> jax.Array:
    """Scores of each row's own ids [B, n], once each, divided by the penalty, or multiplied when negative."""
    seen = jnp.zeros(scores.shape, bool).at[jnp.arange(scores.shape[0])[:, None], ids].set(True, mode="drop")
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def _require_penalty(penalty: Any) -> None:
    if is_number(penalty):
        require(isinstance(penalty, float) and penalty > 0, "penalty", penalty, "a strictly positive float")


@processor
class RepetitionPenaltyLogitsProcessor:
    """Scores of tokens already present are divided by the penalty, or multiplied when negative (Keskar et al. 2019).

    prompt_ignore_length: leading columns that do not count, an int or [B]: left padding, in generate().
    """

    penalty: ArrayLike
    prompt_ignore_length: ArrayLike | None = None

    def __post_init__(self) -> None:
        _require_penalty(self.penalty)
        if isinstance(self.prompt_ignore_length, int):
            require(self.prompt_ignore_length >= 0, "prompt_ignore_length", self.prompt_ignore_length, "not negative")

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        column = jnp.arange(input_ids.shape[1])[None]
        counts = column < length_of(input_ids, cur_len)
        if self.prompt_ignore_length is not None:
            counts &= column >= jnp.reshape(jnp.asarray(self.prompt_ignore_length), (-1, 1))
        return _penalise(scores, jnp.where(counts, input_ids, NO_ID), self.penalty)


@processor
class EncoderRepetitionPenaltyLogitsProcessor:
    """The repetition penalty's inverse for the tokens of the prompt: above 1 favours them.

    encoder_input_ids: [B, P] int, or [B / copies, P]: each row stands for as many rows of scores. Padding counts.
    """

    penalty: ArrayLike
    encoder_input_ids: Any

    def __post_init__(self) -> None:
        _require_penalty(self.penalty)
        object.__setattr__(self, "encoder_input_ids", pad_prompt(self.encoder_input_ids))

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        return _penalise(scores, repeat_rows(self.encoder_input_ids, scores), 1.0 / jnp.asarray(self.penalty))


@processor
class Sequences:
    """Listed sequences of tokens, filled up so that few shapes exist.

    prefixes: [N, W] int32, all but the last token, the newest first, then NO_ID. last: [N] int32. bias: [N] float32.
    """

    prefixes: ArrayLike
    last: ArrayLike
    bias: ArrayLike

    @classmethod
    def of(cls, biases: Mapping[tuple[int, ...], float]) -> Sequences:
        """Of a dict {sequence: bias}. N and W are powers of two."""
        rows = 1 << max(len(biases) - 1, 3).bit_length()
        width = 1 << (max(map(len, biases), default=1) - 1).bit_length()
        prefixes = np.full((rows, width), NO_ID, np.int32)
        last, bias = np.full(rows, NO_ID, np.int32), np.zeros(rows, np.float32)
        for row, (tokens, value) in enumerate(biases.items()):
            sequence = [min(token, NO_ID - 1) for token in tokens]  # no model has so many
            prefixes[row, : len(sequence) - 1] = sequence[-2::-1]
            last[row], bias[row] = sequence[-1], value
        return cls(prefixes, last, bias)

    def add_bias(self, input_ids: jax.Array, scores: jax.Array, length: jax.Array) -> jax.Array:
        """scores [B, V] + the biases of the sequences that the next token would complete; length as of `length_of`."""
        self.require_in_vocabulary(scores.shape[-1])
        prefixes, last = jnp.asarray(self.prefixes), jnp.asarray(self.last)
        column = length - 1 - jnp.arange(prefixes.shape[1])
        tokens = jnp.take if column.ndim == 1 else jnp.take_along_axis
        newest = jnp.where(column >= 0, tokens(input_ids, jnp.maximum(column, 0), axis=1), -1)  # [B, W]
        completes = jnp.all((newest[:, None] == prefixes) | (prefixes == NO_ID), axis=-1)  # [B, N]
        bias = jnp.where(completes, jnp.asarray(self.bias), 0.0)
        return scores + jnp.zeros_like(scores).at[:, last].add(bias, mode="drop")

    def require_in_vocabulary(self, vocab_size: int) -> None:
        """ValueError for a token that the model does not have, where the tokens are not traced."""
        if isinstance(self.prefixes, np.ndarray) and isinstance(self.last, np.ndarray):
            ids = np.concatenate([self.prefixes.ravel(), self.last])
            unknown = sorted({int(token) for token in ids[(ids >= vocab_size) & (ids != NO_ID)]})
            if unknown:
                raise ValueError(f"The model vocabulary size is {vocab_size}, but these tokens are biased: {unknown}")


@processor
class SequenceBiasLogitsProcessor:
    """Add a bias to the token that would complete a listed sequence.

    sequence_bias: a dict {(token, ...): bias}, or a list [[[token, ...], bias], ...]; the biases are floats.
    """

    sequence_bias: Any

    def __post_init__(self) -> None:
        if not isinstance(self.sequence_bias, Sequences):
            object.__setattr__(self, "sequence_bias", Sequences.of(_checked_biases(self.sequence_bias)))

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        return self.sequence_bias.add_bias(input_ids, scores, length_of(input_ids, cur_len))


@processor
class NoBadWordsLogitsProcessor:
    """-inf for the token that would complete one of the listed sequences, of which [eos_token_id] is none.

    bad_words_ids: [[token, ...], ...]. eos_token_id: an id, several or None.
    """

    bad_words_ids: Any
    eos_token_id: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.bad_words_ids, Sequences):
            return
        some = isinstance(self.bad_words_ids, (list, tuple)) and bool(self.bad_words_ids)
        require(some, "bad_words_ids", self.bad_words_ids, "a non-empty list of lists")
        for sequence in self.bad_words_ids:
            require(_is_sequence(sequence), "bad_words_ids", sequence, "a list of lists of token ids")
        ends = [] if self.eos_token_id is None else np.atleast_1d(np.asarray(self.eos_token_id)).tolist()
        excepted = [(), *((end,) for end in ends)]
        banned = [tuple(sequence) for sequence in self.bad_words_ids if tuple(sequence) not in excepted]
        object.__setattr__(self, "bad_words_ids", Sequences.of(dict.fromkeys(banned, -math.inf)))
        object.__setattr__(self, "eos_token_id", None)  # it has served

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        return self.bad_words_ids.add_bias(input_ids, scores, length_of(input_ids, cur_len))


def _is_sequence(ids: Any) -> bool:
    """Whether this is a list of token ids."""
    return isinstance(ids, (list, tuple)) and all(isinstance(token, (int, np.integer)) and token >= 0 for token in ids)


def _checked_biases(biases: Any) -> dict[tuple[int, ...], float]:
    """sequence_bias as a dict; ValueError for what Transformers' SequenceBiasLogitsProcessor refuses."""
    require(
        isinstance(biases, (dict, list)) and bool(biases), "sequence_bias", biases, "a non-empty dict, or list of pairs"
    )
    pairs = list(biases.items()) if isinstance(biases, dict) else biases
    for pair in pairs:
        valid = isinstance(pair, (list, tuple)) and len(pair) == 2 and _is_sequence(pair[0]) and bool(pair[0])
        require(valid and isinstance(pair[1], float), "sequence_bias", pair, "of token ids, and a float as their bias")
    return {tuple(sequence): bias for sequence, bias in pairs}


class Growth(NamedTuple):
    """Exponential growth from a start on; log2 of the factor in two float32, so that no power of it loses digits."""

    start: ArrayLike
    log2_high: ArrayLike
    log2_low: ArrayLike

    @classmethod
    def of(cls, penalty: Any) -> Growth:
        """Of (start, factor)."""
        valid = isinstance(penalty, (list, tuple)) and len(penalty) == 2 and all(map(is_number, penalty))
        require(valid and penalty[1] > 0, "exponential_decay_length_penalty", penalty, "(start, factor), factor > 0")
        log2 = math.log2(penalty[1])
        mantissa, exponent = math.frexp(log2)
        high = math.ldexp(round(mantissa * 512) / 512, exponent)  # 9 bits: its product with 32,767 tokens is exact
        return cls(penalty[0], np.float32(high), np.float32(log2 - high))


@processor
class ExponentialDecayLengthPenalty:
    """From a length on, raise the scores of the end-of-sequence ids: + |score| (factor ** (tokens past it) - 1).

    exponential_decay_length_penalty: (start, factor), start counted from the prompt's end.
    eos_token_id: an id or several. input_ids_seq_length: columns of the prompt.
    """

    exponential_decay_length_penalty: Any
    eos_token_id: Any
    input_ids_seq_length: ArrayLike

    def __post_init__(self) -> None:
        if not isinstance(self.exponential_decay_length_penalty, Growth):
            growth = Growth.of(self.exponential_decay_length_penalty)
            object.__setattr__(self, "exponential_decay_length_penalty", growth)
        object.__setattr__(self, "eos_token_id", pad_eos(self.eos_token_id))

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        start, high, low = self.exponential_decay_length_penalty
        past = length_of(input_ids, cur_len) - self.input_ids_seq_length - start
        whole = jnp.round(past * high)
        rest = (past * high - whole) + past * low  # |rest| <= 0.5, and not the error of past * log2(factor)
        power = jnp.ldexp(jnp.exp2(rest), jnp.clip(whole, -126, 127).astype(jnp.int32)) - 1.0
        growth = jnp.where(whole == 0, jnp.expm1(rest * math.log(2)), jnp.minimum(power, jnp.finfo(jnp.float32).max))
        ids = jnp.asarray(self.eos_token_id)
        score = scores.at[:, ids].get(mode="fill", fill_value=0.0)
        raised = score + jnp.where((past > 0) & jnp.isfinite(score), jnp.abs(score) * growth, 0.0)
        return scores.at[:, ids].set(raised, mode="drop")
