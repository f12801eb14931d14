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
from flaxqwen.generation import beam, decoding, inputs, search
from flaxqwen.generation.config import GenerationConfig, resolve
from flaxqwen.generation.decoding import Control
from flaxqwen.generation.stopping import Stopping
from flaxqwen.model import Model
from flaxqwen.models.qwen2 import Qwen2ForCausalLM
from tests.reference import (
    close,
    counted_compilations,
    padded_mask,
    pair,
    params_of,
    random_ids,
    th,
    tiny,
    torch_model,
)

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
    """48 models in all; without an end-of-sequence token all hypotheses are of max_length."""
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
    assert ended == 0 or eos != "none"


def test_beams_with_processors_are_theirs(rng, ours):
    """Processors see log-probabilities, and each beam's own tokens. 30 models; some hypotheses end early."""

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


def test_without_padding_and_without_a_dict(rng, ours):
    """The ids alone; a pad id of 0 counts as none, as there."""
    ids = random_ids(rng, (2, 6), VOCAB)
    options = {"num_beams": 2, "num_return_sequences": 2, "eos_token_id": list(range(5, 9)), "pad_token_id": 0}
    found = False
    while not found:
        theirs = torch_model("Qwen2ForCausalLM", tiny(vocab_size=VOCAB), seed=int(rng.integers(2**31)))
        gaps = smallest_gap(theirs)
        want = theirs.generate(th(ids), attention_mask=th(np.ones_like(ids)), max_new_tokens=12, **options)
        # Sequences of different lengths, so that there is something to fill.
        found = min(gaps) > 2e-5 and bool((want[:, 6:] == 5).any()) and len(set(want[:, -1].tolist())) > 1
    mine = replace(ours, params=params_of(theirs))
    got = mine.generate(ids, attention_mask=np.ones_like(ids), max_new_tokens=12, **options)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, want)


def begin(ours, ids, mask, **changes):
    """The options, and the program's choice and state after the first token, of a search with 4 beams."""
    given = KEEP | {"num_beams": 4, "max_new_tokens": NEW, "eos_token_id": EOS["several"]} | changes
    options = resolve(GenerationConfig(), None, given, input_length=ids.shape[1], max_position_embeddings=2048)
    request = inputs.Inputs(ids, mask.astype(bool))
    choice = search.make_beam_choice(ours, request, options, Control(Stopping()))
    keep = {"keep_scores": options.output_scores, "keep_logits": options.output_logits}
    state, _ = decoding.start(beam.prefill, ours, request, choice, None, NEW + 4, copies=4, **keep)
    return choice, state.replace(cache=state.cache.replace(bound=512)), keep


def test_the_cache_is_that_of_the_running_beams(rng, ours):
    """Row by row, the keys and values that forward finds for the beams' own tokens."""
    ids, mask = prompts(rng)
    choice, state, keep = begin(ours, ids, mask)
    for _ in range(2):
        state, _ = beam.decode(ours.module, ours.variables, state, choice, steps=4, **keep)
    seen = int(state.cur_len) - 1
    assert seen == int(state.cache.length) == 9 + 8
    mask = np.pad(np.repeat(mask, 4, axis=0), ((0, 0), (0, 8)), constant_values=1)
    sequences = np.asarray(state.running.sequences).reshape(8, -1)[:, :seen]
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    want = ours(sequences, attention_mask=mask, position_ids=positions).past_key_values
    real = np.broadcast_to(mask[:, None, :, None] == 1, want.layers[0].key.shape)
    for mine, other in zip(jax.tree.leaves(state.cache.layers), jax.tree.leaves(want.layers), strict=True):
        close(mine[:, :, :seen], other, where=real)


def test_continuing_from_a_cache(rng, ours):
    """Only what is new of the prompt is run; the result is that without a cache, and so is its own cache's length."""
    ids, mask = prompts(rng)
    options = KEEP | {"num_beams": 4, "num_return_sequences": 4, "eos_token_id": EOS["several"], "max_new_tokens": NEW}
    want = ours.generate(ids, attention_mask=mask, **options)
    seen = ours(ids[:, :6], attention_mask=mask[:, :6], position_ids=np.asarray([range(6), [0, 0, 0, 0, 0, 1]]))
    got = ours.generate(ids, attention_mask=mask, past_key_values=seen.past_key_values, **options)
    np.testing.assert_array_equal(got.sequences, want.sequences)
    np.testing.assert_allclose(got.sequences_scores, want.sequences_scores, atol=1e-5)
    assert got.past_key_values.length.tolist() == [9 + len(got.scores) - 1] * 8


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


