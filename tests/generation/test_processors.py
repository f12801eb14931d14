"""Every processor equals Transformers' on random scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxqwen.generation import processors as ours
from tests.reference import torch

V = 97
SEEDS = range(20)


def sample(seed):
    """Random ids [B, S], scores [B, V] and a generator for the rest."""
    rng = np.random.default_rng([seed, 0xF1A])
    B, S = int(rng.integers(1, 5)), int(rng.integers(1, 30))
    scores = (rng.standard_normal((B, V)) * rng.choice([0.5, 3.0, 10.0])).astype(np.float32)
    if seed % 3 == 0:
        scores[rng.random(scores.shape) < 0.3] = -np.inf
    return rng.integers(0, V, (B, S)).astype(np.int32), scores, rng


def check(mine, theirs, ids, scores):
    """Equal as called alone, and in a jitted program on a longer buffer of which cur_len columns count."""
    want = theirs(torch.tensor(ids, dtype=torch.long), torch.tensor(scores)).numpy()
    np.testing.assert_allclose(mine(jnp.asarray(ids), jnp.asarray(scores)), want, rtol=1e-6, atol=0)
    buffer = np.concatenate([ids, np.full((len(ids), 9), 5, np.int32)], axis=1)
    got = jax.jit(lambda p, *args: p(*args))(mine, buffer, scores, ids.shape[1])
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=0)


def theirs(name, *args, **kwargs):
    import transformers

    return getattr(transformers, name)(*args, **kwargs)


@pytest.mark.parametrize("seed", SEEDS)
def test_temperature(seed):
    ids, scores, rng = sample(seed)
    t = float(rng.uniform(0.1, 3))
    check(ours.TemperatureLogitsWarper(t), theirs("TemperatureLogitsWarper", t), ids, scores)


@pytest.mark.parametrize("seed", SEEDS)
def test_top_k(seed):
    ids, scores, rng = sample(seed)
    scores = np.round(scores * 2) / 2 if seed % 2 else scores  # ties at the k-th are all kept
    k, least = int(rng.integers(1, 2 * V)), int(rng.integers(1, 4))
    mine = ours.TopKLogitsWarper(k, min_tokens_to_keep=least)
    check(mine, theirs("TopKLogitsWarper", k, min_tokens_to_keep=least), ids, scores)


@pytest.mark.parametrize("seed", SEEDS)
def test_top_p(seed):
    ids, scores, rng = sample(seed)
    p, least = float(rng.choice([0.0, 1.0, rng.random(), rng.random()])), int(rng.integers(1, 4))
    mine = ours.TopPLogitsWarper(p, min_tokens_to_keep=least)
    check(mine, theirs("TopPLogitsWarper", p, min_tokens_to_keep=least), ids, scores)


def test_top_p_keeps_all_ties():
    """Six tokens of 1/8 beside one of 1/4: half of the mass needs some of the six, and they are not told apart."""
    scores = np.log(np.array([[0.25] + [0.125] * 6], np.float32))
    kept = np.isfinite(ours.TopPLogitsWarper(0.5)(jnp.zeros((1, 1), jnp.int32), jnp.asarray(scores)))
    assert kept.all()
    assert np.isfinite(ours.TopPLogitsWarper(0.2)(jnp.zeros((1, 1), jnp.int32), jnp.asarray(scores))).sum() == 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ignore", ["none", "int", "rows"])
def test_repetition_penalty(seed, ignore):
    ids, scores, rng = sample(seed)
    penalty = float(rng.uniform(0.3, 2.5))
    skip = rng.integers(0, ids.shape[1] + 1, len(ids))
    mine, other = {"none": (None, None), "int": (int(skip[0]), int(skip[0])), "rows": (skip, torch.tensor(skip))}[
        ignore
    ]
    mine = ours.RepetitionPenaltyLogitsProcessor(penalty, mine)
    check(mine, theirs("RepetitionPenaltyLogitsProcessor", penalty, other), ids, scores)


@pytest.mark.parametrize("seed", SEEDS)
def test_min_length(seed):
    ids, scores, rng = sample(seed)
    eos = rng.choice(V, int(rng.integers(1, 6)), replace=False).tolist()
    n = int(rng.integers(0, 40))
    check(ours.MinLengthLogitsProcessor(n, eos), theirs("MinLengthLogitsProcessor", n, eos), ids, scores)
    args = (int(rng.integers(0, ids.shape[1] + 1)), int(rng.integers(0, 20)), eos)
    mine = ours.MinNewTokensLengthLogitsProcessor(*args)
    check(mine, theirs("MinNewTokensLengthLogitsProcessor", *args), ids, scores)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("TemperatureLogitsWarper", (0.0,)),
        ("TemperatureLogitsWarper", (-1.0,)),
        ("TopKLogitsWarper", (0,)),
        ("TopKLogitsWarper", (-3,)),
        ("TopPLogitsWarper", (1.5,)),
        ("TopPLogitsWarper", (-0.1,)),
        ("RepetitionPenaltyLogitsProcessor", (2,)),
        ("RepetitionPenaltyLogitsProcessor", (-1.0,)),
        ("RepetitionPenaltyLogitsProcessor", (1.5, -2)),
        ("MinLengthLogitsProcessor", (-1, 3)),
        ("MinNewTokensLengthLogitsProcessor", (-1, 2, 3)),
        ("MinNewTokensLengthLogitsProcessor", (1, -2, 3)),
    ],
)
def test_refusals_are_theirs(name, args):
    with pytest.raises(ValueError, match="has to be"):
        theirs(name, *args)
    with pytest.raises(ValueError, match="has to be"):
        getattr(ours, name)(*args)
