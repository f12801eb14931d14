"""Linear layers in PyTorch's layout, and the contraction that every one of them uses.

The forms below were chosen by measurement, because XLA's CPU backend turns a bfloat16 dot into "convert the whole
weight to float32, then dot" unless the conversion fuses into the dot.
"""

from __future__ import annotations

from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flaxqwen.sharding import Sharding, constrain

# One row of bfloat16: the conversion of the weight fuses into the dot only while the row, in float32, is under 16 KB.
MAX_FUSED_CONTRACTION = 4096


def contract(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., in] times weight [out, in] over `in` -> [..., out], accumulated in float32 and cast to x's dtype."""
    weight = weight.astype(x.dtype)
    rows = x.size // x.shape[-1]
    if x.dtype == jnp.bfloat16 and rows == 1:
        return jax.lax.platform_dependent(x, weight, cpu=_contract_one_row_cpu, default=_contract)
    return _contract(x, weight)


def _contract(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Both minor dimensions contracted. A narrow result type would convert whole weights on CPU, so it is float32."""
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, dims, preferred_element_type=jnp.float32).astype(x.dtype)


def _contract_one_row_cpu(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The conversion to float32 fused into the dot: a 0.5B decode step of 78 ms against 253 ms without."""
    pieces = -(-x.shape[-1] // (MAX_FUSED_CONTRACTION - 1))
    bounds = [x.shape[-1] * i // pieces for i in range(pieces + 1)]
    y = None
    for start, stop in pairwise(bounds):
        part = x[..., start:stop].astype(jnp.float32) @ weight[:, start:stop].astype(jnp.float32).T
        # The barrier keeps the dot from fusing into an add, which would bring the converted copy back.
        part = jax.lax.optimization_barrier(part)
        y = part if y is None else y + part
    assert y is not None
    return y.astype(x.dtype)


class Linear(nn.Module):
    """y = x W^T + b with PyTorch's names and layout: weight [out, in], bias [out].

    dtype is the compute dtype (None: that of x); parameters are created in param_dtype.
    """

    features: int
    use_bias: bool = False
    stddev: float = 0.02
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., out]."""
        x = x.astype(self.dtype or x.dtype)
        init = nn.initializers.normal(self.stddev)
        y = contract(x, self.param("weight", init, (self.features, x.shape[-1]), self.param_dtype))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            y = y + bias.astype(y.dtype)
        return y


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
        shape = (self.vocab_size, self.features)
        self.weight = self.param("weight", nn.initializers.normal(self.stddev), shape, self.param_dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids [...] int -> [..., D]."""
        # Whole along D: rows that are cut there would have to change places with the batch, which is cut alike.
        table = constrain(self.sharding, self.weight, "vocab", None)
        x = jnp.take(table, ids, axis=0).astype(self.dtype or self.weight.dtype)
        if self.padding_idx is not None:
            x = jnp.where((ids == self.padding_idx)[..., None], jax.lax.stop_gradient(x), x)
        return x

    def attend(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> logits [..., V], against the table itself."""
        return contract(x, self.weight)