def test_the_cache_is_reordered_in_place(rng, ours):
    """The steps alias the whole state, and their temporaries are less than one layer's cache."""
    choice, state, keep = begin(ours, *prompts(rng), output_scores=False, output_logits=False)
    state = state.replace(cache=state.cache.replace(bound=None).grow(4096))
    compiled = beam.decode.lower(ours.module, ours.variables, state, choice, steps=4, **keep).compile()
    layers = [sum(leaf.nbytes for leaf in jax.tree.leaves(layer)) for layer in state.cache.layers]
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
    monkeypatch.setitem(search.CHUNK, "cpu", (3, 1))
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
    ({"num_beams": 2, "output_logprobs": True, "return_dict_in_generate": True}, "output_logprobs .* cannot be used"),
    ({"num_beams": 0}, "num_beams must be greater than 0"),
    ({"num_beams": 2, "early_stopping": "sometimes"}, "early_stopping must be True, False or 'never'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_refusals_come_before_compiling(options, message, ours):
    with counted_compilations() as compiled, pytest.raises(ValueError, match=message):
        ours.generate([[1, 2]], **options)
    assert not compiled


def test_beams_cannot_be_streamed_step_by_step(ours, rng):
    with pytest.raises(ValueError, match="a streamer cannot be used"):
        ours.stream(random_ids(rng, (1, 5), VOCAB), num_beams=2)


def with_both(ours, rng, **options):
    """(our model, generate()'s arguments, our output, Transformers') of a random model; ties are left aside."""
    while True:
        theirs = torch_model("Qwen2ForCausalLM", tiny(vocab_size=VOCAB), seed=int(rng.integers(2**31)))
        gaps = smallest_gap(theirs)
        ids, mask = prompts(rng)
        given = KEEP | {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": NEW, "pad_token_id": 3}
        given |= {"inputs": ids, "attention_mask": mask} | options
        want = theirs.generate(do_sample=False, **(given | {"inputs": th(ids), "attention_mask": th(mask)}))
        if min(gaps) > 2e-5:
            break
    mine = replace(ours, params=params_of(theirs))
    got = mine.generate(**given)
    np.testing.assert_array_equal(got.sequences, want.sequences)
    np.testing.assert_array_equal(got.beam_indices, want.beam_indices)
    np.testing.assert_allclose(got.sequences_scores, want.sequences_scores, rtol=1e-6, atol=1e-5)
    return mine, given, got, want


@pytest.mark.parametrize("eos", ["none", "one"])
def test_criteria_end_candidates(eos, ours, rng):
    """A user's criterion on the host, and the same traced into the loop: each candidate by itself."""

    def on_host(input_ids, scores, **_):
        return (input_ids[:, -1] % 5 == 0) & (input_ids.shape[1] > 12)

    def traced(input_ids, scores, cur_len):
        newest = jax.lax.dynamic_slice_in_dim(input_ids, cur_len - 1, 1, axis=1)[:, 0]
        return (newest % 5 == 0) & (cur_len > 12)

    for _ in range(3):
        with pytest.warns(UserWarning, match="on_host: called on the host at every step"):
            mine, given, _, want = with_both(ours, rng, eos_token_id=EOS[eos], stopping_criteria=[on_host])
        got = mine.generate(**(given | {"stopping_criteria": [traced]}))
        np.testing.assert_array_equal(got.sequences, want.sequences)


def test_stop_strings_end_candidates(ours, rng):
    """Strings of several tokens, which begin and end inside of tokens."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    pairs = [(a, b) for a in "abcx" for b in "abcxyz"]
    words = [*"abcdefghijklmnopqrstuvwxyz", *(a + b for a, b in pairs)]
    backend = Tokenizer(BPE({word: i for i, word in enumerate(words)}, pairs))
    backend.decoder = decoders.Fuse()
    tokenizer, ended = PreTrainedTokenizerFast(tokenizer_object=backend), 0
    for index, eos in enumerate(("none", "one") * 12):
        if ended and index >= 6:  # in the first six none ends once in some fifty runs
            break
        options = {"stop_strings": ["abx", "xy", "zc", "ca"], "tokenizer": tokenizer, "eos_token_id": EOS[eos]}
        *_, want = with_both(ours, rng, **options)
        ended += int((want.beam_indices < 0).any() or want.sequences.shape[1] < 9 + NEW)
    assert ended > 0


def test_allowed_tokens_and_processors_on_the_host(ours, rng):
    """prefix_allowed_tokens_fn is asked with the prompt's number, and a numpy processor sees each beam's tokens."""

    def allowed(prompt, input_ids):
        return [token for token in range(VOCAB) if token % 3 != (int(input_ids[-1]) + prompt) % 3]

    def processor(input_ids, scores):
        scores[range(len(scores)), input_ids[:, -1]] -= 2.0
        return scores

    for _ in range(3):
        with pytest.warns(UserWarning, match="called on the host"):
            with_both(ours, rng, prefix_allowed_tokens_fn=allowed, logits_processor=[processor], eos_token_id=7)


def test_states_of_each_step_are_theirs(ours, rng):
    *_, got, want = with_both(ours, rng, output_attentions=True, output_hidden_states=True, eos_token_id=7)
    assert len(got.attentions) == len(want.attentions) == len(got.hidden_states)
    real = np.repeat(padded_mask([9, 5], 9, "left"), 3, axis=0).astype(bool)
    for step, (mine, other) in enumerate(zip(got.hidden_states, want.hidden_states, strict=True)):
        for a, b in zip(mine, other, strict=True):
            close(a, b, where=real if step == 0 else None)
    for mine, other in zip(got.attentions[1:], want.attentions[1:], strict=True):
        for a, b in zip(mine, other, strict=True):
            close(a, b)


def test_embeddings_of_prompts(ours, rng):
    """Without ids, only new tokens are returned: those of the ids that the embeddings are of."""
    ids, mask = prompts(rng)
    table = np.asarray(ours.params["model"]["embed_tokens"]["weight"])
    options = {"num_beams": 3, "max_new_tokens": NEW, "eos_token_id": 7, "pad_token_id": 3, "attention_mask": mask}
    want = ours.generate(ids, **options)
    np.testing.assert_array_equal(ours.generate(inputs_embeds=table[ids], **options), want[:, 9:])


def test_time_ends_the_search(ours, rng):
    """All candidates of the step after max_time end."""
    ids, mask = prompts(rng)
    got = ours.generate(
        ids, attention_mask=mask, num_beams=3, max_new_tokens=60, max_time=1e-9, eos_token_id=None, pad_token_id=3
    )
    assert 9 < got.shape[1] < 20
