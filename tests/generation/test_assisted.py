"""Assisted decoding and prompt lookup give the model's own tokens, and sampling its exact distribution.

One geometry for the model and one for the draft model, so that the tests share their programs.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flaxqwen.generation import assisted
from flaxqwen.generation.config import GenerationConfig
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
    torch,
    torch_model,
)

VOCAB, NEW, EOS = 61, 18, 7
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 3}
ANY = {"assistant_confidence_threshold": 0.0}  # every draft counts, however unsure


@pytest.fixture(scope="module")
def ours():
    _, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, vocab_size=VOCAB)
    return Model(module, params, module.config, GenerationConfig())


def random_models(ours, rng, noise=0.1):
    """(theirs, ours) of a random model, and of a draft model near it: it agrees now and then."""
    seed = int(rng.integers(2**31))
    theirs = torch_model("Qwen2ForCausalLM", tiny(vocab_size=VOCAB), seed=seed)
    draft = torch_model("Qwen2ForCausalLM", tiny(vocab_size=VOCAB), seed=seed)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(noise * parameter.abs().mean() * torch.randn_like(parameter))
    return theirs, replace(ours, params=params_of(theirs)), draft, replace(ours, params=params_of(draft))


def test_greedy_tokens_are_theirs(ours, rng):
    """30 models, half of which end by themselves; as many rounds as tokens would mean that no draft was kept."""
    rounds = []
    count = assisted.speculative.decode
    for index in range(30):
        theirs, mine, draft, my_draft = random_models(ours, rng)
        ids = random_ids(rng, (1, 9), VOCAB)
        given = GREEDY | {"eos_token_id": EOS if index % 2 else None}
        draft.generation_config.num_assistant_tokens = 5
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        want = theirs.generate(th(ids), attention_mask=th(np.ones_like(ids)), assistant_model=draft, **given)

        def counted(*arguments, **static):
            rounds.append(1)
            return count(*arguments, **static)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(assisted.speculative, "decode", counted)
            how = {"assistant_model": my_draft, "num_assistant_tokens": 5, **ANY}
            got = mine.generate(ids, attention_mask=np.ones_like(ids), **how, **given)
        np.testing.assert_array_equal(got, want)
    assert len(rounds) < 30 * NEW / 2


def test_a_padded_batch_in_a_larger_cache(ours, rng):
    """The draft model's cache is as large as it must be, the model's as large as is asked."""
    theirs, mine, _, my_draft = random_models(ours, rng)
    ids, mask = random_ids(rng, (2, 9), VOCAB), padded_mask([9, 5], 9, "left")
    want = theirs.generate(th(ids), attention_mask=th(mask), **GREEDY)
    got = mine.generate(ids, attention_mask=mask, assistant_model=my_draft, max_cache_len=1024, **GREEDY)
    np.testing.assert_array_equal(got, want)


def test_their_clock_ends_drafting(ours, rng):
    import transformers

    _, mine, _, my_draft = random_models(ours, rng)
    ids = random_ids(rng, (1, 9), VOCAB)
    late = [transformers.MaxTimeCriteria(0.0, initial_timestamp=0.0)]
    for how in ({"assistant_model": my_draft}, {"prompt_lookup_num_tokens": 3}):
        assert mine.generate(ids, stopping_criteria=late, **how, **GREEDY).shape == (1, 10)


def test_rows_end_together_when_the_time_is_up(ours, rng, monkeypatch):
    """What one row has drafted beyond another is left out: nothing stands in for tokens that were not made."""
    _, mine, _, _ = random_models(ours, rng)
    ids = np.concatenate([np.tile(random_ids(rng, (1, 3), VOCAB), (1, 4)), random_ids(rng, (1, 12), VOCAB)])
    options = {"max_new_tokens": 60, "do_sample": False, "prompt_lookup_num_tokens": 6}
    whole = mine.generate(ids, **options)
    lengths = set()
    for calls in range(2, 12):  # of the clock, one a round
        ticks = iter([0.0] * calls)
        with monkeypatch.context() as patch:
            patch.setattr(assisted.time, "monotonic", lambda ticks=ticks: next(ticks, 100.0))
            got = mine.generate(ids, max_time=50.0, **options)
        np.testing.assert_array_equal(got, whole[:, : got.shape[1]])
        lengths.add(got.shape[1])
    assert len(lengths) > 3


def test_lookup_is_theirs(ours, rng):
    """30 models, on prompts of few tokens; penalties below 1 favour what has been there."""
    for index in range(30):
        theirs, mine, _, _ = random_models(ours, rng)
        ids = random_ids(rng, (1, 12), 4)
        given = GREEDY | {
            "eos_token_id": EOS if index % 2 else None,
            "repetition_penalty": 0.7 if index % 3 else 1.2,
            "prompt_lookup_num_tokens": 5,
            "max_matching_ngram_size": 3,
        }
        want = theirs.generate(th(ids), attention_mask=th(np.ones_like(ids)), **given)
        np.testing.assert_array_equal(mine.generate(ids, attention_mask=np.ones_like(ids), **given), want)


def test_early_exit_is_theirs(ours, rng):
    """30 models that draft with their own first layer."""
    for index in range(30):
        theirs, mine, _, _ = random_models(ours, rng)
        ids = random_ids(rng, (1, 9), VOCAB)
        given = GREEDY | {"eos_token_id": EOS if index % 2 else None, "assistant_early_exit": 1}
        drafts = {"num_assistant_tokens": 5, "num_assistant_tokens_schedule": "constant"}
        want = theirs.generate(th(ids), attention_mask=th(np.ones_like(ids)), **drafts, **given)
        got = mine.generate(ids, attention_mask=np.ones_like(ids), **drafts, **given)
        np.testing.assert_array_equal(got, want)


def test_looked_up_drafts(rng):
    """Against a search by hand: the longest match of up to `ngram` newest tokens, and its first place."""
    for _ in range(30):
        width, lengths = 40, rng.integers(3, 30, 4)
        skip = np.array([rng.integers(0, length - 1) for length in lengths])
        ids = rng.integers(0, 3, (4, width)).astype(np.int32)
        mask = np.arange(width)[None] >= skip[:, None]
        rows = assisted.loop.DecodeState(None, mask, ids, lengths.astype(np.int32), None, None)
        state = assisted.speculative.RoundState(rows, None, np.full(4, 5, np.int32))
        choice = assisted.speculative.DraftChoice(None, 0, 0.0, 1.0, False, ngram=3)
        got = _look_up(state, choice)
        for row, (length, first) in enumerate(zip(lengths, skip, strict=True)):
            text = ids[row, first:length].tolist()
            want = next(
                (
                    text[start + n :][:5]
                    for n in range(min(3, len(text) - 1), 0, -1)
                    for start in range(len(text) - n)
                    if text[start : start + n] == text[-n:]
                ),
                [],
            )
            assert np.asarray(got.tokens[row])[np.asarray(got.proposed[row])].tolist() == want


@jax.jit
def _look_up(state, choice):
    return assisted.speculative.look_up(state, choice, 5)


@pytest.mark.parametrize("drafts", ["model", "lookup"])
def test_rows_are_as_alone(drafts, ours, rng):
    """Rows of a padded batch advance by different lengths, with all that plain decoding has: the same tokens."""
    _, mine, _, draft = random_models(ours, rng)
    ids, mask = random_ids(rng, (3, 9), VOCAB), padded_mask([9, 6, 3], 9, "left")
    given = GREEDY | {
        "eos_token_id": [EOS, 11],
        "attention_mask": mask,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[5], [8, 9]],
        "min_new_tokens": 5,
        "suppress_tokens": [2],
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    how = {"assistant_model": draft, "num_assistant_tokens": 5, **ANY}
    how = how if drafts == "model" else {"prompt_lookup_num_tokens": 5}
    want, got = mine.generate(ids, **given), mine.generate(ids, **how, **given)
    np.testing.assert_array_equal(got.sequences, want.sequences)
    assert len(got.scores) == len(got.logits) == len(want.scores)
    for step, (mine_, other) in enumerate(zip(got.scores, want.scores, strict=True)):
        open_rows = [row for row in range(3) if not np.isin(want.sequences[row, 9 : 9 + step], [EOS, 11]).any()]
        seen = np.isfinite(other[open_rows])
        close(mine_[open_rows][seen], other[open_rows][seen])


def test_streaming_and_continuing(ours, rng):
    """Steps come one by one; the cache of the result serves the next call."""
    _, mine, _, draft = random_models(ours, rng)
    ids = random_ids(rng, (2, 9), VOCAB)
    given = GREEDY | {"eos_token_id": EOS, "assistant_model": draft, "num_assistant_tokens": 5, **ANY}
    mask = {"attention_mask": np.ones_like(ids)}
    first = mine.generate(ids, return_dict_in_generate=True, **mask, **given)
    pieces = list(mine.stream(ids, **mask, **given))
    np.testing.assert_array_equal(np.stack(pieces, 1), first.sequences[:, 9:])
    longer = np.concatenate([first.sequences, random_ids(rng, (2, 4), VOCAB)], axis=1)
    mask = {"attention_mask": np.ones_like(longer)}
    want = mine.generate(longer, eos_token_id=EOS, **mask, **GREEDY)
    got = mine.generate(longer, past_key_values=first.past_key_values, **mask, **given)
    np.testing.assert_array_equal(got, want)


def test_a_draft_of_another_vocabulary(ours, rng):
    """Padded to more or fewer rows than the model's; the ids are the same."""
    _, mine, _, _ = random_models(ours, rng)
    ids = random_ids(rng, (2, 9), VOCAB)
    given = GREEDY | {"eos_token_id": None, "attention_mask": np.ones_like(ids)}
    want = mine.generate(ids, **given)
    for size in (VOCAB - 3, VOCAB + 5):
        _, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, vocab_size=size, num_hidden_layers=1)
        draft = Model(module, params, module.config, GenerationConfig(num_assistant_tokens=5))
        got = mine.generate(ids, assistant_model=draft, **ANY, **given)
        np.testing.assert_array_equal(got, want)


