"""Products with one row on a CPU, and what that CPU can multiply: the fastest form that XLA has depends on it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

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


# jax.jit for the programs of generation. XLA's CPU backend orders operations as if all could run at once, and so widens
# every weight of int8 before it multiplies by the first: 128 tokens through 0.5B took 834 MB beside the weights and 340
# ms, now 59 MB and 170 ms; 1,024 tokens in bfloat16 138 MB, now 57. Other backends ignore the option; JAX refuses it in
# a program that is called in another one, or differentiated.
jit_in_order = partial(jax.jit, compiler_options={"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"})


def rows_of(x: jax.Array) -> int:
    """How many vectors x [..., in] holds."""
    return x.size // x.shape[-1]


def tangent_of_product(
    product: Callable[[Any, Any], jax.Array], primals: tuple[Any, Any], tangents: tuple[Any, Any], y: jax.Array
) -> jax.Array:
    """The tangent of y, which is product(x, weight) and linear in each: of a custom_jvp with symbolic zeros."""
    (x, weight), (dx, dweight) = primals, tangents
    parts = [
        product(a, b)
        for a, b in ((dx, weight), (x, dweight))
        if not isinstance(a, SymbolicZero) and not isinstance(b, SymbolicZero)
    ]
    return sum(parts[1:], parts[0]) if parts else jnp.zeros_like(y)


def as_flat_row(x: jax.Array) -> jax.Array:
    """x itself; on a CPU as an array of its own shape, before contract_one_row.

    XLA moves a reshape past the casts that follow it, into the products of a long row, whose loop is then not
    vectorised: 40 heads of 128 times 5,120 x 5,120 take 9.5 ms in place of 1.5 (Zen 5). It moves none past this
    barrier. A sum over windows of the long row, which a short one is kept apart by, takes a sixth longer than this.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def contract_one_row(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., in], one row, times weight [out, in] of a narrow dtype, which no other form reads but once -> float32.

    The conversion to float32 is fused into the dot. That of the row is not, or it would be done anew for each output: a
    sum over windows, here of the row and of zeros below it, is an operation that XLA does not fuse into a dot (4,864 x
    896 of bfloat16, in the CPU's cache: 0.08 ms in place of 0.12, Zen 5). For a longer row the dot is of ones with
    products in equal parts, each as short as it has to be: 896 x 4,864 takes 0.5 ms so, 0.8 in two dots, each of which
    leaves half of every row out, where what the CPU fetches ahead is lost.
    """
    out, width = weight.shape
    parts = next(n for n in range(1 + width // MAX_FUSED_CONTRACTION, width + 1) if width % n == 0)
    row, weight = x.reshape(1, -1).astype(jnp.float32), weight.astype(jnp.float32)
    if parts > 1:
        products = weight.reshape(out, parts, -1) * row.reshape(parts, -1)
        weight = products.reshape(out * parts, -1)
        row = jnp.ones((1, width // parts))
    else:
        row = jax.lax.reduce_window(row, 0.0, jax.lax.add, (2, 1), (1, 1), ((0, 1), (0, 0)))
    # The barrier keeps the dot from fusing into an add, which would bring the converted copy back.
    y = jax.lax.optimization_barrier(row @ weight.T)
    return y.reshape(out, parts).sum(-1).reshape(*x.shape[:-1], out)
