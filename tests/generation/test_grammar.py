"""Constrained text: Transformers' tokens under an independent prefix_allowed_tokens_fn, and what parses."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from flaxqwen import AutoModelForCausalLM, Qwen2Config
from flaxqwen.generation import batching
from flaxqwen.generation.config import GenerationConfig
from flaxqwen.model import Model
from flaxqwen.models.qwen2 import Qwen2ForCausalLM
from tests.reference import counted_compilations, padded_mask, pair, params_of, random_ids, th, tiny, torch_model

pytest.importorskip("outlines_core", reason="regex and json_schema need it: pip install flaxqwen[grammar]")
partial_match = pytest.importorskip("regex", reason="the oracle matches beginnings of texts with it")

MERGES = ["a b", "b c", "ab c", "1 2", "3 4", '" :', '{ "', "} }", "c a", "0 0"]
LETTERS = list('abcxyz0123456789"{}:,-.')
WORDS = LETTERS + [merge.replace(" ", "") for merge in MERGES]
EOS = len(WORDS)
VOCAB = EOS + 4  # the model has rows that no token uses
REGEXES = [
    r"[0-9]{3}-[a-c]+",
    r"(abc|x)*y",
    r'\{"a":[0-9]{1,2}(,"b":"[a-z]{0,3}")?\}',
    r"-?[0-9]+(\.[0-9]+)?",
    r"(xyz|x|zz)",
    r".{5}",
    r"[^a]*\D[0-9]",
]
GIVEN = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": EOS, "pad_token_id": EOS}


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE tokenizer of a few words."""
    tokenizers = pytest.importorskip("tokenizers", reason="builds the tokenizer")
    import transformers

    vocab = {word: index for index, word in enumerate(WORDS)}
    built = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [tuple(merge.split()) for merge in MERGES]))
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    built.add_special_tokens(["<end>"])
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<end>")
    assert found.eos_token_id == EOS
    return found


@pytest.fixture(scope="module")
def ours():
    _, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, vocab_size=VOCAB, num_hidden_layers=1)
    return Model(module, params, module.config, GenerationConfig())


def random_model(ours, rng):
    theirs = torch_model("Qwen2ForCausalLM", tiny(vocab_size=VOCAB, num_hidden_layers=1), seed=int(rng.integers(2**31)))
    return theirs, replace(ours, params=params_of(theirs))


def allowed_by(expression, prompt_length):
    """prefix_allowed_tokens_fn for an expression: a search over all tokens by partial matches."""
    compiled = partial_match.compile(expression)

    def allowed(_, ids):
        text = "".join(WORDS[token] for token in ids[prompt_length:].tolist() if token < EOS)
        if EOS in ids[prompt_length:].tolist():
            return list(range(VOCAB))
        tokens = [i for i, word in enumerate(WORDS) if compiled.fullmatch(text + word, partial=True)]
        return tokens + [EOS] * bool(compiled.fullmatch(text))

    return allowed


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("expression", REGEXES)
def test_tokens_are_theirs(expression, beams, ours, rng, tokenizer):
    """Greedy and beam search over 3 random models each, two left-padded rows."""
    for _ in range(3):
        theirs, mine = random_model(ours, rng)
        ids, mask = random_ids(rng, (2, 9), VOCAB), padded_mask([9, 5], 9, "left")
        given = GIVEN | {"num_beams": beams}
        want = theirs.generate(
            th(ids), attention_mask=th(mask), prefix_allowed_tokens_fn=allowed_by(expression, 9), **given
        )
        got = mine.generate(ids, attention_mask=mask, regex=expression, tokenizer=tokenizer, **given)
        np.testing.assert_array_equal(got, want)


def text_of(row):
    return "".join(WORDS[token] for token in row.tolist() if token < EOS)


