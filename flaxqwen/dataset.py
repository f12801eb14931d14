"""Training data: a JSON lines file of chats or texts, as packed rows of tokens, shuffled by grain."""

from __future__ import annotations

import importlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import Any

import numpy as np

from flaxqwen.models.losses import IGNORE_INDEX

Example = tuple[list[int], list[int]]  # token ids, and labels: the same, or IGNORE_INDEX where there is no loss
# A text, and the parts of it that are learned, by their characters; None: all, and the end of text after it.
LearnedText = tuple[str, list[tuple[int, int]] | None]

# A fast tokenizer takes many texts by threads of its own; one at a time, the call costs more than the text.
TOKENIZED_AT_ONCE = 1000


def read_examples(lines: Iterable[str], tokenizer: Any) -> Iterator[Example]:
    """The examples of a file's lines, a JSON object each: {"messages": [...]} or {"text": "..."}.

    Of messages the assistant's are learned, the token that ends each included; of a text all. Beside messages there may
    be "tools", for the chat template. Blank lines are skipped.

    Raises:
      ValueError: a line that is neither, by its number.
    """
    numbered = (pair for pair in enumerate(lines, start=1) if pair[1].strip())
    while batch := list(islice(numbered, TOKENIZED_AT_ONCE)):
        texts = []
        for number, line in batch:
            try:
                texts.append(_to_text(json.loads(line), tokenizer))
                texts[-1][0].encode()  # a lone half of a surrogate pair, which JSON can have, is no text
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from None
        yield from _to_examples(texts, tokenizer)


def _to_text(record: Any, tokenizer: Any) -> LearnedText:
    """One record as text; ValueError for what is no record."""
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        return _chat_text(record["messages"], record.get("tools"), tokenizer)
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return record["text"], None
    raise ValueError('expected {"messages": [...]} or {"text": "..."}')


def _chat_text(messages: list[dict[str, str]], tools: Any, tokenizer: Any) -> LearnedText:
    """A conversation: what the template puts between the prompt of each answer and the answer's end is learned."""
    for message in messages:
        if not (isinstance(message, dict) and {"role", "content"} <= message.keys()):
            raise ValueError(f'a message is {{"role": ..., "content": ...}}; found {message!r}')
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError("no message of the assistant: there is nothing to learn")
    if answers[0] == 0:
        raise ValueError("the first message is the assistant's: there is nothing that it answers")
    render = partial(_render, tokenizer, tools)
    text = render(messages)
    spans = []
    for i in answers:
        start = len(render(messages[:i], add_generation_prompt=True))
        until = text if i + 1 == len(messages) else render(messages[: i + 1])
        # What follows the end-of-turn token, a newline in ChatML, is never generated.
        spans.append((start, len(until.rstrip())))
    return text, spans


def _render(tokenizer: Any, tools: Any, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """The text of a chat; ValueError where its template fails."""
    from jinja2 import TemplateError  # which templates need; texts do not

    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise ValueError(f"the chat template says: {error}") from None


def _to_examples(texts: list[LearnedText], tokenizer: Any) -> Iterator[Example]:
    """Tokens and labels of each text."""
    encoded = tokenizer([text for text, _ in texts], add_special_tokens=False, return_offsets_mapping=True)
    for (_, spans), ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if spans is None:
            if tokenizer.eos_token_id is None:
                raise ValueError("the tokenizer has no eos_token, with which a text ends: set one, or train on chats")
            whole = [*ids, tokenizer.eos_token_id]
            yield whole, whole
            continue
        labels = [IGNORE_INDEX] * len(ids)
        for start, stop in spans:  # the tokens that lie in it whole
            first = bisect_left(offsets, start, key=itemgetter(0))
            last = bisect_right(offsets, stop, key=itemgetter(1))
            labels[first:last] = ids[first:last]
        yield ids, labels


def pack(examples: Sequence[Example], length: int) -> dict[str, np.ndarray]:
    """Rows of `length` tokens filled with whole examples: the longest first, each into the fullest row that takes it.

    Returns:
      input_ids, labels, segment_ids (1, 2, ... by example; 0 is padding), position_ids: [R, length] int32. An example
      that is longer than a row is cut.
    """
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i][0]))
    rows: list[list[int]] = []
    room: dict[int, list[int]] = {length: []}  # rows by how many tokens they still take
    for i in order:
        size = min(len(examples[i][0]), length)
        left = next((space for space in range(size, length) if room.get(space)), length)
        if left == length:
            rows.append([])
        row = room[left].pop() if left < length else len(rows) - 1
        rows[row].append(i)
        room.setdefault(left - size, []).append(row)
    packed = {name: np.zeros((len(rows), length), np.int32) for name in ("input_ids", "segment_ids", "position_ids")}
    packed["labels"] = np.full((len(rows), length), IGNORE_INDEX, np.int32)
    for row, members in enumerate(rows):
        start = 0
        for segment, i in enumerate(members, start=1):
            ids, labels = (values[: length - start] for values in examples[i])
            stop = start + len(ids)
            packed["input_ids"][row, start:stop] = ids
            packed["labels"][row, start + 1 : stop] = labels[1:]  # nothing before the first token predicts it
            packed["segment_ids"][row, start:stop] = segment
            packed["position_ids"][row, start:stop] = np.arange(len(ids))
            start = stop
    return packed


class Batches:
    """Batches of rows by the number of the step: the order follows from the seed alone, so there is no place to save.

    Every epoch has an order of its own.
    """

    def __init__(self, rows: dict[str, np.ndarray], batch_size: int, accumulate: int, seed: int) -> None:
        """rows: of pack. A step takes batch_size x accumulate of them.

        Raises:
          ImportError: grain is not installed.
        """
        grain = import_extra("grain")
        self._rows, self._accumulate = rows, accumulate
        order = grain.MapDataset.range(len(rows["input_ids"])).seed(seed).shuffle().repeat()
        self._order = order.batch(batch_size * accumulate)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step: each array [batch, length], or [accumulate, batch, length]."""
        taken = self._order[step]
        shape = (-1,) if self._accumulate == 1 else (self._accumulate, -1)
        return {name: values[taken].reshape(*shape, values.shape[1]) for name, values in self._rows.items()}


def import_extra(name: str) -> Any:
    """A library of the extra [train]; ImportError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"training needs {name.partition('.')[0]}: pip install 'flaxqwen[train]'") from error
