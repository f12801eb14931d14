"""Linear layers in PyTorch's layout, and the contraction that every one of them uses.

The forms below were chosen by measurement, because XLA's CPU backend turns a bfloat16 dot into "convert the whole
weight to float32, then dot" unless the conversion fuses into the dot.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from flaxqwen.convert.quantize import SCALE
from flaxqwen.ops.activations import ACTIVATION
from flaxqwen.ops.cpu import HAS_AMX, HAS_AVX512, contract_one_row, rows_of, tangent_of_product
from flaxqwen.ops.lora import adapt_embedding, adapt_linear
from flaxqwen.ops.products import Arrays, contract_natively, gate_natively, kernel_serves, serves_together
from flaxqwen.ops.quantized import contract_quantized
from flaxqwen.sharding import Sharding, constrain

# How many rows of float32 a CPU takes at a time, where that is faster, at most and at least.
MOST_ROWS, LEAST_ROWS = 500 if HAS_AVX512 else 250, 125

# As how many a single row of bfloat16 is multiplied on a CPU: 2 take 20% longer, 8 take 5%.
NATIVE_ROWS = 4

# Up to so many rows of float32 the weight is the left operand on a CPU: it takes half the time for 2 to 16 rows, and
# about as long as the other form for 32.
FEW_ROWS = 16


def contract(x: jax.Array, weight: jax.Array, scale: jax.Array | None = None, on_one_device: bool = False) -> jax.Array:
    """x [..., in] times weight [out, in] over `in` -> [..., out], accumulated in float32 and cast to x's dtype.

    Args:
      scale: of a quantized weight, see contract_quantized; None: it is not.
      on_one_device: whether the model has no Sharding, so that a CPU may multiply by our kernel.
    """
    if scale is not None:
        return contract_quantized(x, weight, scale, on_one_device)
    if on_one_device and kernel_serves(x, weight):
        return contract_natively(x, weight, x.dtype)
    weight, rows = weight.astype(x.dtype), rows_of(x)
    if x.dtype == jnp.bfloat16 and rows == 1:
        return jax.lax.platform_dependent(x, weight, cpu=_contract_one_row_cpu, default=_contract)
    if x.dtype == jnp.float32 and 1 < rows <= FEW_ROWS:
        return jax.lax.platform_dependent(x, weight, cpu=_contract_few_rows_cpu, default=_contract)
    return _contract(x, weight)


def _contract(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Both minor dimensions contracted. A narrow result type would convert whole weights on CPU, so it is float32."""
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, dims, preferred_element_type=jnp.float32).astype(x.dtype)


