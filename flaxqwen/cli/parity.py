"""`flaxqwen parity`."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Literal

from flaxqwen.cli.common import Console
from flaxqwen.parity import compare


def show_parity(
    name: str,
    *,
    dtype: Literal["float32", "bfloat16"],
    prompts: list[str] | None,
    audio: list[Path],
    steps: int,
    report: Path | None,
    as_json: bool,
) -> bool:
    """Print how a model here compares with PyTorch's, and save that if there is a folder for it; whether it passed.

    Raises:
      OSError: the folder cannot be made. Others as flaxqwen.parity.compare.
    """
    if report is not None:  # before a run of minutes
        if report.is_file():
            raise FileExistsError(17, "a file; expected a folder for the report", str(report))
        report.mkdir(parents=True, exist_ok=True)
    if not sys.stderr.isatty():
        _silence_transformers()
    result = compare(name, dtype=dtype, prompts=prompts, audio=audio, steps=steps)
    if report is not None:  # before what is printed, which a stream may refuse
        result.save(report)
    if as_json:
        print(json.dumps(result.to_dict(), ensure_ascii=False))
    else:
        Console(highlight=False, soft_wrap=True).print(result.table())
    return result.passed


def _silence_transformers() -> None:
    """No progress bars of Transformers."""
    with contextlib.suppress(ImportError):  # compare says what is missing
        import transformers

        transformers.utils.logging.disable_progress_bar()
