"""Random cases for logits processors, and the comparison with Transformers' own: alone, and in a decoding program."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from tests.reference import torch

V = 97
BATCH, LONGEST, BUFFER = 3, 31, 40  # rows and columns of the texts, and of the buffer that they are in
WHOLE = (1, 6)  # but for texts of this shape, which are passed as they are

# At least 20 seeds and shapes each. What takes the time is compiling: two programs a processor.
examples = settings(max_examples=25, deadline=None)


class Case(NamedTuple):
    """ids [B, S] int32, scores [B, V] float32, and a generator for what else a test draws."""

    ids: np.ndarray
    scores: np.ndarray
    rng: np.random.Generator


@st.composite
def cases(draw: st.DrawFn, alphabet: int = V) -> Case:
    """Random text over an alphabet, which repeats itself the more the smaller that is, and random scores."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    B, S = draw(st.just(WHOLE) | st.tuples(st.just(BATCH), st.integers(1, LONGEST)))
    scores = rng.standard_normal((B, V)).astype(np.float32) * draw(st.sampled_from([0.5, 3.0, 10.0]))
    if draw(st.booleans()):
        scores[rng.random(scores.shape) < 0.3] = -np.inf
    return Case(rng.integers(0, alphabet, (B, S)).astype(np.int32), scores.astype(np.float32), rng)


@jax.jit
def run(processor: Any, ids: jax.Array, scores: jax.Array, cur_len: jax.Array | None = None) -> jax.Array:
    """One program for all processors of a kind: their values are traced."""
    return processor(ids, scores, cur_len)


def theirs(name: str, *args: Any, **kwargs: Any) -> Any:
    """Transformers' processor."""
    from transformers.generation import logits_process

    return getattr(logits_process, name)(*args, **kwargs)


def apply_theirs(processor: Any, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    return processor(torch.tensor(ids, dtype=torch.long), torch.tensor(scores)).numpy()


def buffered(ids: np.ndarray, columns: int = BUFFER) -> np.ndarray:
    """ids in a longer buffer, as the loop has them; what is past them must not matter."""
    return np.pad(ids, ((0, 0), (0, columns - ids.shape[1])), mode="wrap")


def check(mine: Any, other: Any, case: Case, rtol: float = 1e-6, atol: float = 0.0) -> np.ndarray:
    """Equal to Transformers', in a buffer of which cur_len columns count, or alone where the shape is WHOLE."""
    ids, scores, _ = case
    want = apply_theirs(other, ids, scores)
    alone = ids.shape[1] == WHOLE[1]
    got = run(mine, ids, scores) if alone else run(mine, buffered(ids), scores, ids.shape[1])
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)
    return want
