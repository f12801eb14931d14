"""Sums of a checkpoint's files, in checksums.json beside them: what `flaxqwen convert --check` compares with.

{"files": {"flax_model.safetensors": {"bytes": 988097824, "crc32": "0f1e2d3c"}, ..}}; names of files in folders have
slashes. CRC-32 is zlib's: 0.2 s per GB, three times as fast as SHA-256 where that is in hardware.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxqwen.convert.errors import CheckpointError
from flaxqwen.convert.tensors import CHUNK, MappedFile

CHECKSUMS = "checksums.json"


class Sum(NamedTuple):
    """Bytes of a file, and their CRC-32."""

    nbytes: int
    crc32: int


def sum_of_file(path: Path, report: Callable[[int], None] = lambda count: None) -> Sum:
    """The sum of a file as it is on the disk; `report` takes the bytes of each read.

    Raises:
      OSError: the file cannot be read; the message has the offset.
    """
    file = MappedFile(path)
    try:
        buffer, crc32 = np.empty(CHUNK, np.uint8), 0
        for start in range(0, file.size, CHUNK):
            piece = buffer[: min(CHUNK, file.size - start)]
            file.read_into(piece, start)
            crc32 = zlib.crc32(piece.data, crc32)
            report(piece.size)
        return Sum(file.size, crc32)
    finally:
        file.close()


def to_json(sums: Mapping[str, Sum]) -> dict[str, dict[str, Any]]:
    """Sums as they stand in JSON."""
    return {name: {"bytes": nbytes, "crc32": f"{crc32:08x}"} for name, (nbytes, crc32) in sorted(sums.items())}


def from_json(entries: Any) -> dict[str, Sum]:
    """The inverse.

    Raises:
      ValueError: these are no sums.
    """
    try:
        return {str(name): Sum(int(e["bytes"]), int(e["crc32"], 16)) for name, e in entries.items()}
    except (AttributeError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"not a map of names to bytes and crc32: {error!r}") from None


def encode(sums: Mapping[str, Sum]) -> bytes:
    """The text of checksums.json."""
    return (json.dumps({"files": to_json(sums)}, indent=2) + "\n").encode()


def read_checksums(folder: Path) -> dict[str, Sum] | None:
    """The sums in a folder's checksums.json; None where there is none.

    Raises:
      CheckpointError: the file is corrupt.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
        return from_json(found["files"] if isinstance(found, dict) else None)
    except (ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid: {error}") from None
