"""Random parameters, as Transformers draws them for a config."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flaxqwen.config import PretrainedConfig
from flaxqwen.convert.memory import WeightMemory
from flaxqwen.convert.names import Path as ParamPath
from flaxqwen.convert.names import to_name
from flaxqwen.layout import TOWER
from flaxqwen.memory import in_huge_pages
from flaxqwen.model import Params
from flaxqwen.sharding import Sharding

# Numbers of a parameter that are drawn at a time, at most.
LARGEST_DRAW = 1 << 24


def draw_params(
    shapes: Mapping[ParamPath, tuple[int, ...]],
    config: PretrainedConfig,
    seed: int,
    dtype: DTypeLike,
    sharding: Sharding | None = None,
) -> Params:
    """Random parameters of the given shapes, as `PreTrainedModel._init_weights` in transformers/modeling_utils.py.

    Norms are one, biases zero, all else is normal with the config's initializer_range; the padding token's embedding is
    zero. Each parameter has its own key, made from its path: a head has the same weights whatever is drawn beside it.

    module.init draws alike, but in one program, which takes 20 s to compile at 24 layers; here each shape has one.
    """
    key, whole, memory = jax.random.key(seed), cast(Any, config), WeightMemory()
    leaves: dict[ParamPath, jax.Array] = {}
    for path, shape in shapes.items():
        owner, leaf = path[-2:]
        device = None if sharding is None else sharding.of_parameter(path, shape)
        if leaf == "bias":
            leaves[path] = jnp.zeros(shape, dtype, device=device)
        elif owner.endswith("norm"):
            leaves[path] = jnp.ones(shape, dtype, device=device)
        else:
            own = whole.audio_config if TOWER in path else whole.get_text_config()
            stddev = own.initializer_range or 0.02
            zero_row = own.pad_token_id if owner == "embed_tokens" else None
            own_key = jax.random.fold_in(key, zlib.crc32(to_name(path).encode()))
            end = path[-2:] if TOWER not in path else (TOWER, *path[-2:])  # one program for all layers
            place = None if sharding is None else (end, sharding)
            draw = partial(_draw_normal, shape=shape, dtype=dtype, zero_row=zero_row, place=place)
            leaves[path] = in_huge_pages(draw(own_key, stddev), memory)  # no name keeps what was drawn beside its copy
    return flax.traverse_util.unflatten_dict(leaves)


@partial(jax.jit, static_argnames=("shape", "dtype", "zero_row", "place"))
def _draw_normal(
    key: jax.Array,
    stddev: float,
    *,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    zero_row: int | None,
    place: tuple[ParamPath, Sharding] | None,
) -> jax.Array:
    """place: on a mesh, the end of the parameter's path and the sharding; what is drawn has the checkpoint's shape."""
    stored = shape if place is None else place[1].heads.stored_shape(place[0], shape)
    blocks = _blocks_of(stored)

    def draw(key: jax.Array) -> jax.Array:
        # In float32: in bfloat16 there are 256 different values, and none beyond 2.7 standard deviations.
        values = jax.random.normal(key, (stored[0] // blocks, *stored[1:]), jnp.float32)
        return (stddev * values).astype(dtype)

    if blocks == 1:
        values = draw(key)
    else:  # one after another; but all at once on a mesh, where a loop would draw all of them on every device
        keys = jax.random.split(key, blocks)
        values = (jax.lax.map(draw, keys) if place is None else jax.vmap(draw)(keys)).reshape(stored)
    values = values if zero_row is None else values.at[zero_row].set(0)
    if place is None:
        return values
    path, sharding = place
    source = sharding.heads.source(path, stored)
    laid = values if source is None else source.apply(values)
    return jax.lax.with_sharding_constraint(laid, sharding.of_parameter(path, shape))


def _blocks_of(shape: tuple[int, ...]) -> int:
    """In how many equal parts along its first axis a parameter is drawn; 1 where none have LARGEST_DRAW or fewer.

    On a CPU a draw takes 16 bytes of memory a number: the embedding of 0.5B, in one piece, 2.2 GB.
    """
    numbers, most = math.prod(shape), min(shape[0], 1024)
    return next((n for n in range(1, most + 1) if shape[0] % n == 0 and numbers <= n * LARGEST_DRAW), 1)
