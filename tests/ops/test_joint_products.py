"""Several products of one x in one call of a kernel: q, k and v; gate and up with the activation. Against numpy."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxqwen import Qwen2Config
from flaxqwen.models.qwen2 import Qwen2MLP
from flaxqwen.ops.linear import Linear, project
from flaxqwen.ops.lora import Adapter
from flaxqwen.ops.products import KERNEL_ROWS, gate_by_kernel
from flaxqwen.quantization import quantize_weight
from flaxqwen.sharding import Sharding, make_mesh
from tests.ops.test_products import BFLOAT16, DTYPES, FLOAT32, INT8, built, drawn
from tests.reference import close, torch


class Three(nn.Module):
    """Layers of one input, whose outputs do not end where tiles do."""

    dtype: np.dtype

    def setup(self) -> None:
        self.layers = [Linear(size, use_bias=True, param_dtype=self.dtype) for size in (200, 24, 37)]

    def __call__(self, x: jax.Array, is_joint: bool) -> list[jax.Array]:
        return project(self.layers, x) if is_joint else [layer(x) for layer in self.layers]


def count(function: object, *arguments: object) -> int:
    """How many calls of kernels a program has."""
    return jax.jit(function).lower(*arguments).compile().as_text().count("custom_call_target")


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("width", [128, 200])
@pytest.mark.usefixtures("kernels_for")
def test_layers_of_one_input(rng: np.random.Generator, dtypes: tuple[np.dtype, np.dtype], width: int):
    """To the last bit what each gives alone, with biases, scales and an adapter; in one call, at a few rows."""
    module, params = Three(dtypes[0]), {}
    for number, size in enumerate((200, 24, 37)):
        weight = drawn(rng, (size, width), FLOAT32)
        own = {"weight": weight.astype(dtypes[1]), "bias": drawn(rng, (size,), dtypes[0])}
        if dtypes[1] == INT8:
            own["weight"], own["weight_scale"] = quantize_weight(jnp.asarray(weight), "int8")
        params[f"layers_{number}"] = own
    adapter = Adapter(drawn(rng, (4, width), FLOAT32), drawn(rng, (24, 4), FLOAT32), np.float32(0.5))
    for lora in ({}, {"lora": {"layers_1": {"adapters": (adapter,)}}}):
        variables = {"params": params, **lora}
        for rows, calls in ((1, 1), (8, 1), (KERNEL_ROWS + 24, None)):
            x = drawn(rng, (1, rows, width), dtypes[0])
            joint, alone = (
                jax.jit(lambda v, x, is_joint=each: module.apply(v, x, is_joint))(variables, x)
                for each in (True, False)
            )
            for found, wanted in zip(joint, alone, strict=True):
                assert found.dtype == dtypes[0]
                np.testing.assert_array_equal(found, wanted)
            assert calls is None or count(lambda v, x: module.apply(v, x, True), variables, x) == calls


@pytest.mark.usefixtures("kernels_for")
def test_derivatives_of_layers_of_one_input(rng: np.random.Generator):
    """Of x and of each weight: those of the layers alone."""
    module, x = Three(FLOAT32), jnp.asarray(drawn(rng, (1, 4, 64), FLOAT32))
    params = module.init(jax.random.key(0), x, False)

    def loss(params: dict, x: jax.Array, is_joint: bool) -> jax.Array:
        return sum(jnp.sin(10 * y).sum() for y in module.apply(params, x, is_joint))

    joint, alone = (jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(params, x, each) for each in (True, False))
    for found, wanted in zip(*map(jax.tree.leaves, (joint, alone)), strict=True):
        close(found, wanted, 1e-5)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def error_bound(gate: np.ndarray, up: np.ndarray, of_gate: np.ndarray, of_up: np.ndarray, unit: float) -> np.ndarray:
    """How far silu(gate) * up may be off, whose factors' sums are off by so much; all is rounded to a unit."""
    gate_off = of_gate + unit * (np.abs(gate) + of_gate)
    up_off = of_up + unit * (np.abs(up) + of_up)
    left = np.abs(silu(gate))
    left_off = 1.1 * gate_off  # the activation's slope is 1.0998 at most
    left_off += unit * (left + left_off)
    off = left_off * np.abs(up) + left * up_off + left_off * up_off
    return off + unit * (left * np.abs(up) + off)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 64), (40, 200), (300, 896)], ids=str)
