"""Reading a generation while it runs: what generate() puts into, and what stream() gives.

Axes: B batch, P columns of the prompts.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar, cast

import numpy as np

REPLACEMENT = "\ufffd"  # what a decoder makes of a character that is not whole

Piece = TypeVar("Piece")
_END = object()


class Streamer(Protocol):
    """What streams: Transformers' TextStreamer, TextIteratorStreamer and the like work as they are."""

    def put(self, value: np.ndarray) -> None:
        """First the prompts [B, P], then the tokens of each step [B]."""

    def end(self) -> None:
        """Generation is over."""


class Stream(Generic[Piece], Iterator[Piece], AsyncIterator[Piece]):
    """The pieces of a generation that runs as they are read, with `for` or `async for`.

    Leaving it (by `close`, at the end of a `with` block, or by dropping it) ends the generation and frees its memory.
    """

    def __init__(self, pieces: Generator[Piece, None, None]) -> None:
        self._pieces = pieces
        self._running = threading.RLock()  # a reader whose task was cancelled leaves its thread in mid-step

    def __next__(self) -> Piece:
        with self._running:
            return next(self._pieces)

    def close(self) -> None:
        """End the generation; where a step is being computed, after it."""
        with self._running:
            self._pieces.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __anext__(self) -> Piece:
        # In a thread: the event loop goes on while the device works.
        piece = await asyncio.to_thread(next, cast(Iterator[Piece], self), _END)
        if piece is _END:
            raise StopAsyncIteration
        return cast(Piece, piece)

    async def aclose(self) -> None:
        """End the generation; where a step is being computed, after it."""
        await asyncio.to_thread(self.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


class TextDecoder:
    """The text of one row's tokens while they come, in whole characters and without special tokens."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes; "" where it ends within a character."""
        self._waiting.append(token)
        text = self._decode(self._waiting)
        if text.endswith(REPLACEMENT):
            return ""
        self._waiting.clear()
        return text

    def flush(self) -> str:
        """The text of what still waits: a character that the model did not finish."""
        text = self._decode(self._waiting)
        self._waiting.clear()
        return text


def text_pieces(
    steps: Iterator[tuple[np.ndarray, np.ndarray]], tokenizer: Any
) -> Generator[str | list[str], None, None]:
    """New text at each step that has any: a string, or, with several rows, one for each ("" where there is none).

    Args:
      steps: the tokens [B] of each step, and which rows [B] had ended before it.
    """

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    def piece(texts: list[str]) -> Iterator[str | list[str]]:
        if any(texts):
            yield texts[0] if len(texts) == 1 else texts

    rows: list[TextDecoder] = []
    for tokens, ended in steps:
        rows = rows or [TextDecoder(decode) for _ in tokens]
        yield from piece(
            ["" if over else row.push(int(token)) for row, token, over in zip(rows, tokens, ended, strict=True)]
        )
    yield from piece([row.flush() for row in rows])
