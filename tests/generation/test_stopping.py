"""What ends a generation: equal to Transformers', row by row, and compiled where it can be."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxqwen.generation import decoding
from flaxqwen.generation.stop_strings import stop_strings_of
from tests.generation.test_generate import models
from tests.reference import counted_compilations, padded_mask, random_ids, th, torch

HOST = "ignore:.*called on the host"
# Two letters, so that strings come about often, in tokens of one to three.
WORDS = ["a", "b", "ab", "ba", "aa", "bab", "bbb", "c", "é", "abc"]


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE of a few tokens; parts of characters among them."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("b", "a"), ("a", "a"), ("b", "ab"), ("b", "b"), ("bb", "b"), ("Ã", "©"), ("ab", "c")]
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend)
    made.add_special_tokens({"eos_token": "<|end|>"})
    return made


@pytest.fixture(scope="module")
def pair_of_models():
    return models(max_position_embeddings=2048, num_hidden_layers=1)


def likely(tokenizer, words=WORDS, size=331):
    """sequence_bias that leaves the tokens of a few words as the likely ones."""
    ids = {tokenizer.encode(word, add_special_tokens=False)[0] for word in words}
    return sorted(ids), [[[token], 30.0] for token in sorted(ids)]


@pytest.mark.parametrize("strings", [["abba"], ["bb", "aab"], "c", ["é"], ["aaaaa", "babab", "bc"]], ids=str)
def test_stop_strings_match_where_theirs_do(strings, tokenizer, rng):
    """The criterion by itself, on random texts of few letters, whole and left of a buffer's end."""
    from transformers import StopStringCriteria

    ids, _ = likely(tokenizer)
    other = tokenizer.encode("é")[0], tokenizer.vocab_size + 40  # half a character; no token of the tokenizer
    texts = rng.choice([*ids, *other], (600, 9)).astype(np.int32)
    want = StopStringCriteria(tokenizer, strings)(th(texts), None).numpy()
    mine = stop_strings_of(tokenizer, tuple(strings) if isinstance(strings, list) else strings, 331)
    np.testing.assert_array_equal(mine(texts, None, 9), want)
    np.testing.assert_array_equal(mine(np.pad(texts, ((0, 0), (0, 23))), None, 9), want)
    assert 0 < want.sum() < 600
    for length in (1, 2, 3):
        short = StopStringCriteria(tokenizer, strings)(th(texts[:, :length]), None).numpy()
        np.testing.assert_array_equal(mine(texts, None, length), short)


@pytest.mark.parametrize("eos", [{}, {"eos_token_id": [97, 264], "pad_token_id": 3}], ids=["no-eos", "eos"])
def test_rows_stop_at_their_own_strings_as_theirs(eos, tokenizer, rng, pair_of_models):
    """Without an end-of-sequence token rows that have stopped go on beside the others, as there."""
    theirs, mine = pair_of_models
    _, bias = likely(tokenizer)
    ends = set()
    for _ in range(4):
        ids, mask = random_ids(rng, (4, 8)), padded_mask([8, 3, 6, 8], 8, "left")
        options = {"max_new_tokens": 24, "sequence_bias": bias, "stop_strings": ["abb", "bc"], **eos}
        options |= {"tokenizer": tokenizer, "repetition_penalty": 1.3}
        want = theirs.generate(th(ids), attention_mask=th(mask), do_sample=False, **options)
        got = mine.generate(ids, attention_mask=mask, **options)
        np.testing.assert_array_equal(got, want)
        ends.add(got.shape[1])
    assert min(ends) < 32


def test_stop_strings_of_the_real_tokenizer(shared, rng):
    from transformers import AutoTokenizer, StopStringCriteria

    real = AutoTokenizer.from_pretrained(shared / "data/tokenizer/qwen2.5-instruct")
    texts = ["one.\n\ntwo", "stop", "He stopped", "nonstop!", "x</answer>", "</answer", "é 界", "a\n", "sto p"]
    strings = ("stop", "\n\n", "</answer>", "界")
    mine = stop_strings_of(real, strings, 151_936)
    theirs = StopStringCriteria(real, list(strings))
    for text in texts:
        ids = np.asarray([real.encode(text)])
        for n in range(1, ids.shape[1] + 1):
            want = theirs(th(ids[:, :n]), None).numpy()
            np.testing.assert_array_equal(mine(ids[:, :n].astype(np.int32), None, n), want, err_msg=repr(text))


