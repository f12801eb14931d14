"""Adapters merged into the weights: W + scaling B A, and with DoRA its rows brought to their magnitudes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxqwen.lora.config import LoraConfig
from flaxqwen.lora.mesh import BASE_LAYER
from flaxqwen.lora.tree import (
    EMBEDDINGS,
    Path,
    Tree,
    base_leaf,
    dense_weight,
    flatten,
    make_variables,
    replace_params,
)
from flaxqwen.ops.lora import Adapter


def merged_params(module: nn.Module, params: Tree, adapters: Sequence[tuple[LoraConfig, Tree]]) -> Tree:
    """Parameters of adapted_module(module, ..., merged=True) that give what the adapters do; others are shared.

    On a mesh a merged weight lies as the weight did, with the same heads.

    Source: Linear.merge and Embedding.merge in peft/tuners/lora/layer.py.

    Raises:
      ValueError: a quantized weight; lora_bias over a layer that has no bias.
    """
    variables = make_variables(module, params, adapters, merged=True)
    merged: Tree = variables["params"]
    for path, added in flatten(variables["lora"]).items():
        layer: Path = path[:-1]
        weight = base_leaf(merged, layer)["weight"]
        dense = dense_weight(merged, layer)
        leaves: dict[Path, Any] = {}
        for adapter in added:
            dense = _merge_embedding(dense, adapter) if layer[-1] in EMBEDDINGS else _merge(dense, adapter)
            if adapter.bias is not None:
                if "bias" not in base_leaf(merged, layer):
                    raise ValueError(f"{'.'.join(layer)} has no bias that lora_bias could be merged into")
                bias = base_leaf(merged, layer)["bias"]
                leaves[*layer, "bias"] = leaves.get((*layer, "bias"), bias) + adapter.scaling * adapter.bias
        leaves[*layer, BASE_LAYER, "weight"] = jax.device_put(dense.astype(weight.dtype), weight.sharding)
        merged = replace_params(merged, leaves)
    return merged


@jax.jit
def _merge(weight: jax.Array, adapter: Adapter) -> jax.Array:
    weight = weight + adapter.scaling * (adapter.B @ adapter.A)
    return weight if adapter.gain is None else weight * adapter.gain[:, None]


@jax.jit
def _merge_embedding(weight: jax.Array, adapter: Adapter) -> jax.Array:
    return weight + adapter.scaling * jnp.swapaxes(adapter.B @ adapter.A, 0, 1)
