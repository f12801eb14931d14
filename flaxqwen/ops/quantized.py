"""Contractions with quantized weights, which stay integers in memory: convert/quantize.py has the format.

Axes: B batch, T new tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flaxqwen.ops.cpu import HAS_AMX, contract_one_row, rows_of
from flaxqwen.ops.products import contract_natively, contract_wide, kernel_serves

# Up to so many rows are multiplied in int8 on a CPU, each as so many digits.
FEW_ROWS, DIGITS = 16, 3


def contract_quantized(x: jax.Array, values: jax.Array, scale: jax.Array, on_one_device: bool = False) -> jax.Array:
    """x [..., in] times a quantized weight over `in` -> [..., out], accumulated in float32 and cast to x's dtype.

    Args:
      values: [out, in] int8, or [out, in / 2] uint8 of two 4-bit integers each.
      scale: [out, groups] float32.
      on_one_device: as of linear.contract.
    """
    if values.dtype == jnp.uint8:
        return _contract_int4(x, values, scale).astype(x.dtype)
    return (_contract_int8(x, values, on_one_device) * scale[:, 0]).astype(x.dtype)


def _contract_int8(x: jax.Array, values: jax.Array, on_one_device: bool) -> jax.Array:
    """Without the scale -> [..., out] float32."""
    if on_one_device and kernel_serves(x, values):
        return contract_natively(x, values, jnp.float32)
    if rows_of(x) <= FEW_ROWS:
        return jax.lax.platform_dependent(x, values, cpu=_contract_int8_cpu, default=contract_wide)
    return contract_wide(x, values)


def _contract_int8_cpu(x: jax.Array, values: jax.Array) -> jax.Array:
    """As digits; but one row without AMX takes half as long with the weight's conversion fused into the dot."""
    return contract_one_row(x, values) if rows_of(x) == 1 and not HAS_AMX else _contract_digits(x, values)


def _contract_digits(x: jax.Array, values: jax.Array) -> jax.Array:
    """x [..., in] times int8 values [out, in], by products of int8 alone -> [..., out] float32.

    Each row of x is written in DIGITS digits of base 254, which leaves an error of 2^-24 of its largest value. XLA's
    CPU backend has products of int8; any other form converts the weight. A 0.5B decode step takes 42 ms (with AMX),
    against 85 with the conversion fused into a float32 dot.
    """
    rest = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    step = jnp.max(jnp.abs(rest), axis=-1, keepdims=True) / 127
    step = jnp.where(step == 0, 1, step)
    digits, steps = [], []
    for _ in range(DIGITS):
        digit = jnp.rint(rest / step)
        rest = rest - digit * step
        digits.append(digit.astype(jnp.int8))
        steps.append(step)
        step = step / 254
    # The digits have an axis of their own: among the rows, they would bring rows that a mesh has cut to each device.
    dims = (((2,), (1,)), ((), ()))
    products = jax.lax.dot_general(jnp.stack(digits), values, dims, preferred_element_type=jnp.int32)
    parts = products.astype(jnp.float32) * jnp.stack(steps)
    return parts.sum(axis=0).reshape(*x.shape[:-1], -1)


def _contract_int4(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    """The even and the odd input channels apart: they are the low and the high halves of the bytes as they lie."""
    if rows_of(x) == 1:
        return jax.lax.platform_dependent(x, values, scale, cpu=_contract_int4_one_row_cpu, default=_contract_int4_wide)
    return _contract_int4_wide(x, values, scale)


def _contract_int4_wide(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    (low, high), (even, odd) = _halves(values, scale), _even_and_odd(x)
    return contract_wide(even, low) + contract_wide(odd, high)


def _contract_int4_one_row_cpu(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    (low, high), (even, odd) = _halves(values, scale), _even_and_odd(x)
    return contract_one_row(even, low) + contract_one_row(odd, high)


def _even_and_odd(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The even and the odd channels of x [..., in]; of pairs, which stay together where a mesh cuts x."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return pairs[..., 0], pairs[..., 1]


def _halves(values: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The even and the odd columns [out, in / 2] of an int4 weight, float32."""
    out, half = values.shape
    wide = jnp.broadcast_to(scale[..., None], (*scale.shape, half // scale.shape[1])).reshape(out, half)
    low, high = ((nibble.astype(jnp.int8) - 8).astype(jnp.float32) * wide for nibble in (values & 15, values >> 4))
    return low, high
