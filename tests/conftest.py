"""What the tests share: where the real inputs are, and one precision for parity."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def find_shared() -> Path | None:
    """The folder of real configs, tokenizers and tools: $FLAXQWEN_SHARED, or `shared` beside the repository."""
    folder = Path(os.environ.get("FLAXQWEN_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    return folder if (folder / "data").is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real inputs; the test is skipped where it is absent."""
    folder = find_shared()
    if folder is None:
        pytest.skip("needs the folder of real inputs (shared/ beside the repository, or $FLAXQWEN_SHARED)")
    return folder
