"""`flaxqwen chat`: turns that reuse the cache, commands, and answers that are stopped."""

from __future__ import annotations

import builtins
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flaxqwen import AutoModelForCausalLM
from flaxqwen.cli.chat import Conversation, common_prefix
from flaxqwen.cli.text import TextStream, chat_ids, decoder, load_tokenizer
from flaxqwen.generation import loop
from tests.cli.conftest import SENTENCE, Run, assert_refused, encode


def ask(conversation: Conversation, message: str) -> TextStream:
    stream = TextStream(decoder(conversation.tokenizer))
    conversation.ask(message, stream)
    return stream


def converse(folder: Path, system: str | None = None, limit: int = 12) -> Conversation:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return Conversation(model, load_tokenizer(folder), system, limit, {"do_sample": False})


@pytest.fixture
def prefilled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each prefill ran, its padding not counted."""
    counts: list[int] = []
    prefill = loop.prefill

    def count(module: Any, params: Any, prompt: loop.Prompt, *args: Any, **options: Any) -> Any:
        counts.append(int(prompt.last) + 1)
        return prefill(module, params, prompt, *args, **options)

    count.trace = prefill.trace  # generate() asks it for the shapes of the results
    monkeypatch.setattr(loop, "prefill", count)
    return counts


def test_a_turn_runs_only_what_is_new(sentence_model: Path, prefilled: list[int]):
    conversation = converse(sentence_model)
    for message in ("Speak.", "Go on, please.", "More."):
        seen = len(conversation.cached)
        assert ask(conversation, message).text == SENTENCE
        # The cache ends before the answer's last token; the rest of the turn follows it.
        turn = f"\n<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"
        new = len(encode(sentence_model, turn)) + 1 if seen else len(conversation.cached) - len(SENTENCE.encode())
        assert prefilled[-1] == new
    assert len(prefilled) == 3


def test_every_turn_answers_as_without_a_cache(random_model: Path, prefilled: list[int]):
    """Answers of a random model do not survive decoding and encoding: what differs from the cache is run again."""
    conversation = converse(random_model)
    messages: list[dict[str, str]] = []
    for turn, message in enumerate(("Hi", "What?", "Ah", "So")):
        if turn == 2:
            conversation.system = "Be brief."
        if turn == 3:
            messages, conversation.messages = [], []
        first = [{"role": "system", "content": conversation.system}] if conversation.system else []
        messages.append({"role": "user", "content": message})
        tokens = chat_ids(conversation.tokenizer, first + messages)
        kept = common_prefix(conversation.cached, tokens)
        answer = ask(conversation, message)
        assert prefilled[-1] == len(tokens) - kept
        assert kept > 20 or turn in (0, 2)
        alone = conversation.model.generate([tokens], max_new_tokens=12, do_sample=False)
        assert answer.tokens == np.asarray(alone)[0, len(tokens) :].tolist()
        messages.append({"role": "assistant", "content": answer.text})


def test_the_same_question_again_runs_one_token(sentence_model: Path, prefilled: list[int]):
    conversation = converse(sentence_model)
    ask(conversation, "Speak.")
    conversation.messages = []
    assert ask(conversation, "Speak.").text == SENTENCE
    assert prefilled[-1] == 1


def test_common_prefix():
    assert [common_prefix(*pair) for pair in (([], [1]), ([1, 2], [1, 2, 3]), ([1, 2, 3], [1, 5, 3]))] == [0, 2, 1]


class Terminal:
    """Answers input() from a list; an exception in it is raised."""

    def __init__(self, lines: list[str | BaseException]) -> None:
        self.lines: Iterator[str | BaseException] = iter(lines)

    def input(self, prompt: str) -> str:
        assert prompt == "> "
        line = next(self.lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let lines be typed at a terminal."""

    def type_lines(*lines: str | BaseException) -> None:
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(builtins, "input", Terminal(list(lines)).input)

    return type_lines


