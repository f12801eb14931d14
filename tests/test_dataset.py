"""Training data from JSON lines: what is read and learned of each, whatever stands beside it."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from flaxqwen import AutoTokenizer, dataset
from flaxqwen.dataset import read_examples
from flaxqwen.hub import BUILT_IN
from flaxqwen.models.losses import IGNORE_INDEX


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUILT_IN["demo"])


def draw_line(rng: np.random.Generator) -> dict:
    """A text, or a conversation of up to three turns that ends with either side."""
    words = ["".join(map(chr, rng.integers(97, 123, size))) for size in rng.integers(1, 12, 8)]
    if rng.random() < 0.3:
        return {"text": " ".join(words)}
    roles = ["user", "assistant"] * 3
    messages = [{"role": role, "content": word} for role, word in zip(roles, words, strict=False)]
    return {"messages": messages[: rng.integers(2, 7)]}


def test_what_is_learned(tokenizer, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch):
    """The assistant's words with the end of each turn, or the whole text with its end; in batches as alone."""
    monkeypatch.setattr(dataset, "TOKENIZED_AT_ONCE", 4)
    records = [draw_line(rng) for _ in range(11)]
    lines = [text for record in records for text in (json.dumps(record), "\n")]  # and blank ones between
    examples = list(read_examples(lines, tokenizer))
    assert len(examples) == len(records)
    for record, (ids, labels) in zip(records, examples, strict=True):
        learned = [token for token in labels if token != IGNORE_INDEX]
        assert all(label in (token, IGNORE_INDEX) for token, label in zip(ids, labels, strict=True))
        if "text" in record:
            assert tokenizer.decode(ids) == record["text"] + tokenizer.eos_token
            assert labels == ids
            continue
        answers = [message["content"] for message in record["messages"] if message["role"] == "assistant"]
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(record["messages"], tokenize=False)
        assert tokenizer.decode(learned) == "".join(f"{answer}<|im_end|>" for answer in answers)


def test_tools_are_in_the_prompt(tokenizer):
    able = copy.deepcopy(tokenizer)
    able.chat_template = "{% if tools %}{{ tools[0].name }} {% endif %}" + tokenizer.chat_template
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    ((ids, labels),) = read_examples([json.dumps({"messages": messages, "tools": [{"name": "xyz"}]})], able)
    assert able.decode(ids) == "xyz " + tokenizer.apply_chat_template(messages, tokenize=False)
    assert able.decode([label for label in labels if label != IGNORE_INDEX]) == "cd<|im_end|>"
    able.chat_template = "{{ messages[0].content + nothing }}"
    with pytest.raises(ValueError, match=r"^line 1: the chat template says: 'nothing' is undefined"):
        list(read_examples([json.dumps({"messages": messages})], able))


UNASKED = json.dumps({"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]})


def test_a_text_needs_an_end(tokenizer):
    """Which a tokenizer of another model may not have; chats have one of their own."""
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no eos_token, with which a text ends"):
        list(read_examples([json.dumps({"text": "ab"})], endless))


@pytest.mark.parametrize(
    "bad",
    [
        '{"messages": []}',
        '{"messages": [{"role": "user"}]}',
        UNASKED,
        "[]",
        "{",
        '{"text": "a\\ud800"}',
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_a_bad_line_is_named(tokenizer, bad: str):
    with pytest.raises(ValueError, match=r"^line 3: "):
        list(read_examples(['{"text": "a"}', "", bad], tokenizer))