def test_stop_strings_compile_once(tokenizer, pair_of_models):
    _, mine = pair_of_models
    ids = np.ones((2, 4), np.int32)
    mine.generate(ids, stop_strings=["ab"], tokenizer=tokenizer, max_new_tokens=6)
    with counted_compilations() as compiled:
        mine.generate(ids, stop_strings="bcc", tokenizer=tokenizer, max_new_tokens=9)
    assert not compiled


def test_max_time_stops_all_rows(pair_of_models, monkeypatch):
    theirs, mine = pair_of_models
    ids = np.ones((2, 4), np.int32)
    whole = mine.generate(ids, max_new_tokens=100)
    got = mine.generate(ids, max_new_tokens=400, max_time=1e-9)
    assert got.shape == (2, 5) == tuple(theirs.generate(th(ids), max_new_tokens=1000, max_time=1e-9).shape)
    # By a clock that goes on by a second whenever it is read: at the start, after prefill, and after each program, of
    # which one on a CPU then has one step.
    monkeypatch.setattr(decoding, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    got = mine.generate(ids, max_new_tokens=100, max_time=2.5)
    steps = 1 if jax.default_backend() == "cpu" else decoding.DEFAULT_CHUNK[0]
    assert got.shape == (2, 4 + 1 + 2 * steps)
    np.testing.assert_array_equal(got, whole[:, : got.shape[1]])


def compiled_criterion(input_ids, scores, cur_len):
    newest = jnp.take(input_ids, cur_len - 1, axis=1)
    return newest % 7 == 3


def numpy_criterion(input_ids, scores, **kwargs):
    return np.asarray(input_ids)[:, -1] % 7 == 3


def torch_criterion(input_ids, scores, **kwargs):
    return torch.eq(input_ids[:, -1] % 7, 3)


CRITERIA = {"jnp": compiled_criterion, "numpy": numpy_criterion, "torch": torch_criterion}


@pytest.mark.filterwarnings(HOST)
@pytest.mark.parametrize("eos", [{}, {"eos_token_id": [5, 100], "pad_token_id": 9}], ids=["no-eos", "eos"])
def test_criteria_of_users(eos, rng, pair_of_models):
    theirs, mine = pair_of_models
    ids = random_ids(rng, (3, 6))
    options = {"max_new_tokens": 19, **eos}
    want = theirs.generate(th(ids), do_sample=False, stopping_criteria=[torch_criterion], **options)
    for name, criterion in CRITERIA.items():
        got = mine.generate(ids, stopping_criteria=[criterion], **options)
        np.testing.assert_array_equal(got, want, err_msg=name)


def test_traced_criteria_compile_once_and_do_not_warn(rng, pair_of_models):
    _, mine = pair_of_models
    options = {"stopping_criteria": [compiled_criterion], "max_new_tokens": 9}
    mine.generate(random_ids(rng, (3, 6)), **options)
    with counted_compilations() as compiled:
        mine.generate(random_ids(rng, (3, 9)), **options)
    assert not compiled


def test_host_criteria_warn_once_and_see_what_theirs_see(rng, pair_of_models):
    theirs, mine = pair_of_models
    ids = random_ids(rng, (2, 6))
    options = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_scores": True}
    seen = [], []

    def recorder(calls):
        def record(input_ids, scores, **kwargs):
            calls.append((np.asarray(input_ids).copy(), [np.asarray(s).copy() for s in scores]))
            return len(calls) == 4

        return record

    theirs.generate(th(ids), stopping_criteria=[recorder(seen[0])], **options)
    with pytest.warns(UserWarning, match="record: called on the host") as warned:
        mine.generate(ids, stopping_criteria=[recorder(seen[1])], **options)
    assert len(warned) == 1
    assert len(seen[0]) == len(seen[1]) == 4
    for (ours, our_scores), (other, their_scores) in zip(*reversed(seen), strict=True):
        np.testing.assert_array_equal(ours, other)
        np.testing.assert_allclose(our_scores, their_scores, atol=1e-4)


def test_their_own_criteria_are_done_without_calling_them(rng, pair_of_models):
    import transformers

    theirs, mine = pair_of_models
    ids = random_ids(rng, (2, 6))
    for criterion in (
        transformers.MaxLengthCriteria(max_length=29),
        transformers.generation.EosTokenCriteria(list(range(0, 331, 9))),
    ):
        options = {"stopping_criteria": transformers.StoppingCriteriaList([criterion]), "pad_token_id": 1}
        want = theirs.generate(th(ids), do_sample=False, max_new_tokens=12, **options)
        np.testing.assert_array_equal(mine.generate(ids, max_new_tokens=12, **options), want)


@pytest.mark.filterwarnings(HOST)
def test_several_criteria_of_theirs(rng, pair_of_models):
    """The ids of all end a row, the least length counts; one made from theirs is asked, and the default stays."""
    import transformers
    from transformers.generation import EosTokenCriteria

    class Never(EosTokenCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.zeros(len(input_ids), dtype=torch.bool)

    theirs, mine = pair_of_models
    ids = random_ids(rng, (2, 6))
    some, others = list(range(0, 331, 9)), list(range(4, 331, 9))
    for criteria in (
        [EosTokenCriteria(some), EosTokenCriteria(others)],
        [transformers.MaxLengthCriteria(20), transformers.MaxLengthCriteria(11)],
        [Never(others)],
    ):
        given = transformers.StoppingCriteriaList(criteria)
        # Forced at max_new_tokens, whatever shorter length the criteria say.
        options = {"eos_token_id": some, "forced_eos_token_id": 7, "max_new_tokens": 12, "pad_token_id": 1}
        options["stopping_criteria"] = given
        want = theirs.generate(th(ids), do_sample=False, **options)
        np.testing.assert_array_equal(mine.generate(ids, **options), want)


@pytest.mark.filterwarnings(HOST)
def test_their_stop_strings_replace_ours(tokenizer, rng, pair_of_models):
    from transformers import StoppingCriteriaList, StopStringCriteria

    theirs, mine = pair_of_models
    ids = random_ids(rng, (1, 6))
    _, bias = likely(tokenizer)
    options = {"sequence_bias": bias, "tokenizer": tokenizer, "max_new_tokens": 12}
    first = tokenizer.decode(mine.generate(ids, **options)[0, 6:7])
    options["stop_strings"] = [first]
    assert mine.generate(ids, **options).shape == (1, 7)
    options["stopping_criteria"] = StoppingCriteriaList([StopStringCriteria(tokenizer, ["never"])])
    want = theirs.generate(th(ids), do_sample=False, **options)
    assert want.shape == (1, 18)
    np.testing.assert_array_equal(mine.generate(ids, **options), want)


def test_their_clock_starts_when_they_say(pair_of_models):
    import transformers

    _, mine = pair_of_models
    late = transformers.MaxTimeCriteria(60.0, initial_timestamp=time.time() - 61)
    assert mine.generate(np.ones((2, 4), np.int32), max_new_tokens=40, stopping_criteria=[late]).shape == (2, 5)


@pytest.mark.filterwarnings(HOST)
def test_criteria_of_their_signature_get_the_scores_of_all_steps(rng, pair_of_models):
    theirs, mine = pair_of_models
    ids = random_ids(rng, (2, 6))
    limits = []

    def high(input_ids, scores, **kwargs):
        assert len(scores) == input_ids.shape[1] - 6
        newest = scores[-1].max(axis=-1)
        newest = newest.values if hasattr(newest, "values") else newest
        limits.append(np.asarray(newest))
        return newest > limit

    options = {"max_new_tokens": 10, "output_scores": True, "return_dict_in_generate": True, "eos_token_id": [330]}
    options |= {"stopping_criteria": [high], "pad_token_id": 3}
    limit = np.inf
    mine.generate(ids, **options)
    limit = float(np.median(limits))
    want = theirs.generate(th(ids), do_sample=False, **options).sequences
    got = mine.generate(ids, **options).sequences
    np.testing.assert_array_equal(got, want)


BAD = [
    ({"stop_strings": "x"}, "needs the tokenizer"),
    ({"stop_strings": [""], "tokenizer": 1}, "none of them empty"),
    ({"stopping_criteria": compiled_criterion}, "must be a list"),
    ({"stopping_criteria": [3]}, "found 3 in it"),
    ({"stopping_criteria": [lambda a, b, c: True]}, "needs 'c'"),
    ({"stopping_criteria": [lambda input_ids, scores, cur_len: scores > 0]}, r"expected a bool, or 1"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_refusals_come_before_compiling(options, message, pair_of_models):
    _, mine = pair_of_models
    with counted_compilations() as compiled, pytest.raises(ValueError, match=message):
        mine.generate([[1, 2]], **options)
    assert not compiled
