"""Beam search gives Transformers' hypotheses, scores and beam indices; beam sampling draws from the exact distribution.

One geometry, and one shape of batch, so that the tests share their programs.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxqwen.cache import KVCache, LayerCache
from flaxqwen.generation import beam, decoding, inputs
from flaxqwen.generation.config import GenerationConfig, resolve
from flaxqwen.model import Model
from flaxqwen.models.qwen2 import Qwen2ForCausalLM
from tests.generation.test_generate import counted_compilations
from tests.reference import close, padded_mask, pair, params_of, random_ids, th, tiny, torch, torch_model

VOCAB = 61  # few tokens, so that beams end early and often
EOS = {"none": None, "one": 7, "several": [7, 11, 30]}
KEEP = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
NEW = 14


@pytest.fixture(scope="module")
def ours():
    _, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, vocab_size=VOCAB)
    return Model(module, params, module.config, GenerationConfig())


def prompts(rng):
    """Two rows, the second padded on the left."""
    return random_ids(rng, (2, 9), VOCAB), padded_mask([9, 5], 9, "left")


def smallest_gap(model):
    """A list that gets, at each step of model.generate, the smallest difference of two candidates' scores."""
    gaps, original = [], model._get_top_k_continuations

    def record(**arguments):
        scores = arguments["accumulated_log_probs"].topk(arguments["beams_to_keep"] + 1).values
        gap = (scores[:, :-1] - scores[:, 1:])[scores[:, 1:] > -1e8]
        gaps.append(float(gap.min()) if gap.numel() else np.inf)
        return original(**arguments)

    model._get_top_k_continuations = record
    return gaps


def compare(ours, rng, models, options):
    """The same output as Transformers' for so many random models; those with ties within rounding do not count."""
    ended = 0
    while models:
        theirs = torch_model("Qwen2ForCausalLM", tiny(vocab_size=VOCAB), seed=int(rng.integers(2**31)))
        gaps = smallest_gap(theirs)
        ids, mask = prompts(rng)
        given = KEEP | {"max_new_tokens": NEW, "pad_token_id": 3} | options(models)
        want = theirs.generate(th(ids), attention_mask=th(mask), do_sample=False, **given)
        if min(gaps) < 2e-5:
            continue
        got = replace(ours, params=params_of(theirs)).generate(ids, attention_mask=mask, **given)
        np.testing.assert_array_equal(got.sequences, want.sequences, err_msg=str(given))
        np.testing.assert_array_equal(got.beam_indices, want.beam_indices)
        # length ** -1 makes scores of some 500
        np.testing.assert_allclose(got.sequences_scores, want.sequences_scores, rtol=1e-6, atol=1e-5)
        assert len(got.scores) == len(want.scores) == len(got.logits) == len(want.logits)
        for mine, other in zip(got.scores + got.logits, want.scores + want.logits, strict=True):
            other = other.numpy()
            np.testing.assert_array_equal(np.isinf(mine), np.isinf(other))
            close(mine[np.isfinite(mine)], other[np.isfinite(other)])
        ended += int((got.beam_indices < 0).any() or got.sequences.shape[1] < 9 + NEW)
        models -= 1
    return ended


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize(("beams", "eos"), [(2, "one"), (4, "several"), (4, "none"), (8, "one")])
def test_beams_are_theirs(beams, eos, early_stopping, rng, ours):
    """48 models in all; among them hypotheses that end early and that do not."""
    penalties = (0.5, 1.0, 2.0, -1.0, 0.0)

    def options(i):
        return {
            "num_beams": beams,
            "early_stopping": early_stopping,
            "length_penalty": penalties[int(rng.integers(5))] if i == 4 else penalties[i - 1],
            "num_return_sequences": beams if i % 2 else 1,
            "eos_token_id": EOS[eos],
        }

    ended = compare(ours, rng, 4, options)
    assert (ended > 0) >= (eos == "several")
    assert ended == 0 or eos != "none"


def test_beams_with_processors_are_theirs(rng, ours):
    """Processors see log-probabilities, and each beam's own tokens. 30 models."""

    def options(i):
        return {
            "num_beams": 4,
            "early_stopping": i % 2 == 0,
            "repetition_penalty": 1.3 if i % 3 else 0.8,
            "no_repeat_ngram_size": 2,
            "num_return_sequences": 4,
            "eos_token_id": EOS["several"],
            "min_new_tokens": 4,
        }

    assert compare(ours, rng, 30, options) > 0


