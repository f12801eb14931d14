"""Adapters on a mesh: loaded, trained and saved as their file has them; in the layers they lie as the weights do.

Without a mesh (sharding None) every function gives back what it was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from flaxqwen.layout import HeadLayout, Source
from flaxqwen.ops.lora import Adapter
from flaxqwen.sharding import Sharding

Path = tuple[str, ...]
BASE_LAYER = "base_layer"  # in peft's names, between an adapted module and its own parameters


def replaced(path: Path) -> Path | None:
    """The parameter that a tensor of an adapter stands in for; None: it is a low-rank one."""
    if any(part.startswith("lora_") for part in path):
        return None
    return tuple(part for part in path if part != BASE_LAYER)


def place(sharding: Sharding | None, leaves: Mapping[Path, Any]) -> dict[Path, jax.Array]:
    """An adapter's tensors on the devices: low-rank ones whole on each, others cut as the parameters they replace."""

    def put(path: Path, leaf: Any) -> jax.Array:
        if sharding is None:
            return jax.device_put(leaf)
        own = replaced(path)
        whole = sharding.of((None,) * leaf.ndim, leaf.shape)
        return jax.device_put(leaf, whole if own is None else sharding.of_parameter(own, leaf.shape))

    return {path: put(path, leaf) for path, leaf in leaves.items()}


def lay_parameter(sharding: Sharding | None, path: Path, leaf: Any) -> Any:
    """A tensor that stands in for a parameter, as the parameter lies."""
    own = replaced(path)
    if sharding is None or own is None:
        return leaf
    return sharding.lay(own, leaf, sharding.source(own, {own: leaf.shape}))


def stored_parameter(sharding: Sharding | None, path: Path, leaf: Any) -> Any:
    """A parameter as the checkpoint has it."""
    own = replaced(path)
    if sharding is None or own is None:
        return leaf
    return sharding.undo(own, leaf, sharding.source(own, sharding.stored_shapes({own: leaf.shape})))


def lay_adapter(sharding: Sharding | None, layer: Path, adapter: Adapter) -> Adapter:
    """A linear layer's adapter where its weight lies: A along the input, all else along the output, cut and padded."""
    if sharding is None:
        return adapter
    logical_axes = sharding.logical_axes((*layer, "weight"))
    assert logical_axes is not None
    out, width = logical_axes
    adapter = with_heads(sharding.heads, layer, adapter)
    axes: dict[str, tuple[str | None, ...]] = {"A": (None, width), "B": (out, None), "bias": (out,), "gain": (out,)}
    leaves = {name: getattr(adapter, name) for name in axes}
    placed = {}
    for name, leaf in leaves.items():
        if leaf is not None:
            logical = (None,) * (leaf.ndim - len(axes[name])) + axes[name]  # those of stacked layers have one more
            placed[name] = jax.device_put(leaf, sharding.of(logical, leaf.shape))
    return adapter.replace(**placed)


def with_heads(heads: HeadLayout, layer: Path, adapter: Adapter) -> Adapter:
    """A linear layer's adapter with the heads of a layout: none in place of padding, copies where they are repeated."""
    if (found := heads.heads_of((*layer, "weight"))) is None:
        return adapter
    side, blocks = found
    axes = {"A": -1} if side == -1 else {"B": -2, "bias": -1, "gain": -1}

    def apply(leaf: Any, axis: int) -> Any:
        return Source(axis, blocks, leaf.shape[axis] // (max(blocks) + 1)).apply(leaf)

    leaves = {name: (getattr(adapter, name), axis) for name, axis in axes.items()}
    return adapter.replace(**{name: apply(leaf, axis) for name, (leaf, axis) in leaves.items() if leaf is not None})
