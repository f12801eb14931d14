"""Logits processors: small pure objects, named and constructed as in transformers/generation/logits_process.py.

Each is a pytree whose values (temperature, penalty, ...) are traced, so that changing a value never compiles again;
which processors there are is static. Called as `processor(input_ids, scores, cur_len=None)`:

  input_ids: [B, S] int32, of which the first cur_len columns count (all of them, when None).
  scores: [B, V] float32, with -inf for what is excluded.
  returns: [B, V] float32.

Axes: B batch, S columns of the sequence buffer, V vocabulary, E end-of-sequence ids.
"""

from __future__ import annotations

from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# Stands for "no id" in fixed-size lists of ids: past every vocabulary, so a scatter in "drop" mode ignores it.
NO_ID = np.iinfo(np.int32).max

# top_k is traced below a static limit, the next power of two: k = 20 and k = 50 share one program.
MIN_TOP_K_LIMIT = 64


class LogitsProcessor(Protocol):
    """Anything with this call can be a processor; it is traced into the decoding program."""

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array: ...


def _require(condition: bool, name: str, found: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"`{name}` has to be {expected}, but is {found!r}")


def _is_number(value: Any) -> bool:
    """False for what jax puts in place of values when it rebuilds a pytree: only the user's own values are checked."""
    return isinstance(value, (int, float, np.number))