def exact_marginals(theirs, ids, warp):
    """[3, V] float64: the probabilities of the first three tokens after ids [1, P], each by itself."""

    def next_probs(rows):
        with torch.no_grad():
            return warp(theirs(th(rows)).logits[:, -1]).double().softmax(-1).numpy()

    first = next_probs(ids)[0]
    everything = np.arange(VOCAB, dtype=np.int32)
    pairs = np.concatenate([np.repeat(ids, VOCAB, 0), everything[:, None]], axis=1)
    second = next_probs(pairs)  # [V, V]
    triples = np.concatenate([np.repeat(pairs, VOCAB, 0), np.tile(everything, VOCAB)[:, None]], axis=1)
    third = next_probs(triples).reshape(VOCAB, VOCAB, VOCAB)
    joint = first[:, None] * second
    return np.stack([first, joint.sum(0), np.einsum("ab,abc->c", joint, third)])


@pytest.mark.parametrize("warpers", [{}, {"temperature": 0.7, "top_k": 12}])
def test_sampling_is_exact(warpers, ours):
    """The first, second and third tokens of 2,000 draws, two of them drafted: chi-squared, p > 1e-4."""
    rng = np.random.default_rng(5)
    theirs, mine, draft, my_draft = random_models(ours, rng, noise=1.0)
    ids, n = random_ids(rng, (1, 9), VOCAB), 2000

    def warp(logits):
        logits = logits / warpers.get("temperature", 1.0)
        kth = logits.topk(warpers.get("top_k", VOCAB)).values[:, -1:]
        return logits.masked_fill(logits < kth, -torch.inf)

    probs = exact_marginals(theirs, ids, warp)
    guess = exact_marginals(draft, ids, warp)
    assert 0.5 * np.abs(probs - guess).sum(1).min() > 0.12  # the draft model's own distribution would be found out
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 3, "num_return_sequences": n, "seed": 11} | warpers
    got = mine.generate(ids, assistant_model=my_draft, num_assistant_tokens=2, eos_token_id=None, **ANY, **options)
    for place in range(3):
        p_value = chi_squared(np.bincount(got[:, 9 + place], minlength=VOCAB), probs[place])
        print(f"token {place + 1}: p = {p_value:.3g}")
        assert p_value > 1e-4


