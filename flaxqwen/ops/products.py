"""Products with a weight on a CPU by a kernel of our own, cpp/products.cc, where it is faster than XLA's."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flaxqwen.ops import cpu_kernels
from flaxqwen.ops.cpu import rows_of, tangent_of_product

# Up to so many rows it is faster than XLA's products. 24 weights of 4,864 x 896 in bfloat16 on 2 cores of a Zen 5: 16
# rows take it 5 to 10 ms and XLA 11 to 12; 32 rows 16 to 20 and XLA 15.
KERNEL_ROWS = 16
# The same of float32, from 2 rows on. With AMX, 8 rows take 0.81 to 0.86 ms a weight and XLA 0.93 to 1.11; 16 take 1.5,
# and XLA 1.2. A step of one row takes 113 ms, and XLA 106, where memory reads 25 GB/s.
FLOAT32_ROWS = 8
# By AMX, whose tiles have rows of so many bytes, any number of rows of bfloat16: 128 rows take 1.2 and 1.1 ms a weight
# (of 896 x 4,864), and XLA 2.9 and 1.3; 1,024 rows 5.5 and 6.5, and XLA 8.7 and 8.6; of int8 1.3 and 1.4, and XLA 5.1
# and 2.5; 6.3 and 6.6, and XLA 11 and 10. Of float32 times int8 up to so many: 64 take 0.73 and 1.1, XLA 1.7 and 2.1.
TILE_ROWS, TILE_BYTES = 64, 64

DTYPES = (
    (jnp.float32, jnp.float32),
    (jnp.float32, jnp.int8),
    (jnp.bfloat16, jnp.bfloat16),
    (jnp.bfloat16, jnp.int8),
)


def kernel_serves(x: jax.Array, weight: jax.Array) -> bool:
    """Whether contract_by_kernel takes x [..., in] and weight [out, in] as they are, and is the fastest on a CPU."""
    if not cpu_kernels.serve() or x.shape[-1] != weight.shape[1] or (x.dtype, weight.dtype) not in DTYPES:
        return False
    least, most = 1, float(KERNEL_ROWS)
    if weight.dtype == jnp.float32:
        least, most = 2, FLOAT32_ROWS
    elif cpu_kernels.INSTRUCTIONS == "amx" and weight.shape[1] * weight.dtype.itemsize % TILE_BYTES == 0:
        most = TILE_ROWS if x.dtype == jnp.float32 else math.inf
    return least <= rows_of(x) <= most


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def contract_by_kernel(x: jax.Array, weight: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """x [..., in] times weight [out, in] over `in`, on a CPU -> [..., out], the sums in float32, or exact.

    A row's result is the same to the last bit whatever rows stand beside it; of bfloat16 times int8 by AMX, among up to
    TILE_ROWS, whose sums are exact, and among more, where they are of float32.

    Args:
      dtype: of the result, float32; or bfloat16, if x and the weight are.
    """
    # With AVX2 products are of float32: the few rows are widened once, the weight as it is read.
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32 if cpu_kernels.INSTRUCTIONS == "avx2" else x.dtype)
    y = jax.ShapeDtypeStruct((rows.shape[0], weight.shape[0]), dtype)
    return cpu_kernels.call("Products", y, rows, weight).reshape(*x.shape[:-1], -1)


@partial(contract_by_kernel.defjvp, symbolic_zeros=True)
def _contract_by_kernel_jvp(
    dtype: DTypeLike, primals: tuple[Any, Any], tangents: tuple[Any, Any]
) -> tuple[jax.Array, jax.Array]:
    y = contract_by_kernel(*primals, dtype)
    return y, tangent_of_product(lambda x, weight: contract_wide(x, weight).astype(dtype), primals, tangents, y)


def contract_wide(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The same as an operation of XLA's -> [..., out] float32; int8 is exact in any floating dtype."""
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight.astype(x.dtype), dims, preferred_element_type=jnp.float32)
