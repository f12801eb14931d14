"""Products of a few rows with a weight of bfloat16 or int8 on a CPU, by a kernel of our own: cpp/few_rows.cc."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from flaxqwen.ops import cpu_kernels
from flaxqwen.ops.cpu import rows_of, tangent_of_product

# Up to so many rows it is faster than XLA's products. 24 weights of 4,864 x 896 in bfloat16 on 2 cores of a Zen 5: 16
# rows take it 5 to 10 ms and XLA 11 to 12; 32 rows 16 to 20 and XLA 15.
KERNEL_ROWS = 16


def kernel_serves(x: jax.Array, weight: jax.Array) -> bool:
    """Whether contract_few_rows takes x [..., in] and weight [out, in] as they are, and is the faster form on a CPU."""
    if not cpu_kernels.serve() or x.shape[-1] != weight.shape[1] or not 1 <= rows_of(x) <= KERNEL_ROWS:
        return False
    return (x.dtype, weight.dtype) in ((jnp.bfloat16, jnp.bfloat16), (jnp.bfloat16, jnp.int8), (jnp.float32, jnp.int8))


@jax.custom_jvp
def contract_few_rows(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., in] times weight [out, in] over `in`, on a CPU -> [..., out] float32, the sums of float32 too.

    A row's result is the same to the last bit whatever rows stand beside it.
    """
    # With AVX2 products are of float32: the few rows are widened once, the weight as it is read.
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32 if cpu_kernels.INSTRUCTIONS == "avx2" else x.dtype)
    y = jax.ShapeDtypeStruct((rows.shape[0], weight.shape[0]), jnp.float32)
    return cpu_kernels.call("FewRows", y, rows, weight).reshape(*x.shape[:-1], -1)


@partial(contract_few_rows.defjvp, symbolic_zeros=True)
def _contract_few_rows_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    y = contract_few_rows(*primals)
    return y, tangent_of_product(contract_wide, primals, tangents, y)


def contract_wide(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The same as an operation of XLA's, for any rows; int8 is exact in any floating dtype."""
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight.astype(x.dtype), dims, preferred_element_type=jnp.float32)
