"""What logits processors share: the call they answer to, checks of their arguments, lists of ids of few lengths.

Axes: B batch, S columns of the sequence buffer, V vocabulary, E ids in a list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeGuard, TypeVar, dataclass_transform

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# Stands for "no id" in fixed-size lists of ids: past every vocabulary, so a scatter in "drop" mode ignores it.
NO_ID = np.iinfo(np.int32).max

SMALLEST_PROMPT = 32  # columns that a prompt inside a processor is padded to at least


class LogitsProcessor(Protocol):
    """Anything with this call can be a processor; it is traced into the decoding program."""

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array: ...


C = TypeVar("C")


@dataclass_transform(frozen_default=True, field_specifiers=(flax.struct.field,))
def processor(cls: type[C]) -> type[C]:
    """A frozen dataclass that is a pytree, as by flax.struct.dataclass, whose structure is equal to no other class's.

    jaxlib (0.10.2) compares the classes of pytrees, but not of those that are registered as dataclasses: min-p and
    top-p, which have as many fields, were equal keys of jit's cache, and one call in a hundred got the other's program.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # a dataclass by now
    traced = [field.name for field in fields if field.metadata.get("pytree_node", True)]
    static = [field.name for field in fields if field.name not in traced]
    keys = [jax.tree_util.GetAttrKey(name) for name in traced]

    def flatten(self: C) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(self, name) for name in traced), tuple(getattr(self, name) for name in static)

    def flatten_with_keys(self: C) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        values, statics = flatten(self)
        return tuple(zip(keys, values, strict=True)), statics

    def unflatten(statics: tuple[Any, ...], values: Any) -> C:
        self = object.__new__(cls)
        for name, value in zip((*traced, *static), (*values, *statics), strict=True):
            object.__setattr__(self, name, value)
        return self

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def require(condition: bool, name: str, found: Any, expected: str) -> None:
    """ValueError, in Transformers' words, unless the condition holds."""
    if not condition:
        raise ValueError(f"`{name}` has to be {expected}, but is {found!r}")


def is_number(value: Any) -> TypeGuard[int | float]:
    """False for what jax puts in place of values when it rebuilds a pytree: only the user's own values are checked."""
    return isinstance(value, (int, float, np.number))


def is_list(value: Any) -> bool:
    """Whether this is a user's own list of ids, which is to be padded: a list, a tuple, numpy's or torch's array."""
    return isinstance(value, (list, tuple, np.ndarray)) or hasattr(value, "numpy")


def require_integer(name: str, value: Any, least: int) -> None:
    """ValueError for a number that is no integer, or is below `least`."""
    if is_number(value):
        expected = "a strictly positive integer" if least else "a non-negative integer"
        require(float(value).is_integer() and value >= least, name, value, expected)


