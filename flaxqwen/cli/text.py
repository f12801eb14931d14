"""From prompts to token ids, and from the tokens of a generation to text as they come."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
REPLACEMENT = "\ufffd"


def load_tokenizer(folder: Path) -> Any:
    """Transformers' tokenizer of a model's folder; None where there is none."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    import transformers  # seconds, where torch is installed

    return _read(transformers.AutoTokenizer, folder)


def _read(kind: Any, folder: Path) -> Any:
    """kind.from_pretrained(folder), of Transformers; ValueError for files that Python's json gives up on."""
    try:
        return kind.from_pretrained(folder)
    except RecursionError:
        raise ValueError(f"{folder}: a JSON file of the {kind.__name__[4:].lower()} is nested too deep") from None


def need_tokenizer(tokenizer: Any, folder: Path) -> Any:
    """The tokenizer; ValueError where there is none."""
    if tokenizer is None:
        files = " or ".join(TOKENIZER_FILES)
        raise ValueError(f"{folder}: no tokenizer ({files}) for text; token ids work: generate --ids")
    return tokenizer


def read_text(file: Path) -> str:
    """A file's text; ValueError, with its name, for what is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeError:
        raise ValueError(f"{file}: not UTF-8 text") from None


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt's text, from the argument, a file, or (for "-") stdin; without the newline that ends a file.

    Raises:
      ValueError: no text, or not UTF-8.
      OSError: a file that cannot be read.
    """
    if file is not None:
        prompt = read_text(file).removesuffix("\n")
    elif prompt == "-":
        try:
            prompt = sys.stdin.read().removesuffix("\n")
        except UnicodeError:
            raise ValueError("the prompt: not UTF-8 text") from None
    assert prompt is not None
    check_text(prompt, "the prompt")
    if not prompt:
        raise ValueError(f"{file}: empty; expected a prompt" if file else "the prompt is empty")
    return prompt


def check_text(text: str, what: str) -> str:
    """The text; ValueError where it stands for bytes that were none, as an argument may, and stdin in the C locale."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what}: not UTF-8 text") from None
    return text


def parse_ids(text: str) -> list[int]:
    """Token ids of "1 2 3" or "1,2,3"; ValueError for what is no number."""
    words = re.split(r"[\s,]+", text.strip(" ,\n"))
    for word in words:
        if not re.fullmatch(r"-?\d+", word):
            raise ValueError(f"--ids: {word!r} is not a token id; expected integers such as '1 2 3'")
    return [int(word) for word in words]


def chat_ids(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    """Messages as the token ids that the model answers, by the tokenizer's chat template.

    Raises:
      ValueError: the tokenizer has no template.
    """
    if tokenizer.chat_template is None:
        raise ValueError(f"{tokenizer.name_or_path}: the tokenizer has no chat template: the model is not for chat")
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def make_messages(system: str | None, message: str, clips: int = 0) -> list[dict[str, Any]]:
    """A conversation that begins with a user's message, after the system's if there is one. ValueError: not text."""
    return [*system_messages(system), user_message(message, clips)]


def system_messages(system: str | None) -> list[dict[str, Any]]:
    """The system's message, if there is one; ValueError where it is not text."""
    return [] if system is None else [{"role": "system", "content": check_text(system, "the system message")}]


def user_message(text: str, clips: int = 0) -> dict[str, Any]:
    """A message of the user's, with so many clips of audio before its text; ValueError where that is not text."""
    check_text(text, "the message")
    if not clips:
        return {"role": "user", "content": text}
    return {"role": "user", "content": [*[{"type": "audio"}] * clips, {"type": "text", "text": text}]}


def load_processor(folder: Path) -> Any:
    """Transformers' processor of a model's folder; ValueError where there is none.

    It makes features and chats of audio, and texts of text as the tokenizer does.
    """
    need_tokenizer(load_tokenizer(folder), folder)
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise ValueError(f"{folder}: no processor ({' or '.join(PROCESSOR_FILES)}) for audio")
    import transformers  # seconds, where torch is installed

    return _read(transformers.AutoProcessor, folder)


def decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """The text of token ids, without special tokens; the ids themselves where there is no tokenizer."""
    if tokenizer is None:
        return lambda ids: "".join(f"{token} " for token in ids)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


class TextStream:
    """The text of one row's tokens while they come: a streamer for generate().

    write: called with each piece of text. Pieces are whole characters: a token that ends within one waits for the rest.
    now: the clock of first_at.
    tokens: the new token ids so far; text: theirs, as far as it has been written; first_at: when the first one came.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        write: Callable[[str], None] | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.first_at = 0.0
        self._decode, self._write, self._now = decode, write, now
        self._waiting: list[int] = []

    def put(self, value: np.ndarray) -> None:
        """Take a step's token [1]; the prompt [1, P], which generate() sends first, is not written."""
        if value.ndim == 2:
            return
        if not self.tokens:
            self.first_at = self._now()
        self.tokens.append(int(value[0]))
        self._waiting.append(int(value[0]))
        text = self._decode(self._waiting)
        if not text.endswith(REPLACEMENT):
            self._emit(text)

    def end(self) -> None:
        """Write what still waits: a character that the model did not finish."""
        self._emit(self._decode(self._waiting))

    def _emit(self, text: str) -> None:
        self._waiting.clear()
        self.text += text
        if self._write is not None and text:
            self._write(text)
