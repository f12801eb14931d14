"""Whether a checkpoint on disk is what was written: `flaxqwen convert --check`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flaxqwen.convert.checkpoint import open_checkpoint
from flaxqwen.convert.checksums import CHECKSUMS, read_checksums, sum_of_file
from flaxqwen.convert.errors import CheckpointError
from flaxqwen.convert.load import match
from flaxqwen.convert.names import Path as ParameterPath
from flaxqwen.convert.progress import Report
from flaxqwen.convert.staging import WEIGHTS


@dataclass(frozen=True)
class Checked:
    """What has been found right: tensors, and files that were read whole (none where there is no checksums.json)."""

    tensors: int
    files: int
    nbytes: int


def check(
    folder: str | Path,
    *,
    expected: Mapping[ParameterPath, tuple[int, ...]] | None = None,
    progress: Report | None = None,
) -> Checked:
    """Check the checkpoint in a folder: its files and their index, the tensors it should have, and its checksums.json.

    Of a file, the tensors are checked, and the checksums.json beside it with all that it names.

    Args:
      expected: the shape of every parameter of its model, by its path.
      progress: called with the bytes done and the bytes in all.

    Raises:
      FileNotFoundError: there is no checkpoint.
      CheckpointError: what is wrong; of tensors and of files, all are listed.
      OSError: a file cannot be read.
    """
    source = Path(folder)
    folder = source if source.is_dir() else source.parent
    with open_checkpoint(source) as checkpoint:
        if expected is not None:
            match(checkpoint, expected)
        tensors = len(checkpoint.tensors)
    sums = read_checksums(folder)
    if sums is None:
        return Checked(tensors, 0, 0)
    held = [path for path in sorted(folder.iterdir()) if WEIGHTS.fullmatch(path.name)]
    files = [file for path in held for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    names = [file.relative_to(folder).as_posix() for file in files if file.is_file()]
    problems = [f"{name} is not in {CHECKSUMS}" for name in names if name not in sums]
    total, done = sum(wanted.nbytes for wanted in sums.values()), 0

    def count(read: int) -> None:
        nonlocal done
        done += read
        if progress:
            progress(min(done, total), total)

    for name, wanted in sums.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != wanted.nbytes:
            problems.append(f"{name} has {path.stat().st_size} bytes, expected {wanted.nbytes}")
        elif (found := sum_of_file(path, count)) != wanted:
            problems.append(f"{name} has crc32 {found.crc32:08x}, expected {wanted.crc32:08x}")
    if problems:
        raise CheckpointError(f"{folder}: not as it was written: {'; '.join(problems)}")
    return Checked(tensors, len(sums), total)
