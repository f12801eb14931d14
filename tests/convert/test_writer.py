"""Files in large blocks: the bytes, the sum, and errors of threads that reach the caller by name."""

from __future__ import annotations

import errno
import fcntl
import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from flaxqwen.convert import writer as module
from flaxqwen.convert.writer import BLOCK, Writer


def pieces(data: bytes, rng: np.random.Generator) -> list[bytes]:
    cuts = np.sort(rng.integers(0, len(data) + 1, 40))
    return [data[i:j] for i, j in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="looks for Linux's O_DIRECT")
@pytest.mark.parametrize("size", [0, 1, 4096, BLOCK - 1, BLOCK, 3 * BLOCK + 17])
@pytest.mark.parametrize("disk", ["as it is", "without O_DIRECT", "refuses O_DIRECT late"])
def test_bytes_and_their_sum(tmp_path: Path, rng: np.random.Generator, monkeypatch, size: int, disk: str):
    if disk == "without O_DIRECT":
        monkeypatch.setattr(module, "_DIRECT", 0)
    pwrite, direct = os.pwrite, []

    def refuse(fd: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            direct.append(offset)
            if disk == "refuses O_DIRECT late":
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse)
    data, counts = rng.bytes(size), []
    writer = Writer(tmp_path / "a", tmp_path / "b", counts.append)
    for piece in pieces(data, rng):
        buffer = bytearray(piece)
        writer.write(memoryview(buffer))
        buffer[:] = bytes(len(buffer))  # as a caller that uses its buffer again
    writer.close(is_complete=True)
    assert (tmp_path / "a").read_bytes() == data
    assert (writer.size, writer.crc32, sum(counts)) == (size, zlib.crc32(data), size)
    assert disk == "as it is" or len(direct) <= 1


def write(writer: Writer) -> None:
    """Four blocks and a half, as Staging has them written."""
    is_complete = False
    try:
        for _ in range(9):
            writer.write(bytes(BLOCK // 2))
        is_complete = True
    finally:
        writer.close(is_complete)


@pytest.mark.parametrize("broken", [0, 2 * BLOCK, 4 * BLOCK])
def test_an_error_names_the_file_and_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int):
    pwrite = os.pwrite

    def fail(fd: int, data: memoryview, offset: int) -> int:
        if offset == broken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", fail)
    writer = Writer(tmp_path / "a", tmp_path / "b", lambda count: None)
    with pytest.raises(OSError, match=rf"No space left on device at byte {broken}.*/b'$"):
        write(writer)
