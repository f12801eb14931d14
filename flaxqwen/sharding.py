"""Several devices: which axis of which array lies on which axis of the mesh, as data beside the model.

XLA's SPMD partitioner does the rest. A decode step costs two all-reduces per layer and one for the embedding.

Axes: B batch, T tokens, S cache capacity, N query heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, TypeVar

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flaxqwen.cache import LayerCache
from flaxqwen.config import Qwen2AudioConfig, Qwen2Config
from flaxqwen.convert.names import Path, to_name
from flaxqwen.convert.quantize import SCALE, group_count
from flaxqwen.layout import HeadLayout, Source

T = TypeVar("T")
Config = Qwen2Config | Qwen2AudioConfig
Axes = tuple[str | None, ...]

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axes of parameters, by tensor name; the first pattern that fits. Those of Qwen2-Audio's tower have names of
# their own but for q, k and v, whose heads lie as the decoder's. A `weight*` is a weight, or, where it is quantized,
# its integers or its scales, which are cut alike; those of the embedding are whole: cut, they would be gathered apart.
PARAMETER_RULES: tuple[tuple[str, Axes], ...] = (
    ("*embed_tokens.weight_scale", (None, None)),
    ("*embed_tokens.weight", ("vocab", "embed")),
    ("*lm_head.weight*", ("vocab", "embed")),
    ("*q_proj.weight*", ("heads", "embed")),
    ("*q_proj.bias", ("heads",)),
    ("*[kv]_proj.weight*", ("kv_heads", "embed")),
    ("*[kv]_proj.bias", ("kv_heads",)),
    ("*o_proj.weight*", ("embed", "heads")),
    ("*gate_proj.weight*", ("mlp", "embed")),
    ("*up_proj.weight*", ("mlp", "embed")),
    ("*down_proj.weight*", ("embed", "mlp")),
    ("*out_proj.weight", ("embed", "heads")),
    ("*fc1.weight", ("mlp", "embed")),
    ("*fc1.bias", ("mlp",)),
    ("*fc2.weight", ("embed", "mlp")),
    ("*conv[12].weight", (None, None, None)),
    ("*embed_positions.weight", (None, "embed")),
    ("*linear.weight", (None, "embed")),
    ("*norm.weight", (None,)),
    ("*score.weight", (None, "embed")),
    ("*qa_outputs.weight", (None, "embed")),
    ("*.bias", (None,)),
)

# The axes of the mesh that a logical axis is cut along. An axis whose length they do not divide is cut along the first
# of them that do, or not at all; and along none that an axis before it is cut along.
LOGICAL_AXES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),  # weights only: activations are whole along it
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "slots": (),  # of the KV cache: ("data", "fsdp") shares one long context; 3 small all-reduces more in each layer
    "mlp": ("tensor",),
}


CACHE_AXES = ("batch", "kv_heads", "slots", None)  # of keys, values and their scales


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = -1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor.

    Args:
      data: the batch is cut along it; every part has all weights.
      fsdp: the batch is cut along it, and the weights too: they are gathered layer by layer.
      tensor: heads, MLP and vocabulary are cut along it. One of the three may be -1: what is left of the devices.
      devices: default: all, of every process.

    Raises:
      ValueError: sizes that do not make up the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    open_axes = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if any(size < 1 and size != -1 for size in sizes.values()) or len(open_axes) > 1:
        raise ValueError(f"mesh of {sizes}: sizes are 1 or more, and one of them may be -1")
    if open_axes:
        sizes[open_axes[0]] = max(len(devices) // known, 1)
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"mesh of {sizes} does not make up {len(devices)} devices")
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, (AxisType.Auto,) * 3, devices=devices)


def parse_mesh(text: str | None) -> dict[str, int]:
    """The sizes that make_mesh takes, from "data=2,tensor=4"; None: its defaults.

    Raises:
      ValueError: another form, or an axis that there is none of.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (text or "").split(",")):
        name, _, size = part.partition("=")
        if name not in MESH_AXES or name in sizes or not size.removeprefix("-").isdecimal():
            raise ValueError(f"mesh {text!r}: expected sizes of {', '.join(MESH_AXES)}, such as data=2,tensor=4")
        sizes[name] = int(size)
    return sizes


