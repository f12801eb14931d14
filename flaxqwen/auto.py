"""AutoConfig and the AutoModel classes: from a name to a model, as in Transformers."""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from flaxqwen.config import PretrainedConfig, Qwen2AudioConfig, Qwen2Config, config_from_file, int_keys
from flaxqwen.convert import Checkpoint, Progress, has_own_head, load_params, open_checkpoint
from flaxqwen.convert.names import Path as ParamPath
from flaxqwen.convert.names import is_classifier, to_name
from flaxqwen.convert.quantize import SCALE, Scheme, quantized_shapes
from flaxqwen.generation.config import GenerationConfig
from flaxqwen.hub import resolve_folder
from flaxqwen.initialization import draw_params
from flaxqwen.layout import TOWER
from flaxqwen.loading import ShardReader
from flaxqwen.lora.config import CONFIG_FILE, LoraConfig
from flaxqwen.model import Model, Params
from flaxqwen.models.heads import (
    Qwen2ForQuestionAnswering,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
)
from flaxqwen.models.qwen2 import Qwen2ForCausalLM, Qwen2Model
from flaxqwen.models.qwen2_audio import Qwen2AudioForConditionalGeneration, Qwen2AudioModel
from flaxqwen.native import restore_native
from flaxqwen.ops.dispatch import choose_attention
from flaxqwen.quantization import quantization_of, quantize_params
from flaxqwen.sharding import Sharding, module_sharding

MeshAxes = Mapping[str, tuple[str, ...]]
AttentionNames = str | Mapping[str, str] | None

