"""One-dimensional convolution in PyTorch's layout of weights."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class Conv1d(nn.Module):
    """Convolution over time with PyTorch's names and layout: weight [out, in, width], bias [out].

    width: odd; half of it is padded on each side. dtype: of the arithmetic (None: that of x).
    """

    features: int
    width: int
    stride: int = 1
    stddev: float = 0.02
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., T, in] -> [..., ceil(T / stride), out]."""
        x = x.astype(self.dtype or x.dtype)
        shape = (self.features, x.shape[-1], self.width)
        weight = self.param("weight", nn.initializers.normal(self.stddev), shape, self.param_dtype).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        y = jax.lax.conv_general_dilated(
            x, weight, (self.stride,), [(self.width // 2,) * 2], dimension_numbers=("NWC", "OIW", "NWC")
        )
        return y + bias.astype(y.dtype)
