"""What the tests of our kernels for CPUs share."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

from flaxqwen.ops import cpu_kernels


@pytest.fixture(params=["amx", "avx512", "avx2"])
def kernels_for(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each of the instructions that kernels were built for and that run here, in programs of their own."""
    if request.param not in cpu_kernels.BUILT:
        pytest.skip(f"there are no kernels for {request.param}, or this CPU has not got it")
    monkeypatch.setattr(cpu_kernels, "INSTRUCTIONS", request.param)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()
