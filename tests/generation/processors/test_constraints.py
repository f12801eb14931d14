"""Constraints equal Transformers' on random scores, at the length where they act and at others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given

from flaxqwen import generation as ours
from tests.generation.processors.oracle import Case, V, cases, check, examples, theirs


def some_ids(rng: np.random.Generator) -> list[int]:
    return rng.choice(V, int(rng.integers(1, 7)), replace=False).tolist()


def near(case: Case) -> int:
    """A length that is often that of the text."""
    return max(0, case.ids.shape[1] + int(case.rng.choice([0, 0, 1, -1, 10])))


@examples
@given(cases())
def test_min_length(case: Case) -> None:
    args = (near(case), some_ids(case.rng))
    check(ours.MinLengthLogitsProcessor(*args), theirs("MinLengthLogitsProcessor", *args), case)


@examples
@given(cases())
def test_min_new_tokens(case: Case) -> None:
    prompt = int(case.rng.integers(0, case.ids.shape[1] + 1))
    args = (prompt, max(0, near(case) - prompt), some_ids(case.rng))
    check(ours.MinNewTokensLengthLogitsProcessor(*args), theirs("MinNewTokensLengthLogitsProcessor", *args), case)


@examples
@given(cases())
def test_forced_bos(case: Case) -> None:
    token = int(case.rng.integers(V))
    mine, other = ours.ForcedBOSTokenLogitsProcessor(token), theirs("ForcedBOSTokenLogitsProcessor", token)
    check(mine, other, case)
    check(mine, other, case._replace(ids=case.ids[:, :1]))


@examples
@given(cases())
def test_forced_eos(case: Case) -> None:
    args = (near(case) + 1, some_ids(case.rng))
    check(ours.ForcedEOSTokenLogitsProcessor(*args), theirs("ForcedEOSTokenLogitsProcessor", *args), case)


@examples
@given(cases())
def test_suppress(case: Case) -> None:
    ids = some_ids(case.rng) + [V + 3, -1][: int(case.rng.integers(3))]  # those are no tokens, there and here
    check(ours.SuppressTokensLogitsProcessor(ids), theirs("SuppressTokensLogitsProcessor", ids), case)
    args = (ids, near(case))
    mine = ours.SuppressTokensAtBeginLogitsProcessor(*args)
    check(mine, theirs("SuppressTokensAtBeginLogitsProcessor", *args), case)


@examples
@given(cases())
def test_inf_and_nan_removal_and_normalization(case: Case) -> None:
    scores = case.scores.copy()
    check(ours.LogitNormalization(), theirs("LogitNormalization"), case, atol=1e-6)
    for value in (np.nan, np.inf, -np.inf):
        scores[case.rng.random(scores.shape) < 0.1] = value
    check(ours.InfNanRemoveLogitsProcessor(), theirs("InfNanRemoveLogitsProcessor"), case._replace(scores=scores))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("MinLengthLogitsProcessor", (-1, 3)),
        ("MinNewTokensLengthLogitsProcessor", (-1, 2, 3)),
        ("MinNewTokensLengthLogitsProcessor", (1, -2, 3)),
        ("ForcedEOSTokenLogitsProcessor", (9, -1)),
        ("ForcedEOSTokenLogitsProcessor", (9, [1, -1])),
        ("ForcedEOSTokenLogitsProcessor", (9, [1.5])),
    ],
)
def test_refusals_are_theirs(name: str, args: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="has to be"):
        theirs(name, *args)
    with pytest.raises(ValueError, match="has to be"):
        getattr(ours, name)(*args)
