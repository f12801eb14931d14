"""An adapter as a tree of tensors beside the parameters, and what the module is applied to with it.

The tree is the file: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight is
adapter["model"]["layers_0"]["self_attn"]["q_proj"]["lora_A"]["weight"]. It holds what is trained and nothing else.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from flaxqwen.convert.names import to_name, to_path
from flaxqwen.convert.quantize import SCALE
from flaxqwen.lora.config import LoraConfig
from flaxqwen.lora.mesh import BASE_LAYER, lay_adapter, lay_parameter, place, replaced, stored_parameter
from flaxqwen.models.qwen2 import Qwen2ForCausalLM
from flaxqwen.ops.lora import Adapter
from flaxqwen.sharding import Sharding, module_sharding

Tree = dict[str, Any]
Path = tuple[str, ...]
EMBEDDINGS = ("embed_tokens", "embed_positions")
# What peft writes besides where it trains a vocabulary that has grown (save_embedding_layers).
VOCABULARY = (("model", "embed_tokens", "weight"), ("lm_head", "weight"))


@dataclass(frozen=True)
class Layer:
    """A linear layer or an embedding of the model: its path, its name, its weight's shape."""

    path: Path
    name: str
    shape: tuple[int, int]

    @property
    def is_linear(self) -> bool:
        return self.path[-1] not in EMBEDDINGS


def flatten(tree: Mapping[str, Any]) -> dict[Path, Any]:
    return flax.traverse_util.flatten_dict(tree)


