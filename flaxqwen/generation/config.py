"""Generation options: Transformers' GenerationConfig as a frozen dataclass, and the options that one call runs with.

`GenerationConfig` holds what somebody set, None elsewhere. `resolve` lays a call's keywords over its config, over the
model's config, over the global defaults, and gives a `ResolvedConfig`: plain numbers, ready for the compiled loop.
"""

from __future__ import annotations

import difflib
import json
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from flaxqwen.config_values import FrozenMapping, assign, errors_of, freeze_fields, thaw
from flaxqwen.files import replacing

FILE_NAME = "generation_config.json"
DEFAULT_NEW_TOKENS = 20  # where nobody set a length

# Options that will not be: the values which leave them without effect, and why; any other value is refused by name.
_HUB = "Transformers moved it out to code on the hub"
_TORCH = "it is about torch.compile, and generation here is always compiled by XLA"
_ON_DEVICE = (None, "dynamic", "static", "quantized", "sliding_window", "hybrid", "hybrid_chunked")
NOT_SUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "cache_implementation": (
        _ON_DEVICE,
        "the cache stays on the device: cache_dtype='int8' halves it, and a mesh divides it",
    ),
    "cache_config": ((None,), "a quantised cache has one form here, that of cache_dtype='int8'"),
    "is_assistant": ((None, False), "Transformers sets it within assisted decoding: give an assistant_model"),
    "speculation_type": ((None,), "it is about DFlash drafts, which no Qwen2 comes with: give an assistant_model"),
    "low_memory": ((None, False), _HUB),
    "penalty_alpha": ((None, 0.0), _HUB),
    "dola_layers": ((None,), _HUB),
    "diversity_penalty": ((0.0,), _HUB),
    "num_beam_groups": ((1,), _HUB),
    "constraints": ((None,), _HUB),
    "force_words_ids": ((None,), _HUB),
    "compile_config": ((None,), _TORCH),
    "disable_compile": ((None, False), _TORCH),
    "use_mtp": ((None, False), "Qwen2 has no head that predicts several tokens"),
}

CACHES = ("dynamic", "static", "offloaded", "offloaded_static", "quantized", "paged")
OLDER_CACHES = ("sliding_window", "hybrid", "hybrid_chunked", "offloaded_hybrid", "offloaded_hybrid_chunked")

