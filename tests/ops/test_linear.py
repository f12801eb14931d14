"""The contraction of every linear layer, in each of the forms that a CPU has for it, against numpy."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxqwen import Qwen2Config, Qwen2ForCausalLM
from flaxqwen.cache import init_cache
from flaxqwen.ops import cpu_kernels, linear
from flaxqwen.ops.cpu import contract_one_row

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


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize(("width", "parts"), [(896, 1), (4864, 2), (8960, 4), (4101, 3)])
def test_one_row_reads_the_weight_as_it_lies(rng: np.random.Generator, dtype: Any, width: int, parts: int):
    """On a CPU: exact but for float32's rounding, in dots of so many parts, and no copy of the weight is made."""
    x, weight = rng.standard_normal(width), rng.integers(-127, 128, (64, width))
    want = weight @ x.astype(np.float32).astype(np.float64)
    program = jax.jit(contract_one_row).lower(
        *(inputs := (jnp.asarray([[x]], jnp.float32), jnp.asarray(weight, dtype)))
    )
    compiled = program.compile()
    assert compiled.memory_analysis().temp_size_in_bytes < weight.size
    assert f"f32[{64 * parts}]" in compiled.as_text()
    got = np.asarray(compiled(*inputs), np.float64)
    assert got.shape == (1, 1, 64)
    np.testing.assert_allclose(got[0, 0], want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("heads", [6, 72])
def test_products_of_one_row_are_vectorised(monkeypatch: pytest.MonkeyPatch, heads: int):
    """On a CPU, of a decoding step: each row comes flat to its product, and nothing is done to a short one there."""
    monkeypatch.setattr(linear, "HAS_AMX", False)
    monkeypatch.setattr(cpu_kernels, "INSTRUCTIONS", None)
    config = Qwen2Config(
        vocab_size=500, hidden_size=192, intermediate_size=320, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    module = Qwen2ForCausalLM(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    ids, cache = jnp.ones((1, 1), jnp.int32), init_cache(config, 1, 64, jnp.bfloat16)
    params = jax.eval_shape(module.init, jax.random.key(0), ids)
    text = jax.jit(module.apply).lower(params, ids, past_key_values=cache).compile().as_text()
    bodies = [part.split("\n}")[0] for part in text.split("\n%fused_computation")]
    products = [body for body in bodies if " dot(" in body and " convert(" in body]
    assert len(products) == 2 * 7 + 1
    for body in products:
        shapes = re.findall(r"(\w+)\[([\d,]*)\]\S* parameter", body)
        vectors = [dtype for dtype, sizes in shapes if sum(size != "1" for size in sizes.split(",")) == 1]
        assert len(vectors) == len(shapes) - 1 == 1  # and the weight
        assert vectors == ["f32"] or "4608" in body
