"""Every warper equals Transformers' on random scores."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from flaxqwen import generation as ours
from tests.generation.processors.oracle import Case, V, cases, check, examples, run, theirs

# name -> its value, drawn at random; all but temperature and top-h take min_tokens_to_keep.
VALUES: dict[str, Any] = {
    "TemperatureLogitsWarper": lambda rng: rng.uniform(0.1, 3),
    "TopKLogitsWarper": lambda rng: int(rng.integers(1, 2 * V)),
    "TopPLogitsWarper": lambda rng: rng.choice([0.0, 1.0, rng.random(), rng.random(), rng.random()]),
    "MinPLogitsWarper": lambda rng: rng.choice([0.0, 1.0, rng.random(), 0.1 * rng.random()]),
    "TypicalLogitsWarper": lambda rng: rng.uniform(0.01, 0.98),
    "EpsilonLogitsWarper": lambda rng: 10 ** rng.uniform(-5, -0.2),
    "EtaLogitsWarper": lambda rng: 10 ** rng.uniform(-5, -0.2),
    "TopHLogitsWarper": lambda rng: rng.uniform(0.05, 0.98),
}


def arguments(name: str, rng: np.random.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
    value = VALUES[name](rng)
    value = value if isinstance(value, int) else float(value)
    if name in ("TemperatureLogitsWarper", "TopHLogitsWarper"):
        return (value,), {}
    least = int(rng.choice([1, 1, 2, 3, 5]))
    return (value,), {"min_tokens_to_keep": least, "filter_value": float(rng.choice([-np.inf, -1e4]))}


@pytest.mark.parametrize("name", VALUES)
def test_warpers(name: str) -> None:
    @examples
    @given(cases())
    def equal(case: Case) -> None:
        args, kwargs = arguments(name, case.rng)
        check(getattr(ours, name)(*args, **kwargs), theirs(name, *args, **kwargs), case)

    equal()


@examples
@given(cases())
def test_ties_at_the_kth_are_all_kept(case: Case) -> None:
    scores = np.round(case.scores * 2) / 2
    k = int(case.rng.integers(1, 2 * V))
    check(ours.TopKLogitsWarper(k), theirs("TopKLogitsWarper", k), case._replace(scores=scores))


def test_top_p_keeps_all_ties() -> None:
    """Six tokens of 1/8 beside one of 1/4: half of the mass needs some of the six, and they are not told apart."""
    ids, scores = jnp.zeros((1, 1), jnp.int32), jnp.log(jnp.asarray([[0.25] + [0.125] * 6]))
    assert np.isfinite(ours.TopPLogitsWarper(0.5)(ids, scores)).all()
    assert np.isfinite(ours.TopPLogitsWarper(0.2)(ids, scores)).sum() == 1


def test_top_p_among_few_tokens_and_among_many(rng: np.random.Generator) -> None:
    """Rows whose nucleus has some, and thousands of tokens, and one that top-k cut before: each as if it were alone."""
    scores = rng.standard_normal((3, 5000)) * [[12], [0.3], [0.3]]
    scores[2, np.argsort(scores[2])[:-40]] = -np.inf
    ids, scores, top_p = jnp.zeros((3, 1), jnp.int32), scores.astype(np.float32), rng.uniform(0.5, 0.95)
    warper = ours.TopPLogitsWarper(top_p)
    kept = np.isfinite(run(warper, ids, scores))
    for row in range(3):
        np.testing.assert_array_equal(kept[row], np.isfinite(run(warper, ids[:1], scores[row : row + 1])[0]))
        order = np.argsort(-scores[row])
        count = kept[row].sum()
        assert kept[row, order[:count]].all()
        weights = np.exp(scores[row, order].astype(np.float64) - scores[row].max())
        probs = weights / weights.sum()
        error = 5000 * 2**-23  # of a sum of so many numbers, whose total is 1, that are rounded before
        assert probs[: count - 1].sum() - error < top_p <= probs[:count].sum() + error
    assert kept[0].sum() < 100 < 1000 < kept[1].sum()
    assert kept[2].sum() < 40


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("traced", [True, False])
def test_the_vocabulary_is_never_sorted(rows: int, traced: bool) -> None:
    """Nor where a processor's values are known when the program is compiled: XLA knew the highest k of one row then."""
    ids, scores = jax.ShapeDtypeStruct((rows, 9), jnp.int32), jax.ShapeDtypeStruct((rows, 5000), jnp.float32)
    for name in VALUES:
        warper = getattr(ours, name)(*([20] if name == "TopKLogitsWarper" else [0.5]))
        if traced:
            lowered = run.lower(warper, ids, scores, 5)
        else:
            lowered = jax.jit(lambda ids, scores, warper=warper: warper(ids, scores, 5)).lower(ids, scores)
        assert " sort(" not in lowered.compile().as_text()


