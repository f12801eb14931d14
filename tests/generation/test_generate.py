"""generate() gives Transformers' tokens, in few programs, whatever the batch, the padding and the chunks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxqwen.generation.config import GenerationConfig
from flaxqwen.model import Model
from flaxqwen.models.qwen2 import Qwen2ForCausalLM
from tests.reference import close, counted_compilations, padded_mask, pair, random_ids, th, torch

EOS = [5, 7, 100, 20, 33, 41, 42, 43, 44, 45, 210, 211, 212, 213, 214]


def models(seed=0, **changes):
    """(Transformers' model, ours) of one tiny config, with no generation defaults."""
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, seed=seed, **changes)
    return theirs, Model(module, params, module.config, GenerationConfig())


@pytest.fixture(scope="module")
def tiny_models():
    return models(max_position_embeddings=2048)


OPTIONS = {
    "greedy": {},
    "eos": {"eos_token_id": EOS, "pad_token_id": 3},
    "one-eos": {"eos_token_id": 7},
    "eos-none": {"eos_token_id": None},
    "min-new-tokens": {"eos_token_id": EOS, "pad_token_id": 3, "min_new_tokens": 9},
    "min-length": {"eos_token_id": EOS, "pad_token_id": 3, "min_length": 25},
    "repetition-penalty": {"repetition_penalty": 1.4},
    "repetition-reward": {"repetition_penalty": 0.7, "eos_token_id": EOS, "pad_token_id": 9},
}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize("options", OPTIONS)
def test_greedy_is_theirs(options, padded, rng):
    """Two models each, 32 in all."""
    given = OPTIONS[options] | {"max_new_tokens": 21, "do_sample": False}
    for seed in rng.integers(0, 2**31, 2):
        theirs, mine = models(seed=int(seed))
        ids = random_ids(rng, (3, 13))
        mask = padded_mask([13, 4, 9], 13, "left") if padded else np.ones_like(ids)
        want = theirs.generate(th(ids), attention_mask=th(mask), **given)
        np.testing.assert_array_equal(mine.generate(ids, attention_mask=mask, **given), want)


@pytest.mark.parametrize(
    "given",
    [
        {"eos_token_id": [10**12, 7]}, {"pad_token_id": 10**12, "eos_token_id": 7}, {"suppress_tokens": [10**12]},
        {"begin_suppress_tokens": [10**12]}, {"do_sample": True, "top_k": 10**12, "seed": 1},
    ],
    ids=lambda given: next(iter(given)),
)  # fmt: skip
def test_numbers_beyond_32_bits(given, rng, tiny_models):
    """Ids that are no tokens act on none, and so many likeliest tokens are all; no integer overflows."""
    _, mine = tiny_models
    ids = random_ids(rng, (2, 6))
    plain = {name: value for name, value in given.items() if name in ("do_sample", "seed")}
    plain |= {"top_k": 0} if "top_k" in given else {}
    plain["eos_token_id"] = 7 if "eos_token_id" in given else None
    options = {"max_new_tokens": 9} | ({"eos_token_id": None} | given)
    np.testing.assert_array_equal(mine.generate(ids, **options), mine.generate(ids, max_new_tokens=9, **plain))
    with pytest.raises(ValueError, match="these tokens are biased"):
        mine.generate(ids, max_new_tokens=2, bad_words_ids=[[10**12]])


def test_a_negative_padding_is_none(rng, tiny_models):
    """Rows that wait for others are filled with their end, as where there is no padding; Transformers' own fail."""
    _, mine = tiny_models
    for _ in range(5):
        ids, mask = random_ids(rng, (3, 9)), padded_mask([9, 4, 7], 9, "left")
        given = {"attention_mask": mask, "eos_token_id": EOS, "max_new_tokens": 40}
        for way in ({}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 2}):
            want = mine.generate(ids, **given, **way, pad_token_id=EOS[0])
            np.testing.assert_array_equal(mine.generate(ids, **given, **way, pad_token_id=-1), want)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@pytest.mark.parametrize("length", [{"max_length": 17}, {"max_new_tokens": 1}, {"max_new_tokens": 2}, {}])
def test_lengths_are_theirs(length, rng, tiny_models):
    theirs, mine = tiny_models
    ids = random_ids(rng, (2, 6))
    np.testing.assert_array_equal(mine.generate(ids, **length), theirs.generate(th(ids), **length))


