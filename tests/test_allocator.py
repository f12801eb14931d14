"""Memory that is freed and taken again: by page faults, each of which is a page that the kernel cleared."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, sys
from flaxqwen.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
len(b"x" * (80 << 20))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    len(b"x" * (80 << 20) + b"y")
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    """Of taking 160 MB and giving them back, five times."""
    done = subprocess.run([sys.executable, "-c", COUNT, mode], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose malloc is told to keep memory")
def test_freed_memory_is_kept():
    assert faults("plain") > 5 * faults("keep")