def test_without_padding_and_without_a_dict(rng):
    """The ids alone; a pad id of 0 counts as none, as there."""
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, vocab_size=VOCAB, seed=int(rng.integers(1000)))
    mine = Model(module, params, module.config, GenerationConfig())
    gaps = smallest_gap(theirs)
    for _ in range(3):
        ids = random_ids(rng, (2, 6), VOCAB)
        options = {"num_beams": 2, "num_return_sequences": 2, "eos_token_id": list(range(5, 40)), "pad_token_id": 0}
        want = theirs.generate(th(ids), attention_mask=torch.ones(2, 6), max_new_tokens=8, do_sample=False, **options)
        got = mine.generate(ids, attention_mask=np.ones((2, 6)), max_new_tokens=8, **options)
        assert got.dtype == np.int32
        if min(gaps) > 2e-5:
            np.testing.assert_array_equal(got, want)


def test_the_cache_of_the_running_beams(rng, ours):
    """Is that of their tokens: the search is over after `length` of them; a second turn continues from a cache."""
    ids = random_ids(rng, (2, 9), VOCAB)
    options = KEEP | {"num_beams": 2, "num_return_sequences": 2, "eos_token_id": None, "max_new_tokens": 3}
    got = ours.generate(ids, **options)
    assert got.past_key_values.length.tolist() == [11] * 4
    seen = ours(got.sequences[:, :11]).past_key_values
    for layer, other in zip(got.past_key_values.layers, seen.layers, strict=True):
        # At max_length every candidate has ended, and those that would go on are in no order: compare as sets.
        for mine, want in ((layer.key, other.key), (layer.value, other.value)):
            for row in range(4):
                beams = slice(row // 2 * 2, row // 2 * 2 + 2)
                errors = np.abs(np.asarray(want[beams, :, :11]) - np.asarray(mine[row, :, :11])).max(axis=(1, 2, 3))
                assert np.isfinite(errors).all()
    cached = ours.generate(ids, past_key_values=ours(ids[:, :4]).past_key_values, **options)
    np.testing.assert_array_equal(cached.sequences, got.sequences)


@pytest.mark.parametrize(("capacity", "prompt", "length"), [(384, 130, 300), (384, 5, 129), (40, 5, 33)])
def test_the_reorder_moves_rows_of_new_slots(capacity, prompt, length, rng):
    """Over several blocks, and where the capacity is no multiple of one."""
    shape, parents = (4, 2, capacity, 3), np.asarray([1, 1, 3, 2])
    layers = []
    for _ in range(2):
        key, value = rng.normal(size=(2, *shape)).astype(np.float32)
        for array in (key, value):
            array[[1, 3], :, :prompt] = array[[0, 2], :, :prompt]  # the beams of a prompt share its slots
        layers.append(LayerCache(jnp.asarray(key), jnp.asarray(value)))
    cache = KVCache(tuple(layers), jnp.asarray(length))
    moved = jax.jit(beam._reorder)(cache, parents, prompt)
    for before, after in zip(jax.tree.leaves(layers), jax.tree.leaves(moved.layers), strict=True):
        np.testing.assert_array_equal(after[:, :, :length], np.asarray(before)[parents, :, :length])


def program(ours, capacity):
    """The compiled steps of 4 beams, and the state that they take."""
    options = resolve(
        GenerationConfig(), None, {"max_new_tokens": 8, "num_beams": 4}, input_length=6, max_position_embeddings=2048
    )
    request = inputs.Inputs(np.ones((2, 6), np.int32), np.ones((2, 6), bool))
    keep = {"keep_scores": False, "keep_logits": False}
    choice, prompt = beam.make_beam_choice(request, options, VOCAB), inputs.make_prompt(request, 32, capacity)
    arguments = {"capacity": capacity, "copies": 4, "cache_dtype": np.dtype("float32"), **keep}
    state, _ = jax.eval_shape(
        lambda params, prompt: beam.prefill(ours.module, params, prompt, choice, None, **arguments), ours.params, prompt
    )
    return beam.decode.lower(ours.module, ours.params, state, choice, steps=4, **keep).compile(), state


def test_the_cache_is_reordered_in_place(ours):
    """The steps alias the whole state, and their temporaries are less than one layer's cache."""
    compiled, state = program(ours, 2048)
    layers = [sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layer)) for layer in state.cache.layers]
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(layers)
    assert memory.temp_size_in_bytes < layers[0]


def test_values_never_compile_again(rng, ours):
    ids, mask = prompts(rng)
    base = KEEP | {"num_beams": 4, "max_new_tokens": 9, "eos_token_id": [5, 9, 8]}
    changes = [
        {"length_penalty": 2.0}, {"early_stopping": True}, {"early_stopping": "never"}, {"max_new_tokens": 30},
        {"eos_token_id": [1, 2, 3, 4]}, {"num_return_sequences": 3}, {"pad_token_id": 0}, {"max_new_tokens": 1},
    ]  # fmt: skip
    ours.generate(ids, attention_mask=mask, **base)
    with counted_compilations() as compiled:
        for change in changes:
            ours.generate(prompts(rng)[0], attention_mask=mask, **(base | change))
    assert not compiled