def _contract_few_rows_cpu(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The weight as the left operand, which XLA's CPU library reads as it lies; the right one it packs anew each time.

    The barrier keeps XLA from moving the transpose into the product, which would swap the operands back. 6 rows times
    4,864 x 896: 2 x the time of one row, in place of 4.
    """
    dims = (((1,), (0,)), ((), ()))
    columns = jax.lax.dot_general(weight, x.reshape(-1, x.shape[-1]).T, dims, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(columns).T.reshape(*x.shape[:-1], -1)


def _contract_one_row_cpu(x: jax.Array, weight: jax.Array) -> jax.Array:
    """One row of bfloat16, of which XLA's CPU backend has no product.

    With AMX, the row several times over: a 0.5B decode step of 57 ms, against 106 with the weight's conversion to
    float32 fused into the dot, and 253 with the whole weight converted. Without, that takes 2 to 7 x as long as the
    fused conversion.
    """
    if not HAS_AMX:
        return contract_one_row(x, weight).astype(x.dtype)
    rows = jnp.broadcast_to(x.reshape(1, -1), (NATIVE_ROWS, x.shape[-1]))
    return _contract(rows, weight)[:1].reshape(*x.shape[:-1], -1)


def block_of_rows(count: int) -> int | None:
    """The size of equal blocks of so many rows; None where there are none."""
    sizes = range(min(MOST_ROWS, count // 2), LEAST_ROWS - 1, -1)
    return next((size for size in sizes if count % size == 0), None)


@jax.custom_jvp
def contract_by_rows(x: jax.Array, weight: jax.Array) -> jax.Array:
    """As contract, of many rows: on a CPU without AVX-512 in blocks of a few hundred.

    XLA's product of 1,500 rows and 5,120 x 1,280 runs at 57 GFLOP/s on a core (Zen 3), of 250 to 375 at 75 to 77;
    PyTorch's runs at 73. With AVX-512 blocks take 3 to 14% longer. Derivatives are in one piece: in blocks that of the
    weight would be a sum of their number.
    """
    size = None if HAS_AVX512 else block_of_rows(x.size // x.shape[-1])
    if size is None or x.dtype != jnp.float32:
        return contract(x, weight)

    def by_rows(x: jax.Array, weight: jax.Array) -> jax.Array:
        y = jax.lax.map(lambda rows: _contract(rows, weight), x.reshape(-1, size, x.shape[-1]))
        return y.reshape(*x.shape[:-1], -1)

    return jax.lax.platform_dependent(x, weight.astype(x.dtype), cpu=by_rows, default=_contract)


@partial(contract_by_rows.defjvp, symbolic_zeros=True)
def _contract_by_rows_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    y = contract_by_rows(*primals)
    return y, tangent_of_product(contract, primals, tangents, y)


def weight_of(module: nn.Module, shape: tuple[int, int], stddev: float, dtype: DTypeLike) -> tuple[jax.Array, Any]:
    """The weight [out, in] of a module, and its scale, where it is quantized, or else None."""
    if module.has_variable("params", SCALE):  # of another shape or dtype than `init` would give
        return module.get_variable("params", "weight"), module.get_variable("params", SCALE)
    return module.param("weight", nn.initializers.normal(stddev), shape, dtype), None


class Linear(nn.Module):
    """y = x W^T + b with PyTorch's names and layout: weight [out, in], bias [out].

    dtype is the compute dtype (None: that of x); parameters are created in param_dtype. sharding: how the model lies on
    a mesh; None: on one device. by_rows: see contract_by_rows, for where our kernel does not serve.
    """

    features: int
    use_bias: bool = False
    stddev: float = 0.02
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    sharding: Sharding | None = None
    by_rows: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, product: jax.Array | None = None) -> jax.Array:
        """x [..., in] -> [..., out]. product: x W^T, where it is there already (see project)."""
        x = x.astype(self.dtype or x.dtype)
        weight, scale = weight_of(self, (self.features, x.shape[-1]), self.stddev, self.param_dtype)
        is_alone = self.sharding is None
        if product is None:
            by_rows = self.by_rows and scale is None and not (is_alone and kernel_serves(x, weight))
            product = contract_by_rows(x, weight) if by_rows else contract(x, weight, scale, is_alone)
        y = product
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            y = y + bias.astype(y.dtype)
        return adapt_linear(self, x, product, y)


def _operands(layers: Sequence[Linear], x: jax.Array) -> tuple[Arrays, Arrays] | None:
    """The weights of several layers, and the scales of quantized ones, where one call of a kernel takes x with them."""

    def of_all(name: str) -> Arrays:
        found: list[Any] = [
            layer.get_variable("params", name) for layer in layers if layer.has_variable("params", name)
        ]
        return tuple(map(jnp.asarray, found))

    weights = of_all("weight")
    if len(weights) < len(layers) or any(layer.sharding is not None or layer.by_rows for layer in layers):
        return None
    return (weights, tuple(scale[:, 0] for scale in of_all(SCALE))) if serves_together(x, weights) else None


def project(layers: Sequence[Linear], x: jax.Array) -> list[jax.Array]:
    """What each of some layers of one dtype makes of x [..., in]; of a few rows by one call of our kernel for all.

    0.5B's q, k and v take 88 us a layer so, of one row of bfloat16, and 123 in three calls, between which threads wait
    for each other.
    """
    x = x.astype(layers[0].dtype or x.dtype)
    if (operands := _operands(layers, x)) is None:
        return [layer(x) for layer in layers]
    weights, scales = operands
    products = contract_natively(x, weights, jnp.float32 if scales else x.dtype)
    if scales:
        products = (products * jnp.concatenate(scales)).astype(x.dtype)
    ends = np.cumsum([layer.features for layer in layers])
    return [layer(x, part) for layer, part in zip(layers, jnp.split(products, ends[:-1], axis=-1), strict=True)]


def project_gated(gate: Linear, up: Linear, activation: str, x: jax.Array) -> jax.Array:
    """activation(gate(x)) * up(x), x [..., in] -> [..., out]; of a few rows by one call of our kernel.

    Not where something is added to the products, or somebody looks at them.
    """
    x, layers = x.astype(gate.dtype or x.dtype), (gate, up)
    is_bare = not any(
        layer.use_bias or layer.has_variable("lora", "adapters") or layer.is_mutable_collection("intermediates")
        for layer in layers
    )
    operands = _operands(layers, x) if is_bare and ACTIVATION[activation] is ACTIVATION["silu"] else None
    if operands is not None:
        return gate_natively(x, *operands)
    gated, other = project(layers, x)
    return ACTIVATION[activation](gated) * other


class Embed(nn.Module):
    """A table of token embeddings, weight [V, D], that also serves as a tied output head.

    padding_idx: the id whose row a lookup does not train, as in torch.nn.Embedding; None: there is none.
    """

    vocab_size: int
    features: int
    padding_idx: int | None = None
    stddev: float = 0.02
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    sharding: Sharding | None = None

    def setup(self) -> None:
        self.weight, self.scale = weight_of(self, (self.vocab_size, self.features), self.stddev, self.param_dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids [...] int -> [..., D]."""
        # Whole along D: rows that are cut there would have to change places with the batch, which is cut alike.
        x = jnp.take(constrain(self.sharding, self.weight, "vocab", None), ids, axis=0)
        if self.scale is not None:
            x = x * jnp.take(self.scale, ids, axis=0)
        x = x.astype(self.dtype or x.dtype)
        if self.padding_idx is not None:
            padding = self.padding_idx % self.vocab_size  # -1 is the last row, as in PyTorch
            x = jnp.where((ids == padding)[..., None], jax.lax.stop_gradient(x), x)
        return adapt_embedding(self, ids, x)

    def attend(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> logits [..., V], against the table itself."""
        return contract(x, self.weight, self.scale, self.sharding is None)
