"""Products with a weight on a CPU by a kernel of our own, cpp/products.cc, where it is faster than XLA's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from flaxqwen.ops import cpu_kernels
from flaxqwen.ops.activations import ACTIVATION
from flaxqwen.ops.cpu import rows_of, tangent_of_product

# Up to so many rows it is faster than XLA's products. 24 weights of 4,864 x 896 in bfloat16 on 2 cores of a Zen 5: 16
# rows take it 5 to 10 ms and XLA 11 to 12; 32 rows 16 to 20 and XLA 15.
KERNEL_ROWS = 16
# The same of float32. With AMX, 8 rows take 0.81 to 0.86 ms a weight and XLA 0.93 to 1.11; 16 take 1.5, and XLA 1.2. A
# step of one row takes 85, 82, 90 and 107 ms, with XLA's products in turns 95, 90, 102 and 110.
FLOAT32_ROWS = 8
# By AMX any number of rows of bfloat16: 128 rows take 1.2 and 1.1 ms a weight (of 896 x 4,864), and XLA 2.9 and 1.3;
# 1,024 rows 5.5 and 6.5, and XLA 8.7 and 8.6; of int8 1.3 and 1.4, and XLA 5.1 and 2.5; 6.3 and 6.6, and XLA 11 and 10.
# Up to TILE_ROWS of int8 have exact sums. Of float32, in three parts of bfloat16, SPLIT_ROWS and more: 24 rows take 2.3
# and 2.2 ms, and XLA 2.5 and 3.3; 128 rows 4.4 and 5.1, and XLA 9.9 and 10.3; 1,024 rows 27 and 32, XLA 42 and 45.
TILE_ROWS, SPLIT_ROWS = 64, 17
# What the width of a weight is a multiple of, then.
TILE_WIDTH = {np.dtype(jnp.float32): 32, np.dtype(jnp.bfloat16): 32, np.dtype(jnp.int8): 64}
# By AMX many rows of x are copied, so many at a time at most, and in blocks.
COPIED_ROWS, COPIED_BLOCK = 4096, 32

Arrays = tuple[jax.Array, ...]
Weights = jax.Array | Arrays

# What remat knows the kernel's products by, which are no dots.
PRODUCT = "product"

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
    rows, in_tiles = rows_of(x), cpu_kernels.INSTRUCTIONS == "amx" and weight.shape[1] % TILE_WIDTH[weight.dtype] == 0
    if weight.dtype == jnp.float32:
        return 1 <= rows <= FLOAT32_ROWS or (in_tiles and rows >= SPLIT_ROWS)
    return rows >= 1 and (in_tiles or rows <= KERNEL_ROWS)


def serves_together(x: jax.Array, weights: Sequence[jax.Array]) -> bool:
    """Whether a kernel takes x [..., in] and several weights [out, in] at once, which pays at a few rows."""
    return rows_of(x) <= KERNEL_ROWS and all(w.dtype == weights[0].dtype and kernel_serves(x, w) for w in weights)


def _rows(x: jax.Array) -> jax.Array:
    """x [..., in] as [rows, in]; in float32 for AVX2, whose products are: the weight is widened as it is read."""
    return x.reshape(-1, x.shape[-1]).astype(jnp.float32 if cpu_kernels.INSTRUCTIONS == "avx2" else x.dtype)


def _copy_bytes(rows: jax.Array, weight: jax.Array) -> int:
    """How much memory a product of x [rows, in] takes beside its result: that of three parts, if x is float32."""
    fewest = SPLIT_ROWS if weight.dtype == jnp.float32 else TILE_ROWS + 1
    if cpu_kernels.INSTRUCTIONS != "amx" or rows.shape[0] < fewest:
        return 0
    blocks = -(-min(rows.shape[0], COPIED_ROWS) // COPIED_BLOCK)
    return blocks * COPIED_BLOCK * rows.shape[1] * (6 if rows.dtype == jnp.float32 else 2)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def contract_by_kernel(x: jax.Array, weight: Weights, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """x [..., in] times weight [out, in] over `in`, on a CPU -> [..., out], the sums in float32, or exact.

    A row's result is the same to the last bit whatever rows stand beside it. By AMX so it is of int8 among up to
    TILE_ROWS, whose sums are exact, and among more; and of float32 among fewer than SPLIT_ROWS, and among more, where
    infinity, and what bfloat16 rounds to it, makes NaN.

    Args:
      weight: or a tuple of some, whose outputs then follow each other.
      dtype: of the result, float32; or bfloat16, if x and the weight are.
    """
    rows, weights = _rows(x), jax.tree.leaves(weight)
    result = jax.ShapeDtypeStruct((rows.shape[0], sum(each.shape[0] for each in weights)), dtype)
    y = cpu_kernels.call("Products", result, rows, *weights, lent=_copy_bytes(rows, weights[0]))
    return y.reshape(*x.shape[:-1], -1)


@partial(contract_by_kernel.defjvp, symbolic_zeros=True)
def _contract_by_kernel_jvp(
    dtype: DTypeLike, primals: tuple[Any, Any], tangents: tuple[Any, Any]
) -> tuple[jax.Array, jax.Array]:
    (x, weight), (dx, dweight) = primals, tangents
    y = contract_by_kernel(x, weight, dtype)
    weights, dweights = (weight, dweight) if isinstance(weight, tuple) else ((weight,), (dweight,))
    ends = np.cumsum([each.shape[0] for each in weights])
    parts = [
        tangent_of_product(lambda x, weight: contract_wide(x, weight).astype(dtype), (x, each), (dx, deach), part)
        for each, deach, part in zip(weights, dweights, jnp.split(y, ends[:-1], axis=-1), strict=True)
    ]
    return y, jnp.concatenate(parts, axis=-1)


def contract_natively(x: jax.Array, weight: Weights, dtype: DTypeLike) -> jax.Array:
    """contract_by_kernel, and elsewhere than on a CPU contract_wide, under the name that remat knows it by."""

    def kernel(x: jax.Array, weight: Weights) -> jax.Array:
        return contract_by_kernel(x, weight, dtype)

    def plain(x: jax.Array, weight: Weights) -> jax.Array:
        return jnp.concatenate([contract_wide(x, each).astype(dtype) for each in jax.tree.leaves(weight)], axis=-1)

    return checkpoint_name(jax.lax.platform_dependent(x, weight, cpu=kernel, default=plain), PRODUCT)


@jax.custom_jvp
def gate_by_kernel(x: jax.Array, weights: Arrays, scales: Arrays) -> jax.Array:
    """silu(x gate^T) * (x up^T) on a CPU, of a few rows: x [..., in] -> [..., out] in x's dtype.

    Args:
      weights: gate and up, [out, in] each.
      scales: () or, of weights of int8, theirs, [out] float32 each.
    """
    rows = _rows(x)
    y = jax.ShapeDtypeStruct((rows.shape[0], weights[0].shape[0]), x.dtype)
    return cpu_kernels.call("GatedProducts", y, rows, *weights, *scales).reshape(*x.shape[:-1], -1)


def gate_plainly(x: jax.Array, weights: Arrays, scales: Arrays) -> jax.Array:
    """The same as operations of XLA's."""
    products = [contract_wide(x, weight) for weight in weights]
    if scales:
        products = [product * scale for product, scale in zip(products, scales, strict=True)]
    left, right = (product.astype(x.dtype) for product in products)
    return ACTIVATION["silu"](left) * right


@gate_by_kernel.defjvp
def _gate_by_kernel_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    _, tangent = jax.jvp(gate_plainly, primals, tangents)
    return gate_by_kernel(*primals), tangent


def gate_natively(x: jax.Array, weights: Arrays, scales: Arrays) -> jax.Array:
    """gate_by_kernel, and elsewhere than on a CPU gate_plainly."""
    return jax.lax.platform_dependent(x, weights, scales, cpu=gate_by_kernel, default=gate_plainly)


def contract_wide(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The same as an operation of XLA's -> [..., out] float32; int8 is exact in any floating dtype."""
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight.astype(x.dtype), dims, preferred_element_type=jnp.float32)