def chi_squared(counts, probs):
    """The p-value of counts [V] under probs [V], with rare tokens put together."""
    n = counts.sum()
    assert counts[probs == 0].sum() == 0
    common = probs * n >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(probs[common], probs[~common].sum()) * n
    keep = expected > 0
    return stats.chisquare(observed[keep], expected[keep] * observed[keep].sum() / expected[keep].sum()).pvalue


def test_sampling_with_a_lookup_is_plain_sampling(ours, rng):
    """Draw for draw."""
    _, mine, _, _ = random_models(ours, rng)
    ids, mask = random_ids(rng, (3, 9), 5), padded_mask([9, 6, 3], 9, "left")
    options = {"do_sample": True, "top_k": 4, "seed": 5, "eos_token_id": EOS, "pad_token_id": 3, "max_new_tokens": NEW}
    want = mine.generate(ids, attention_mask=mask, **options)
    np.testing.assert_array_equal(mine.generate(ids, attention_mask=mask, prompt_lookup_num_tokens=5, **options), want)


def test_values_compile_nothing(ours, rng):
    """Another number of drafts of one bucket, schedule, threshold, length, seed or end of sequence."""
    _, mine, _, draft = random_models(ours, rng)
    ids = random_ids(rng, (2, 9), VOCAB)
    base = {"assistant_model": draft, "pad_token_id": 3, "do_sample": True, "eos_token_id": EOS}
    mine.generate(ids, num_assistant_tokens=5, max_new_tokens=NEW, seed=0, **base)
    with counted_compilations() as compiled:
        for changes in (
            {"num_assistant_tokens": 4},
            {"num_assistant_tokens": 5, "assistant_confidence_threshold": 0.9},
            {"num_assistant_tokens": 2, "num_assistant_tokens_schedule": "heuristic"},
            {"num_assistant_tokens": 5, "max_new_tokens": 11, "seed": 4, "eos_token_id": [1, 2]},
        ):
            mine.generate(ids, **({"max_new_tokens": NEW, "seed": 1} | base | changes))
    assert not compiled