def test_samples_match_each_rows_own_expression(ours, rng, tokenizer):
    """Several continuations of rows with expressions of their own; assisted decoding and a lookup as well."""
    _, mine = random_model(ours, rng)
    ids, expressions = random_ids(rng, (2, 6), VOCAB), [REGEXES[0], REGEXES[2]]
    given = {"regex": expressions, "tokenizer": tokenizer, "attention_mask": np.ones_like(ids)}
    given |= {"do_sample": True, "max_new_tokens": 40, "eos_token_id": EOS, "num_return_sequences": 8, "seed": 1}
    plain = mine.generate(ids, **given)
    drafted = mine.generate(ids, assistant_model=mine, num_assistant_tokens=3, **given)
    np.testing.assert_array_equal(mine.generate(ids, prompt_lookup_num_tokens=3, **given), plain)
    for got in (plain, drafted):
        whole = [(i, row) for i, row in enumerate(got) if EOS in row[6:]]
        assert len(whole) > 8
        for i, row in whole:
            assert re.fullmatch(expressions[i // 8], text_of(row[6:])), text_of(row[6:])


@pytest.mark.parametrize("way", [{}, {"do_sample": True}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_a_row_ends_where_other_options_leave_it_nothing(way, ours, rng, tokenizer):
    """What matches, where the end is not allowed yet; a beginning of it, where a word that it needs is not."""
    _, mine = random_model(ours, rng)
    ids = random_ids(rng, (2, 6), VOCAB)
    given = {"regex": "x[0-9]-y", "tokenizer": tokenizer, "max_new_tokens": 16, "eos_token_id": EOS, **way}
    for blocked in ({"min_new_tokens": 12}, {"suppress_tokens": [EOS]}):
        for row in mine.generate(ids, **given, **blocked):
            assert re.fullmatch("x[0-9]-y", text_of(row[6:]))
            assert EOS in row[6:]
    for row in mine.generate(ids, bad_words_ids=[[LETTERS.index("-")]], **given):
        assert re.fullmatch("x[0-9]", text_of(row[6:]))


def test_batched_rows_end_likewise(ours, rng, tokenizer):
    _, mine = random_model(ours, rng)
    options = {"regex": "x[0-9]-y", "min_new_tokens": 12} | GIVEN
    texts = list(random_ids(rng, (3, 6), VOCAB))
    requests = [batching.make_request(mine, ids, options, tokenizer) for ids in texts]
    found = batching.run(
        mine, iter(enumerate(requests)), rows=2, capacity=requests[0].capacity, counts=batching.Counts()
    )
    for _, tokens in found:
        assert re.fullmatch("x[0-9]-y", text_of(np.asarray(tokens)))
        assert tokens[-1] == EOS


def test_host_processors_see_the_constraint(ours, rng, tokenizer):
    """What runs on the host at every step gets scores of what is allowed, and the text still matches."""
    _, mine = random_model(ours, rng)
    seen = []

    def look(input_ids, scores):
        seen.append(int(np.isfinite(scores).sum()))
        return scores

    with pytest.warns(UserWarning, match="called on the host"):
        got = mine.generate(np.array([[1, 2]]), regex="[0-9]{3}", tokenizer=tokenizer, logits_processor=[look], **GIVEN)
    assert re.fullmatch("[0-9]{3}", text_of(got[0, 2:]))
    assert seen[0] == 10 + 3  # digits, and three tokens of two
    assert seen[-1] == 1  # the end


def test_other_expressions_compile_nothing(ours, rng, tokenizer):
    _, mine = random_model(ours, rng)
    ids = random_ids(rng, (1, 6), VOCAB)
    mine.generate(ids, regex=REGEXES[0], tokenizer=tokenizer, **GIVEN)
    with counted_compilations() as compiled:
        for expression in REGEXES[1:]:
            mine.generate(ids, regex=expression, tokenizer=tokenizer, **GIVEN)
    assert not compiled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regex": "(a"}, r"regex '\(a' cannot be compiled"),
        ({"regex": ""}, "regex must be a regular expression"),
        ({"regex": 3}, "regex must be a regular expression, found 3"),
        ({"regex": ["a", "b"]}, "regex is a list of 2; expected one, or 1"),
        ({"regex": "a", "json_schema": {}}, "give one of them"),
        ({"regex": "a", "tokenizer": None}, "regex needs the tokenizer"),
        ({"regex": "a", "eos_token_id": None}, "regex needs an eos_token_id"),
        ({"json_schema": "{"}, "json_schema cannot be compiled"),
        ({"json_schema": {"type": "nothing"}}, "json_schema cannot be compiled"),
        ({"json_schema": {"items": {"type": "integer", "minimum": 3}}}, "minimum cannot be enforced"),
        ({"json_schema": {"properties": []}}, r"properties is \[\], expected an object"),
        ({"json_schema": {"pattern": "a+", "minLength": 3}}, "pattern goes without minLength"),
        ({"json_schema": {"allOf": [{"type": "null"}, {"type": "integer"}]}}, "allOf of several"),
    ],
)
def test_refusals(changes, message, ours, tokenizer):
    with pytest.raises(ValueError, match=message):
        ours.generate(np.array([[1, 2]]), **(GIVEN | {"tokenizer": tokenizer} | changes))


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["red", "绿", "blue"]}, "minItems": 1, "maxItems": 3},
        "alive": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "alive"],
}


def test_json_with_the_real_tokenizer(shared):
    """Samples of a tiny model with the real vocabulary are JSON of the schema."""
    transformers = pytest.importorskip("transformers", reason="has the tokenizer")
    real = transformers.AutoTokenizer.from_pretrained(shared / "data/tokenizer/qwen2.5-instruct")
    config = Qwen2Config(
        vocab_size=151936, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    ids = np.asarray([real("Describe someone:")["input_ids"]])
    got = model.generate(
        ids, json_schema=SCHEMA, tokenizer=real, eos_token_id=151645, do_sample=True, top_k=0, seed=3,
        max_new_tokens=120, num_return_sequences=6,
    )  # fmt: skip
    texts = [real.decode(row[row != 151645]) for row in got[:, ids.shape[1] :] if 151645 in row]
    assert texts, "none of the samples came to its end"
    for text in texts:
        person = json.loads(text)
        assert list(person) == SCHEMA["required"]
        assert isinstance(person["name"], str)
        assert len(person["name"]) <= 8
        assert isinstance(person["age"], int)
        assert isinstance(person["alive"], bool)
        assert set(person["tags"]) <= {"red", "绿", "blue"}
        assert 1 <= len(person["tags"]) <= 3