def mesh_of(text: str | None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of devices (default: all), from the text that parse_mesh reads. Raises ValueError as both."""
    sizes = parse_mesh(text)
    return make_mesh(sizes.get("data", 1), sizes.get("fsdp", 1), sizes.get("tensor", -1), devices)


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How a model lies on a mesh: a static field of its modules, which constrain activations in a few named places.

    mesh: of make_mesh, or any with axes of these names.
    heads: of the attention.
    parameters, axes: the rules; see PARAMETER_RULES and LOGICAL_AXES.
    """

    mesh: Mesh
    heads: HeadLayout
    parameters: tuple[tuple[str, Axes], ...] = PARAMETER_RULES
    axes: tuple[tuple[str, tuple[str, ...]], ...] = tuple(LOGICAL_AXES.items())

    @classmethod
    def fit(cls, mesh: Mesh, config: Config, axes: Mapping[str, tuple[str, ...]] | None = None) -> Sharding:
        """The sharding of a config's model; `axes` goes over LOGICAL_AXES.

        Raises:
          ValueError: an axis that is not in the mesh, or no logical one.
        """
        merged = {**LOGICAL_AXES, **(axes or {})}
        for logical, names in merged.items():
            if logical not in LOGICAL_AXES:
                raise ValueError(f"{logical!r} is no logical axis; there are {', '.join(LOGICAL_AXES)}")
            for name in names:
                if name not in mesh.axis_names:
                    raise ValueError(f"axis {name!r}, of {logical!r}, is not in the mesh, which has {mesh.axis_names}")
        parts = math.prod(mesh.shape[name] for name in merged["kv_heads"])
        return cls(mesh, HeadLayout.fit(config.get_text_config(), parts), axes=tuple(merged.items()))

    def spec(self, logical: Axes, shape: tuple[int, ...]) -> PartitionSpec:
        """Where an array of `shape` lies, given the logical axis of each of its axes (None: whole on every device)."""
        found = dict(self.axes)
        parts: list[tuple[str, ...] | None] = []
        for name, size in zip(logical, shape, strict=True):
            taken: tuple[str, ...] = ()
            for axis in found[name] if name is not None else ():
                is_free = not any(axis in part for part in parts if part)
                if is_free and size % math.prod(self.mesh.shape[other] for other in (*taken, axis)) == 0:
                    taken = (*taken, axis)
            parts.append(taken or None)
        return PartitionSpec(*parts)

    def of(self, logical: Axes, shape: tuple[int, ...]) -> NamedSharding:
        """`spec` on the mesh."""
        return NamedSharding(self.mesh, self.spec(logical, shape))

    def of_parameter(self, path: Path, shape: tuple[int, ...]) -> NamedSharding:
        """Where a parameter lies; one of layers that are stacked has an axis more, in front, which is whole.

        Raises:
          ValueError: there is no rule for it.
        """
        logical = self.logical_axes(path)
        if logical is None or not 0 <= len(shape) - len(logical) <= 1:
            raise ValueError(f"{to_name(path)} {list(shape)}: no rule in flaxqwen.sharding.PARAMETER_RULES fits it")
        return self.of((None,) * (len(shape) - len(logical)) + logical, shape)

    def of_params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Where each of a tree of parameters (or of their shapes) lies, as a tree."""
        return _map_params(lambda path, leaf: self.of_parameter(path, leaf.shape), params)

    def source(self, path: Path, stored: Mapping[Path, tuple[int, ...]]) -> Source | None:
        """What a parameter becomes here, given the shapes of all in the checkpoint; None: it stays as it is."""
        if path[-1] == SCALE:
            found = self._source_of_groups(path, stored[path][-1], stored[*path[:-1], "weight"])
            if found is not None:
                return found
        return self.heads.source(path, stored[path])

    def _source_of_groups(self, path: Path, groups: int, values: tuple[int, ...]) -> Source | None:
        """Of int4's scales where input channels are cut: each is repeated until no two heads, or devices, share one."""
        logical = self.logical_axes(path)
        if logical is None or logical[-1] in (None, "embed"):  # whole when it is used
            return None
        if path[-2] == "o_proj" and not self.heads.is_identity:
            parts, blocks = max(self.heads.queries) + 1, self.heads.queries
            is_int8 = values[-1] == parts * self.heads.head_dim
        else:
            parts = values[-1] // self.of(logical, values).shard_shape(values)[-1]
            blocks, is_int8 = tuple(range(parts)), groups == 1  # or int4's of a single group, which is as good
        count = math.lcm(groups, parts)
        if is_int8 or (count == groups and -1 not in blocks):
            return None
        places = [(block, i) for block in blocks for i in range(count // parts)]
        return Source(-1, tuple((b * (count // parts) + i) * groups // count if b >= 0 else -1 for b, i in places), 1)

    def logical_axes(self, path: Path) -> Axes | None:
        """Those of a parameter, by the first rule that fits; None: there is none."""
        name = to_name(path)
        return next((axes for pattern, axes in self.parameters if fnmatchcase(name, pattern)), None)

    def stored_shapes(self, shapes: Mapping[Path, tuple[int, ...]]) -> dict[Path, tuple[int, ...]]:
        """The shapes in the checkpoint of parameters that have these on the mesh."""
        stored = {path: self.heads.stored_shape(path, shape) for path, shape in shapes.items()}
        for path, shape in stored.items():
            if path[-1] == SCALE and shape[-1] > 1:
                width = 2 * stored[*path[:-1], "weight"][-1]
                stored[path] = (*shape[:-1], group_count(width))
        return stored

    def lay(self, path: Path, leaf: jax.Array, source: Source | None) -> jax.Array:
        """A parameter as the checkpoint has it, laid on the mesh."""
        if source is None:
            return jax.device_put(leaf, self.of_parameter(path, leaf.shape))
        place = self.of_parameter(path, source.laid_shape(leaf.shape))
        # Put again: the program's own name for the place is another, and would compile what it is given to anew.
        return jax.device_put(_move(leaf, source=source, place=place, is_back=False), place)

    def undo(self, path: Path, leaf: jax.Array, source: Source | None) -> jax.Array:
        """A parameter as the checkpoint has it, cut as its axes allow; the inverse of `lay`."""
        if source is None:
            return leaf
        place = self.of_parameter(path, source.stored_shape(leaf.shape))
        return jax.device_put(_move(leaf, source=source, place=place, is_back=True), place)

    def undo_heads(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters as the checkpoint has them."""
        stored = self.stored_shapes(shapes_of(params))
        return _map_params(lambda path, leaf: self.undo(path, leaf, self.source(path, stored)), params)

    def check_stored(self, params: Mapping[str, Any]) -> None:
        """ValueError for (unquantized) parameters that have other heads than the checkpoint's."""
        for path, shape in shapes_of(params).items():
            if (found := self.heads.heads_of(path)) is not None:
                size = (max(found[1]) + 1) * self.heads.head_dim
                if shape[found[0]] != size:
                    raise ValueError(
                        f"{to_name(path)} is {list(shape)}, the checkpoint's has {size} in that place: heads are "
                        "padded or repeated on this mesh; give sharding.undo_heads(params)"
                    )

    def apply_heads(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters as the checkpoint has them, laid on the mesh; the inverse of undo_heads."""
        stored = shapes_of(params)
        return _map_params(lambda path, leaf: self.lay(path, leaf, self.source(path, stored)), params)


@partial(jax.jit, static_argnames=("source", "place", "is_back"))
def _move(leaf: jax.Array, *, source: Source, place: NamedSharding, is_back: bool) -> jax.Array:
    """A parameter by its source, or back. Each device has it whole for a moment: blocks lie across the axis's cuts."""
    whole = jax.lax.with_sharding_constraint(leaf, NamedSharding(place.mesh, PartitionSpec()))
    return jax.lax.with_sharding_constraint(source.undo(whole) if is_back else source.apply(whole), place)


def shapes_of(params: Mapping[str, Any]) -> dict[Path, tuple[int, ...]]:
    """The shape of each of a tree of parameters, by its path."""
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(dict(params)).items()}


def _map_params(function: Callable[[Path, Any], Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of what `function` makes of each path and its parameter."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(tuple(key.key for key in path), leaf), dict(params)
    )


def module_sharding(module: Any) -> Sharding | None:
    """How a module lies on a mesh; None: on one device."""
    return getattr(module, "sharding", None)


def constrain(sharding: Sharding | None, x: jax.Array, *logical: str | None) -> jax.Array:
    """x, kept where its logical axes lie; without a sharding, as it is."""
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding.of(logical, x.shape))


def settle(sharding: Sharding | None, tree: T) -> T:
    """What a program of generation returns, each array in one place: the KV cache on its devices, all else on every.

    So the next program finds what the first one was compiled for, and every process can read all but the cache.
    """
    if sharding is None:
        return tree

    def place(node: Any) -> Any:
        if not isinstance(node, LayerCache):
            return constrain(sharding, node, *(None,) * node.ndim)
        return jax.tree.map(lambda a: constrain(sharding, a, *CACHE_AXES), node)

    return jax.tree.map(place, tree, is_leaf=lambda node: isinstance(node, LayerCache))


def cuts_slots(sharding: Sharding | None, cache: LayerCache) -> bool:
    """Whether a mesh cuts the slots of a KV cache."""
    return sharding is not None and sharding.spec(CACHE_AXES, cache.key.shape)[2] is not None


def own_heads(sharding: Sharding | None, weights: jax.Array) -> jax.Array:
    """Attention weights [B, N, T, S] of the checkpoint's heads, without those that fill up groups."""
    if sharding is None or not sharding.heads.is_padded:
        return weights
    return jnp.take(weights, np.asarray(sharding.heads.own_queries), axis=1)


def mask_of_heads(sharding: Sharding | None, mask: jax.Array) -> jax.Array:
    """A 4D mask [B, 1 or N, T, S] with a place for each head that there is; any will do for one of zeros."""
    if sharding is None or mask.shape[1] == 1 or not sharding.heads.is_padded:
        return mask
    return jnp.take(mask, np.maximum(sharding.heads.queries, 0), axis=1)