@pytest.mark.usefixtures("kernels_for")
def test_gated(rng: np.random.Generator, dtypes: tuple[np.dtype, np.dtype], size: tuple[int, int]):
    """Rounded where torch rounds: no number is further off than that allows, and nearly all are as numpy has them."""
    weights = tuple(drawn(rng, size, dtypes[1]) for _ in range(2))
    spread = 73 if dtypes[1] == INT8 else 1
    scales = tuple(np.abs(drawn(rng, size[:1], FLOAT32)) + 0.5 for _ in range(2)) if dtypes[1] == INT8 else ()
    unit = 2**-22 if dtypes[0] == FLOAT32 else 2**-8  # of float32 also what the exponential function is off by
    for rows in (1, 3, 8, 16):
        x = (drawn(rng, (rows, size[1]), FLOAT32) / (spread * size[1] ** 0.5)).astype(dtypes[0])
        found = jax.jit(gate_by_kernel)(x, weights, scales)
        assert found.shape == (rows, size[0])
        assert found.dtype == dtypes[0]
        wide, factors = x.astype(np.float64), [weight.astype(np.float64).T for weight in weights]
        if scales:
            factors = [factor * scale for factor, scale in zip(factors, scales, strict=True)]
        gate, up = (wide @ factor for factor in factors)
        sums_off = (1e-6 * (np.abs(wide) @ np.abs(factor)) for factor in factors)
        error = np.abs(np.asarray(found, np.float64) - silu(gate) * up)
        assert (error <= error_bound(gate, up, *sums_off, unit)).all()
        gate, up = (number.astype(dtypes[0]).astype(np.float64) for number in (gate, up))
        wanted = (silu(gate).astype(dtypes[0]).astype(np.float64) * up).astype(dtypes[0])
        if dtypes[0] == BFLOAT16 and found.size > 1000:
            assert (np.asarray(found) == wanted).mean() > 0.95


@pytest.mark.usefixtures("kernels_for")
def test_the_activation_everywhere(rng: np.random.Generator):
    """Of numbers as they come, by weights that pick them: to 3 in the last place; NaN stays in its row."""
    numbers = np.concatenate([rng.uniform(-80, 90, 500), rng.standard_normal(500), [0.0, -0.0, -88.5, -200, 3e15]])
    x = np.zeros((2, len(numbers) + 11), np.float32)
    x[0, : len(numbers)] = numbers
    picks = np.eye(x.shape[1], dtype=np.float32)
    found = np.asarray(jax.jit(gate_by_kernel)(x, (picks, np.ones_like(picks)), ()), np.float64)[0]
    gate = x[0].astype(np.float64)
    with np.errstate(over="ignore"):
        wanted = silu(gate) * np.float64(x[0].sum(dtype=np.float64))
    close(found / x[0].sum(dtype=np.float64), wanted / x[0].sum(dtype=np.float64), 1e-6)
    small = np.abs(gate) < 80
    np.testing.assert_allclose(found[small], wanted[small], rtol=2e-6)
    x[1, 7] = np.nan
    both = np.asarray(jax.jit(gate_by_kernel)(x, (picks, np.ones_like(picks)), ()))
    np.testing.assert_array_equal(both[0], found)
    assert np.isnan(both[1]).all()


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.usefixtures("kernels_for")
def test_a_row_alone_and_among_others(rng: np.random.Generator, dtypes: tuple[np.dtype, np.dtype]):
    """The same to the last bit."""
    weights = tuple(drawn(rng, (100, 256), dtypes[1]) for _ in range(2))
    scales = tuple(drawn(rng, (100,), FLOAT32) for _ in range(2)) if dtypes[1] == INT8 else ()
    x = drawn(rng, (16, 256), dtypes[0])
    whole = np.asarray(jax.jit(gate_by_kernel)(x, weights, scales))
    for rows in (1, 5):
        np.testing.assert_array_equal(jax.jit(gate_by_kernel)(x[-rows:], weights, scales), whole[-rows:])


