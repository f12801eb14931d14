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
from flaxqwen.convert.names import Path as ParamPath
from flaxqwen.convert.quantize import SCALE, Scheme, check_scheme, quantize_rows, scheme_for, scheme_of, to_config


def quantization_of(
    folder: Path | None, config: PretrainedConfig, wanted: Scheme | None, mesh: Any = None
) -> tuple[Scheme | None, PretrainedConfig]:
    """How the weights will be quantized, from the config and from what is asked for; and a config that says so.

    Raises:
      ValueError: another method, an unknown scheme, weights that are quantized already, a mesh, or a model other
        than Qwen2.
    """
    try:
        stored = scheme_of(config.quantization_config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}" if folder else str(error)) from None
    scheme = stored if wanted is None else check_scheme(wanted)
    if scheme is not None and not isinstance(config, Qwen2Config):
        raise ValueError(f"model_type {config.model_type!r} does not run quantized yet: leave out quantize")
    if scheme is not None and mesh is not None:
        raise ValueError("quantized weights do not lie on a mesh yet: leave out mesh, or quantize")
    if wanted is None:
        return stored, config
    if stored is not None and folder is not None:
        raise ValueError(f"{folder}: its weights are quantized already, to {stored}: leave out quantize={wanted!r}")
    extra = {**config.extra, "quantization_config": to_config(check_scheme(wanted))}
    return wanted, dataclasses.replace(config, extra=extra)


def quantize_params(params: dict[str, Any], scheme: Scheme) -> dict[str, Any]:
    """The parameters with their weights quantized, one after the other on their device."""
    leaves: dict[ParamPath, jax.Array] = {}
    for path, leaf in flax.traverse_util.flatten_dict(params).items():
        own = scheme_for(path, leaf.shape, scheme)
        if own is None:
            leaves[path] = leaf
        else:
            leaves[path], leaves[(*path[:-1], SCALE)] = _quantize(leaf, scheme=own)
    return flax.traverse_util.unflatten_dict(leaves)


@partial(jax.jit, static_argnames="scheme")
def _quantize(weight: jax.Array, *, scheme: Scheme) -> tuple[jax.Array, jax.Array]:
    return quantize_rows(weight.astype(jnp.float32), scheme, jnp)
