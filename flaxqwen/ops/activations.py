"""Activation functions by the names that config.json uses (ACT2FN in transformers/activations.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp


def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), by erf as in PyTorch: jax.nn's is by erfc, which takes twice as long on a CPU."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def _rounded_once(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """The function in float32 of narrower values, rounded last, as in PyTorch; jax.nn's round in between.

    For its gradient the narrow values are kept, not those in float32.
    """
    wide = jax.checkpoint(lambda x: function(x.astype(jnp.float32)).astype(x.dtype), prevent_cse=False)
    return lambda x: wide(x) if jnp.finfo(x.dtype).bits < 32 else function(x)


_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": gelu,
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}

ACTIVATION = {name: _rounded_once(function) for name, function in _FUNCTIONS.items()}
