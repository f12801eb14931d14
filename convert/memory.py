"""Memory for weights."""

from __future__ import annotations

import mmap
import sys
import threading
from contextlib import suppress

import numpy as np

# XLA's CPU backend takes host memory without a copy when it is aligned so.
ALIGNMENT = 64
# Linux's on x86, and on ARM with pages of 4 KB.
HUGE_PAGE = 1 << 21
# Weights of so many bytes and more lie in blocks, of so many at least.
SMALLEST, BLOCK = 1 << 16, 32 * HUGE_PAGE
# Blocks whose rest may be taken yet: small weights fill up what a large one has left.
OPEN = 2


class WeightMemory:
    """Where the weights of a model lie: side by side, in blocks of huge pages. For several threads.

    The CPU finds its way to every page by tables that are in memory themselves: on a virtual machine 1 GB is read at 20
    to 24 GB/s in pages of 4 KB, in huge ones at 28 to 31. numpy would ask for them too, of arrays over 4 MB: 9% of 0.5B
    are smaller, and 1 MB of each larger one, on the average, would be left over. Where each weight had huge pages of
    its own, as far as it filled them, a step of 0.5B in bfloat16 took 56 and 64 ms, and 52 and 56 side by side.

    A block goes when the last of its weights has gone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rests: list[np.ndarray] = []  # the block last taken from is the first

    def take(self, size: int) -> np.ndarray:
        """`size` bytes of nobody else's, aligned to 64 bytes."""
        taken = -(-size // ALIGNMENT) * ALIGNMENT
        if size < SMALLEST:
            return _aligned(np.empty(taken + ALIGNMENT, np.uint8), ALIGNMENT)[:size]
        with self._lock:
            place = next((i for i, rest in enumerate(self._rests) if len(rest) >= taken), None)
            block = _new_block(max(taken, BLOCK)) if place is None else self._rests.pop(place)
            self._rests = [block[taken:], *self._rests][:OPEN]
        return block[:size]


def _new_block(size: int) -> np.ndarray:
    """At least so many bytes, which take none before they are written to."""
    if sys.platform != "linux":
        return _aligned(np.empty(size + ALIGNMENT, np.uint8), ALIGNMENT)
    size = -(-size // HUGE_PAGE) * HUGE_PAGE
    pages = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block = _aligned(np.frombuffer(pages, np.uint8), HUGE_PAGE)[:size]
    with suppress(OSError):  # a kernel that has none
        pages.madvise(mmap.MADV_HUGEPAGE, len(pages) - HUGE_PAGE - size, size)
    return block


def _aligned(memory: np.ndarray, alignment: int) -> np.ndarray:
    return memory[-memory.ctypes.data % alignment :]
