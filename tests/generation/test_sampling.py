"""Draws follow the exact distribution, and a row's text depends on its seed, its place and its own prompt alone."""

from __future__ import annotations

import numpy as np
import pytest

from flaxqwen.generation.config import GenerationConfig
from flaxqwen.model import Model
from flaxqwen.models.qwen2 import Qwen2ForCausalLM
from tests.reference import padded_mask, pair, random_ids, th, torch

VOCAB, DRAWS = 61, 2000
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
PLAIN = {"do_sample": True, "top_k": 0, "eos_token_id": None}
# Every warper with next to no effect, so that all tests are one program in which one of them acts.
ALL = PLAIN | {
    "temperature": 1.001, "top_h": 0.999, "top_k": 60, "top_p": 0.999, "min_p": 1e-4, "typical_p": 0.999,
    "epsilon_cutoff": 1e-5, "eta_cutoff": 1e-5,
}  # fmt: skip
OPTIONS = [
    PLAIN,
    ALL | {"temperature": 0.6},
    ALL | {"top_h": 0.6},
    ALL | {"top_k": 9},
    ALL | {"top_p": 0.6},
    ALL | {"min_p": 0.3},
    ALL | {"typical_p": 0.5},
    ALL | {"epsilon_cutoff": 0.02},
    ALL | {"eta_cutoff": 0.5},
    ALL | {"temperature": 1.4, "top_k": 20, "top_p": 0.8},
]


@pytest.fixture(scope="module")
def models():
    """(Transformers' model, ours)."""
    changes = SMALL | {"num_key_value_heads": 1, "max_position_embeddings": 2048}
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, seed=1, **changes)
    return theirs, Model(module, params, module.config, GenerationConfig())


def next_probs(model, ids, options):
    """[B, V] float64: what Transformers would draw the next token from."""

    def loop(model, input_ids, logits_processor, **_):
        with torch.no_grad():
            return logits_processor(input_ids, model(input_ids).logits[:, -1]).double().softmax(-1)

    return model.generate(th(ids), custom_generate=loop, max_new_tokens=2, **options).numpy()


def p_value(counts, probs):
    """Of chi-squared; rare outcomes are one."""
    from scipy import stats

    assert counts[probs == 0].sum() == 0
    expected = probs * counts.sum()
    common = expected >= 5
    observed, expected = (np.append(a[common], a[~common].sum()) for a in (counts, expected))
    keep = expected > 0
    return stats.chisquare(observed[keep], expected[keep] * observed[keep].sum() / expected[keep].sum()).pvalue


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda given: str({k: v for k, v in given.items() if ALL.get(k) != v} or "plain")
)
def test_draws_follow_the_exact_distribution(options, models, record_property):
    """The first token, the second, and both: chi-squared of 2,000 draws, each p > 1e-4."""
    theirs, mine = models
    ids = np.random.default_rng(8).integers(0, VOCAB, (1, 6)).astype(np.int32)
    pairs = np.concatenate([np.repeat(ids, VOCAB, axis=0), np.arange(VOCAB, dtype=np.int32)[:, None]], axis=1)
    first = next_probs(theirs, ids, options)[0]
    joint = first[:, None] * next_probs(theirs, pairs, options)
    bans = options is not PLAIN and options["temperature"] != 0.6
    assert ((first == 0).sum() > 6) == bans
    got = mine.generate(ids, max_new_tokens=2, seed=77, num_return_sequences=DRAWS, **options)[:, 6:]
    counts = np.zeros((VOCAB, VOCAB))
    np.add.at(counts, tuple(got.T), 1)
    values = [
        p_value(counts.sum(axis=1), first),
        p_value(counts.sum(axis=0), joint.sum(axis=0)),
        p_value(counts.reshape(-1), joint.reshape(-1)),
    ]
    record_property("p_values", list(map(float, values)))
    print("first, second, both: p =", ", ".join(f"{value:.3g}" for value in values))
    assert min(values) > 1e-4


def test_a_rows_text_is_its_own(models, rng):
    """Whatever is beside it, however much it is padded, and into whichever buckets. (Nor on chunks: test_generate.)"""
    _, mine = models
    ids, mask = random_ids(rng, (3, 8), VOCAB), padded_mask([8, 5, 8], 8, "left")

    def row(ids, mask, seed=11):
        got = mine.generate(ids, attention_mask=mask, max_new_tokens=12, seed=seed, **PLAIN | {"temperature": 1.5})
        return got[1, ids.shape[1] :]

    want = row(ids, mask)
    np.testing.assert_array_equal(row(ids, mask), want)
    assert (row(ids, mask, seed=12) != want).any()
    for columns in (12, 510):  # of the same buckets, and of other ones of prompts and caches
        other = random_ids(rng, (3, columns), VOCAB)
        other[1, -5:] = ids[1, -5:]
        np.testing.assert_array_equal(row(other, padded_mask([columns, 5, 7], columns, "left")), want)
    np.testing.assert_array_equal(row(ids[:2], mask[:2]), want)
