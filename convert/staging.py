"""Files that take their places in a folder together, or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from flaxqwen.convert.writer import Writer

# A file that holds weights, or the index of its shards.
WEIGHTS = re.compile(r"(flax_|pytorch_)?model(-\d{5}-of-\d{5})?\.(safetensors|bin|msgpack)(\.index\.json)?")

TEMPORARY = ".{}.flaxqwen"
_TEMPORARY = re.compile(r"\..+\.flaxqwen")


class Staging:
    """Writes files of a folder under temporary names; `commit` gives them their own, all at the end.

    On any error before, the temporaries are removed and the folder is as it was, or is not there if it was not. The
    names of the temporaries are fixed: a process that was killed leaves some, and the next one takes them over.
    """

    def __init__(self, folder: Path, report: Callable[[int], None] = lambda count: None) -> None:
        self.folder = folder
        self._report = report
        self._written: list[str] = []
        self._created: list[Path] = []
        self._is_committed = False

    def __enter__(self) -> Staging:
        missing = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._created = missing
        return self

    def write(self, name: str, fill: Callable[[Writer], None]) -> None:
        """Let `fill` write the file `name`."""
        self._written.append(name)
        writer = Writer(self._temporary(name), self.folder / name, self._report)
        is_complete = False
        try:
            fill(writer)
            is_complete = True
        finally:
            writer.close(is_complete)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a small file."""
        self.write(name, lambda writer: writer.write(data))

    def commit(self) -> None:
        """Put the files in their places, in the order they were written, and remove the weights they replace."""
        # Old indexes first: if this stops half-way, none is left that would name the old shards and find new ones.
        for path in list(self.folder.glob("*.index.json")):
            if WEIGHTS.fullmatch(path.name):
                path.unlink()
        for name in self._written:
            os.replace(self._temporary(name), self.folder / name)
        self._is_committed = True
        for path in list(self.folder.iterdir()):
            is_stale = WEIGHTS.fullmatch(path.name) and path.name not in self._written
            if is_stale or _TEMPORARY.fullmatch(path.name):
                path.unlink()
        _sync_folder(self.folder)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_committed:
            return
        for name in self._written:
            self._temporary(name).unlink(missing_ok=True)
        for folder in self._created:
            folder.rmdir()

    def _temporary(self, name: str) -> Path:
        return self.folder / TEMPORARY.format(name)


def is_occupied(folder: Path) -> bool:
    """Whether a folder holds anything but what a killed process left."""
    return folder.is_dir() and any(not _TEMPORARY.fullmatch(path.name) for path in folder.iterdir())


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder last; only POSIX can open one."""
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