DTYPES: dict[str, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
# What Transformers loads a model_type with, where it is none of the classes below.
OTHER_CLASSES = {"qwen2_audio": "AutoModelForSeq2SeqLM"}
# Names of overrides that older configs have, and the field they are in today.
OLDER_FIELDS = {"rope_scaling": "rope_parameters", "rope_theta": "rope_parameters"}
# Arguments of Transformers that have another name here, because their values are others.
OTHER_NAMES = {"attn_implementation": "attention_implementation"}


class AutoConfig:
    """Reads the config.json of a folder or of a repository of the hub."""

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        dtype: Any = None,
        torch_dtype: Any = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> PretrainedConfig:
        """The config of the class that model_type names; overrides replace its fields, dtype as a model's does.

        Raises:
          FileNotFoundError: no such folder or repository.
          TypeError: an override that is no field of the config.
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
        if (wanted := parse_dtype(torch_dtype if dtype is None else dtype)) is not None:
            overrides["dtype"] = np.dtype(wanted).name
        return _override(config_from_file(folder), overrides)


class _AutoModel:
    """What the Auto classes share; `modules` maps a model_type to the Linen module."""

    modules: ClassVar[dict[str, type[nn.Module]]] = {}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: PretrainedConfig | str | os.PathLike[str] | None = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        mesh: Mesh | None = None,
        mesh_axes: MeshAxes | None = None,
        quantize: Scheme | None = None,
        attention_implementation: AttentionNames = None,
        **overrides: Any,
    ) -> Model:
        """Load a model in PyTorch's, Flax's or orbax's format, found by looking; orbax's in the class that it is of.

        Args:
          pretrained_model_name_or_path: a folder, or a hub id; of an adapter alone, the base that it names is loaded,
            and the adapter into it.
          config: in place of the folder's own; or the folder or the hub id of one.
          dtype: of the parameters: "float32", "bfloat16", "float16", or that of jax, numpy or torch; None or "auto":
            that of the config, or else that of the first tensor by name. torch_dtype is its older name.
          revision, token, cache_dir, local_files_only: of the hub, as in Transformers.
          mesh: of make_mesh: the devices that the model lies on, and runs on. Each process reads its own shards.
          mesh_axes: axes of the mesh, by logical axis, over sharding.LOGICAL_AXES.
          quantize: "int8" or "int4" quantizes the weights while they load (see convert/quantize.py); norms, biases
            and arithmetic keep dtype. A checkpoint that is quantized already stays so.
          attention_implementation: "xla"; "splash" and "paged" on TPUs, "cudnn", "tokamax" and "pallas" on GPUs,
            "native" and "blocks" on CPUs; or by kind of call, {"prefill": "cudnn"}; default: as ops/dispatch.py has it.
          overrides: fields of the config, such as num_labels=3; rope_parameters without rope_theta keeps the config's.

        Returns:
          The model. Its config is the one given, with the dtype of the parameters, and untied where the checkpoint has
          a head of its own. A classifier's head that is not in the checkpoint is drawn at random, with a warning.

        Raises:
          FileNotFoundError: no such folder or repository, or no weights in it.
          TypeError: an override that is no field of the config; a config of another library.
          ValueError: a config or a dtype or an attention that is not supported, before any weight is fetched; weights
            that do not fit the config (all that is wrong, in one error).
        """
        where: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = resolve_folder(pretrained_model_name_or_path, weights=False, revision=revision, **where)
        if (base := adapter_base(folder)) is not None:
            asked = {"config": config, "dtype": dtype, "torch_dtype": torch_dtype, "mesh": mesh, "mesh_axes": mesh_axes}
            asked |= {"quantize": quantize, "attention_implementation": attention_implementation}
            model = cls.from_pretrained(base, **asked, **where, **overrides)
            return model.load_adapter(pretrained_model_name_or_path, revision=revision, **where)
        if isinstance(config, str | os.PathLike):
            config = AutoConfig.from_pretrained(config, **where)
        elif config is not None:
            _check_is_config(config, "one of flaxqwen's, or the folder or the hub id of one")
        config = _override(config_from_file(folder) if config is None else config, overrides)
        wanted = parse_dtype(torch_dtype if dtype is None else dtype) or parse_dtype(config.dtype)
        module_of = partial(cls.module_of, mesh=mesh, mesh_axes=mesh_axes, attention=attention_implementation)
        module_of(config)
        scheme, config = quantization_of(folder, config, quantize)
        # A hub's folder is named by its commit: the weights are those that the config came with.
        folder = resolve_folder(pretrained_model_name_or_path, revision=folder.name, **where)
        with open_checkpoint(folder) as checkpoint:
            if checkpoint.format == "orbax" and scheme is not None:
                raise ValueError(f"{folder}: an orbax checkpoint is of plain weights: leave out quantize")
            wanted = wanted or _stored_dtype(checkpoint)
            config = dataclasses.replace(cls._untied(config, checkpoint), dtype=np.dtype(wanted).name)
            module = module_of(config, wanted)
            if scheme is not None:
                module = module.clone(dtype=wanted)
            if quantize is not None:
                checkpoint = checkpoint.quantized(quantize)
            params, new = _load(module, checkpoint, wanted, scheme)
        if new:
            warnings.warn(f"{folder} has no {', '.join(new)}: newly initialised, to be trained", stacklevel=2)
        return Model(module, params, config, _generation_config(folder, config))

    @classmethod
    def from_config(
        cls,
        config: PretrainedConfig,
        seed: int = 0,
        dtype: Any = None,
        mesh: Mesh | None = None,
        mesh_axes: MeshAxes | None = None,
        quantize: Scheme | None = None,
        attention_implementation: AttentionNames = None,
        torch_dtype: Any = None,
    ) -> Model:
        """A model with random weights, drawn as Transformers draws them.

        Args:
          config: of one of our models.
          seed: of the draws; one seed gives the same weights on every device, and on every mesh.
          dtype: of the parameters, as in from_pretrained; default: that of the config, or else float32. torch_dtype is
            its older name.
          mesh, mesh_axes: as in from_pretrained.
          quantize, attention_implementation: as in from_pretrained.

        Raises:
          TypeError: a config of another library.
          ValueError: a model_type, a dtype or an attention that is not supported.
        """
        _check_is_config(config, "one of flaxqwen's, as AutoConfig.from_pretrained(...) gives it")
        wanted = parse_dtype(torch_dtype if dtype is None else dtype) or parse_dtype(config.dtype) or jnp.float32
        config = dataclasses.replace(config, dtype=np.dtype(wanted).name)
        scheme, config = quantization_of(None, config, quantize)
        module = cls.module_of(config, wanted, mesh, mesh_axes, attention_implementation)
        params = draw_params(param_shapes(module), config, seed, wanted, module_sharding(module))
        if scheme is not None:
            module = module.clone(dtype=wanted)
            params = quantize_params(params, scheme, module_sharding(module))
        return Model(module, params, config, GenerationConfig.from_model_config(config))

    @classmethod
    def module_of(
        cls,
        config: PretrainedConfig,
        param_dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
        mesh_axes: MeshAxes | None = None,
        attention: AttentionNames = None,
    ) -> nn.Module:
        """The Linen module for a config; on a mesh, its own config has the heads that fit there.

        Raises:
          TypeError: what is no mesh.
          ValueError: a model_type that this class does not load; an attention that is not for the devices; mesh_axes
            without a mesh.
        """
        if not isinstance(mesh, Mesh | None):
            raise TypeError(f"mesh is a {type(mesh).__name__}; expected a jax.sharding.Mesh, as of make_mesh(...)")
        if mesh is None and mesh_axes is not None:
            raise ValueError("mesh_axes says which axes of a mesh the model lies on: give the mesh too")
        kind = config.model_type
        if kind not in cls.modules:
            known = ", ".join(map(repr, cls.modules))
            other = f": it is for {OTHER_CLASSES[kind]}" if kind in OTHER_CLASSES else ""
            raise ValueError(f"{cls.__name__} does not load model_type {kind!r}{other}; it loads {known}")
        chosen = choose_attention(attention, _platform(mesh))
        if mesh is None:
            return cls.modules[kind](config, param_dtype=param_dtype, attention=chosen)
        assert isinstance(config, Qwen2Config | Qwen2AudioConfig)
        sharding = Sharding.fit(mesh, config, mesh_axes)
        laid = sharding.heads.replace_in(config)
        return cls.modules[kind](laid, param_dtype=param_dtype, sharding=sharding, attention=chosen)

    @classmethod
    def _untied(cls, config: PretrainedConfig, checkpoint: Checkpoint) -> PretrainedConfig:
        """A head in the checkpoint that differs from the embedding counts, whatever the config says."""
        if not isinstance(config, Qwen2Config) or cls.modules[config.model_type] is not Qwen2ForCausalLM:
            return config
        is_tied = config.tie_word_embeddings and not has_own_head(checkpoint)
        return dataclasses.replace(config, tie_word_embeddings=is_tied)


class AutoModel(_AutoModel):
    """The model without a head."""

    modules: ClassVar = {"qwen2": Qwen2Model, "qwen2_audio": Qwen2AudioModel}


class AutoModelForCausalLM(_AutoModel):
    """With a language-model head."""

    modules: ClassVar = {"qwen2": Qwen2ForCausalLM}


class AutoModelForSeq2SeqLM(_AutoModel):
    """Qwen2-Audio with a language-model head, by the class under which Transformers loads it."""

    modules: ClassVar = {"qwen2_audio": Qwen2AudioForConditionalGeneration}


class AutoModelForMultimodalLM(AutoModelForSeq2SeqLM):
    """The same, by its newer name in Transformers."""


class AutoModelForSequenceClassification(_AutoModel):
    """With a head that labels the row."""

    modules: ClassVar = {"qwen2": Qwen2ForSequenceClassification}


class AutoModelForTokenClassification(_AutoModel):
    """With a head that labels each token."""

    modules: ClassVar = {"qwen2": Qwen2ForTokenClassification}


class AutoModelForQuestionAnswering(_AutoModel):
    """With a head that finds the span of the answer."""

    modules: ClassVar = {"qwen2": Qwen2ForQuestionAnswering}


def language_model_class(config: PretrainedConfig) -> type[_AutoModel]:
    """The class that loads a model of this config with a language-model head."""
    return AutoModelForSeq2SeqLM if isinstance(config, Qwen2AudioConfig) else AutoModelForCausalLM


def _platform(mesh: Mesh | None) -> str:
    """Of the devices that a model lies on: those of a mesh, or jax's default one."""
    settings: Any = jax.config
    device = settings.jax_default_device if mesh is None else mesh.devices.flat[0]
    return jax.default_backend() if device is None else getattr(device, "platform", device)


def adapter_base(folder: Path) -> str | None:
    """The base model that a folder of peft's, which holds an adapter alone, names; None for any other folder.

    Raises:
      ValueError: it names none, or another adapter.
    """
    if not _is_adapter(folder):
        return None
    path = folder / CONFIG_FILE
    if (base := LoraConfig.from_file(folder).notes.get("base_model_name_or_path")) is None:
        raise ValueError(f"{path}: no base_model_name_or_path: load the base, and load_adapter this")
    if not isinstance(base, str) or _is_adapter(Path(base)):
        raise ValueError(f"{path}: base_model_name_or_path is {base!r}; expected the name of a model")
    return base


def _is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def parse_dtype(dtype: Any) -> Any:
    """A dtype of jax by any of its names, torch's included; None for None and "auto".

    Raises:
      ValueError: one that weights cannot have here.
    """
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return None
    name = getattr(dtype, "__name__", str(dtype)).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not supported for weights; expected one of {', '.join(DTYPES)}, or 'auto'")
    return DTYPES[name]


def param_shapes(module: nn.Module) -> dict[ParamPath, tuple[int, ...]]:
    """The shape of every parameter by its path; nothing is allocated or computed.

    Layers of a stack have the same shapes: only the first is traced, which takes 0.02 s, and 80 take 2 s.
    """
    config: Any = module.config
    counts = {False: config.get_text_config().num_hidden_layers}
    if isinstance(config, Qwen2AudioConfig):
        counts[True] = config.audio_config.encoder_layers
        tower = dataclasses.replace(config.audio_config, encoder_layers=1)
        one = dataclasses.replace(config, text_config=config.text_config.first_layers(1), audio_config=tower)
    else:
        one = config.first_layers(1)
    tree = _init_params.eval_shape(module.clone(config=one), np.zeros((1, 1), np.int32))
    shapes = {}
    for path, leaf in flax.traverse_util.flatten_dict(tree).items():
        for i in range(counts[TOWER in path] if "layers_0" in path else 1):
            shapes[tuple(f"layers_{i}" if key == "layers_0" else key for key in path)] = leaf.shape
    return dict(sorted(shapes.items()))


@partial(jax.jit, static_argnums=0)  # of which eval_shape traces a module once
def _init_params(module: nn.Module, input_ids: np.ndarray) -> Params:
    """What module.init draws. The key is made in here: outside, it would be a program of its own to compile."""
    params: Params = module.init(jax.random.key(0), input_ids)["params"]
    return params


def _load(
    module: Any, checkpoint: Checkpoint, dtype: DTypeLike, scheme: Scheme | None = None
) -> tuple[Params, list[str]]:
    """The module's parameters from a checkpoint, and the names of those of a new head, where it has none."""
    shapes, sharding = param_shapes(module), module_sharding(module)
    if checkpoint.format == "orbax":
        return restore_native(checkpoint.path, shapes, np.dtype(dtype), sharding), []
    shapes = shapes if sharding is None else sharding.stored_shapes(shapes)
    if scheme is not None:
        shapes = quantized_shapes(shapes, scheme)
    stored = {name.split(".")[0] for name in checkpoint.tensors}
    # A classifier's head is put on a pretrained decoder: missing from its checkpoint, it is drawn, with a warning.
    head = {path: shape for path, shape in shapes.items() if is_classifier(path[0]) and path[0] not in stored}
    body = {path: shape for path, shape in shapes.items() if path not in head}
    with Progress("Loading") if sys.stderr.isatty() else nullcontext() as report:
        load: Callable[..., Params] = partial(load_params, dtype=np.dtype(dtype), put=jax.device_put, progress=report)
        if sharding is not None:
            load = partial(ShardReader(sharding, np.dtype(dtype)).load, progress=report)
        if not head:
            return load(checkpoint, body), []
        # A new head goes on a bare decoder, which leaves the head that the checkpoint may have.
        name = next(iter(body))[0]
        params = {name: load(checkpoint, {path[1:]: shape for path, shape in body.items()})}
    return params | draw_params(head, module.config, 0, dtype, sharding), sorted(map(to_name, head))


def _stored_dtype(checkpoint: Checkpoint) -> Any:
    """That of the first tensor, by name, that has one of ours: as `_get_dtype` in transformers/modeling_utils.py."""
    stored = sorted(checkpoint.tensors.items())
    names = (tensor.dtype.name for name, tensor in stored if not name.endswith(SCALE))
    return DTYPES[next((name for name in names if name in DTYPES), "float32")]


def _check_is_config(config: Any, expected: str) -> None:
    if not isinstance(config, PretrainedConfig):
        raise TypeError(f"config is a {type(config).__module__}.{type(config).__qualname__}; expected {expected}")


def _override(config: PretrainedConfig, overrides: dict[str, Any]) -> PretrainedConfig:
    """The config with some fields replaced; TypeError for names that are no fields."""
    names = [field.name for field in dataclasses.fields(config) if field.name != "extra"]
    for name in overrides:
        if name not in names:
            renamed = OLDER_FIELDS | OTHER_NAMES
            near = [renamed[name]] if name in renamed else difflib.get_close_matches(name, names, n=1)
            raise TypeError(f"unknown argument {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    rope = overrides.get("rope_parameters")
    if isinstance(config, Qwen2Config) and isinstance(rope, Mapping):
        overrides = {**overrides, "rope_parameters": {"rope_theta": config.rope_parameters.rope_theta, **rope}}
    if isinstance(labels := overrides.get("id2label"), Mapping):  # as config.json has them, or as Python has
        overrides = {**overrides, "id2label": int_keys(labels)}
    return dataclasses.replace(config, **overrides) if overrides else config


def _generation_config(folder: Path, config: PretrainedConfig) -> GenerationConfig:
    path = folder / "generation_config.json"
    return GenerationConfig.from_json_file(path) if path.is_file() else GenerationConfig.from_model_config(config)