def test_the_search_does_not_depend_on_chunks(rng, ours, monkeypatch):
    ids, mask = prompts(rng)
    options = KEEP | {"num_beams": 4, "eos_token_id": EOS["several"], "max_new_tokens": NEW, "early_stopping": True}
    want = ours.generate(ids, attention_mask=mask, **options)
    monkeypatch.setitem(decoding.CHUNK, "cpu", (3, 1))
    got = ours.generate(ids, attention_mask=mask, **options)
    np.testing.assert_array_equal(got.sequences, want.sequences)
    np.testing.assert_array_equal(got.beam_indices, want.beam_indices)
    assert len(got.scores) == len(want.scores)
    assert got.past_key_values.length.tolist() == want.past_key_values.length.tolist()


def chi_squared(counts, probabilities):
    """The p-value; rare outcomes are one."""
    from scipy import stats

    expected = probabilities * counts.sum()
    common = expected >= 5
    observed, expected = (np.append(a[common], a[~common].sum()) for a in (counts, expected))
    keep = expected > 0
    assert observed[~keep].sum() == 0
    return stats.chisquare(observed[keep], expected[keep] * observed[keep].sum() / expected[keep].sum()).pvalue


def best_of_two(weights):
    """Probability that each outcome is the likelier of two draws without replacement."""
    p = weights / weights.sum()
    pairs = p[:, None] * p[None] * (1 / (1 - p[:, None]) + 1 / (1 - p[None]))
    return (pairs * (p[None] < p[:, None])).sum(axis=1)


def test_beam_sampling_draws_from_the_exact_distribution(ours):
    """The first token and the second, by chi-squared: p > 1e-4. Every row draws for itself.

    The last step draws 2 of the continuations without replacement and returns the likelier. With top_k=4 the first
    step draws all 4 tokens: what goes on is known, and the second step's distribution with it.
    """
    module = ours.module
    row = np.random.default_rng(3).integers(0, VOCAB, (1, 6)).astype(np.int32)

    def log_probs(ids):
        return np.asarray(jax.nn.log_softmax(ours(ids).logits[:, -1]), np.float64)

    def draw(**options):
        ids = np.repeat(row, 200, axis=0)
        rows = [ours.generate(ids, do_sample=True, num_beams=2, seed=seed, **options)[:, 6:] for seed in range(10)]
        return np.concatenate(rows)

    assert module.config.vocab_size == VOCAB
    first = log_probs(row)[0]
    counts = np.bincount(draw(max_new_tokens=1, top_k=VOCAB)[:, 0], minlength=VOCAB)
    assert chi_squared(counts, best_of_two(np.exp(first))) > 1e-4
    running = np.argsort(-first)[:2]
    second = log_probs(np.concatenate([np.repeat(row, 2, axis=0), running[:, None].astype(np.int32)], axis=1))
    tops = np.argsort(-second, axis=1)[:, :4]
    weights = np.zeros((VOCAB, VOCAB))
    for token, score, top, scores in zip(running, first[running], tops, second, strict=True):
        weights[token, top] = np.exp(score + scores[top])
    both = draw(max_new_tokens=2, top_k=4)
    counts = np.bincount(both[:, 0] * VOCAB + both[:, 1], minlength=VOCAB**2)
    assert chi_squared(counts, best_of_two(weights.reshape(-1))) > 1e-4


def test_beam_sampling_is_seeded_and_does_not_depend_on_the_batch(rng, ours):
    ids, mask = prompts(rng)
    options = {"do_sample": True, "num_beams": 4, "temperature": 1.5, "max_new_tokens": 8, "eos_token_id": None}
    one = ours.generate(ids, attention_mask=mask, seed=11, **options)
    np.testing.assert_array_equal(one, ours.generate(ids, attention_mask=mask, seed=11, **options))
    assert (one != ours.generate(ids, attention_mask=mask, seed=12, **options)).any()
    other = np.concatenate([random_ids(rng, (2, 3), VOCAB), random_ids(rng, (2, 9), VOCAB)], axis=1)
    other[1, -5:] = ids[1, -5:]
    again = ours.generate(other, attention_mask=padded_mask([12, 5], 12, "left"), seed=11, **options)
    np.testing.assert_array_equal(one[1, -8:], again[1, -8:])


class Recorder:
    def put(self, value): ...
    def end(self): ...


BAD = [
    ({"num_beams": 2, "streamer": Recorder()}, "streamer cannot be used"),
    ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences must not be more than num_beams=2"),
    ({"num_beams": 0}, "num_beams must be greater than 0"),
    ({"num_beams": 2, "early_stopping": "sometimes"}, "early_stopping must be True, False or 'never'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_refusals_come_before_compiling(options, message, ours):
    with counted_compilations() as compiled, pytest.raises(ValueError, match=message):
        ours.generate([[1, 2]], **options)
    assert not compiled
