"""How memory is mapped, as Linux tells."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

has_huge_pages = pytest.mark.skipif(
    sys.platform != "linux" or not Path("/sys/kernel/mm/transparent_hugepage").is_dir(),
    reason="transparent huge pages are asked of Linux, where its kernel has them",
)


def flags_at(address: int) -> list[str]:
    """Those of the mapping that an address lies in; `hg` is: huge pages were asked for."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(edge, 16) for edge in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"{address:#x} is not mapped")
