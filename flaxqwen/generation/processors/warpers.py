"""Warpers: temperature, and the ways to cut the tail of a distribution before a token is drawn from it.

The vocabulary is never sorted: thresholds come from a bisection, or from the few highest scores. Tokens tied at a
threshold are all kept; Transformers, where it sorts, keeps as many as its sort happens to put first.

Axes: B batch, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flaxqwen.generation.processors.base import (
    NO_ID,
    highest_of,
    is_number,
    kth_highest,
    processor,
    require,
    require_integer,
    smallest_float,
)

# top_k is traced below a static limit, the next power of two: k = 20 and k = 50 share one program.
MIN_TOP_K_LIMIT = 64

TOP_H_TOKENS = 100  # what top-h looks at, in Transformers
NUCLEUS_TOKENS = 128  # what top-p looks at first, on a CPU


def _bound_min_tokens(warper: Any) -> None:
    """Check min_tokens_to_keep, which is traced, and set its static limit: 1, 5, 9, ..."""
    least = warper.min_tokens_to_keep
    require_integer("min_tokens_to_keep", least, 1)
    if warper.limit is None:
        object.__setattr__(warper, "limit", 1 + -(-(int(np.asarray(least)) - 1) // 4) * 4)


def _drop(warper: Any, scores: jax.Array, dropped: jax.Array, preference: jax.Array | None = None) -> jax.Array:
    """filter_value where `dropped`, but for the min_tokens_to_keep tokens of highest preference (default: score)."""
    preference = scores if preference is None else preference
    dropped &= preference < kth_highest(preference, warper.min_tokens_to_keep, warper.limit)
    return jnp.where(dropped, warper.filter_value, scores)


@processor
class TemperatureLogitsWarper:
    """Divide the scores by a temperature: below 1 sharpens the distribution, above 1 flattens it."""

    temperature: ArrayLike

    def __post_init__(self) -> None:
        if is_number(self.temperature):
            require(self.temperature > 0, "temperature", self.temperature, "a strictly positive float")

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        return scores / self.temperature


@processor
class TopKLogitsWarper:
    """Keep the k highest scores; those tied with the k-th are kept too, as in Transformers."""

    top_k: ArrayLike
    filter_value: ArrayLike = -jnp.inf
    min_tokens_to_keep: ArrayLike = 1
    limit: int | None = flax.struct.field(pytree_node=False, default=None)

    def __post_init__(self) -> None:
        require_integer("top_k", self.top_k, 1)
        if is_number(self.top_k):  # all tokens and more; the program's numbers have 32 bits
            object.__setattr__(self, "top_k", min(int(self.top_k), NO_ID))
        if self.limit is None:
            largest = max(int(np.asarray(self.top_k)), int(np.asarray(self.min_tokens_to_keep)), MIN_TOP_K_LIMIT)
            object.__setattr__(self, "limit", 1 << (largest - 1).bit_length())

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        assert self.limit is not None
        kth = kth_highest(scores, jnp.maximum(self.top_k, self.min_tokens_to_keep), self.limit)
        return jnp.where(scores < kth, self.filter_value, scores)


@processor
class TopPLogitsWarper:
    """Keep the most probable tokens whose probabilities add up to top_p (nucleus sampling, Holtzman et al. 2020)."""

    top_p: ArrayLike
    filter_value: ArrayLike = -jnp.inf
    min_tokens_to_keep: ArrayLike = 1
    limit: int | None = flax.struct.field(pytree_node=False, default=None)

    def __post_init__(self) -> None:
        if is_number(self.top_p):
            require(0 <= self.top_p <= 1, "top_p", self.top_p, "a float from 0 to 1")
        _bound_min_tokens(self)

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        probs, dropped = jax.nn.softmax(scores, axis=-1), 1.0 - jnp.asarray(self.top_p, jnp.float32)
        least = jax.lax.platform_dependent(probs, dropped, cpu=_least_of_nucleus_on_cpu, default=_least_of_nucleus)
        return _drop(self, scores, probs < least)


def _mass(probs: jax.Array, at_most: jax.Array) -> jax.Array:
    """[B, 1]: the sum of those of probs [B, n] that are at most so large."""
    return jnp.sum(jnp.where(probs <= at_most, probs, 0.0), axis=-1, keepdims=True)


def _least_of_nucleus(probs: jax.Array, dropped: jax.Array) -> jax.Array:
    """[B, 1]: the least of probs [B, V] for which it and what is less probable have a mass beyond `dropped`."""
    return smallest_float(lambda least: _mass(probs, least) > dropped, len(probs), 1.0)


def _least_of_nucleus_on_cpu(probs: jax.Array, dropped: jax.Array) -> jax.Array:
    """The same, among the few most probable tokens alone where the mass of all others may be dropped.

    So it is after top-k, which leaves nothing to the others: 8 rows of 151,936 take 2 ms, and 14 by passes over all. A
    row's result does not depend on the others', though one that has to look among all takes their time.
    """
    few = highest_of(probs, min(NUCLEUS_TOKENS, probs.shape[-1]))
    rest = _mass(probs, few[:, -1:])
    masses = rest + jax.lax.cumsum(jnp.where(few > few[:, -1:], few, 0.0), axis=1, reverse=True)
    least = jnp.min(jnp.where(masses > dropped, few, 1.0), axis=-1, keepdims=True)
    has_more = rest > dropped

    def among_all(probs: jax.Array) -> jax.Array:
        return jnp.where(has_more, _least_of_nucleus(probs, dropped), least)

    return jax.lax.cond(jnp.any(has_more), among_all, lambda _: least, probs)


@processor
class MinPLogitsWarper:
    """Keep the tokens at least min_p times as probable as the most probable one (Nguyen et al. 2024)."""

    min_p: ArrayLike
    filter_value: ArrayLike = -jnp.inf
    min_tokens_to_keep: ArrayLike = 1
    limit: int | None = flax.struct.field(pytree_node=False, default=None)

    def __post_init__(self) -> None:
        if is_number(self.min_p):
            require(0 <= self.min_p <= 1, "min_p", self.min_p, "a float in the [0, 1] interval")
        _bound_min_tokens(self)

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        probs = jax.nn.softmax(scores, axis=-1)
        return _drop(self, scores, probs < self.min_p * jnp.max(probs, axis=-1, keepdims=True))


@processor
class TypicalLogitsWarper:
    """Keep the tokens whose surprise is nearest to its mean, the entropy, up to a mass (Meister et al. 2022)."""

    mass: ArrayLike = 0.9
    filter_value: ArrayLike = -jnp.inf
    min_tokens_to_keep: ArrayLike = 1
    limit: int | None = flax.struct.field(pytree_node=False, default=None)

    def __post_init__(self) -> None:
        if is_number(self.mass):
            require(0 < self.mass < 1, "typical_p", self.mass, "a float > 0 and < 1")
        _bound_min_tokens(self)

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        log_probs = jax.nn.log_softmax(scores, axis=-1)
        probs = jnp.exp(log_probs)
        distance = jnp.abs(-log_probs - _entropy(log_probs, probs))

        def mass_suffices(threshold: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(distance <= threshold, probs, 0.0), axis=-1, keepdims=True) >= self.mass

        threshold = smallest_float(mass_suffices, scores.shape[0], jnp.inf)
        return _drop(self, scores, distance > threshold, preference=-distance)


@processor
class EpsilonLogitsWarper:
    """Keep the tokens of probability epsilon or more (Hewitt et al. 2022)."""

    epsilon: ArrayLike
    filter_value: ArrayLike = -jnp.inf
    min_tokens_to_keep: ArrayLike = 1
    limit: int | None = flax.struct.field(pytree_node=False, default=None)

    def __post_init__(self) -> None:
        if is_number(self.epsilon):
            require(0 < self.epsilon < 1, "epsilon_cutoff", self.epsilon, "a float > 0 and < 1")
        _bound_min_tokens(self)

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        return _drop(self, scores, jax.nn.softmax(scores, axis=-1) < self.epsilon)


@processor
class EtaLogitsWarper:
    """Keep the tokens of probability min(epsilon, sqrt(epsilon) exp(-entropy)) or more (Hewitt et al. 2022)."""

    epsilon: ArrayLike
    filter_value: ArrayLike = -jnp.inf
    min_tokens_to_keep: ArrayLike = 1
    limit: int | None = flax.struct.field(pytree_node=False, default=None)

    def __post_init__(self) -> None:
        if is_number(self.epsilon):
            require(0 < self.epsilon < 1, "eta_cutoff", self.epsilon, "a float > 0 and < 1")
        _bound_min_tokens(self)

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        log_probs = jax.nn.log_softmax(scores, axis=-1)
        probs = jnp.exp(log_probs)
        eta = jnp.minimum(self.epsilon, jnp.sqrt(self.epsilon) * jnp.exp(-_entropy(log_probs, probs)))
        return _drop(self, scores, probs < eta)


@processor
class TopHLogitsWarper:
    """Keep the most probable tokens whose terms of the entropy add up to top_h of it (arXiv 2509.02510).

    As in Transformers, all but the 100 highest scores are dropped first.
    """

    top_h: ArrayLike
    filter_value: ArrayLike = -jnp.inf

    def __post_init__(self) -> None:
        if is_number(self.top_h):
            require(0 < self.top_h <= 1, "top_h", self.top_h, "in the range (0, 1]")

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        highest = highest_of(scores, min(TOP_H_TOKENS, scores.shape[-1]))
        log_probs = jax.nn.log_softmax(highest, axis=-1)
        probs = jnp.exp(log_probs)
        terms = jnp.where(probs > 0, -probs * log_probs, 0.0)
        within = jnp.cumsum(terms, axis=-1) <= self.top_h * jnp.sum(terms, axis=-1, keepdims=True)
        kept = jnp.sum(within & (probs > 0), axis=-1, keepdims=True)
        last = jnp.take_along_axis(highest, jnp.maximum(kept - 1, 0), axis=-1)
        return jnp.where(scores < last, self.filter_value, scores)


def _entropy(log_probs: jax.Array, probs: jax.Array) -> jax.Array:
    """[B, 1], in nats; tokens of no probability add nothing."""
    return -jnp.sum(jnp.where(probs > 0, probs * log_probs, 0.0), axis=-1, keepdims=True)
