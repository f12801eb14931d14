"""Products with one row on a CPU, and what that CPU can multiply: the fastest form that XLA has depends on it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp

# One row: the conversion of the weight fuses into the dot only while the row, in float32, is under 16 KB.
MAX_FUSED_CONTRACTION = 4096


def cpu_flags() -> str:
    """What Linux says that this machine's CPU can do; empty elsewhere."""
    try:
        with Path("/proc/cpuinfo").open(encoding="ascii", errors="replace") as lines:
            # The first processor's: the others are alike, and a large machine takes long to list them.
            return next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return ""


# Units for tiles of bfloat16 and int8; and vectors of 16 float32.
HAS_AMX, HAS_AVX512 = map(cpu_flags().split().__contains__, ("amx_tile", "avx512f"))


def rows_of(x: jax.Array) -> int:
    """How many vectors x [..., in] holds."""
    return x.size // x.shape[-1]


def contract_one_row(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., in], one row, times weight [out, in] of a narrow dtype, which no other form reads but once -> float32.

    The conversion to float32 is fused into the dot.
    """
    pieces = -(-x.shape[-1] // (MAX_FUSED_CONTRACTION - 1))
    bounds = [x.shape[-1] * i // pieces for i in range(pieces + 1)]
    x, y = x.astype(jnp.float32), None
    for start, stop in pairwise(bounds):
        part = x[..., start:stop] @ weight[:, start:stop].astype(jnp.float32).T
        # The barrier keeps the dot from fusing into an add, which would bring the converted copy back.
        part = jax.lax.optimization_barrier(part)
        y = part if y is None else y + part
    assert y is not None
    return y
