"""What a CPU takes in blocks of rows: products, their derivatives, an encoder's attention, against numpy and torch."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxqwen.ops import linear
from flaxqwen.ops.attention import attend_to_all
from flaxqwen.ops.linear import block_of_rows, contract_by_rows
from tests.reference import close, torch


@pytest.fixture
def without_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU whose products run in blocks."""
    monkeypatch.setattr(linear, "HAS_AVX512", False)
    monkeypatch.setattr(linear, "MOST_ROWS", 250)


@pytest.mark.usefixtures("without_avx512")
def test_blocks_are_equal():
    """Of every length that generate() gives the encoder, and of odd ones, which are not cut."""
    assert [block_of_rows(count) for count in (1500, 1250, 1000, 750, 500, 250)] == [250, 250, 250, 250, 250, 125]
    assert [block_of_rows(count) for count in (60, 249, 257, 2 * 257, 1499)] == [None] * 5


@pytest.mark.usefixtures("without_avx512")
@pytest.mark.parametrize("shape", [(1, 500), (2, 375), (7, 3)])
def test_products_and_derivatives(rng: np.random.Generator, shape: tuple[int, ...]):
    """Both derivatives, each alone, and forward mode, against numpy's in float64."""
    x = rng.standard_normal((*shape, 48)).astype(np.float32)
    weight, dy = rng.standard_normal((32, 48)).astype(np.float32), rng.standard_normal((*shape, 32)).astype(np.float32)
    wide = [array.astype(np.float64) for array in (x, weight, dy)]
    wanted = wide[0] @ wide[1].T
    of_x, of_weight = wide[2] @ wide[1], np.einsum("abo,abi->oi", wide[2], wide[0])
    close(jax.jit(contract_by_rows)(x, weight), wanted, 1e-6)

    def loss(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.vdot(contract_by_rows(x, weight), dy)

    for argnums in ((0, 1), (0,), (1,)):
        found = jax.jit(jax.grad(loss, argnums))(x, weight)
        for gradient, argument in zip(found, argnums, strict=True):
            close(gradient, (of_x, of_weight)[argument], 1e-5)
    _, tangent = jax.jit(partial(jax.jvp, contract_by_rows))((x, weight), (2 * x, weight))
    close(tangent, 3 * wanted, 1e-6)


@pytest.mark.usefixtures("without_avx512")
def test_a_cpu_takes_blocks():
    """The compiled product is of 250 rows, in a loop."""
    x, weight = jnp.ones((1, 1500, 64)), jnp.ones((96, 64))
    text = jax.jit(contract_by_rows).lower(x, weight).compile().as_text()
    assert "f32[250,96]" in text
    assert "while" in text


@pytest.mark.parametrize("length", [500, 61])
def test_attention_of_an_encoder(rng: np.random.Generator, length: int):
    """Against torch's, with slots that nobody sees; and its gradients."""
    B, N, H = 2, 3, 8
    query, key, value, dy = (rng.standard_normal((B, N, length, H)).astype(np.float32) for _ in range(4))
    seen = np.arange(length) < np.array([[length], [length // 3]])
    tensors = [torch.tensor(array, requires_grad=True) for array in (query, key, value)]
    mask = torch.tensor(seen)[:, None, None]
    wanted = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask)
    wanted.backward(torch.tensor(dy))

    def run(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attend_to_all(query.swapaxes(1, 2), key, value, jnp.asarray(seen)).swapaxes(1, 2)

    found, backward = jax.vjp(jax.jit(run), query, key, value)
    close(found, wanted, 2e-6)
    for gradient, tensor in zip(backward(jnp.asarray(dy)), tensors, strict=True):
        close(gradient, tensor.grad, 1e-5)
