"""peft's folder of an adapter: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from flaxqwen.convert import CheckpointError
from flaxqwen.convert.checkpoint import Checkpoint
from flaxqwen.convert.names import newer_audio_name
from flaxqwen.distributed import gather, is_main
from flaxqwen.files import replacing
from flaxqwen.lora.config import CONFIG_FILE, LoraConfig
from flaxqwen.lora.mesh import place, replaced
from flaxqwen.lora.tree import Tree, adapter_shapes, base_array, param_shapes, to_name, to_path, to_tensors
from flaxqwen.models.qwen2_audio import Qwen2AudioForConditionalGeneration
from flaxqwen.sharding import module_sharding

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."


def read_tensors(folder: Path) -> tuple[str, dict[str, np.ndarray]]:
    """The file with an adapter's weights in a folder, and its tensors by their names there.

    Raises:
      FileNotFoundError: no weights of an adapter in the folder.
    """
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder}: no weights of an adapter; expected {' or '.join(WEIGHTS)}")
    with Checkpoint(path) as checkpoint:
        return str(path), {name: np.array(checkpoint.read(name)) for name in checkpoint.tensors}


def fit_adapter(where: str, config: LoraConfig, tensors: Mapping[str, Any], module: nn.Module, params: Tree) -> Tree:
    """An adapter for a model of tensors by peft's names; the low-rank ones in float32 whatever they were, as peft.

    Raises:
      ValueError: tensors that are missing, unexpected, or of another shape than the config asks for: all that is
        wrong, in one error that begins with `where` they are from.
    """
    own = {own_name(name, module): tensor for name, tensor in tensors.items()}
    check_tensors(where, config, own, module, params)
    return place_tensors(own, module, params)


def own_name(name: str, module: nn.Module) -> str:
    """The name in an adapter's tree of a tensor of peft's, whose file of a Qwen2-Audio may be of Transformers 4."""
    name = name.removeprefix(PREFIX)
    return newer_audio_name(name) if isinstance(module, Qwen2AudioForConditionalGeneration) else name


def place_tensors(tensors: Mapping[str, Any], module: nn.Module, params: Tree) -> Tree:
    """Tensors by name as a tree on the module's devices, the low-rank ones in float32.

    A copy of the base's weights, as peft writes of adapted embeddings, is the base's own array here.
    """
    sharding = module_sharding(module)
    shared, leaves = {}, {}
    for name, tensor in tensors.items():
        path = to_path(name)
        if replaced(path) is None:
            leaves[path] = np.asarray(tensor, np.float32)
        elif (own := base_array(params, path, sharding)) is not None and _is_equal(own, tensor):
            shared[path] = own
        else:
            leaves[path] = tensor
    return flax.traverse_util.unflatten_dict(place(sharding, leaves) | shared)


def _is_equal(own: jax.Array, tensor: Any) -> bool:
    return bool(jnp.array_equal(own, jnp.asarray(tensor).astype(own.dtype)))


def check_tensors(where: str, config: LoraConfig, tensors: Mapping[str, Any], module: nn.Module, params: Tree) -> None:
    """ValueError where an adapter's tensors are not those that its config asks for in this model."""
    needed, optional = adapter_shapes(config, param_shapes(module, params))
    expected, found = {**optional, **needed}, {}
    wrong = []
    for name, tensor in tensors.items():
        try:
            found[to_path(name)] = tuple(tensor.shape)
        except ValueError:
            wrong.append(f"{name} is unexpected")
    wrong += [f"{to_name(path)} is missing" for path in needed if path not in found]
    for path, shape in found.items():
        if path not in expected:
            wrong.append(f"{to_name(path)} is unexpected")
        elif shape != expected[path]:
            wrong.append(f"{to_name(path)} has shape {shape}, expected {expected[path]}")
    if wrong:
        raise CheckpointError(f"{where}: the adapter does not fit the model: {'; '.join(wrong)}")


def write_adapter(folder: str | os.PathLike[str], config: LoraConfig, adapter: Tree) -> None:
    """Write an adapter so that peft loads it. Of several processes all take part, and the first one writes."""
    folder = Path(folder)
    tensors = {PREFIX + name: gather(leaf) for name, leaf in to_tensors(adapter).items()}
    if not is_main():
        return
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
    # Both are whole before either takes its place.
    with replacing(folder / CONFIG_FILE) as written, replacing(folder / WEIGHTS[0]) as weights:
        safetensors.numpy.save_file(tensors, weights, metadata={"format": "pt"})
        written.write_text(text, encoding="utf-8")
    (folder / WEIGHTS[1]).unlink(missing_ok=True)
