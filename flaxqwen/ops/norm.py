"""Root-mean-square layer normalisation."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019; Qwen2RMSNorm in transformers/models/qwen2/modeling_qwen2.py)."""

    eps: float
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., D]: normalised in float32, cast to x's dtype, then scaled, as in Transformers."""
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return weight.astype(x.dtype) * (wide * scale).astype(x.dtype)
