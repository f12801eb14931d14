"""Stop strings inside the compiled loop: a row ends with the token in which one of them ends.

Strings are matched in bytes, backwards from the newest token, by tables over the vocabulary: no string is decoded
while tokens are made. Equal to StopStringCriteria in transformers/generation/stopping_criteria.py.

Axes: B batch, S columns of the sequence buffer, V vocabulary, C classes of tokens, N stop strings, E = 1 + bytes of the
longest stop string.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flaxqwen.generation.processors.base import length_of
from flaxqwen.generation.tokens import bytes_of_tokens

SMALLEST_CLASSES, SMALLEST_BYTES = 64, 16


class StopStrings(flax.struct.PyTreeNode):
    """The tables of some stop strings. Tokens of one class are alike to all of them; class 0 fits nowhere.

    token_class: [V] int32.
    length: [C] int32, bytes of a token.
    ends: [C, N, E] bool: the string may end inside such a token, which then holds its last e bytes.
    fits: [C, N, E] bool: such a token fits before the last e bytes of the string; always where that is all of it.
    """

    token_class: jax.Array
    length: jax.Array
    ends: jax.Array
    fits: jax.Array

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike) -> jax.Array:
        """[B] bool: whether a string ends in the newest of the cur_len tokens ([] or [B]) of input_ids [B, S]."""
        longest = self.ends.shape[-1] - 1
        columns = length_of(input_ids, cur_len) - 1 - jnp.arange(longest)  # newest first: each holds a byte at least
        take = jnp.take if columns.ndim == 1 else jnp.take_along_axis
        tokens = take(input_ids, jnp.maximum(columns, 0), axis=1)
        classes = jnp.where(columns >= 0, self.token_class[tokens], 0)  # [B, longest]
        older = classes[:, 1:]
        lengths = self.length[older]
        behind = jnp.cumsum(lengths, axis=1) - lengths  # bytes between an older token and the newest
        held = jnp.minimum(jnp.arange(longest + 1) + behind[..., None], longest)  # [B, longest - 1, E]
        strings = jnp.arange(self.ends.shape[1])[:, None]
        fits = self.fits[older[:, :, None, None], strings, held[:, :, None, :]]  # [B, longest - 1, N, E]
        return (self.ends[classes[:, 0]] & fits.all(axis=1)).any(axis=(1, 2))


def stop_strings_of(tokenizer: Any, strings: str | tuple[str, ...], vocab_size: int) -> StopStrings:
    """The tables of `strings` for a tokenizer of Transformers, and a model of `vocab_size` tokens.

    Raises:
      ValueError: no tokenizer; an empty string, or none.
    """
    if tokenizer is None:
        raise ValueError("stop_strings needs the tokenizer: pass it to generate() as `tokenizer`")
    strings = (strings,) if isinstance(strings, str) else strings
    if not strings or not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"stop_strings must be a string or some, none of them empty, found {strings!r}")
    return _make_tables(tokenizer, len(tokenizer), strings, vocab_size)


@lru_cache(maxsize=8)
def _make_tables(tokenizer: Any, size: int, strings: tuple[str, ...], vocab_size: int) -> StopStrings:
    """Few shapes: other strings, of about as many bytes, compile nothing anew."""
    stops = [string.encode() for string in strings]
    N, longest = _power_of_two(len(stops), 1), _power_of_two(max(map(len, stops)), SMALLEST_BYTES)
    token_class = np.zeros(vocab_size, np.int32)
    rows = {_row(b"", stops, N, longest): 0}
    starts = tuple({stop[:i] for stop in stops for i in range(1, len(stop) + 1)})
    ends = tuple({stop[-i:] for stop in stops for i in range(1, len(stop) + 1)})
    for token, text in bytes_of_tokens(tokenizer, size):
        # Most tokens hold no part of a string, which these tell in 1 us.
        touches = text.endswith(starts) or text.startswith(ends) or any(text in stop or stop in text for stop in stops)
        if touches and token < vocab_size:
            token_class[token] = rows.setdefault(_row(text, stops, N, longest), len(rows))
    C = _power_of_two(len(rows), SMALLEST_CLASSES)
    tables = np.zeros((C, 2, N, longest + 1), bool)
    length = np.ones(C, np.int32)
    for (size, row), index in rows.items():
        length[index] = size
        tables[index] = np.frombuffer(row, bool).reshape(tables.shape[1:])
    return StopStrings(*jax.device_put((token_class, length, tables[:, 0], tables[:, 1])))


def _row(text: bytes, stops: list[bytes], N: int, longest: int) -> tuple[int, bytes]:
    """(length, tables) of a token: `ends` and `fits` of StopStrings, [2, N, E]."""
    ends, fits = np.zeros((2, N, longest + 1), bool)
    for i, stop in enumerate(stops):
        n = len(stop)
        for held in range(1, len(text) + 1):
            if text[:held].endswith(stop[-held:]):
                ends[i, min(held, n)] = True
        fits[i, n:] = True
        for held in range(1, n):
            before = stop[: n - held]
            fits[i, held] = bool(text) and (before.endswith(text) or text.endswith(before))
    return max(min(len(text), longest), 1), np.stack([ends, fits]).tobytes()


def _power_of_two(n: int, smallest: int) -> int:
    return max(smallest, 1 << (n - 1).bit_length())