def param_shapes(module: nn.Module, params: Tree) -> dict[Path, tuple[int, ...]]:
    """The shapes of a module's parameters in the checkpoint, as if nothing was quantized; a tied head's included."""
    flat = flatten(params)
    if any(path[-1] == SCALE for path in flat):
        flat = flatten(jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"])
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    if (sharding := module_sharding(module)) is not None:
        shapes = sharding.stored_shapes(shapes)
    if is_tied(module):
        shapes["lm_head", "weight"] = shapes["model", "embed_tokens", "weight"]
    return shapes


def is_tied(module: nn.Module) -> bool:
    return isinstance(module, Qwen2ForCausalLM) and module.config.tie_word_embeddings


def adapted_layers(config: LoraConfig, shapes: Mapping[Path, tuple[int, ...]]) -> list[Layer]:
    """The layers that an adapter changes.

    Raises:
      ValueError: there are none; DoRA, or a bias, of an embedding; the encoder's positions.
    """
    layers = [Layer(path[:-1], to_name(path[:-1]), shape) for path, shape in shapes.items() if len(shape) == 2]
    found = [layer for layer in layers if config.targets(layer.name, layer.is_linear)]
    if not found:
        raise ValueError(f"target_modules {config.target_modules!r} names no linear layer or embedding of the model")
    for layer in found:
        if layer.path[-1] == "embed_positions":
            raise ValueError(
                f"adapters of {layer.name} are not supported: it is a table of sines that is added as it is"
            )
        if not layer.is_linear and (config.use_dora or config.lora_bias):
            raise ValueError(f"use_dora and lora_bias are not supported for embeddings: leave {layer.name} out")
    return found


def adapter_shapes(
    config: LoraConfig, shapes: Mapping[Path, tuple[int, ...]]
) -> tuple[dict[Path, tuple[int, ...]], dict[Path, tuple[int, ...]]]:
    """The shapes of an adapter's tensors: those that it has, and those that its file may have besides."""
    needed: dict[Path, tuple[int, ...]] = {}
    layers = adapted_layers(config, shapes)
    for layer in layers:
        rank, (out, width) = config.rank(layer.name), layer.shape
        if not layer.is_linear:
            needed[*layer.path, "lora_embedding_A"] = (rank, out)
            needed[*layer.path, "lora_embedding_B"] = (width, rank)
            continue
        needed[*layer.path, "lora_A", "weight"] = (rank, width)
        needed[*layer.path, "lora_B", "weight"] = (out, rank)
        if config.lora_bias:
            needed[*layer.path, "lora_B", "bias"] = (out,)
        if config.use_dora:
            needed[*layer.path, "lora_magnitude_vector"] = (out,)
    optional: dict[Path, tuple[int, ...]] = {}
    adapted = {layer.path for layer in layers}
    for path, shape in shapes.items():
        name = to_name(path[:-1])
        if config.saves(name):
            needed[path] = shape
        elif path[:-1] in adapted and (path[-1] == "weight" or config.bias != "none"):
            optional[*path[:-1], BASE_LAYER, path[-1]] = shape
        elif (path[-1] == "bias" and config.bias == "all") or path in VOCABULARY:
            optional[path] = shape
    return needed, optional


def init_adapter(module: nn.Module, params: Tree, config: LoraConfig, seed: int = 0) -> Tree:
    """A new adapter, drawn as peft draws it, float32: the model's output with it is what it was without.

    Tensors that belong to the base (modules_to_save, biases) are the base's own arrays, as the checkpoint has them.

    Raises:
      ValueError: config names no layer of the model; DoRA over a quantized weight.
    """
    sharding = module_sharding(module)
    needed, optional = adapter_shapes(config, param_shapes(module, params))
    trained = {path: shape for path, shape in optional.items() if path[-1] == "bias"}
    key = jax.random.key(seed)
    leaves: dict[Path, Any] = {}
    for path, shape in {**needed, **trained}.items():
        kind = next((part for part in path if part.startswith("lora_")), None)
        own_key = jax.random.fold_in(key, zlib.crc32(to_name(path).encode()))
        if kind is None:
            leaves[path] = stored_parameter(sharding, path, base_leaf(params, path))
        elif kind == "lora_magnitude_vector":
            weight = dense_weight(params, path[:-1], sharding)
            if config.init_lora_weights is False:  # else B is zero
                A, B = (leaves[*path[:-1], part, "weight"] for part in ("lora_A", "lora_B"))
                weight += config.scaling(to_name(path[:-1])) * (B @ A)
            leaves[path] = jnp.linalg.norm(weight, axis=1)
        else:
            width = shape[-1] if path[-1] != "bias" else needed[*path[:-1], "weight"][-1]
            leaves[path] = _draw(own_key, kind, width, shape, config)
    return flax.traverse_util.unflatten_dict(place(sharding, leaves))


def _draw(key: jax.Array, kind: str, width: int, shape: tuple[int, ...], config: LoraConfig) -> jax.Array:
    """Of a layer that takes `width` values. Source: LoraLayer.reset_lora_parameters in peft/tuners/lora/layer.py."""
    init = config.init_lora_weights
    if kind == "lora_embedding_B" or (kind == "lora_embedding_A" and init is False):
        return jax.random.normal(key, shape)
    if kind == "lora_embedding_A" or (kind == "lora_B" and init is not False):
        return jnp.zeros(shape)
    if init == "gaussian":
        return jax.random.normal(key, shape) / shape[0]
    bound = 1 / math.sqrt(width)  # Kaiming's uniform of torch.nn.Linear
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def base_leaf(params: Tree, path: Path) -> Any:
    """The base's parameter that a path of an adapter replaces."""
    path = tuple(part for part in path if part != BASE_LAYER)
    if path[0] == "lm_head" and "lm_head" not in params:
        path = ("model", "embed_tokens", *path[1:])
    node: Any = params
    for part in path:
        node = node[part]
    return node


def base_array(params: Tree, path: Path, sharding: Sharding | None) -> jax.Array | None:
    """The base's parameter that a path of an adapter replaces, as the checkpoint has it; None: it is quantized."""
    *owner, name = path
    if name == "weight" and SCALE in base_leaf(params, tuple(owner)):
        return None
    return stored_parameter(sharding, path, base_leaf(params, path))


def dense_weight(params: Tree, layer: Path, sharding: Sharding | None = None) -> jax.Array:
    """The float32 weight of a layer, with a sharding as the checkpoint has it; ValueError where it is quantized."""
    weight = base_array(params, (*layer, "weight"), sharding)
    if weight is None:
        raise ValueError(f"{to_name(layer)} is quantized: DoRA and merging need the weights themselves, load without")
    return jnp.asarray(weight, jnp.float32)


def overrides(adapter: Tree) -> dict[Path, Any]:
    """The tensors of an adapter that stand in for parameters, by their path in the adapter."""
    return {path: leaf for path, leaf in flatten(adapter).items() if replaced(path) is not None}


def own_weights(adapter: Tree, params: Tree, sharding: Sharding | None = None) -> dict[Path, Any]:
    """Those of an adapter's overrides that are not the base's own arrays."""
    found = overrides(adapter).items()
    return {path: leaf for path, leaf in found if leaf is not base_array(params, path, sharding)}


def adapted_module(module: nn.Module, adapters: Sequence[Tree], merged: bool = False) -> nn.Module:
    """The module that adapters are applied with: a tied head is untied where they change it or its embedding alone.

    merged: whether the adapters are in the weights.
    """
    own = ("weight", "lora_embedding_A") if merged else ("weight",)
    changed = {path[-2:] for tree in adapters for path in flatten(tree)}
    unties = any("lm_head" in tree for tree in adapters) or any(("embed_tokens", leaf) in changed for leaf in own)
    if not unties or not isinstance(module, Qwen2ForCausalLM) or not module.config.tie_word_embeddings:
        return module
    return module.clone(config=replace(module.config, tie_word_embeddings=False))


def with_own_head(base: nn.Module, adapted: nn.Module, params: Tree) -> Tree:
    """The base's parameters as adapted_module reads them: a head that it has untied is the embedding's array."""
    return params if adapted is base else params | {"lm_head": params["model"]["embed_tokens"]}


def make_variables(
    module: nn.Module,
    params: Tree,
    adapters: Sequence[tuple[LoraConfig, Tree]],
    dropout: bool = False,
    merged: bool = False,
) -> Tree:
    """What adapted_module(module, ...) is applied to: {"params": ..., "lora": ...}. Pure, and differentiable.

    Args:
      module, params: of the base. Arrays that no adapter replaces are shared.
      adapters: config and tensors of each; their outputs add up.
      dropout: whether lora_dropout acts, where there is a "dropout" rng.
      merged: as of adapted_module.

    Raises:
      ValueError: DoRA beside another adapter, or over a quantized weight.
    """
    if len(adapters) > 1 and any(config.use_dora for config, _ in adapters):
        raise ValueError("an adapter with use_dora is active alone: its magnitudes are of the base with it")
    params = with_own_head(module, adapted_module(module, [tree for _, tree in adapters], merged), params)
    layers: dict[Path, tuple[Adapter, ...]] = {}
    sharding = module_sharding(module)
    for config, tree in adapters:
        own = {path: lay_parameter(sharding, path, leaf) for path, leaf in overrides(tree).items()}
        params = replace_params(params, own)
        for path in layer_paths(tree):
            adapter = layer_adapter(config, params, tree, path, dropout, sharding)
            if path[-1] not in EMBEDDINGS:
                adapter = lay_adapter(sharding, path, adapter)
            layers[*path, "adapters"] = (*layers.get((*path, "adapters"), ()), adapter)
    return {"params": params, "lora": flax.traverse_util.unflatten_dict(layers)}


def layer_paths(adapter: Tree) -> Iterator[Path]:
    """The layers that an adapter adds to."""
    for path in flatten(adapter):
        if path[-1] == "lora_embedding_A":
            yield path[:-1]
        elif path[-2:] == ("lora_A", "weight"):
            yield path[:-2]


def layer_adapter(
    config: LoraConfig,
    params: Tree,
    adapter: Tree,
    path: Path,
    dropout: bool = False,
    sharding: Sharding | None = None,
) -> Adapter:
    """An adapter's part in one layer, as the checkpoint has it; sharding: that the parameters lie by."""
    own: Any = adapter
    for part in path:
        own = own[part]
    scaling = np.float32(config.scaling(to_name(path)))
    if "lora_embedding_A" in own:
        return Adapter(own["lora_embedding_A"], own["lora_embedding_B"], scaling)
    A, B = own["lora_A"]["weight"], own["lora_B"]["weight"]
    gain = None
    if "lora_magnitude_vector" in own:
        gain = _gain(own["lora_magnitude_vector"], dense_weight(params, path, sharding), A, B, scaling)
    rate = np.float32(config.lora_dropout) if dropout and config.lora_dropout else None
    if gain is not None and rate is not None:
        raise ValueError("lora_dropout in training with use_dora is not supported: set it to 0")
    return Adapter(A, B, scaling, own["lora_B"].get("bias"), gain, rate)


@jax.jit
def _gain(magnitude: jax.Array, weight: jax.Array, A: jax.Array, B: jax.Array, scaling: jax.Array) -> jax.Array:
    """Magnitude over norm, [out]; no gradient goes through the norm (DoRA, section 4.3)."""
    adapted = weight + scaling * (B @ A)
    return magnitude / jax.lax.stop_gradient(jnp.linalg.norm(adapted, axis=1))


def replace_params(params: Tree, leaves: Mapping[Path, Any]) -> Tree:
    """Parameters with some leaves replaced, cast to the dtype of what they replace."""
    for path, leaf in leaves.items():
        params = _replaced(params, tuple(part for part in path if part != BASE_LAYER), leaf)
    return params


def _replaced(node: Tree, path: Path, leaf: Any) -> Tree:
    if len(path) == 1:
        if SCALE in node and path[0] == "weight":
            raise ValueError(
                "an adapter with weights of its own (modules_to_save, or embeddings that peft saves besides) cannot go "
                "over quantized ones: load without quantize"
            )
        return node | {path[0]: jnp.asarray(leaf).astype(node[path[0]].dtype)}
    return node | {path[0]: _replaced(node[path[0]], path[1:], leaf)}


def to_tree(tensors: Mapping[str, Any]) -> Tree:
    """An adapter's tree from tensors by name, without peft's prefix."""
    return flax.traverse_util.unflatten_dict({to_path(name): tensor for name, tensor in tensors.items()})


def to_tensors(adapter: Tree) -> dict[str, Any]:
    """An adapter's tensors by name, without peft's prefix."""
    return {to_name(path): leaf for path, leaf in flatten(adapter).items()}
