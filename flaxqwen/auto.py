"""AutoConfig and the AutoModel classes: from a name to a model, as in Transformers."""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flaxqwen.config import PretrainedConfig, Qwen2Config, config_from_file
from flaxqwen.convert import Checkpoint, Progress, has_own_head, load_params, open_checkpoint
from flaxqwen.convert.names import Path as ParamPath
from flaxqwen.convert.names import base_prefix, to_name
from flaxqwen.generation.config import GenerationConfig
from flaxqwen.hub import resolve_folder
from flaxqwen.model import Model, Params
from flaxqwen.models.heads import (
    Qwen2ForQuestionAnswering,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
)
from flaxqwen.models.qwen2 import Qwen2ForCausalLM, Qwen2Model

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
# Heads that are put on a pretrained decoder: missing from its checkpoint, they are drawn at random, with a warning.
NEW_HEADS = ("score", "qa_outputs")


class AutoConfig:
    """Reads the config.json of a folder or of a repository of the hub."""

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> PretrainedConfig:
        """The config of the class that model_type names; overrides replace its fields.

        Raises:
          FileNotFoundError: no such folder or repository.
          ValueError: a config that is not supported.
        """
        folder = resolve_folder(
            pretrained_model_name_or_path,
            weights=False,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        return _override(config_from_file(folder), overrides)


class _AutoModel:
    """What the Auto classes share; `modules` maps a model_type to the Linen module."""

    modules: ClassVar[dict[str, type[nn.Module]]] = {}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: PretrainedConfig | None = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> Model:
        """Load a model in PyTorch's or Flax's format, found by looking.

        Args:
          pretrained_model_name_or_path: a folder, or a hub id.
          config: in place of the folder's own.
          dtype: "float32", "bfloat16", "float16", or that of jax, numpy or torch; None or "auto": that of config.json,
            or else as stored. torch_dtype is its older name.
          revision, token, cache_dir, local_files_only: of the hub, as in Transformers.
          overrides: fields of the config, such as num_labels=3.

        Raises:
          FileNotFoundError: no such folder or repository, or no weights in it.
          ValueError: a config that is not supported, or weights that do not fit it (all that is wrong, in one error).
        """
        folder = resolve_folder(
            pretrained_model_name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        config = _override(config or config_from_file(folder), overrides)
        if config.quantization_config is not None:
            method = config.quantization_config.get("quant_method", "unknown")
            raise ValueError(f"{folder}: weights quantized by {method!r} are not supported; use the unquantized model")
        wanted = parse_dtype(torch_dtype if dtype is None else dtype) or parse_dtype(config.dtype)
        with open_checkpoint(folder) as checkpoint:
            config = _untie(config, checkpoint)
            module = cls.module_of(config)
            params = _load(module, checkpoint, wanted)
        return Model(module, params, config, _generation_config(folder, config))

    @classmethod
    def from_config(cls, config: PretrainedConfig, seed: int = 0, dtype: Any = None) -> Model:
        """A model with random weights, drawn as Transformers draws them; dtype: default float32."""
        module = cls.module_of(config, parse_dtype(dtype) or jnp.float32)
        params = _draw(module, jax.random.key(seed))
        return Model(module, params, config, GenerationConfig.from_model_config(config))

    @classmethod
    def module_of(cls, config: PretrainedConfig, param_dtype: Any = jnp.float32) -> nn.Module:
        """The Linen module for a config."""
        if config.model_type not in cls.modules:
            raise ValueError(f"{cls.__name__} has no {config.model_type!r}; it has {', '.join(map(repr, cls.modules))}")
        return cls.modules[config.model_type](config, param_dtype=param_dtype)


class AutoModel(_AutoModel):
    """The decoder without a head."""

    modules: ClassVar = {"qwen2": Qwen2Model}


class AutoModelForCausalLM(_AutoModel):
    """With a language-model head."""

    modules: ClassVar = {"qwen2": Qwen2ForCausalLM}


class AutoModelForSequenceClassification(_AutoModel):
    """With a head that labels the row."""

    modules: ClassVar = {"qwen2": Qwen2ForSequenceClassification}


class AutoModelForTokenClassification(_AutoModel):
    """With a head that labels each token."""

    modules: ClassVar = {"qwen2": Qwen2ForTokenClassification}


class AutoModelForQuestionAnswering(_AutoModel):
    """With a head that finds the span of the answer."""

    modules: ClassVar = {"qwen2": Qwen2ForQuestionAnswering}


def parse_dtype(dtype: Any) -> Any:
    """A dtype by any of its names, torch's included; None for None and "auto".

    Raises:
      ValueError: one that weights cannot have here.
    """
    if dtype is None or dtype == "auto":
        return None
    text = str(dtype).removeprefix("torch.")
    name = text if text in DTYPES else getattr(dtype, "__name__", text)
    if name not in DTYPES and isinstance(dtype, np.dtype):
        name = dtype.name
    if name not in DTYPES:
        raise ValueError(f"dtype {text!r} is not supported for weights; expected one of {', '.join(DTYPES)}, or 'auto'")
    return DTYPES[name]


def param_shapes(module: nn.Module) -> dict[ParamPath, tuple[int, ...]]:
    """The shape of every parameter by its path; nothing is allocated or computed."""
    tree = jax.eval_shape(module.init, jax.random.key(0), _dummy_ids())["params"]
    return {tuple(k.key for k in path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}


def _dummy_ids() -> np.ndarray:
    return np.zeros((1, 1), np.int32)


def _load(module: nn.Module, checkpoint: Checkpoint, dtype: Any) -> Params:
    """The module's parameters from a checkpoint, with a new head where it has none."""
    shapes = param_shapes(module)
    stored = {name.split(".")[0] for name in checkpoint.tensors}
    new = {path[0] for path in shapes if path[0] in NEW_HEADS} - stored
    expected = {path: shape for path, shape in shapes.items() if path[0] not in new}
    with Progress("Loading") if sys.stderr.isatty() else nullcontext() as report:
        params = load_params(checkpoint, expected, dtype, jax.device_put, report)
    if new:
        names = ", ".join(sorted(to_name(path) for path in shapes if path[0] in new))
        warnings.warn(f"{checkpoint.path} has no {names}: newly initialised, to be trained", stacklevel=4)
        drawn = _draw(module, jax.random.key(0), tuple(sorted(new)))
        params |= jax.tree.map(lambda a: a.astype(jax.tree.leaves(params)[0].dtype), drawn)
    return params


@partial(jax.jit, static_argnames=("module", "parts"))
def _draw(module: nn.Module, key: jax.Array, parts: tuple[str, ...] | None = None) -> Params:
    """Random parameters: all, or only some of the top modules (XLA drops what the others would take)."""
    params = module.init(key, _dummy_ids())["params"]
    return params if parts is None else {part: params[part] for part in parts}


def _untie(config: PretrainedConfig, checkpoint: Checkpoint) -> PretrainedConfig:
    """A head in the checkpoint that differs from the embedding counts, whatever the config says, as in Transformers."""
    tied = isinstance(config, Qwen2Config) and config.tie_word_embeddings
    if tied and base_prefix(checkpoint.tensors) and has_own_head(checkpoint):
        return dataclasses.replace(config, tie_word_embeddings=False)
    return config


def _override(config: PretrainedConfig, overrides: dict[str, Any]) -> PretrainedConfig:
    """The config with some fields replaced; TypeError for names that are no fields."""
    names = [f.name for f in dataclasses.fields(config)]
    for name in overrides:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise TypeError(f"unknown argument {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return dataclasses.replace(config, **overrides) if overrides else config


def _generation_config(folder: Path, config: PretrainedConfig) -> GenerationConfig:
    path = folder / "generation_config.json"
    return GenerationConfig.from_json_file(path) if path.is_file() else GenerationConfig.from_model_config(config)