@pytest.mark.usefixtures("kernels_for")
def test_derivatives_of_gated(rng: np.random.Generator):
    """Of x and of both weights, by torch's in float64, and forward mode by numpy; of x alone where they are int8."""
    x, weights = drawn(rng, (4, 64), FLOAT32) / 8, tuple(drawn(rng, (40, 64), FLOAT32) for _ in range(2))

    def loss(x: jax.Array, weights: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.sin(gate_by_kernel(x, weights, ())).sum()

    found = jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(x, weights))
    leaves = [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in (x, *weights)]
    torch.sin(torch.nn.functional.silu(leaves[0] @ leaves[1].T) * (leaves[0] @ leaves[2].T)).sum().backward()
    for ours, leaf in zip(found, leaves, strict=True):
        close(ours, leaf.grad, 1e-5)

    integers, scales = tuple(drawn(rng, (40, 64), INT8) for _ in range(2)), (np.full(40, 0.01, np.float32),) * 2
    _, tangent = jax.jit(lambda x: jax.jvp(lambda x: gate_by_kernel(x, integers, scales), (x,), (x,)))(x)
    gate, up = (0.01 * x.astype(np.float64) @ array.astype(np.float64).T for array in integers)
    sigmoid = 1 / (1 + np.exp(-gate))
    slope = sigmoid * (1 + gate * (1 - sigmoid))  # along x itself, where the products' tangents are the products
    close(tangent, slope * gate * up + silu(gate) * up, 1e-5)


@built
def test_where_gate_and_up_are_one_call(rng: np.random.Generator):
    """Not of more rows, another activation, with an adapter, on a mesh, or where somebody looks at what they give."""
    plain = Qwen2Config(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=2)
    gelu = Qwen2Config.from_dict(plain.to_dict() | {"hidden_act": "gelu"})
    sharding = Sharding.fit(make_mesh(devices=jax.devices()[:1]), plain)
    x = jnp.asarray(drawn(rng, (1, KERNEL_ROWS + 1, 64), BFLOAT16))
    params = Qwen2MLP(plain, param_dtype=jnp.bfloat16).init(jax.random.key(0), x)
    adapter = Adapter(drawn(rng, (4, 64), FLOAT32), drawn(rng, (96, 4), FLOAT32), np.float32(0.5))
    adapted = params | {"lora": {"up_proj": {"adapters": (adapter,)}}}
    few = x[:, :-1]

    def gated(config: Qwen2Config, variables: dict, x: jax.Array, **options: object) -> int:
        apply = Qwen2MLP(config, param_dtype=jnp.bfloat16, **options).apply
        return jax.jit(apply).lower(variables, x).compile().as_text().count("GatedProducts")

    assert gated(plain, params, few) == 1
    assert gated(plain, params, x) == gated(gelu, params, few) == gated(plain, adapted, few) == 0
    assert gated(plain, params, few, sharding=sharding) == 0
    module = Qwen2MLP(plain, param_dtype=jnp.bfloat16)
    y, seen = jax.jit(lambda v, x: module.apply(v, x, capture_intermediates=True))(params, few)
    close(y.astype(jnp.float32), jax.jit(module.apply)(params, few).astype(jnp.float32), 1e-2)
    assert {"gate_proj", "up_proj", "down_proj"} <= set(seen["intermediates"])