def pad_ids(ids: Any, multiple: int = 4) -> np.ndarray:
    """A list of token ids as an int32 array, filled up with NO_ID so that few lengths, and few programs, exist.

    Negative ids, and those beyond int32, stand for no id: as in Transformers, they equal no token.
    """
    given = np.atleast_1d(np.asarray([] if ids is None else ids))
    given = np.where((given < 0) | (given > NO_ID), NO_ID, given).astype(np.int32)
    length = -(-max(given.size, 1) // multiple) * multiple
    return np.concatenate([given, np.full(length - given.size, NO_ID, np.int32)])


def pad_eos(ids: Any) -> Any:
    """`pad_ids` of a user's own end-of-sequence ids; ValueError for a negative one."""
    if not (is_number(ids) or is_list(ids)):
        return ids
    given = np.asarray(ids)
    integers = given.size > 0 and np.issubdtype(given.dtype, np.integer) and bool((given >= 0).all())
    require(integers, "eos_token_id", ids, "a list of non-negative integers")
    return pad_ids(given)


def pad_prompt(ids: Any) -> Any:
    """A user's own prompts [B, P] or [P], as [B, next power of two] int32, filled up with NO_ID on the right."""
    if not is_list(ids):
        return ids
    given = np.atleast_2d(np.asarray(ids, np.int32))
    width = max(SMALLEST_PROMPT, 1 << (given.shape[1] - 1).bit_length())
    return np.pad(given, ((0, 0), (0, width - given.shape[1])), constant_values=NO_ID)


def repeat_rows(prompts: jax.Array, scores: jax.Array) -> jax.Array:
    """Prompts [B / copies, P] as [B, P], each as often as `scores` [B, V] continues it."""
    return jnp.repeat(jnp.asarray(prompts), scores.shape[0] // prompts.shape[0], axis=0)


def length_of(input_ids: jax.Array, cur_len: ArrayLike | None) -> jax.Array:
    """How many columns of input_ids [B, S] count: an int32 scalar, or [B, 1] where cur_len is [B]."""
    length = jnp.asarray(input_ids.shape[1] if cur_len is None else cur_len)
    return length[:, None] if length.ndim else length


def column(input_ids: jax.Array, at: jax.Array) -> jax.Array:
    """[B, 1]: one column of input_ids [B, S], a scalar or [B, 1] of them; the nearest where there is none."""
    if at.ndim == 0:
        return jax.lax.dynamic_slice_in_dim(input_ids, at, 1, axis=1)
    return jnp.take_along_axis(input_ids, at, axis=1, mode="clip")


def ban(scores: jax.Array, ids: jax.Array, where: jax.Array) -> jax.Array:
    """-inf for each row's own ids [B, n], where `where` [B, n] holds."""
    rows = jnp.arange(scores.shape[0])[:, None]
    return scores.at[rows, jnp.where(where, ids, NO_ID)].set(-jnp.inf, mode="drop")


def suppress(scores: jax.Array, ids: ArrayLike, when: ArrayLike = True) -> jax.Array:
    """-inf at `ids` [E], if `when`: for all rows, or [B, 1]."""
    if jnp.ndim(when):
        ids = jnp.broadcast_to(jnp.asarray(ids).reshape(-1), (scores.shape[0], jnp.size(ids)))
        return ban(scores, ids, jnp.asarray(when))
    return scores.at[:, jnp.where(when, jnp.asarray(ids), NO_ID)].set(-jnp.inf, mode="drop")


def force(scores: jax.Array, ids: ArrayLike, when: ArrayLike) -> jax.Array:
    """0 at `ids` [E] and -inf elsewhere, if `when`: for all rows, or [B, 1]."""
    forced = jnp.full(scores.shape[1], -jnp.inf).at[jnp.asarray(ids)].set(0.0, mode="drop")
    return jnp.where(when, forced, scores)


def highest_of(scores: jax.Array, count: int) -> jax.Array:
    """[B, count]: the highest scores [B, V] of each row, descending.

    With a barrier: from one of them, known when it compiles, XLA's CPU backend would sort them all, 25 ms a row.
    """
    return jax.lax.optimization_barrier(jax.lax.top_k(scores, count)[0])


def kth_highest(scores: jax.Array, k: ArrayLike, limit: int) -> jax.Array:
    """[B, 1]: the k-th highest score of each row; k is traced, from 1 to the static limit."""
    if limit == 1:
        return jnp.max(scores, axis=-1, keepdims=True)
    limit = min(limit, scores.shape[-1])
    highest = highest_of(scores, limit)
    index = jnp.clip(jnp.asarray(k, jnp.int32) - 1, 0, limit - 1)
    return jnp.take_along_axis(highest, jnp.broadcast_to(index, (scores.shape[0], 1)), axis=-1)


def smallest_float(holds: Callable[[jax.Array], jax.Array], rows: int, at_most: float) -> jax.Array:
    """[rows, 1]: the smallest float from 0 to at_most for which a monotone predicate holds, or at_most.

    A bisection over bits: those of floats which are not negative, read as integers, are in the floats' order. Exact in
    31 steps, each a pass over the scores, where sorting 151,936 of them takes 45 times a pass's time.
    """
    last = int(np.float32(at_most).view(np.int32))

    def halve(_: int, span: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = span
        middle = low + (high - low) // 2
        enough = holds(jax.lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(enough, low, jnp.minimum(middle + 1, high)), jnp.where(enough, middle, high)

    span = jnp.zeros((rows, 1), jnp.int32), jnp.full((rows, 1), last, jnp.int32)
    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, last.bit_length(), halve, span)[1], jnp.float32)