def test_a_session(run: Run, sentence_model: Path, typed: Callable[..., None]):
    typed("Speak.", "", "  ", "/help", "/nonsense", "/system Be brief.", "/clear", "Again.", "/exit", "never")
    result = run("chat", sentence_model)
    assert (result.code, result.err) == (0, "")
    header, first, *middle, unknown, last = result.out.splitlines()
    assert "/help" in header
    assert (first, last) == (SENTENCE, SENTENCE)
    assert [line.split()[0] for line in middle] == ["/clear", "/audio", "/system", "/help", "/exit", "Ctrl-C"]
    assert "/nonsense" in unknown


def test_piped_messages_need_no_terminal(run: Run, sentence_model: Path, monkeypatch: pytest.MonkeyPatch):
    lines = iter(["Speak.", "Speak."])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines, None) or (_ for _ in ()).throw(EOFError))
    assert run("chat", sentence_model).out == f"{SENTENCE}\n{SENTENCE}\n"


def test_what_is_no_text_is_one_line(run: Run, sentence_model: Path, typed: Callable[..., None]):
    """Bytes that are not UTF-8, as Python gives them in the C locale and in others; and in a system message."""
    undecodable = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    for lines, what in (
        (["\udcff"], "the message"),
        (["/system \udcff", "Speak."], "the system message"),
        ([undecodable], "stdin"),
    ):
        typed(*lines)
        result = run("chat", sentence_model)
        assert (result.code, result.err) == (2, f"error: {what}: not UTF-8 text\n")
    assert_refused(run("chat", sentence_model, "--system", "\udcff"), "the system message: not UTF-8 text")


def test_stop_strings_of_the_models_own_config(sentence_model: Path):
    conversation = converse(sentence_model, limit=30)
    settings = {"stop_strings": [SENTENCE[2:4]], "do_sample": True, "num_return_sequences": 2}
    own = dataclasses.replace(conversation.model.generation_config, **settings)
    conversation.model = dataclasses.replace(conversation.model, generation_config=own)
    stream = TextStream(decoder(conversation.tokenizer))
    assert conversation.ask("Speak.", stream) == "stop"
    assert stream.text == SENTENCE[:4]


def test_interrupt_stops_the_answer_and_keeps_it(
    run: Run, sentence_model: Path, typed: Callable[..., None], monkeypatch: pytest.MonkeyPatch, prefilled: list[int]
):
    pieces: list[str] = []

    def print_now(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == len(SENTENCE) + 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("flaxqwen.cli.chat.print_now", print_now)
    typed("Speak.", "Speak.", KeyboardInterrupt(), "Speak.")
    assert run("chat", sentence_model).code == 0
    assert "".join(pieces) == SENTENCE + SENTENCE[:3] + SENTENCE

    def turn(answer: str) -> int:
        text = f"{answer}<|im_end|>\n<|im_start|>user\nSpeak.<|im_end|>\n<|im_start|>assistant\n"
        return len(encode(sentence_model, text))

    # The cache was lost with the answer: the last turn runs the whole conversation.
    assert prefilled[2] == prefilled[0] + turn(SENTENCE) + turn(SENTENCE[:3])


def test_limit_and_full_context_say_so(run: Run, sentence_model: Path, typed: Callable[..., None]):
    typed("Speak.", "Speak.", "y" * 160, "z" * 160, "/clear", "x" * 300, "Speak.")
    result = run("chat", sentence_model, "--max-new-tokens", "4")
    assert result.code == 0
    cut = [line.split(":")[0] for line in result.err.splitlines()]
    full = "[the model's context of 256 tokens is full"
    alone = "[the message takes more than the model's context of 256 tokens"
    assert cut == ["[stopped after 4 tokens"] * 2 + [full] * 2 + [alone, "[stopped after 4 tokens"]
    assert result.out.count(SENTENCE[0]) == 3


@pytest.mark.parametrize("room", [3, 1, 0])
def test_answers_end_with_the_context(sentence_model: Path, room: int):
    conversation = converse(sentence_model)
    empty = len(chat_ids(conversation.tokenizer, [{"role": "user", "content": ""}]))
    stream = TextStream(decoder(conversation.tokenizer))
    assert conversation.ask("y" * (256 - empty - room), stream) == ("context" if room else "message")
    assert stream.tokens == encode(sentence_model, SENTENCE)[:room]
    assert len(conversation.messages) == (2 if room else 0)
