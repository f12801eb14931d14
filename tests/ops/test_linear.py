"""The contraction of every linear layer, in each of the forms that a CPU has for it, against numpy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxqwen.ops import linear

# A result of bfloat16 is rounded to 8 bits.
TOLERANCE: dict[Any, float] = {jnp.float32: 2e-6, jnp.bfloat16: 2**-8 * 1.01}


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (3, 2), (4, 1), (5, 4)])
def test_contractions(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: Any, amx: bool
):
    """[B, T, in] times [out, in], with a row short and long enough for either form of one."""
    monkeypatch.setattr(linear, "HAS_AMX", amx)
    for width in (192, 4864) if shape == (1, 1) else (192,):
        x, weight = (jnp.asarray(rng.standard_normal((*s, width)), dtype) for s in (shape, (40,)))
        got = jax.jit(lambda *inputs: linear.contract(*inputs))(x, weight)
        want = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
        assert (got.dtype, got.shape) == (dtype, want.shape)
        assert np.abs(np.asarray(got, np.float64) - want).max() <= TOLERANCE[dtype] * np.abs(want).max()


def test_few_rows_do_not_pack_the_weight():
    """On a CPU the weight is the left operand of the product and no copy of it is made: XLA has not swapped it back."""
    x, weight = jnp.ones((6, 256)), jnp.ones((512, 256))
    text = jax.jit(linear.contract).lower(x, weight).compile().as_text()
    (product,) = [line for line in text.splitlines() if " dot(" in line]
    assert "f32[512,6]" in product.split(" dot(")[0]
    assert "lhs_contracting_dims={1}" in product
