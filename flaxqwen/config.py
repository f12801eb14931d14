"""Model configurations, read from config.json and written back to it.

Frozen and hashable, so that a config can be a field of a Linen module and a static argument of jit. Names, defaults and
what follows from what are those of Transformers 5 (configuration_utils.py, modeling_rope_utils.py and each model's
configuration_*.py); the files of older versions are read too. What our models would not honour is refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from flaxqwen.config_values import (
    DerivedInt,
    DerivedTuple,
    FrozenMapping,
    assign,
    check_at_least,
    check_at_most,
    check_known,
    check_probability,
    errors_of,
    freeze_fields,
    merge,
    show,
    thaw,
)
from flaxqwen.files import replacing
from flaxqwen.rope_config import ROPE_PARAMETERS, RopeParameters

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "tanh", "sigmoid")
DTYPES = ("float32", "float16", "bfloat16")
LAYER_TYPES = ("full_attention", "sliding_attention")
# More than any model has, and less than what takes minutes to lay out.
MOST_LAYERS, LARGEST_SIZE = 4096, 2**24
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# Keys beside our fields that change what a model computes, with the values that leave it as it is here.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_mrope": (False, None),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "per_layer_config": (None,),
    "tie_last_hidden_states": (True, None),
    "token_classification_bias": (True,),
}

_DERIVED_INT, _DERIVED_TUPLE = DerivedInt(), DerivedTuple()


@dataclass(frozen=True, kw_only=True)
class PretrainedConfig:
    """What the configs of all models share (PreTrainedConfig in transformers/configuration_utils.py).

    num_labels, id2label: either is enough; by default two labels, LABEL_0 and LABEL_1.
    extra: the keys of config.json that no field holds, unchanged; `to_dict` gives them back.
    """

    model_type: ClassVar[str] = ""
    _older_names: ClassVar[dict[str, str]] = {"torch_dtype": "dtype"}
    # Null is the same as absent for these keys, and their default is not written: as in Transformers' own files.
    _optional: ClassVar[frozenset[str]] = frozenset(
        {"architectures", "dtype", "output_attentions", "output_hidden_states"}
        | {"num_labels", "id2label", "label2id", "problem_type"}
    )

    architectures: tuple[str, ...] | None = None
    dtype: str | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    num_labels: int = _DERIVED_INT
    id2label: Mapping[int, str] = field(default_factory=FrozenMapping)
    label2id: Mapping[str, int] | None = None
    problem_type: str | None = None
    extra: Mapping[str, Any] = field(default_factory=FrozenMapping)

    def __post_init__(self) -> None:
        freeze_fields(self)
        self._derive_labels()
        if self.dtype is not None:
            check_known("dtype", self.dtype, DTYPES)
        if self.problem_type is not None:
            check_known("problem_type", self.problem_type, PROBLEM_TYPES)
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError("problem_type 'single_label_classification' needs 2 labels or more; num_labels is 1")
        for name, neutral in _NEUTRAL.items():
            if name in self.extra and self.extra[name] not in neutral:
                raise ValueError(f"{name} is {show(self.extra[name])}, which is not supported; expected {neutral[0]}")

    def _derive_labels(self) -> None:
        """num_labels from id2label; or, where the labels have no names of their own, id2label from num_labels."""
        if isinstance(self.num_labels, DerivedInt):
            assign(self, num_labels=DerivedInt(len(self.id2label) or 2))
        check_at_least(1, self, "num_labels")
        if len(self.id2label) == self.num_labels:
            return
        for name, given in (("id2label", tuple(self.id2label.values())), ("label2id", tuple(self.label2id or ()))):
            if set(given) != set(_unnamed_labels(len(given)).values()):
                raise ValueError(f"num_labels is {self.num_labels}, but {name} has {show(given)}: give one of them")
        labels = _unnamed_labels(self.num_labels)
        assign(self, id2label=FrozenMapping(labels), label2id=FrozenMapping(_inverse(labels)))

    @property
    def quantization_config(self) -> Mapping[str, Any] | None:
        """How the checkpoint's weights are quantized, as config.json says it; None where they are not."""
        found = self.extra.get("quantization_config")
        if found is not None and not (isinstance(found, Mapping) and isinstance(found.get("quant_method", ""), str)):
            raise ValueError(f"quantization_config is {show(found)}, expected an object with a quant_method")
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read the object of a config.json, of Transformers 5 or older.

        Raises:
          ValueError: another model_type; a value of another JSON type, out of range, or not supported; an older and a
            newer name of the same thing that disagree.
        """
        if (model_type := values.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(f"model_type is {show(model_type)}, expected {cls.model_type!r}")
        values = cls._modernise({key: value for key, value in values.items() if key != "model_type"})
        names = {f.name for f in fields(cls)} - {"extra"}
        given = {k: v for k, v in values.items() if k in names and not (v is None and k in cls._optional)}
        if isinstance(labels := given.get("id2label"), Mapping):
            given["id2label"] = int_keys(labels)
        return cls(**given, extra={key: value for key, value in values.items() if key not in given})

    @classmethod
    def _modernise(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Older names of keys -> the newer ones; nulls that mean the default are dropped."""
        for older, newer in cls._older_names.items():
            if (value := values.pop(older, None)) is not None:
                merge(values, newer, value, older)
        return {k: v for k, v in values.items() if not (v is None and k in PretrainedConfig._optional)}

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> Self:
        """Read a config.json.

        Raises:
          FileNotFoundError: no such file.
          ValueError: not a JSON object, or as `from_dict`.
        """
        with errors_of(path):
            return cls.from_dict(_read_object(path))

    def to_dict(self) -> dict[str, Any]:
        """The object of config.json in the form of Transformers 5; `from_dict` reads it to an equal config."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        optional = self._optional | {"return_dict"}
        unwritten = {f.name for f in fields(self) if f.name in optional and values[f.name] == f.default}
        unwritten |= {name for name, value in values.items() if isinstance(value, DerivedInt)}
        unwritten |= {"extra", "num_labels"}  # num_labels is the length of id2label
        labels = _unnamed_labels(2)
        if self.id2label == labels and self.label2id == _inverse(labels):
            unwritten |= {"id2label", "label2id"}
        written = {name: thaw(value) for name, value in values.items() if name not in unwritten}
        return {"model_type": self.model_type, **thaw(self.extra), **written}

    def to_json_string(self) -> str:
        """The text of config.json."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json into `folder`, made if need be. The file appears whole or not at all."""
        with replacing(Path(folder, "config.json")) as path:
            path.write_text(self.to_json_string(), encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(PretrainedConfig):
    """Qwen2 and Qwen2.5 (transformers/models/qwen2/configuration_qwen2.py).

    head_dim and layer_types follow from the other fields unless given, also through `dataclasses.replace`; so do
    layer_types that were given just as they would follow, as newer files do.
    """

    model_type: ClassVar[str] = "qwen2"
    # Transformers has no such attributes unless config.json does: a null goes to `extra`, and back.
    _optional: ClassVar[frozenset[str]] = PretrainedConfig._optional | {
        "head_dim",
        "classifier_dropout",
        "hidden_dropout",
    }

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = _DERIVED_INT
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters = field(default_factory=RopeParameters)
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: tuple[str, ...] = _DERIVED_TUPLE
    attention_dropout: float = 0.0
    classifier_dropout: float | None = None
    hidden_dropout: float | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rope_parameters, Mapping | None):
            assign(self, rope_parameters=RopeParameters.from_dict(self.rope_parameters or {}))
        if self.num_key_value_heads is None:
            assign(self, num_key_value_heads=self.num_attention_heads)
        if self.layer_types is None:
            assign(self, layer_types=DerivedTuple())
        super().__post_init__()
        check_at_least(1, self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        check_at_least(1, self, "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
        check_at_most(MOST_LAYERS, self, "num_hidden_layers")
        check_at_most(LARGEST_SIZE, self, "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
        check_at_most(2**31 - 1, self, "max_position_embeddings", "max_window_layers")
        check_at_least(0, self, "max_window_layers", "initializer_range", "rms_norm_eps")
        check_probability(self, "attention_dropout", "classifier_dropout", "hidden_dropout")
        check_known("hidden_act", self.hidden_act, ACTIVATIONS)
        self._derive_heads()
        self._derive_layer_types()
        self._complete_rope()
        self._dual_chunk_length()

    def _derive_heads(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads, {heads}, is not a multiple of num_key_value_heads, {kv_heads}")
        if isinstance(self.head_dim, DerivedInt):
            if self.hidden_size % heads:
                raise ValueError(f"hidden_size, {self.hidden_size}, is not a multiple of num_attention_heads, {heads}")
            assign(self, head_dim=DerivedInt(self.hidden_size // heads))
        check_at_most(LARGEST_SIZE, self, "head_dim")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embedding needs an even number, 2 or more")

    def _derive_layer_types(self) -> None:
        """Layers from max_window_layers on slide, where there is a window."""
        if not self.use_sliding_window:
            assign(self, sliding_window=None)
        if self.sliding_window is not None:
            check_at_least(1, self, "sliding_window")
        first = self.num_hidden_layers if self.sliding_window is None else self.max_window_layers
        derived = DerivedTuple(LAYER_TYPES[i >= first] for i in range(self.num_hidden_layers))
        if isinstance(self.layer_types, DerivedTuple) or self.layer_types == derived:
            assign(self, layer_types=derived)
        for name in self.layer_types:
            check_known("layer_types", name, LAYER_TYPES)
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries, but num_hidden_layers is {self.num_hidden_layers}"
            )
        if self.sliding_window is None and "sliding_attention" in self.layer_types:
            raise ValueError(
                "layer_types has 'sliding_attention', which needs use_sliding_window true and a sliding_window; "
                f"found {self.use_sliding_window} and {self.sliding_window}"
            )

    def _complete_rope(self) -> None:
        """The trained length defaults to max_position_embeddings; the factors of longrope must fit head_dim."""
        rope = self.rope_parameters
        if "original_max_position_embeddings" in ROPE_PARAMETERS[rope.rope_type][1]:
            if rope.original_max_position_embeddings is None:
                rope = dataclasses.replace(rope, original_max_position_embeddings=self.max_position_embeddings)
                assign(self, rope_parameters=rope)
            # Phi-3's files hold this key outside; Transformers lets it win, but only once the model is built.
            outside = self.extra.get("original_max_position_embeddings")
            if outside not in (None, rope.original_max_position_embeddings):
                raise ValueError(f"original_max_position_embeddings, {show(outside)}, belongs in rope_parameters")
        for name in ("short_factor", "long_factor"):
            factors = getattr(rope, name)
            if factors is not None and (len(factors) != self.head_dim // 2 or min(factors) <= 0):
                raise ValueError(
                    f"rope_parameters: {name} is {show(factors)}, {len(factors)} numbers; expected "
                    f"{self.head_dim // 2} (head_dim / 2), each more than 0"
                )

    def _dual_chunk_length(self) -> int | None:
        """Tokens after which the checkpoint's own recipe goes over to dual chunk attention; None: never."""
        dual_chunk = self.extra.get("dual_chunk_attention_config")
        if dual_chunk is None:
            return None
        length = dual_chunk.get("original_max_position_embeddings") if isinstance(dual_chunk, Mapping) else None
        if not isinstance(length, int) or length < 1:
            raise ValueError(
                "dual_chunk_attention_config needs original_max_position_embeddings, an integer, 1 or more; "
                f"found {show(dual_chunk)}"
            )
        return length

    def get_text_config(self) -> Qwen2Config:
        """The config of the decoder: itself."""
        return self

    def first_layers(self, count: int) -> Qwen2Config:
        """The config of a model of so many of its layers."""
        return dataclasses.replace(self, num_hidden_layers=count, layer_types=self.layer_types[:count])

    @property
    def context_length(self) -> int:
        """The longest context, in tokens, that our attention is right for.

        max_position_embeddings, or more where the rope is scaled to it (YaRN as in Qwen2.5's model cards), or less
        where dual chunk attention, which is not supported, takes over (Qwen2.5-1M).
        """
        length, rope = self.max_position_embeddings, self.rope_parameters
        if rope.factor is not None and rope.rope_type in ("linear", "dynamic", "yarn"):
            length = max(length, int(rope.factor * (rope.original_max_position_embeddings or length)))
        return min(length, self._dual_chunk_length() or length)

    @property
    def head_dropout(self) -> float:
        """Dropout before the token classifier (GenericForTokenClassification in transformers/modeling_layers.py)."""
        if self.classifier_dropout is not None:
            return self.classifier_dropout
        return 0.1 if self.hidden_dropout is None else self.hidden_dropout

    @classmethod
    def _modernise(cls, values: dict[str, Any]) -> dict[str, Any]:
        """rope_scaling, and rope_theta and partial_rotary_factor outside it -> rope_parameters."""
        values = super()._modernise(values)
        if (older := values.pop("rope_scaling", None)) not in (None, {}):
            merge(values, "rope_parameters", older, "rope_scaling")
        rope = values.get("rope_parameters")
        if not isinstance(rope, Mapping | None):
            raise ValueError(f"rope_parameters (or rope_scaling) is {show(rope)}, expected an object or null")
        rope = dict(rope or {})
        default = rope.get("rope_theta", RopeParameters.rope_theta)
        merge(rope, "rope_theta", values.pop("rope_theta", default), "rope_theta outside rope_parameters")
        if (partial := values.pop("partial_rotary_factor", None)) is not None:
            merge(rope, "partial_rotary_factor", partial, "partial_rotary_factor outside rope_parameters")
        return {**values, "rope_parameters": rope}


@dataclass(frozen=True, kw_only=True)
class Qwen2AudioEncoderConfig(PretrainedConfig):
    """The audio tower of Qwen2-Audio (transformers/models/qwen2_audio/configuration_qwen2_audio.py)."""

    model_type: ClassVar[str] = "qwen2_audio_encoder"
    _older_names: ClassVar[dict[str, str]] = {
        **PretrainedConfig._older_names,
        "num_hidden_layers": "encoder_layers",
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "intermediate_size": "encoder_ffn_dim",
    }

    num_mel_bins: int = 128
    encoder_layers: int = 32
    encoder_attention_heads: int = 20
    encoder_ffn_dim: int = 5120
    encoder_layerdrop: float = 0.0
    d_model: int = 1280
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_function: str = "gelu"
    activation_dropout: float = 0.0
    scale_embedding: bool = False
    initializer_range: float = 0.02
    max_source_positions: int = 1500

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "num_mel_bins", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim")
        check_at_least(1, self, "d_model", "max_source_positions")
        check_at_most(MOST_LAYERS, self, "encoder_layers")
        check_at_most(LARGEST_SIZE, self, "num_mel_bins", "encoder_ffn_dim", "d_model", "max_source_positions")
        check_at_least(0, self, "initializer_range")
        check_probability(self, "encoder_layerdrop", "dropout", "attention_dropout", "activation_dropout")
        check_known("activation_function", self.activation_function, ACTIVATIONS)
        if self.d_model % (heads := self.encoder_attention_heads):
            raise ValueError(f"d_model, {self.d_model}, is not a multiple of encoder_attention_heads, {heads}")


@dataclass(frozen=True, kw_only=True)
class Qwen2AudioConfig(PretrainedConfig):
    """Qwen2-Audio (transformers/models/qwen2_audio/configuration_qwen2_audio.py).

    The published file is sparse: hidden size, layers and heads of its text_config are the defaults of Qwen2Config.
    """

    model_type: ClassVar[str] = "qwen2_audio"
    _older_names: ClassVar[dict[str, str]] = {**PretrainedConfig._older_names, "audio_token_id": "audio_token_index"}

    audio_config: Qwen2AudioEncoderConfig = field(default_factory=Qwen2AudioEncoderConfig)
    text_config: Qwen2Config = field(default_factory=Qwen2Config)
    audio_token_index: int = 151646

    def __post_init__(self) -> None:
        parts: dict[str, type[PretrainedConfig]] = {"audio_config": Qwen2AudioEncoderConfig, "text_config": Qwen2Config}
        for name, kind in parts.items():
            value = getattr(self, name)
            if isinstance(value, Mapping | None):
                with errors_of(name):
                    assign(self, **{name: kind.from_dict(value or {})})
        super().__post_init__()
        check_at_least(0, self, "audio_token_index")

    def get_text_config(self) -> Qwen2Config:
        """The config of the decoder."""
        return self.text_config


_CONFIGS: dict[str, type[PretrainedConfig]] = {
    kind.model_type: kind for kind in (Qwen2Config, Qwen2AudioConfig, Qwen2AudioEncoderConfig)
}


def int_keys(labels: Mapping[Any, str]) -> dict[Any, str]:
    """Labels by integers, which are strings in JSON; other keys stay, to be refused."""
    return {int(key) if str(key).isdecimal() else key: label for key, label in labels.items()}


def config_from_dict(values: Mapping[str, Any]) -> PretrainedConfig:
    """Read the object of a config.json into the config of its model_type.

    Raises:
      ValueError: a model_type that is missing or not supported, or as `PretrainedConfig.from_dict`.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in _CONFIGS:
        raise ValueError(f"model_type is {show(model_type)}; supported: {', '.join(_CONFIGS)}")
    return _CONFIGS[model_type].from_dict(values)


def config_from_file(path: str | os.PathLike[str]) -> PretrainedConfig:
    """Read a config.json, or the one in a folder, into the config of its model_type.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a JSON object, or as `config_from_dict`.
    """
    path = Path(path, "config.json") if os.path.isdir(path) else path
    with errors_of(path):
        return config_from_dict(_read_object(path))


def _read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    text = Path(path).read_bytes()
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, found {show(values)}")
    return values


def _unnamed_labels(count: int) -> dict[int, str]:
    return {index: f"LABEL_{index}" for index in range(count)}


def _inverse(labels: Mapping[int, str]) -> dict[str, int]:
    return {label: index for index, label in labels.items()}
