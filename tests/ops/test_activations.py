"""Activations against Transformers', in each dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxqwen.ops.activations import ACTIVATION
from tests.reference import close, torch

# Transformers writes these two out in the dtype of their input, and rounds in between.
WRITTEN_OUT = ("gelu_new", "quick_gelu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ACTIVATION)
def test_activations_round_once(name, dtype, rng):
    """Within one unit in the last place of PyTorch's, tails included."""
    from transformers.activations import ACT2FN

    values = np.concatenate([rng.normal(size=4000) * scale for scale in (0.1, 1, 5)]).astype(np.float32)
    x = torch.tensor(values).to(getattr(torch, dtype))
    ours = np.asarray(ACTIVATION[name](jnp.asarray(x.float().numpy()).astype(dtype)).astype(jnp.float32))
    if name in WRITTEN_OUT:
        theirs = ACT2FN[name](x.double()).to(x.dtype).double().numpy()
    else:
        theirs = ACT2FN[name](x).double().numpy()
    # In float32 tanh and erf are approximations, off near their zeros and in their tails.
    unit = {"float32": 2e-6, "bfloat16": 2**-7, "float16": 2**-10}[dtype]
    assert (np.abs(ours - theirs) <= unit * np.abs(theirs) + 2e-6).all()


@pytest.mark.parametrize("name", ACTIVATION)
def test_gradients_keep_narrow_values(name, rng):
    x = jnp.asarray(rng.normal(size=(8, 16)), jnp.bfloat16)
    _, pull = jax.vjp(ACTIVATION[name], x)
    assert {leaf.dtype for leaf in jax.tree.leaves(pull)} <= {x.dtype}
    wide = jax.vjp(ACTIVATION[name], x.astype(jnp.float32))[1](jnp.ones(x.shape))[0]
    close(pull(jnp.ones_like(x))[0], wide, 2**-7)
