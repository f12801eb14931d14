"""A file that is written in large blocks, past the page cache where that is possible, with its checksum."""

from __future__ import annotations

import errno
import mmap
import os
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

# Bytes that go to the disk at once, one block after the other. On the machine of the benchmark 1 GB takes 0.4 to 0.6 s,
# which is what its disk takes; in pieces of 256 KiB 0.5 to 0.6 s, and two at a time are no faster.
BLOCK = 1 << 22
_BLOCKS = 3  # one is filled while one is written, and one more evens out their paces
# Linux's way from our memory straight to the disk. Through the page cache the copy takes a core 0.25 s per GB, several
# times that where the kernel has to ask a hypervisor for the memory, and the wait for the disk comes on top.
_DIRECT = getattr(os, "O_DIRECT", 0)
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)


class Writer:
    """A file being written, block by block, while the caller makes the next. Errors name the file it is to become.

    size, crc32: of what has been written; of the whole file after `close`.
    """

    def __init__(self, path: Path, target: Path, report: Callable[[int], None]) -> None:
        self.target = target
        self.size = 0
        self.crc32 = 0
        self._report = report
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _CLOEXEC, 0o666)
        self._direct = _open_direct(path)
        self._is_direct = self._direct is not None
        self._hasher = ThreadPoolExecutor(1)  # one: the sum of a block goes on from that of the block before
        self._disk = ThreadPoolExecutor(1)
        self._blocks = deque(_Block() for _ in range(_BLOCKS))  # the first is being filled

    def write(self, data: bytes | memoryview) -> None:
        """Take all of the data, which may change as soon as this returns."""
        view = memoryview(data)
        while view:
            start = self.size % BLOCK
            piece = view[: BLOCK - start]
            self._blocks[0].memory[start : start + len(piece)] = piece
            self.size += len(piece)
            view = view[len(piece) :]
            if self.size % BLOCK == 0:
                self._send()
            self._report(len(piece))

    def close(self, is_complete: bool) -> None:
        """Close the file; one that is complete, once its bytes are on the disk."""
        try:
            if is_complete:
                self._finish()
        finally:
            self._hasher.shutdown()
            self._disk.shutdown()
            os.close(self._fd)
            if self._direct is not None:
                os.close(self._direct)

    def _send(self) -> None:
        """Let the block that is full be written, and wait until the next is free."""
        block, data = self._blocks[0], memoryview(self._blocks[0].memory)
        write = self._disk.submit(self._write_at, data, self.size - BLOCK)
        block.work = [self._hasher.submit(self._add_to_sum, data), write]
        self._blocks.rotate(-1)
        self._blocks[0].wait()

    def _finish(self) -> None:
        for block in self._blocks:
            block.wait()
        rest = self.size % BLOCK
        data = memoryview(self._blocks[0].memory)[:rest]
        self._add_to_sum(data)
        self._write_at(data, self.size - rest)
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._named(error, self.size) from error

    def _add_to_sum(self, data: memoryview) -> None:
        self.crc32 = zlib.crc32(data, self.crc32)

    def _write_at(self, data: memoryview, offset: int) -> None:
        while data:
            # A disk takes whole sectors: the end of a file, and what is left of a short write, go the usual way.
            direct = self._direct if self._is_direct and len(data) == BLOCK else None
            try:
                count = os.pwrite(self._fd if direct is None else direct, data, offset)
            except OSError as error:
                if direct is None or error.errno != errno.EINVAL:
                    raise self._named(error, offset) from error
                self._is_direct = False  # a file system that has taken the flag and does not mean it
                continue
            data = data[count:]
            offset += count

    def _named(self, error: OSError, offset: int) -> OSError:
        return OSError(error.errno, f"{error.strerror} at byte {offset}", str(self.target))


class _Block:
    """Memory of one block, and what is being done with it."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, BLOCK)  # aligned to pages, as _DIRECT needs it
        self.work: list[Future[None]] = []

    def wait(self) -> None:
        for future in self.work:
            future.result()
        self.work = []


def _open_direct(path: Path) -> int | None:
    """The file, opened once more for writing past the page cache; None where that is not to be had."""
    try:
        return os.open(path, os.O_WRONLY | _DIRECT | _CLOEXEC) if _DIRECT else None
    except OSError:
        return None