def test_stop_strings_and_own_criteria_stop_rows(ours, rng):
    """Traced criteria see each row's own length."""
    _, mine, _, draft = random_models(ours, rng)
    ids = random_ids(rng, (3, 9), VOCAB)

    def past_thirteen(input_ids, scores, cur_len):
        newest = jax.lax.dynamic_slice_in_dim(input_ids, cur_len - 1, 1, axis=1)[:, 0]
        return jnp.logical_and(cur_len > 13, newest % 2 == 0)

    given = GREEDY | {"eos_token_id": EOS, "stopping_criteria": [past_thirteen]}
    want = mine.generate(ids, **given)
    got = mine.generate(ids, assistant_model=draft, num_assistant_tokens=5, **ANY, **given)
    np.testing.assert_array_equal(got, want)


def test_what_cannot_be_drafted_is_plain_decoding(ours, rng):
    """A processor on the host asks at every step: a warning, and the same tokens."""
    _, mine, _, draft = random_models(ours, rng)
    ids = random_ids(rng, (1, 9), VOCAB)

    def on_host(input_ids, scores):
        scores[:, int(input_ids[0, -1])] = -np.inf
        return scores

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = mine.generate(ids, logits_processor=[on_host], **GREEDY)
    with (
        pytest.warns(UserWarning, match="assistant_model is left aside, as the host is asked"),
        pytest.warns(UserWarning, match="on_host: called on the host at every step"),
    ):
        got = mine.generate(ids, logits_processor=[on_host], assistant_model=draft, **GREEDY)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beams": 2}, "assistant_model goes with greedy decoding and sampling only, found num_beams=2"),
        ({"use_cache": False}, "assistant_model needs use_cache=True"),
        ({"num_assistant_tokens": 0}, "num_assistant_tokens must be greater than 0, found 0"),
        ({"num_assistant_tokens_schedule": "linear"}, "must be one of constant, heuristic, heuristic_transient"),
        ({"guidance_scale": 2.0}, "assistant_model cannot go with guidance_scale=2.0"),
        ({"prompt_lookup_num_tokens": 3}, "give one of them"),
        ({"assistant_model": None, "prompt_lookup_num_tokens": 0}, "must be greater than 0, found 0 and 2"),
        ({"assistant_model": None, "assistant_ensemble_weight": 0.5}, "needs an assistant_model"),
        ({"assistant_early_exit": 2}, "assistant_model and assistant_early_exit both draft"),
        ({"assistant_model": None, "assistant_early_exit": 0}, "assistant_early_exit must be a positive number of"),
        ({"assistant_model": 3}, "assistant_model must be a model of flaxqwen, found int"),
        ({"streamer": 3}, r"streamer must have put\(\) and end\(\), found int"),
        ({"assistant_tokenizer": "any"}, "assistant_tokenizer is not supported"),
    ],
)
def test_refusals(changes, message, ours):
    given = GREEDY | {"assistant_model": ours} | changes
    with counted_compilations() as compiled, pytest.raises(ValueError, match=message):
        ours.generate(np.array([[1, 2, 3]]), **given)
    assert not compiled
