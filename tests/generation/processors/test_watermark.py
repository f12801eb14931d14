"""Watermarks: the same green lists and the same reweighing as Transformers'."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxqwen import generation as ours
from flaxqwen.generation.processors import torch_random
from tests.generation.processors.oracle import Case, V, apply_theirs, buffered, cases, check, examples, run, theirs
from tests.reference import torch

KEYS = st.sampled_from([15485863, 7, 2**40 + 17, 2**63 - 25, 2**64 - 59, -3, -(2**63)])


@pytest.mark.parametrize(("n", "steps"), [(97, 60), (97, 96), (5, 4), (2, 1), (2_000, 1_800), (40_000, 10_000)])
def test_permutations_are_those_of_torch(n: int, steps: int, rng: np.random.Generator) -> None:
    seeds = rng.integers(0, 2**32, 6).astype(np.uint32)
    words = jax.jit(torch_random.draws, static_argnums=1)(seeds, 1300)
    first = jax.jit(jax.vmap(torch_random.permutation_starts_with, (0, None, None, None)), static_argnums=(1, 3))
    one = jax.jit(torch_random.permutation_starts_with_value, static_argnums=(2, 4))
    for count in {1, steps // 2, steps}:
        permutations = [torch.randperm(n, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
        want = np.zeros((len(seeds), n), bool)
        for row, permutation in zip(want, permutations, strict=True):
            row[permutation[:count].numpy()] = True
        np.testing.assert_array_equal(first(seeds, n, count, steps), want)
        # Of so many values some move more often than one pass looks at: the others wait for them.
        rows = np.repeat(np.arange(len(seeds)), 200)
        values = rng.integers(0, n, len(rows)).astype(np.int32)
        np.testing.assert_array_equal(one(seeds[rows], values, n, count, steps), want[rows, values])
    for row, seed in zip(words, seeds, strict=True):
        np.testing.assert_array_equal(row, torch_random.host_draws(1300, int(seed)))
        generator = torch.Generator().manual_seed(int(seed))
        bits = torch.randint(0, 2, (1300,), generator=generator).numpy()
        np.testing.assert_array_equal(np.asarray(row) % 2, bits)


@examples
@given(cases(), KEYS, st.integers(1, 4), st.sampled_from([0.25, 0.26, 0.9]))
def test_lefthash(case: Case, key: int, width: int, ratio: float) -> None:
    args = (V, "cpu", ratio, float(case.rng.normal()), key, "lefthash", width)
    check(ours.WatermarkLogitsProcessor(*args), theirs("WatermarkLogitsProcessor", *args), case, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(cases(), st.sampled_from([15485863, 9 - 2**63]), st.integers(1, 4), st.sampled_from([0.25, 0.26]))
def test_selfhash(case: Case, key: int, width: int, ratio: float) -> None:
    scores = case.rng.permuted(
        np.linspace(-9, 9, case.scores.size, dtype=np.float32).reshape(case.scores.shape), axis=1
    )
    args = (V, "cpu", ratio, float(case.rng.normal()), key, "selfhash", width)
    check(
        ours.WatermarkLogitsProcessor(*args),
        theirs("WatermarkLogitsProcessor", *args),
        case._replace(scores=scores),
        atol=1e-6,
    )


def synthid(size: int = 2**16, history: int = 1024, **options: Any) -> tuple[Any, Any]:
    """(ours, Transformers') with the same arguments."""
    kwargs = {"ngram_len": 4, "keys": [654, 400, 836, 123, 2**40, -5], "sampling_table_seed": 3} | options
    kwargs |= {"sampling_table_size": size, "context_history_size": history}
    prompt = kwargs.pop("prompt_length", None)
    other = theirs("SynthIDTextWatermarkLogitsProcessor", **kwargs, device="cpu")
    return ours.SynthIDTextWatermarkLogitsProcessor(**kwargs, prompt_length=prompt), other


SYNTHID = [{}, {"skip_first_ngram_calls": True}, {"debug_mode": True}, {"size": 16, "history": 3}, {"ngram_len": 1}]


@pytest.mark.parametrize("options", SYNTHID, ids=str)
def test_synthid(options: dict[str, Any], rng: np.random.Generator) -> None:
    """Text after text, token by token: Transformers' processor counts its calls. Of two tokens, contexts repeat."""
    repeated = 0
    for prompt in (1, 2, 6):
        mine, other = synthid(prompt_length=prompt, **options)
        ids = rng.integers(0, 2, (3, 30)).astype(np.int32)
        for length in range(prompt, 30):
            scores = rng.standard_normal((3, V)).astype(np.float32)
            want = apply_theirs(other, ids[:, :length], scores)
            got = np.asarray(run(mine, buffered(ids[:, :length]), scores, length))
            repeated += int((want == (1 if "debug_mode" in options else scores)).all(axis=1).sum())
            # Six layers of 1 + bit - mass: where the mass is nearly 1, few digits are left, there and here.
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert repeated > 0


@examples
@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 1), (V, 2**20), (331, 64), (40_000, 16)]))
def test_synthid_of_any_scores(seed: int, sizes: tuple[int, int]) -> None:
    """Of vocabularies of which the table of bits covers a part, and of peaked distributions.

    Where one token has nearly all, a layer leaves the others nothing or a last digit, as that token's mass is rounded,
    there and here (in 1% of texts): so what must be float32's least number are the tokens that cannot come.
    """
    rng, (vocab_size, size) = np.random.default_rng(seed), sizes
    scores = (rng.standard_normal((1, vocab_size)) * rng.choice([0.3, 2.0, 6.0])).astype(np.float32)
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    scores[:, -1] = 0.0
    mine, other = synthid(size)
    ids = np.ones((1, 6), np.int32)
    want, got = apply_theirs(other, ids, scores), np.asarray(run(mine, ids, scores))
    np.testing.assert_allclose(np.exp(got), np.exp(want), rtol=0, atol=1e-6)
    assert set(got[np.isneginf(scores)]) == set(want[np.isneginf(scores)]) <= {np.finfo(np.float32).min}


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"greenlist_ratio": 0.0}, "greenlist_ratio"),
        ({"greenlist_ratio": 1.0}, "greenlist_ratio"),
        ({"seeding_scheme": "righthash"}, "seeding_scheme"),
        ({"hashing_key": 2**64}, "hashing_key"),
    ],
    ids=str,
)
def test_refusals_are_theirs(changes: dict[str, Any], refused: str) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        theirs("WatermarkLogitsProcessor", V, "cpu", **changes)
    with pytest.raises(ValueError, match=f"`{refused}` has to be"):
        ours.WatermarkLogitsProcessor(V, **changes)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"sampling_table_size": 1000}, "sampling_table_size"),
        ({"sampling_table_size": 2**25}, "sampling_table_size"),
        ({"keys": []}, "keys"),
        ({"ngram_len": 0}, "ngram_len"),
        ({"context_history_size": 0}, "context_history_size"),
    ],
    ids=str,
)
def test_synthid_that_is_refused(changes: dict[str, Any], refused: str) -> None:
    options = {"ngram_len": 4, "keys": [1], "sampling_table_size": 16, "sampling_table_seed": 0}
    with pytest.raises(ValueError, match=f"`{refused}` has to be"):
        ours.SynthIDTextWatermarkLogitsProcessor(**(options | {"context_history_size": 4} | changes))
