"""Progress of long work on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

# Called with the bytes done and the bytes in all.
Report = Callable[[int, int], None]

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Shows how far a work on bytes is, with its rate and the time left: `with Progress("Loading") as report:`.

    report: a function of the bytes done and the bytes in all. Without a terminal the last line comes at the end, so a
      work shorter than a line's interval prints one.
    """

    def __init__(self, what: str, file: TextIO | None = None) -> None:
        self.what = what
        self.file = file or sys.stderr
        self._started = self._printed = time.monotonic()
        self._report: Report = self._line
        self._total = 0
        self._stop: Callable[[], None] = lambda: None

    def __enter__(self) -> Report:
        if self.file.isatty():
            self._start_bar()
        self._started = self._printed = time.monotonic()
        return self._report

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        if kind is None and self._total:
            self._print(self._total, self._total)

    def _start_bar(self) -> None:
        # Imported here: rich takes 50 ms, and most loads are not watched.
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        bar = Bar(*columns, TimeRemainingColumn(), console=Console(file=self.file))
        task = bar.add_task(self.what, total=None)
        self._report = lambda done, total: bar.update(task, completed=done, total=total)
        self._stop = bar.stop
        bar.start()

    def _line(self, done: int, total: int) -> None:
        self._total = total
        if done < total and time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._print(done, total)

    def _print(self, done: int, total: int) -> None:
        self._printed = time.monotonic()
        rate = done / max(self._printed - self._started, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if 0 < done < total else ""
        print(
            f"{self.what}: {100 * done / total:.0f}% of {total / 1e6:.0f} MB, {rate / 1e6:.0f} MB/s{left}",
            file=self.file,
            flush=True,
        )