# option -> (test, in words). What Transformers' `GenerationConfig.validate` demands of any value:
Range = tuple[Callable[[Any], bool], str]
VALID: dict[str, Range] = {
    "early_stopping": (lambda x: x in (True, False, "never"), "True, False or 'never'"),
    "max_new_tokens": (lambda x: x > 0, "greater than 0"),
    "num_beams": (lambda x: x > 0, "greater than 0"),
    "top_logprobs": (lambda x: isinstance(x, int) and x >= 0, "0 or a positive integer"),
    "num_return_sequences": (lambda x: x > 0, "greater than 0"),
    "seed": (lambda x: 0 <= x < 2**32, "from 0 to 2**32 - 1"),
    "assistant_ensemble_weight": (lambda x: 0 < x < 1, "between 0 and 1"),
    "cache_dtype": (lambda x: x == "int8", "'int8', or None for the compute dtype"),
    "cache_implementation": (lambda x: x in CACHES + OLDER_CACHES, f"one of {', '.join(CACHES)}"),
}
# and what its processors demand of a value that acts:
RANGES: dict[str, Range] = {
    "temperature": (lambda x: isinstance(x, float) and x > 0, "a float above 0 (for greedy decoding, do_sample=False)"),
    "top_k": (lambda x: x > 0, "a positive integer, or 0 for no limit"),
    "top_p": (lambda x: x >= 0, "a number from 0 to 1"),
    "min_p": (lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "max_cache_len": (lambda x: x > 0, "a positive number of tokens"),
    "assistant_early_exit": (lambda x: x > 0, "a positive number of layers"),
    "prefill_chunk_size": (lambda x: x > 0, "a positive number of tokens"),
    "top_h": (lambda x: 0 < x <= 1, "a number above 0, up to 1"),
    "typical_p": (lambda x: x > 0, "a number above 0, up to 1"),
    "repetition_penalty": (lambda x: isinstance(x, float) and x > 0, "a float above 0"),
    "encoder_repetition_penalty": (lambda x: isinstance(x, float) and x > 0, "a float above 0"),
}

METADATA = ("transformers_version", "_from_model_config", "_commit_hash")  # of a generation_config.json, not options


@dataclass(frozen=True, repr=False)
class GenerationConfig:
    """Options of generate(), with the names and meanings of Transformers 5.23's GenerationConfig; None is unset.

    Lists become tuples, dicts frozen dicts, arrays and other objects with `to_dict` their plain values: the config is
    hashable. Options of encoder-decoder models and of continuous batching are left out.

    Ours alone:
      cache_dtype: "int8" keeps keys and values as integers, with a scale for each token and head: about half the
        memory of bfloat16. It is what cache_implementation="quantized" is here. None: the compute dtype.
      seed: 0 <= seed < 2**32, of the draws; one seed gives one text. None takes a new one for each call.
      output_logprobs: give the log-probability of each new token, in nats, by the model alone, before processors.
      top_logprobs: so many of the likeliest tokens at each step, with theirs; implies output_logprobs.
      extra: entries of a generation_config.json that are no options; kept for writing back, without effect.

    Raises:
      ValueError: a value, or a combination, that Transformers' `GenerationConfig.validate` refuses, or a wrong type.
    """

    # length
    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    early_stopping: bool | str | None = None
    max_time: float | None = None
    stop_strings: str | tuple[str, ...] | None = None
    # strategy
    do_sample: bool | None = None
    seed: int | None = None
    num_beams: int | None = None
    use_mtp: bool | None = None
    # KV cache
    use_cache: bool | None = None
    cache_implementation: str | None = None
    cache_config: Mapping[str, Any] | None = None
    cache_dtype: str | None = None
    max_cache_len: int | None = None
    prefill_chunk_size: int | None = None
    # logits
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    top_h: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    repetition_penalty: float | None = None
    encoder_repetition_penalty: float | None = None
    length_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    encoder_no_repeat_ngram_size: int | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    renormalize_logits: bool | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | tuple[int, ...] | None = None
    remove_invalid_values: bool | None = None
    exponential_decay_length_penalty: tuple[float, ...] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    sequence_bias: tuple[Any, ...] | None = None  # ((ids, bias), ...)
    token_healing: bool | None = None
    guidance_scale: float | None = None
    watermarking_config: Mapping[str, Any] | None = None
    # outputs
    num_return_sequences: int | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None
    output_logprobs: bool | None = None
    top_logprobs: int | None = None
    return_dict_in_generate: bool | None = None
    # special tokens
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    # assisted decoding
    is_assistant: bool | None = None
    num_assistant_tokens: int | None = None
    num_assistant_tokens_schedule: str | None = None
    assistant_confidence_threshold: float | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    assistant_early_exit: int | None = None
    assistant_lookbehind: int | None = None
    target_lookbehind: int | None = None
    assistant_ensemble_weight: float | None = None
    speculation_type: str | None = None
    # known in order to be refused
    compile_config: Mapping[str, Any] | None = None
    disable_compile: bool | None = None
    low_memory: bool | None = None
    penalty_alpha: float | None = None
    dola_layers: str | tuple[int, ...] | None = None
    diversity_penalty: float | None = None
    num_beam_groups: int | None = None
    constraints: Any = None
    force_words_ids: tuple[Any, ...] | None = None
    extra: Mapping[str, Any] = FrozenMapping()

    def __post_init__(self) -> None:
        given = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        if isinstance(given["sequence_bias"], Mapping):  # JSON has no lists as keys: Transformers takes pairs as well
            given["sequence_bias"] = [_plain(pair) for pair in given["sequence_bias"].items()]
        assign(self, **given)
        freeze_fields(self)
        # An integer stays one: Transformers refuses some where a float is due, and files are written as they were read.
        assign(self, **{name: value for name, value in given.items() if type(value) is int})
        self.validate()

    def __repr__(self) -> str:
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in values if v is not None and v != {})})"

    def validate(self) -> None:
        """Raise ValueError for what can be seen to be wrong from the config alone, as Transformers' `validate`."""
        self._check(VALID)
        count, beams = self.num_return_sequences or 1, self.num_beams or 1
        if beams == 1 and count > 1 and not self.do_sample:
            raise ValueError(f"num_return_sequences must be 1 in greedy decoding (no do_sample), found {count}")
        if 1 < beams < count:
            raise ValueError(f"num_return_sequences must not be more than num_beams={beams}, found {count}")
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            forced = set(_ids(getattr(self, name)))
            if forced and forced <= set(self.suppress_tokens or ()):
                raise ValueError(f"{name} must not be all in suppress_tokens, found {sorted(forced)}")

    def _check(self, ranges: dict[str, Range], neutral: Mapping[str, Any] = FrozenMapping()) -> None:
        for name, (test, expected) in ranges.items():
            value = getattr(self, name)
            if value != neutral.get(name) and not test(value):
                raise ValueError(f"{name} must be {expected}, found {value!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config of a generation_config.json's content; entries that are no options go to `extra`."""
        options = {name: value for name, value in values.items() if name in OPTIONS}
        return cls(**options, extra={name: value for name, value in values.items() if name not in OPTIONS})

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> Self:
        """Read a generation_config.json; ValueError, with the file's name, for what it cannot be."""
        with errors_of(path):
            return cls.from_dict(_read_object(path))

    @classmethod
    def from_model_config(cls, config: Any) -> Self:
        """The options which a model's config, a dict or an object with `to_dict`, carries."""
        outer = config if isinstance(config, Mapping) else config.to_dict()
        text = outer.get("text_config") or {}
        values = {name: _first_set(outer.get(name), text.get(name)) for name in OPTIONS}
        if any(values[name] for name in OPTIONS if name.startswith("output_")):
            values["return_dict_in_generate"] = True
        return cls(**values)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Read folder's generation_config.json, or, where there is none, what its config.json says of generation."""
        path = Path(folder, FILE_NAME)
        if path.is_file():
            return cls.from_json_file(path)
        path = path.with_name("config.json")
        if not path.is_file():
            raise FileNotFoundError(f"{os.fspath(folder)}: found neither {FILE_NAME} nor config.json")
        with errors_of(path):
            return cls.from_model_config(_read_object(path))

    @classmethod
    def coerce(cls, value: Any) -> GenerationConfig:
        """Ours as it is; a dict, whose names must be options; an object with `to_dict`, as Transformers' config is."""
        if value is None:
            return cls()
        if isinstance(value, GenerationConfig):
            return value
        if isinstance(value, Mapping):
            check_names([name for name in value if name not in METADATA])
            return cls.from_dict(value)
        if not hasattr(value, "to_dict"):
            raise ValueError(f"generation_config must be a GenerationConfig or a dict, found {type(value).__name__}")
        public = {name: x for name, x in value.to_dict().items() if not name.startswith("_") and x is not None}
        return cls.from_dict(public)

    def to_dict(self) -> dict[str, Any]:
        """What is set, in JSON's types: the options, and the `extra` entries beside them."""
        options = {name: thaw(getattr(self, name)) for name in OPTIONS if getattr(self, name) is not None}
        return options | thaw(self.extra)

    def to_json_string(self) -> str:
        """The text of generation_config.json, formatted as Transformers writes it."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write folder/generation_config.json: the whole file, or, on an error, no change."""
        with replacing(Path(folder, FILE_NAME)) as path:
            path.write_text(self.to_json_string(), encoding="utf-8")


OPTIONS = tuple(f.name for f in fields(GenerationConfig) if f.name != "extra")


@dataclass(frozen=True, repr=False, kw_only=True)
class ResolvedConfig(GenerationConfig):
    """The options one call runs with, made by `resolve`.

    An option that does not act has its neutral value, so that calls which do the same have equal options; what the
    compiled loop takes as a number is never None. The defaults here are those of Transformers'
    `GenerationConfig._get_default_generation_params`, for what nobody set.

      max_length, min_length: in tokens, the prompt included; max_new_tokens, min_new_tokens: the same without it.
      eos_token_id: the ids that end a row, () for none. pad_token_id: None only where there is no such id.

    Raises:
      ValueError: a value out of its range, or an option that is not supported.
    """

    max_length: int
    max_new_tokens: int
    min_length: int = 0
    min_new_tokens: int
    early_stopping: bool | str = False
    do_sample: bool = False
    num_beams: int = 1
    use_cache: bool = True
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    remove_invalid_values: bool = False
    num_return_sequences: int = 1
    output_attentions: bool
    output_hidden_states: bool
    output_scores: bool = False
    output_logits: bool
    output_logprobs: bool
    top_logprobs: int = 0
    return_dict_in_generate: bool = False
    eos_token_id: tuple[int, ...]
    num_assistant_tokens: int = 20
    num_assistant_tokens_schedule: str = "constant"
    assistant_confidence_threshold: float = 0.4
    assistant_lookbehind: int = 10
    target_lookbehind: int = 10
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0

    def validate(self) -> None:
        """Raise ValueError for values that Transformers' processors refuse, and for options that are not supported."""
        super().validate()
        self._check(RANGES, OFF)
        for name, (neutral, reason) in NOT_SUPPORTED.items():
            if getattr(self, name) not in neutral:
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported: {reason}")
        if self.prefill_chunk_size and (self.output_attentions or self.output_hidden_states):
            raise ValueError("prefill_chunk_size does not go with output_attentions or output_hidden_states")


DEFAULTS = {f.name: f.default for f in fields(ResolvedConfig) if f.name in OPTIONS and f.default is not None}

# What an option is when a keyword says None, or, if it shapes sampling alone, when do_sample is off. Only top_k has a
# default that acts.
OFF = DEFAULTS | {"top_k": 0}
OUTPUTS = ("output_scores", "output_logits", "output_logprobs")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def merge(
    model_defaults: GenerationConfig,
    generation_config: Any = None,
    keywords: Mapping[str, Any] | None = None,
    arguments: Collection[str] = (),
) -> GenerationConfig:
    """What somebody set for a call: a keyword wins over generation_config, that over the model's defaults.

    None in a config is unset; as a keyword it is explicit: eos_token_id=None is no end-of-sequence token, whatever the
    configs say. (In a config, eos_token_id=() says so.)

    Args:
      model_defaults: the model's own config, from its generation_config.json.
      generation_config: the call's, anything that `GenerationConfig.coerce` takes.
      keywords: the call's options by name.
      arguments: names of generate()'s other arguments, to recognise a misspelt one.
    """
    keywords = keywords or {}
    check_names(keywords, arguments)
    config = GenerationConfig.coerce(generation_config)
    values = {name: _first_set(getattr(config, name), getattr(model_defaults, name)) for name in OPTIONS}
    return GenerationConfig(**(values | dict(keywords)))


def resolve(
    model_defaults: GenerationConfig,
    generation_config: Any = None,
    keywords: Mapping[str, Any] | None = None,
    *,
    input_length: int,
    max_position_embeddings: int,
    arguments: Collection[str] = (),
) -> ResolvedConfig:
    """The options that one call of generate() runs with: those of `merge`, and what follows for the rest.

    An option that nobody set has its default; one that a keyword set to None is off. Source: `generate`,
    `_prepare_generation_config`, `_prepare_special_tokens` and `_prepare_generated_length` in
    transformers/generation/utils.py.

    Args:
      model_defaults, generation_config, keywords, arguments: as of `merge`.
      input_length: columns of input_ids, padding included.
      max_position_embeddings: the model's context, which bounds the default length and no other.

    Raises:
      ValueError: unknown names; values or combinations that Transformers refuses; options that are not supported.
    """
    keywords = keywords or {}
    given = merge(model_defaults, generation_config, keywords, arguments)
    unset = {name: (OFF if name in keywords else DEFAULTS).get(name) for name in OPTIONS}
    values = {name: _first_set(getattr(given, name), unset[name]) for name in OPTIONS}
    if not given.do_sample:
        values |= {name: OFF.get(name) for name in SAMPLING}
    for name in ("top_p", "typical_p"):
        values[name] = min(values[name], 1.0)
    values["output_logprobs"] = values["output_logprobs"] or values["top_logprobs"]
    for name in (*OUTPUTS, "output_attentions", "output_hidden_states"):
        values[name] = bool(values[name] and given.return_dict_in_generate)
    eos = _ids(given.eos_token_id)
    values["eos_token_id"] = tuple(token for token in eos if token >= 0)  # -1 is a way to say "none"
    # With a padding that is no token Transformers ends in an IndexError as soon as a row waits for the others.
    pads = [token for token in (given.pad_token_id, *eos) if token is not None and 0 <= token < 2**31]
    values["pad_token_id"] = pads[0] if pads else None
    values |= _lengths(given, input_length, max_position_embeddings)
    if keywords.get("max_length") is not None and given.max_new_tokens is not None:
        message = f"max_length={given.max_length} has no effect: max_new_tokens={given.max_new_tokens} wins over it"
        warnings.warn(message, stacklevel=3)
    return ResolvedConfig(**values)


def _lengths(given: GenerationConfig, input_length: int, max_position_embeddings: int) -> dict[str, int]:
    """The four length options in agreement; those of new tokens win."""
    if given.max_new_tokens is not None:
        max_length = input_length + given.max_new_tokens
    elif given.max_length is not None:
        max_length = given.max_length
    else:
        max_length = min(input_length + DEFAULT_NEW_TOKENS, max_position_embeddings)
    if input_length >= max_length:
        raise ValueError(f"max_length={max_length} leaves no room after a prompt of {input_length}: set max_new_tokens")
    min_length = given.min_length or 0
    if given.min_new_tokens is not None:
        min_length = input_length + given.min_new_tokens
    if min_length > max_length:
        message = f"the minimum of {min_length} tokens is beyond the maximum of {max_length}, where generation stops"
        warnings.warn(message, stacklevel=4)
    return {
        "max_length": max_length,
        "max_new_tokens": max_length - input_length,
        "min_length": min_length,
        "min_new_tokens": max(min_length - input_length, 0),
    }


def check_names(names: Collection[str], arguments: Collection[str] = ()) -> None:
    """Raise ValueError for names that are no options, with the nearest of the options and of generate()'s arguments."""
    for name in names:
        if name not in OPTIONS:
            near = difflib.get_close_matches(name, (*OPTIONS, *arguments), n=1)
            raise ValueError(f"unknown generation option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _plain(value: Any) -> Any:
    """JSON's types for what people pass: arrays and scalars of any library, tuples, dicts, config objects."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _plain(value.to_dict()) if hasattr(value, "to_dict") else value


def _first_set(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _ids(tokens: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """A special token of one id or several as a tuple."""
    return () if tokens is None else (tokens,) if isinstance(tokens, int) else tokens


def _read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"must hold a JSON object, found {type(values).__name__}")
    return values