def pad_ids(ids: int | tuple[int, ...] | list[int] | np.ndarray | None, multiple: int = 4) -> np.ndarray:
    """A list of token ids as an int32 array, filled up with NO_ID so that few lengths, and few programs, exist."""
    given = np.atleast_1d(np.asarray([] if ids is None else ids, np.int32))
    length = -(-max(given.size, 1) // multiple) * multiple
    return np.concatenate([given, np.full(length - given.size, NO_ID, np.int32)])


def _suppress(scores: jax.Array, ids: jax.Array, when: ArrayLike) -> jax.Array:
    """-inf at `ids` [E], if `when`."""
    value = jnp.where(when, -jnp.inf, scores.at[:, ids].get(mode="fill", fill_value=0.0))
    return scores.at[:, ids].set(value, mode="drop")


@flax.struct.dataclass
class TemperatureLogitsWarper:
    """Divide the scores by a temperature: below 1 sharpens the distribution, above 1 flattens it."""

    temperature: ArrayLike

    def __post_init__(self) -> None:
        if _is_number(self.temperature):
            _require(self.temperature > 0, "temperature", self.temperature, "a strictly positive float")

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        return scores / self.temperature


@flax.struct.dataclass
class TopKLogitsWarper:
    """Keep the k highest scores; those tied with the k-th are kept too, as in Transformers."""

    top_k: ArrayLike
    filter_value: ArrayLike = -jnp.inf
    min_tokens_to_keep: ArrayLike = 1
    limit: int | None = flax.struct.field(pytree_node=False, default=None)

    def __post_init__(self) -> None:
        if _is_number(self.top_k):
            _require(float(self.top_k).is_integer() and self.top_k > 0, "top_k", self.top_k, "a strictly positive int")
        if self.limit is None:
            largest = max(int(self.top_k), int(self.min_tokens_to_keep), MIN_TOP_K_LIMIT)
            object.__setattr__(self, "limit", 1 << (largest - 1).bit_length())

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        assert self.limit is not None
        limit = min(self.limit, scores.shape[-1])
        k = jnp.clip(jnp.maximum(self.top_k, self.min_tokens_to_keep), 1, limit)
        highest = jax.lax.top_k(scores, limit)[0]
        kth = jnp.take_along_axis(highest, jnp.broadcast_to(k - 1, (scores.shape[0], 1)), axis=-1)
        return jnp.where(scores < kth, self.filter_value, scores)


@flax.struct.dataclass
class TopPLogitsWarper:
    """Keep the most probable tokens whose probabilities add up to top_p (nucleus sampling, Holtzman et al. 2020).

    The vocabulary is never sorted: a bisection over the bits of the probability finds the threshold, exactly. Tokens
    tied at the threshold are all kept; Transformers keeps as many as its sort happens to put last.
    """

    top_p: ArrayLike
    filter_value: ArrayLike = -jnp.inf
    min_tokens_to_keep: int = flax.struct.field(pytree_node=False, default=1)

    def __post_init__(self) -> None:
        if _is_number(self.top_p):
            _require(0 <= self.top_p <= 1, "top_p", self.top_p, "a float from 0 to 1")
        _require(self.min_tokens_to_keep >= 1, "min_tokens_to_keep", self.min_tokens_to_keep, "a positive int")

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        probs = jax.nn.softmax(scores, axis=-1)
        dropped = 1.0 - jnp.asarray(self.top_p, jnp.float32)

        def mass_exceeds(bits: jax.Array) -> jax.Array:
            threshold = jax.lax.bitcast_convert_type(bits, jnp.float32)
            mass = jnp.sum(jnp.where(probs <= threshold, probs, 0.0), axis=-1, keepdims=True)
            return mass > dropped

        # Probabilities are not negative, so their bits, read as integers, are in the same order.
        low = jnp.zeros((scores.shape[0], 1), jnp.int32)
        high = jnp.full_like(low, np.float32(1).view(np.int32))
        _, bits = jax.lax.fori_loop(0, 30, lambda _, span: _halve(span, mass_exceeds), (low, high))
        threshold = jax.lax.bitcast_convert_type(bits, jnp.float32)
        always = jax.lax.top_k(probs, min(self.min_tokens_to_keep, probs.shape[-1]))[0][:, -1:]
        return jnp.where(probs < jnp.minimum(threshold, always), self.filter_value, scores)


def _halve(span: tuple[jax.Array, jax.Array], predicate: Any) -> tuple[jax.Array, jax.Array]:
    """One step towards the smallest integer in [low, high] for which the monotone predicate holds."""
    low, high = span
    middle = low + (high - low) // 2
    holds = predicate(middle)
    return jnp.where(holds, low, jnp.minimum(middle + 1, high)), jnp.where(holds, middle, high)


@flax.struct.dataclass
class RepetitionPenaltyLogitsProcessor:
    """Scores of tokens already present are divided by the penalty, or multiplied when negative (Keskar et al. 2019).

    prompt_ignore_length: leading columns that do not count, an int or [B]: left padding, in generate().
    """

    penalty: ArrayLike
    prompt_ignore_length: ArrayLike | None = None

    def __post_init__(self) -> None:
        if _is_number(self.penalty):
            _require(isinstance(self.penalty, float) and self.penalty > 0, "penalty", self.penalty, "a positive float")
        if isinstance(self.prompt_ignore_length, int):
            _require(self.prompt_ignore_length >= 0, "prompt_ignore_length", self.prompt_ignore_length, "not negative")

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        B, S = input_ids.shape
        column = jnp.arange(S)[None]
        counts = column < (S if cur_len is None else cur_len)
        if self.prompt_ignore_length is not None:
            counts &= column >= jnp.reshape(jnp.asarray(self.prompt_ignore_length), (-1, 1))
        ids = jnp.where(counts, input_ids, NO_ID)
        seen = jnp.zeros(scores.shape, bool).at[jnp.arange(B)[:, None], ids].set(True, mode="drop")
        penalised = jnp.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return jnp.where(seen, penalised, scores)


@flax.struct.dataclass
class MinLengthLogitsProcessor:
    """No end of sequence before min_length tokens, the prompt included."""

    min_length: ArrayLike
    eos_token_id: Any

    def __post_init__(self) -> None:
        if _is_number(self.min_length):
            _require(
                float(self.min_length).is_integer() and self.min_length >= 0, "min_length", self.min_length, "an int"
            )
        if isinstance(self.eos_token_id, (int, list, tuple)):
            object.__setattr__(self, "eos_token_id", pad_ids(self.eos_token_id))

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        length = input_ids.shape[1] if cur_len is None else cur_len
        return _suppress(scores, self.eos_token_id, length < jnp.asarray(self.min_length))


@flax.struct.dataclass
class MinNewTokensLengthLogitsProcessor:
    """No end of sequence before min_new_tokens tokens after the prompt."""

    prompt_length_to_skip: ArrayLike
    min_new_tokens: ArrayLike
    eos_token_id: Any

    def __post_init__(self) -> None:
        for name in ("prompt_length_to_skip", "min_new_tokens"):
            value = getattr(self, name)
            if _is_number(value):
                _require(float(value).is_integer() and value >= 0, name, value, "an int, not negative")
        if isinstance(self.eos_token_id, (int, list, tuple)):
            object.__setattr__(self, "eos_token_id", pad_ids(self.eos_token_id))

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        length = input_ids.shape[1] if cur_len is None else cur_len
        new = length - jnp.asarray(self.prompt_length_to_skip)
        return _suppress(scores, self.eos_token_id, new < self.min_new_tokens)
