"""Models with quantized weights: whether one has them, and parameters quantized on their device."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from flaxqwen.config import PretrainedConfig, Qwen2Config
from flaxqwen.convert.memory import WeightMemory
from flaxqwen.convert.names import Path as ParamPath
from flaxqwen.convert.quantize import (
    SCALE,
    Scheme,
    check_scheme,
    quantize_rows,
    scheme_for,
    scheme_of,
    to_config,
)
from flaxqwen.memory import in_huge_pages
from flaxqwen.sharding import Sharding, shapes_of


def quantization_of(
    folder: Path | None, config: PretrainedConfig, wanted: Scheme | None
) -> tuple[Scheme | None, PretrainedConfig]:
    """How the weights will be quantized, from the config and from what is asked for; and a config that says so.

    Raises:
      ValueError: another method, an unknown scheme, weights that are quantized already, or a model other than Qwen2.
    """
    try:
        stored = scheme_of(config.quantization_config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}" if folder else str(error)) from None
    scheme = stored if wanted is None else check_scheme(wanted)
    if scheme is not None and not isinstance(config, Qwen2Config):
        raise ValueError(f"model_type {config.model_type!r} does not run quantized yet: leave out quantize")
    if wanted is None:
        return stored, config
    if stored is not None and folder is not None:
        raise ValueError(f"{folder}: its weights are quantized already, to {stored}: leave out quantize={wanted!r}")
    extra = {**config.extra, "quantization_config": to_config(check_scheme(wanted))}
    return wanted, dataclasses.replace(config, extra=extra)


def quantize_params(params: dict[str, Any], scheme: Scheme, sharding: Sharding | None = None) -> dict[str, Any]:
    """The parameters with their weights quantized, one after the other on their devices.

    On a mesh it is the checkpoint's weight that is quantized: heads move with their integers and scales.
    """
    stored = {} if sharding is None else sharding.stored_shapes(shapes_of(params))
    leaves: dict[ParamPath, jax.Array] = {}
    memory = WeightMemory()
    for path, leaf in flax.traverse_util.flatten_dict(params).items():
        own = scheme_for(path, leaf.shape, scheme)
        if own is None:
            leaves[path] = leaf
        elif sharding is None:
            leaves[path], leaves[*path[:-1], SCALE] = quantize_weight(leaf, own)
            leaves[path] = in_huge_pages(leaves[path], memory)
        else:
            leaves |= quantize_onto(sharding, path, sharding.undo(path, leaf, sharding.source(path, stored)), own)
    return flax.traverse_util.unflatten_dict(leaves)


def quantize_onto(sharding: Sharding, path: ParamPath, weight: jax.Array, scheme: Scheme) -> dict[ParamPath, jax.Array]:
    """The integers and scales of a weight as the checkpoint has it, laid on the mesh, by their paths."""
    found = dict(zip((path, (*path[:-1], SCALE)), quantize_weight(weight, scheme), strict=True))
    stored = {name: leaf.shape for name, leaf in found.items()}
    return {name: sharding.lay(name, leaf, sharding.source(name, stored)) for name, leaf in found.items()}


@partial(jax.jit, static_argnames="scheme")
def quantize_weight(weight: jax.Array, scheme: Scheme) -> tuple[jax.Array, jax.Array]:
    """A weight [out, in] as convert.quantize.quantize_rows, on its devices; on a CPU bit for bit."""
    return quantize_rows(weight.astype(jnp.float32), scheme, jnp)
