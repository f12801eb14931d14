"""Memory for weights."""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress

import numpy as np

# XLA's CPU backend takes host memory without a copy when it is aligned so.
ALIGNMENT = 64
# Linux's on x86, and on ARM with pages of 4 KB.
HUGE_PAGE = 1 << 21


def fresh_bytes(size: int) -> np.ndarray:
    """`size` bytes of nobody else's, aligned to 64 bytes; of large ones what fills whole huge pages lies in such.

    The CPU finds its way to every page by tables that are in memory themselves: on a virtual machine 1 GB is read at 20
    to 24 GB/s in pages of 4 KB, in huge ones at 28 to 31. numpy would ask for them too, but for what is left over as
    well, 1 MB of each weight on the average that nothing uses.
    """
    if size < HUGE_PAGE or sys.platform != "linux":
        memory = np.empty(size + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
    else:
        pages = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = np.frombuffer(pages, np.uint8)
        start = -memory.ctypes.data % HUGE_PAGE
        with suppress(OSError):  # a kernel that has none
            pages.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE_PAGE * HUGE_PAGE)
    return memory[start : start + size]
