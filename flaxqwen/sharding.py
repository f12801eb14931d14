"""Several devices: which axis of which array lies on which axis of the mesh, as data beside the model.

XLA's SPMD partitioner does the rest. A decode step costs two all-reduces per layer and one for the embedding.

Axes: B batch, S cache capacity, N query heads, K key/value heads, G = N / K, H head dim.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flaxqwen.cache import LayerCache
from flaxqwen.config import Qwen2AudioConfig, Qwen2Config
from flaxqwen.convert.names import Path, to_name

T = TypeVar("T")
Config = Qwen2Config | Qwen2AudioConfig
Axes = tuple[str | None, ...]

MESH_AXES = ("data", "fsdp", "tensor")
TOWER = "audio_tower"  # of Qwen2-Audio: its heads are never padded or repeated

# Logical axes of parameters, by tensor name; the first pattern that fits. Those of Qwen2-Audio's tower have names of
# their own but for q, k and v, whose heads lie as the decoder's.
PARAMETER_RULES: tuple[tuple[str, Axes], ...] = (
    ("*embed_tokens.weight", ("vocab", "embed")),
    ("*lm_head.weight", ("vocab", "embed")),
    ("*q_proj.weight", ("heads", "embed")),
    ("*q_proj.bias", ("heads",)),
    ("*[kv]_proj.weight", ("kv_heads", "embed")),
    ("*[kv]_proj.bias", ("kv_heads",)),
    ("*o_proj.weight", ("embed", "heads")),
    ("*gate_proj.weight", ("mlp", "embed")),
    ("*up_proj.weight", ("mlp", "embed")),
    ("*down_proj.weight", ("embed", "mlp")),
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
# of them that do, or not at all.
LOGICAL_AXES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),  # weights only: activations are whole along it
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}


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
class HeadLayout:
    """Attention heads as they lie on a tensor axis that the checkpoint's numbers may not fit.

    Each key/value head is repeated, next to itself, until the axis divides their number; the query heads of a group are
    padded with heads of zeros until the repeats divide their number. The columns of o_proj for those are zero too, so
    that nothing changes: 28 query and 4 key/value heads become 32 and 8 on 8 devices. Unpadded, the partitioner moves
    activations from device to device in every layer (18 all-gathers and 24 all-to-alls in 4 layers).

    queries: the checkpoint's head in each place; -1: a head of zeros. keys: likewise of key/value heads; none is zero.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    head_dim: int

    @classmethod
    def fit(cls, config: Qwen2Config, parts: int) -> HeadLayout:
        """The layout of a config's heads on a tensor axis of `parts` devices."""
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        group, repeats = heads // kv_heads, math.lcm(kv_heads, parts) // kv_heads
        padded = -(-group // repeats) * repeats
        queries = [k * group + g if g < group else -1 for k in range(kv_heads) for g in range(padded)]
        return cls(tuple(queries), tuple(k for k in range(kv_heads) for _ in range(repeats)), int(config.head_dim))

    @cached_property
    def own_queries(self) -> tuple[int, ...]:
        """The places of the checkpoint's query heads, in its order."""
        return tuple(place for place, head in enumerate(self.queries) if head >= 0)

    @property
    def is_padded(self) -> bool:
        """Whether any query head is one of zeros."""
        return len(self.own_queries) < len(self.queries)

    @property
    def repeats(self) -> int:
        """How many times each key/value head is there."""
        return len(self.keys) // (max(self.keys) + 1)

    @property
    def is_identity(self) -> bool:
        """Whether heads are just as in the checkpoint."""
        return not self.is_padded and self.repeats == 1

    def replace_in(self, config: Config) -> Config:
        """The config of a module whose decoder has the heads of this layout."""
        if self.is_identity:
            return config
        heads, kv_heads = len(self.queries), len(self.keys)
        text = dataclasses.replace(
            config.get_text_config(), num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=self.head_dim
        )
        return text if isinstance(config, Qwen2Config) else dataclasses.replace(config, text_config=text)

    def sources(self, path: Path) -> tuple[int, tuple[int, ...]] | None:
        """The axis of a parameter that heads lie on, and the checkpoint's head in each place; None where none does."""
        owner, leaf = path[-2:] if len(path) > 1 else ("", "")
        if self.is_identity or leaf not in ("weight", "bias") or TOWER in path:
            return None
        places = {"q_proj": (0, self.queries), "k_proj": (0, self.keys), "v_proj": (0, self.keys)}
        return (1, self.queries) if (owner, leaf) == ("o_proj", "weight") else places.get(owner)

    def stored_shape(self, path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the checkpoint of a parameter of `shape`."""
        found = self.sources(path)
        if found is None:
            return shape
        axis, heads = found
        return (*shape[:axis], (max(heads) + 1) * self.head_dim, *shape[axis + 1 :])

    def apply(self, path: Path, array: jax.Array) -> jax.Array:
        """A parameter in this layout, from the checkpoint's."""
        found = self.sources(path)
        if found is None:
            return array
        axis, heads = found
        split = self._split(array, axis)
        places = np.asarray(heads)
        keep = (places >= 0).reshape((-1,) + (1,) * (split.ndim - axis - 1))
        taken = jnp.where(keep, jnp.take(split, np.maximum(places, 0), axis=axis), 0)
        return taken.reshape(*array.shape[:axis], -1, *array.shape[axis + 1 :]).astype(array.dtype)

    def undo(self, path: Path, array: jax.Array) -> jax.Array:
        """The checkpoint's parameter, from one in this layout; the inverse of `apply`."""
        found = self.sources(path)
        if found is None:
            return array
        axis, heads = found
        first = np.asarray([heads.index(head) for head in range(max(heads) + 1)])
        taken = jnp.take(self._split(array, axis), first, axis=axis)
        return taken.reshape(*array.shape[:axis], -1, *array.shape[axis + 1 :])

    def _split(self, array: jax.Array, axis: int) -> jax.Array:
        """[..., heads * H, ...] -> [..., heads, H, ...]."""
        return array.reshape(*array.shape[:axis], -1, self.head_dim, *array.shape[axis + 1 :])


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
                if size % math.prod(self.mesh.shape[other] for other in (*taken, axis)) == 0:
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
        name = to_name(path)
        logical = next((axes for pattern, axes in self.parameters if fnmatchcase(name, pattern)), None)
        if logical is None or not 0 <= len(shape) - len(logical) <= 1:
            raise ValueError(f"{name} {list(shape)}: no rule in flaxqwen.sharding.PARAMETER_RULES fits it")
        return self.of((None,) * (len(shape) - len(logical)) + logical, shape)

    def of_params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Where each of a tree of parameters (or of their shapes) lies, as a tree."""
        return _map_params(lambda path, leaf: self.of_parameter(path, leaf.shape), params)

    def undo_heads(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters as the checkpoint has them."""

        def undo(path: Path, leaf: jax.Array) -> jax.Array:
            return leaf if self.heads.sources(path) is None else _undo(leaf, heads=self.heads, path=path[-2:])

        return _map_params(undo, params)

    def apply_heads(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters as the checkpoint has them, laid on the mesh; the inverse of undo_heads."""

        def apply(path: Path, leaf: jax.Array) -> jax.Array:
            if self.heads.sources(path) is None:
                return leaf
            laid = _apply(leaf, heads=self.heads, path=path[-2:])
            return jax.device_put(laid, self.of_parameter(path, laid.shape))

        return _map_params(apply, params)


@partial(jax.jit, static_argnames=("heads", "path"))
def _undo(leaf: jax.Array, *, heads: HeadLayout, path: Path) -> jax.Array:
    return heads.undo(path, leaf)


@partial(jax.jit, static_argnames=("heads", "path"))
def _apply(leaf: jax.Array, *, heads: HeadLayout, path: Path) -> jax.Array:
    return heads.apply(path, leaf)


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
        return jax.tree.map(lambda a: constrain(sharding, a, "batch", "kv_heads", *(None,) * (a.ndim - 2)), node)

    return jax.tree.map(place, tree, is_leaf=lambda node: isinstance(node, LayerCache))


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
