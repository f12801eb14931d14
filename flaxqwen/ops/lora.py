"""Low-rank adapters (LoRA, Hu et al. 2021) of linear layers and embeddings: what is added to their outputs.

An adapter lies beside the parameters, in the collection "lora" under the module's own path, and is read only. The
arithmetic and its order are those of peft/tuners/lora/layer.py.

Axes: B batch, T tokens, n stacked adapters, P prompts (of B / P rows each), r rank.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

Array = Any  # of jax, or of numpy as it comes from the host


class Adapter(flax.struct.PyTreeNode):
    """What is added to one layer: y + scaling B(A x), or of DoRA gain (y + scaling B(A x)), the layer's bias left out.

    A: [r, in], of an embedding [r, V]; B: [out, r]. Where rows choose: [n, r, in] and [n, out, r].
    scaling: float32 scalar, or [n].
    bias: [out], of B; or None.
    gain: [out], DoRA's magnitude over the norm of each adapted row of the weight; or None.
    dropout: float32 scalar, the probability that an element of x is dropped where there is a "dropout" rng; or None.
    rows: [P] int32, which of the stacked adapters each prompt has; its continuations stand next to one another.
    """

    A: Array
    B: Array
    scaling: Array
    bias: Array | None = None
    gain: Array | None = None
    dropout: Array | None = None
    rows: Array | None = None


def adapters_of(module: nn.Module) -> tuple[Adapter, ...]:
    """The module's active adapters, those that rows choose laid out by row: A [P, r, in], B [P, out, r]."""
    return tuple(map(_by_prompt, module.get_variable("lora", "adapters", ())))


def _by_prompt(adapter: Adapter) -> Adapter:
    rows = adapter.rows
    return adapter if rows is None else jax.tree.map(lambda a: jnp.asarray(a)[rows], adapter.replace(rows=None))


def adapt_linear(module: nn.Module, x: jax.Array, product: jax.Array, y: jax.Array) -> jax.Array:
    """The output [B, T, out] of a linear layer with the module's adapters.

    Args:
      x: [B, T, in], the layer's input. product: x W^T, without the bias. y: with it.
    """
    dtype = y.dtype
    for adapter in adapters_of(module):
        low = x.astype(adapter.A.dtype)
        if adapter.dropout is not None and module.has_rng("dropout"):
            keep = 1 - adapter.dropout
            kept = jax.random.bernoulli(module.make_rng("dropout"), keep, low.shape)
            low = jnp.where(kept, low / keep.astype(low.dtype), 0)
        added = expand(adapter, _by_rows(low, adapter.A))
        if adapter.gain is not None:  # y + (gain - 1) product + gain added
            added = adapter.gain * added + (adapter.gain - 1) * product
        y = y + added
    return y.astype(dtype)


def adapt_embedding(module: nn.Module, ids: jax.Array, x: jax.Array) -> jax.Array:
    """The embeddings x [B, T, D] of ids [B, T] with the module's adapters."""
    dtype = x.dtype
    for adapter in adapters_of(module):
        x = x + expand(adapter, _look_up(ids, adapter.A))
    return x.astype(dtype)


def expand(adapter: Adapter, low: jax.Array) -> jax.Array:
    """scaling (B low + bias), from low [B, T, r] -> [B, T, out]."""
    y = _by_rows(low, adapter.B)
    if adapter.bias is not None:
        y = y + adapter.bias
    scaling = adapter.scaling.astype(y.dtype)
    if scaling.ndim:
        scaling = jnp.repeat(scaling, y.shape[0] // scaling.shape[0])[:, None, None]
    return y * scaling


def _by_rows(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., in] times weight [out, in]; or x [B, T, in] times weight [P, out, in], each for B / P rows."""
    if weight.ndim == 2:
        return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))
    rows = x.reshape(weight.shape[0], -1, x.shape[-1])
    return jnp.einsum("nti,noi->nto", rows, weight).reshape(*x.shape[:-1], -1)


def _look_up(ids: jax.Array, table: jax.Array) -> jax.Array:
    """Columns of table [r, V], or [P, r, V] for B / P rows each, at ids [B, T] -> [B, T, r]."""
    if table.ndim == 2:
        return jnp.take(table, ids, axis=1).transpose(1, 2, 0)
    rows = ids.reshape(table.shape[0], -1)
    return jnp.take_along_axis(table, rows[:, None], axis=2).swapaxes(1, 2).reshape(*ids.shape, -1)