@pytest.mark.parametrize("mass", [0.2, 0.5, 0.9])
def test_typical_keeps_the_ties_that_transformers_keeps(mass: float) -> None:
    scores = np.log(np.array([[0.3, 0.1, 0.1, 0.1, 0.1, 0.2, 0.05, 0.05]], np.float32))
    case = Case(np.ones((1, 6), np.int32), scores, np.random.default_rng(0))
    check(ours.TypicalLogitsWarper(mass), theirs("TypicalLogitsWarper", mass), case)


def test_top_h_looks_at_a_hundred_scores(rng: np.random.Generator) -> None:
    case = Case(np.ones((2, 6), np.int32), 0.1 * rng.standard_normal((2, 331)).astype(np.float32), rng)
    want = check(ours.TopHLogitsWarper(0.97), theirs("TopHLogitsWarper", 0.97), case)
    assert (np.isfinite(want).sum(-1) > 90).all()


@pytest.mark.parametrize("name", ["TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper", "EpsilonLogitsWarper"])
def test_min_tokens_to_keep_is_traced(name: str, rng: np.random.Generator) -> None:
    """As many as the tokens that end a beam, and one: up to four of them are one program."""
    make = getattr(ours, name)
    ids, scores = np.ones((1, 6), np.int32), 5 * rng.standard_normal((1, V)).astype(np.float32)
    small = 0.01 if name in ("TopPLogitsWarper", "TypicalLogitsWarper") else 0.99
    kept = [int(np.isfinite(run(make(small, min_tokens_to_keep=k), ids, scores)).sum()) for k in (2, 3, 4, 5)]
    assert kept == [2, 3, 4, 5]
    assert {make(small, min_tokens_to_keep=k).limit for k in (2, 3, 4, 5)} == {5}


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("TemperatureLogitsWarper", (0.0,)),
        ("TemperatureLogitsWarper", (-1.0,)),
        ("TopKLogitsWarper", (0,)),
        ("TopKLogitsWarper", (-3,)),
        ("TopPLogitsWarper", (1.5,)),
        ("TopPLogitsWarper", (-0.1,)),
        ("TopPLogitsWarper", (0.5, -1.0, 0)),
        ("MinPLogitsWarper", (1.5,)),
        ("MinPLogitsWarper", (-0.1,)),
        ("MinPLogitsWarper", (0.1, -1.0, 0)),
        ("TypicalLogitsWarper", (0.0,)),
        ("TypicalLogitsWarper", (1.0,)),
        ("TypicalLogitsWarper", (0.5, -1.0, 0)),
        ("EpsilonLogitsWarper", (0.0,)),
        ("EpsilonLogitsWarper", (1.0,)),
        ("EpsilonLogitsWarper", (0.1, -1.0, 0)),
        ("EtaLogitsWarper", (0.0,)),
        ("EtaLogitsWarper", (1.0,)),
        ("EtaLogitsWarper", (0.1, -1.0, 0)),
        ("TopHLogitsWarper", (0.0,)),
        ("TopHLogitsWarper", (1.1,)),
    ],
)
def test_refusals_are_theirs(name: str, args: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"has to be|must be"):
        theirs(name, *args)
    with pytest.raises(ValueError, match="has to be"):
        getattr(ours, name)(*args)
