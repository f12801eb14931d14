"""`flaxqwen parity`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from rich.console import Console

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
    """Print how a model here compares with PyTorch's, and save that if there is a folder for it; whether it passed."""
    result = compare(name, dtype=dtype, prompts=prompts, audio=audio, steps=steps)
    if as_json:
        print(json.dumps(result.to_dict(), ensure_ascii=False))
    else:
        Console(highlight=False, soft_wrap=True).print(result.table())
    if report is not None:
        result.save(report)
    return result.passed
