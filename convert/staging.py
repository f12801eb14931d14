"""Files that take their places in a folder together, or not at all; and go on where a killed process has ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from flaxqwen.convert.checksums import CHECKSUMS, Sum, encode, from_json, sum_of_file, to_json
from flaxqwen.convert.writer import Writer

# None where the system is not POSIX: nothing keeps two processes apart there.
fcntl: Any = import_module("fcntl") if find_spec("fcntl") else None

ORBAX = "orbax_model"  # the folder of an orbax checkpoint, beside config.json

# A file that holds weights, or the index of its shards; or the folder that does.
WEIGHTS = re.compile(
    rf"(flax_|pytorch_)?model(-\d{{5}}-of-\d{{5}})?\.(safetensors|bin|msgpack)(\.index\.json)?|{ORBAX}"
)

TEMPORARY = ".{}.flaxqwen"
JOURNAL = TEMPORARY.format("journal")
_TEMPORARY = re.compile(r"\..+\.flaxqwen")


@dataclass(frozen=True)
class PlannedFile:
    """A file of a checkpoint, before it is written.

    nbytes: of the file; of a msgpack, of its tensors alone. content: a function that writes it, or the whole of it.
    """

    nbytes: int
    content: Callable[[Writer], None] | bytes


class Staging:
    """Writes files of a folder under temporary names; `commit` gives them their own, all at the end.

    A file "a/b" of a folder in the folder lies in a temporary folder, which takes the place of "a" as a whole.

    On any error before, the temporaries are removed and the folder is as it was, or is not there if it was not. A
    process that is killed leaves its temporaries, and a journal of the sums of those that are finished. The next one
    with the same key takes these over, if they still have their sums; one with another key, or none, begins anew.

    The folder is locked meanwhile: another Staging of it, in whatever process, is an OSError.

    folder: where to; made if need be.
    report: takes the bytes of each write.
    key: stands for all that the files are made of.
    """

    def __init__(
        self, folder: Path, report: Callable[[int], None] = lambda count: None, key: str | None = None
    ) -> None:
        self.folder = folder
        self._report = report
        self._key = key
        self._finished: dict[str, Sum] = {}  # by a process that was killed
        self._written: list[str] = []
        self._sums: dict[str, Sum] = {}
        self._created: list[Path] = []
        self._lock: int | None = None
        self._is_committed = False

    def __enter__(self) -> Staging:
        missing = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.folder)
        self._created = missing
        try:
            self._finished = read_journal(self.folder, self._key)
            if not self._finished:  # what lies in a temporary folder would go with it
                for path in self.folder.glob(TEMPORARY.format("*")):
                    if path.is_dir():
                        shutil.rmtree(path)
        except BaseException:
            _unlock(self._lock)
            raise
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of the files that have been written."""
        return {name: found.nbytes for name, found in self._sums.items()}

    def write(self, name: str, fill: Callable[[Writer], None]) -> None:
        """Let `fill` write the file `name`, unless that is done."""
        if not self._take_over(name):
            self._write(name, fill)
        self._save_journal()

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a small file."""
        self._write(name, lambda writer: writer.write(data))

    def write_checksums(self) -> None:
        """Write the sums of all files so far beside them."""
        self.write_bytes(CHECKSUMS, encode(self._sums))

    def commit(self) -> None:
        """Put the files in their places, in the order they were written, and remove the weights they replace."""
        self._save_journal()
        # Old indexes first: if this stops half-way, none is left that would name the old shards and find new ones.
        for path in list(self.folder.glob("*.index.json")):
            if WEIGHTS.fullmatch(path.name):
                path.unlink()
        tops = dict.fromkeys(map(_top, self._written))
        for top in tops:
            if self._temporary(top).exists():  # or it was in its place already
                self._put(top)
        self._is_committed = True
        for path in list(self.folder.iterdir()):
            is_ours = WEIGHTS.fullmatch(path.name) or path.name == CHECKSUMS
            is_stale = is_ours and path.name not in tops
            if is_stale or (_TEMPORARY.fullmatch(path.name) and path.name != JOURNAL):
                _remove(path)
        _sync_folder(self.folder)
        (self.folder / JOURNAL).unlink(missing_ok=True)  # the last: without it, all is in its place

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self._is_committed:
                self._undo()
        finally:
            _unlock(self._lock)

    def _undo(self) -> None:
        """Leave the folder as it was."""
        for top in set(map(_top, (*self._written, *self._finished))):
            _remove(self._temporary(top))
        _remove(self._temporary("new-journal"))  # of a disk that was full just then
        # Where a killed process has begun to put files in their places, they are told by the journal alone.
        if not any((self.folder / name).exists() for name in self._finished):
            (self.folder / JOURNAL).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # since it was made, another process has put something there
            for folder in self._created:
                folder.rmdir()

    def _write(self, name: str, fill: Callable[[Writer], None]) -> None:
        self._written.append(name)
        self._temporary(name).parent.mkdir(parents=True, exist_ok=True)
        writer = Writer(self._temporary(name), self.folder / name, self._report)
        is_complete = False
        try:
            fill(writer)
            is_complete = True
        finally:
            writer.close(is_complete)
        self._sums[name] = Sum(writer.size, writer.crc32)

    def _take_over(self, name: str) -> bool:
        """Whether a killed process has finished the file, and it is as it was."""
        wanted = self._finished.pop(name, None)
        if wanted is None:
            return False
        for path in (self._temporary(name), self.folder / name):
            if path.is_file() and path.stat().st_size == wanted.nbytes and sum_of_file(path) == wanted:
                if path == self.folder / name:
                    self._temporary(name).unlink(missing_ok=True)
                self._written.append(name)
                self._sums[name] = wanted
                self._report(wanted.nbytes)
                return True
        return False

    def _put(self, top: str) -> None:
        """Put a file, or a folder, in its place."""
        temporary, place = self._temporary(top), self.folder / top
        if temporary.is_dir():
            for name in self._written:
                if _top(name) == top and not self._temporary(name).exists():  # taken over where it is
                    os.replace(self.folder / name, self._temporary(name))
            for folder in (temporary, *filter(Path.is_dir, temporary.rglob("*"))):
                _sync_folder(folder)
        if place.is_dir():  # os.replace takes no folder that has files
            old = self._temporary(f"old-{top}")
            _remove(old)
            os.replace(place, old)
        os.replace(temporary, place)

    def _save_journal(self) -> None:
        """Note what is finished; the file is always a whole one."""
        if self._key is None:
            return
        journal = {"key": self._key, "files": to_json(self._finished | self._sums)}
        temporary = self._temporary("new-journal")
        temporary.write_text(json.dumps(journal), encoding="utf-8")
        os.replace(temporary, self.folder / JOURNAL)

    def _temporary(self, name: str) -> Path:
        top, _, rest = name.partition("/")
        return self.folder / TEMPORARY.format(top) / rest


def read_journal(folder: Path, key: str | None) -> dict[str, Sum]:
    """The files that a killed process has finished under this key, in their places or under their temporary names."""
    try:
        journal = json.loads((folder / JOURNAL).read_bytes())
        return from_json(journal["files"]) if journal["key"] == key else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # none, or not whole: nothing is finished
        return {}


def is_occupied(folder: Path, besides: Collection[str] = ()) -> bool:
    """Whether a folder holds anything but what a killed process left: temporaries, and files `besides`."""
    tops = set(map(_top, besides))
    return folder.is_dir() and any(
        not _TEMPORARY.fullmatch(path.name) and path.name not in tops for path in folder.iterdir()
    )


def _lock(folder: Path) -> int | None:
    """Keep others from writing a folder until `_unlock`; the system does that for a process that is killed.

    Raises:
      OSError: another one is writing it.
    """
    if fcntl is None:
        return None
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise OSError(f"{folder}: another process is writing it") from None
    except OSError:  # a file system without locks, as NFS for folders: go on without
        pass
    return fd


def _unlock(fd: int | None) -> None:
    if fd is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)  # now, even where a fork still has the descriptor
        os.close(fd)


def _top(name: str) -> str:
    """What stands in the folder itself of a file's name."""
    return name.partition("/")[0]


def _remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder last; only POSIX can open one."""
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