@pytest.mark.parametrize("changes", [{"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, {}])
def test_each_row_is_as_alone(changes, rng):
    theirs, mine = models(**changes)
    ids, lengths = random_ids(rng, (4, 40)), [40, 3, 17, 28]
    mask = padded_mask(lengths, 40, "left")
    batch = np.asarray(mine.generate(ids, attention_mask=mask, max_new_tokens=40))
    np.testing.assert_array_equal(batch, theirs.generate(th(ids), attention_mask=th(mask), max_new_tokens=40))
    for row, length in enumerate(lengths):
        alone = mine.generate(ids[row : row + 1, -length:], max_new_tokens=40)
        np.testing.assert_array_equal(batch[row, -40:], np.asarray(alone)[0, -40:])


def test_masks_with_holes_are_honoured(rng, tiny_models):
    theirs, mine = tiny_models
    ids = random_ids(rng, (2, 12))
    mask = (rng.random((2, 12)) < 0.6).astype(np.int32)
    mask[:, -1] = 1
    want = theirs.generate(th(ids), attention_mask=th(mask), max_new_tokens=10, do_sample=False)
    np.testing.assert_array_equal(mine.generate(ids, attention_mask=mask, max_new_tokens=10), want)


@pytest.mark.parametrize("eos", [[3, 9], [9]], ids=["pad-is-eos", "pad-is-not-eos"])
def test_mask_is_inferred_as_theirs(eos, rng, tiny_models):
    theirs, mine = tiny_models
    ids = random_ids(rng, (2, 9))
    ids[1, :4] = 3
    options = {"eos_token_id": eos, "pad_token_id": 3, "max_new_tokens": 12, "do_sample": False}
    np.testing.assert_array_equal(mine.generate(ids, **options), theirs.generate(th(ids), **options))


def test_scores_and_logits(rng, tiny_models):
    theirs, mine = tiny_models
    ids = random_ids(rng, (2, 7))
    options = {
        "max_new_tokens": 9,
        "repetition_penalty": 1.3,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    want, got = theirs.generate(th(ids), **options), mine.generate(ids, **options)
    np.testing.assert_array_equal(got.sequences, want.sequences)
    assert len(got.scores) == len(want.scores) == len(got.logits) == 9
    for ours, other in zip(got.scores + got.logits, want.scores + want.logits, strict=True):
        close(ours, other)


def test_continuing_from_a_cache(rng, tiny_models):
    """A second turn runs only what is new, and gives the tokens of a call without the cache."""
    _, mine = tiny_models
    ids = random_ids(rng, (2, 9))
    first = mine.generate(ids, max_new_tokens=6, return_dict_in_generate=True)
    assert np.asarray(first.past_key_values.length).tolist() == [14, 14]
    longer = np.concatenate([first.sequences, random_ids(rng, (2, 5))], axis=1)
    want = np.asarray(mine.generate(longer, max_new_tokens=8))
    cache = jax.tree.map(jnp.copy, first.past_key_values)
    for past in (cache, first.past_key_values):
        np.testing.assert_array_equal(mine.generate(longer, max_new_tokens=8, past_key_values=past), want)
        with pytest.raises(ValueError, match="past_key_values was given to an earlier call"):
            mine.generate(longer, max_new_tokens=8, past_key_values=past)


def test_continuing_past_the_capacity_and_in_several_ways(rng, tiny_models):
    """The cache grows where it is too small; several continuations part from one cache."""
    _, mine = tiny_models
    ids = random_ids(rng, (1, 20))
    cache = mine(ids[:, :12]).past_key_values
    assert cache.capacity == 12
    got = mine.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=True, seed=4, num_return_sequences=3)
    want = mine.generate(ids, max_new_tokens=5, do_sample=True, seed=4, num_return_sequences=3)
    np.testing.assert_array_equal(got, want)


def test_sampling_without_a_seed_follows_numpys(rng, tiny_models):
    _, mine = tiny_models
    ids = random_ids(rng, (1, 4))
    texts = []
    for seed in (5, 5, None):
        if seed is not None:
            np.random.seed(seed)
        texts.append(np.asarray(mine.generate(ids, do_sample=True, top_k=0, max_new_tokens=16)).tolist())
    assert texts[0] == texts[1] != texts[2]


def test_num_return_sequences_are_rows_of_their_prompts(rng, tiny_models):
    _, mine = tiny_models
    ids = random_ids(rng, (2, 5))
    got = np.asarray(mine.generate(ids, do_sample=True, num_return_sequences=3, seed=1, max_new_tokens=4))
    assert got.shape == (6, 9)
    np.testing.assert_array_equal(got[:, :5], np.repeat(ids, 3, axis=0))
    assert len({tuple(row[5:]) for row in got}) > 2


class Recorder:
    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        self.values.append(np.asarray(value))

    def end(self):
        self.ended = True


def test_streamer_gets_what_theirs_gets(rng, tiny_models):
    theirs, mine = tiny_models
    ids = random_ids(rng, (1, 5))
    recorders = Recorder(), Recorder()
    options = {"max_new_tokens": 11, "eos_token_id": EOS, "pad_token_id": 3}
    theirs.generate(th(ids), streamer=recorders[0], **options)
    got = mine.generate(ids, streamer=recorders[1], **options)
    assert all(r.ended for r in recorders)
    assert len(recorders[0].values) == len(recorders[1].values) == 1 + got.shape[1] - 5
    for want, value in zip(recorders[0].values, recorders[1].values, strict=True):
        np.testing.assert_array_equal(value, want)


def test_values_never_compile_again(rng, tiny_models):
    _, mine = tiny_models
    ids = random_ids(rng, (2, 9))
    base = {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.7, "seed": 0, "eos_token_id": [5]}
    base |= {"max_new_tokens": 10, "repetition_penalty": 1.2}
    mine.generate(ids, **base)
    changes = [
        {"temperature": 1.3}, {"temperature": 1.0}, {"top_p": 0.5}, {"top_k": 50}, {"seed": 9}, {"pad_token_id": 0},
        {"eos_token_id": [7, 9]}, {"eos_token_id": None}, {"max_new_tokens": 37}, {"max_new_tokens": 1},
        {"repetition_penalty": 1.7},
    ]  # fmt: skip
    with counted_compilations() as compiled:
        for change in changes:
            mine.generate(random_ids(rng, (2, 9)), **(base | change))
    assert not compiled


def test_a_hundred_prompt_lengths_compile_at_most_twelve_programs(tiny_models):
    rng = np.random.default_rng(0)
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, max_position_embeddings=2048, vocab_size=333)
    mine = Model(module, params, module.config, GenerationConfig())
    lengths = rng.permutation(np.linspace(1, 1024, 100).astype(int))
    assert len(set(lengths)) == 100
    with counted_compilations() as compiled:
        for length in lengths:
            mine.generate(random_ids(rng, (1, length)), max_new_tokens=6)
    assert len(compiled) <= 12


BAD = [
    ({"inputs": np.zeros((1, 0), np.int32)}, "prompt is empty"),
    ({"inputs": np.zeros((3,), np.int32)}, r"shape \(3,\)"),
    ({"inputs": [[1, 331]]}, "token id 331 is out of the vocabulary"),
    ({"inputs": [[1, -4]]}, "token id -4"),
    ({"inputs": [[1.5, 2.0]]}, "float64"),
    ({"inputs": np.ones((1, 2049), np.int32)}, "2049 tokens, the model's context is 2048"),
    ({"inputs": [[1, 2]], "input_ids": [[1, 2]]}, "the same argument"),
    ({}, "no prompt"),
    ({"inputs": [[1, 2]], "attention_mask": [[1]]}, r"attention_mask has shape \(1, 1\)"),
    ({"inputs": [[1, 2]], "attention_mask": [[1, 3]]}, "other than 0 and 1"),
    ({"inputs": [[1, 2]], "position_ids": [[1]]}, r"position_ids is int64 \(1, 1\); expected integers \(1, 2\)"),
    ({"inputs": [[1, 2]], "position_ids": [[0.5, 1.5]]}, "position_ids is float64"),
    ({"inputs": [[1, 2]], "position_ids": [[-1, 0]]}, "position_ids has -1"),
    ({"inputs": [[1, 2]], "position_ids": [[0, 1]], "guidance_scale": 2.0}, "cannot go with .* position_ids"),
    ({"inputs": [[1, 2]], "temprature": 0.3}, "temperature"),
    ({"inputs": [[1, 2]], "max_new_tokens": 0}, "max_new_tokens"),
    ({"inputs": [[1, 2]], "max_length": 2}, "max_length"),
    ({"inputs": [[1, 2]], "num_return_sequences": 2}, "num_return_sequences"),
    ({"inputs": [[1, 2]], "attention_mask": np.ones((1, 1, 2, 2), int)}, r"attention_mask has shape \(1, 1, 2, 2\)"),
    ({"inputs": [[1, 2]], "labels": [[1, 2]]}, "unknown generation option 'labels'"),
    ({"inputs": [[1, 2]], "cache_position": [0, 1]}, "unknown generation option 'cache_position'"),
    ({"inputs": [[1, 2]], "do_sample": True, "temperature": 0.0}, "temperature must be a float above 0"),
    ({"inputs": [[1, 2]], "repetition_penalty": 2}, "repetition_penalty must be a float above 0"),
    ({"inputs": [[1, 2]], "cache_implementation": "paper"}, "cache_implementation must be one of"),
    ({"inputs": [[1, 2]], "penalty_alpha": 0.6}, "penalty_alpha=0.6 is not supported"),
    ({"inputs": [[1, 2]], "token_healing": True}, "token_healing needs the model's tokenizer"),
    ({"inputs": [[1, 2]], "past_key_values": (((),),)}, "past_key_values must be a KVCache"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_refusals_come_before_compiling(arguments, message, tiny_models):
    _, mine = tiny_models
    with counted_compilations() as compiled, pytest.raises(ValueError, match=message):
        mine.generate(**arguments)
    assert not compiled


def test_a_cache_that_does_not_fit_is_refused(rng, tiny_models):
    _, mine = tiny_models
    ids = random_ids(rng, (2, 9))
    with pytest.raises(ValueError, match="at least one token more"):
        mine.generate(ids, past_key_values=mine(ids).past_key_values)
    with pytest.raises(ValueError, match="expected 1 rows"):
        mine.generate(ids[:1], past_key_values=mine(ids[:, :4]).past_key_values)


def test_bos_is_the_prompt_where_there_is_none(tiny_models):
    theirs, mine = tiny_models
    want = theirs.generate(bos_token_id=17, max_new_tokens=5, do_sample=False)
    np.testing.assert_array_equal(mine.generate(bos_token_id=17, max_new_tokens=5), want)


def test_positions_of_the_user(rng, tiny_models):
    """New tokens count on from the last one, in every way of decoding, and with a cache of the prompt's beginning."""
    theirs, mine = tiny_models
    ids = random_ids(rng, (2, 9))
    given = {"attention_mask": padded_mask([9, 5], 9, "left"), "position_ids": np.cumsum(rng.integers(1, 9, (2, 9)), 1)}
    plain = mine.generate(ids, attention_mask=given["attention_mask"], max_new_tokens=12)
    for way in ({}, {"num_beams": 2, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 3}):
        options = {"do_sample": False, "max_new_tokens": 12, **way}
        rows = slice(0, 1) if "prompt_lookup_num_tokens" in way else slice(None)  # theirs drafts for one row
        own = {name: value[rows] for name, value in given.items()}
        want = theirs.generate(th(ids[rows]), **{name: th(value) for name, value in own.items()}, **options)
        np.testing.assert_array_equal(mine.generate(ids[rows], **own, **options), want)
        assert way or not np.array_equal(want, plain)
    beginning = {name: value[:, :4] for name, value in given.items()}
    cache = mine(ids[:, :4], **beginning).past_key_values
    whole = mine.generate(ids, **given, max_new_tokens=12)
    np.testing.assert_array_equal(mine.generate(ids, **given, past_key_values=cache, max_new_tokens=12), whole)


def test_lists_and_torch_tensors_are_taken(rng, tiny_models):
    _, mine = tiny_models
    ids = random_ids(rng, (1, 6))
    want = np.asarray(mine.generate(ids, max_new_tokens=3))
    for given in (ids.tolist(), th(ids), jnp.asarray(ids), ids.astype(np.int64)):
        np.testing.assert_array_equal(mine.generate(input_ids=given, max_new_tokens=3), want)


def test_log_probabilities(rng, tiny_models):
    """Of each token and of the likeliest, by torch's logits; 0 after a row's end. Another number compiles nothing."""
    theirs, mine = tiny_models
    ids = random_ids(rng, (2, 5))
    given = {"max_new_tokens": 9, "do_sample": True, "top_k": 3, "seed": 1, "pad_token_id": 0}
    free = mine.generate(ids, attention_mask=np.ones_like(ids), eos_token_id=None, **given)
    # A token with which one row ends before the other.
    end = next(token for token in free[0, 5:12] if np.ptp((free[:, 5:] == token).argmax(1)) or token not in free[1, 5:])
    given |= {"eos_token_id": int(end), "return_dict_in_generate": True, "attention_mask": np.ones_like(ids)}
    got = mine.generate(ids, top_logprobs=4, **given)
    with torch.no_grad():
        want = theirs(th(got.sequences)).logits.log_softmax(-1)[:, 4:-1].numpy()
    new = got.sequences[:, 5:]
    ended = np.cumsum(new == given["eos_token_id"], axis=1) - (new == given["eos_token_id"]) > 0
    assert ended.any()
    chosen = np.take_along_axis(want, new[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(got.logprobs, np.where(ended, 0, chosen), atol=2e-5)
    top = np.sort(want, axis=-1)[..., :-5:-1]
    np.testing.assert_allclose(got.top_logprobs, np.where(ended[..., None], 0, top), atol=2e-5)
    picked = np.take_along_axis(want, got.top_tokens, axis=2)
    np.testing.assert_allclose(np.where(ended[..., None], 0, picked), got.top_logprobs, atol=2e-5)
    with counted_compilations() as compiled:
        fewer = mine.generate(ids, top_logprobs=3, **given)
    assert not compiled
    np.testing.assert_array_equal(fewer.top_tokens, got.top_tokens[..., :3])
    assert mine.generate(ids, output_logprobs=True, **given).top_logprobs is None
    with pytest.raises(ValueError, match="output_logprobs"):
        mine.generate(ids, **(given | {"num_beams": 2, "do_sample": False, "output_logprobs": True}))
