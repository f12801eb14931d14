"""Small Qwen2 checkpoints for the tests, made by Transformers or by numpy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flaxqwen.convert import open_checkpoint, to_path

GEOMETRY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 11,  # so that the order of names is not the order of layers
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


def save_model(folder: Path, kind: str = "Qwen2ForCausalLM", dtype: str = "bfloat16", tied: bool = False, **save: Any):
    """Save a random model with Transformers; biases and norms are random too, so that no two tensors are equal."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2Config(**GEOMETRY, tie_word_embeddings=tied)
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder, **save)
    return model


def random_tensors(dtype: Any = ml_dtypes.bfloat16, layers: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors with names of a Qwen2ForCausalLM, without torch."""
    shapes = {"model.embed_tokens.weight": (24, 8), "model.norm.weight": (8,), "lm_head.weight": (24, 8)}
    for i in range(layers):
        shapes[f"model.layers.{i}.self_attn.q_proj.weight"] = (12, 8)
        shapes[f"model.layers.{i}.self_attn.q_proj.bias"] = (12,)
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (8,)
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def read_all(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, by our reader, copied."""
    with open_checkpoint(path) as checkpoint:
        return {name: np.array(checkpoint.read(name)) for name in checkpoint.tensors}


def expected_of(tensors: dict[str, Any]) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shapes by path that a model with these tensors would ask for."""
    return {to_path(name): tuple(tensor.shape) for name, tensor in tensors.items()}


def flatten(params: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """A nested dict by path."""
    flat = {}
    for key, value in params.items():
        flat |= flatten(value, (*path, key)) if isinstance(value, dict) else {(*path, key): value}
    return flat


def assert_same(left: dict[Any, np.ndarray], right: dict[Any, np.ndarray]) -> None:
    """The same names, dtypes, shapes and bytes."""
    assert set(left) == set(right)
    for name, array in left.items():
        assert array.dtype == right[name].dtype, name
        assert array.shape == right[name].shape, name
        assert array.tobytes() == right[name].tobytes(), name


def save_sparse(folder: Path, shapes: dict[str, tuple[int, ...]], shards: int = 1, dtype: str = "BF16") -> None:
    """A checkpoint of zeros that are holes in its files, whatever its size; tensors go to shards in turn."""
    folder.mkdir()
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(shapes)}
    for file in names:
        header, at = {}, 0
        for name in (name for name, where in weight_map.items() if where == file):
            end = at + math.prod(shapes[name]) * {"BF16": 2, "F32": 4}[dtype]
            header[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
