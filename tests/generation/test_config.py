"""Generation options against Transformers: names, defaults, files, precedence, and what generate() ends up with."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxqwen.generation.config import (
    DEFAULT_NEW_TOKENS,
    DEFAULTS,
    METADATA,
    NOT_SUPPORTED,
    OPTIONS,
    GenerationConfig,
    ResolvedConfig,
    merge,
    resolve,
)

CONTEXT = 64
# fmt: off
SUPPORTED = {
    "do_sample", "temperature", "top_k", "top_p", "seed", "repetition_penalty", "num_return_sequences", "use_cache",
    "max_new_tokens", "max_length", "min_new_tokens", "min_length", "eos_token_id", "pad_token_id", "bos_token_id",
    "return_dict_in_generate", "output_scores", "output_logits", "min_p", "top_h", "typical_p", "epsilon_cutoff",
    "eta_cutoff", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "renormalize_logits", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "sequence_bias",
    "watermarking_config", "num_beams", "early_stopping", "length_penalty", "max_time", "stop_strings",
    "output_attentions", "output_hidden_states", "guidance_scale", "prompt_lookup_num_tokens",
    "max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_ensemble_weight", "output_logprobs", "top_logprobs",
    "prefill_chunk_size", "cache_dtype", "max_cache_len", "token_healing", "assistant_early_exit",
}
# They are about a draft model with another tokenizer, which is refused.
INERT = {"assistant_lookbehind", "target_lookbehind"}
ACTIVE_VALUES: dict[str, Any] = {
    "cache_implementation": "offloaded", "cache_config": {"nbits": 4}, "is_assistant": True,
    "speculation_type": "dflash",
    "low_memory": True, "penalty_alpha": 0.6, "dola_layers": "high", "diversity_penalty": 0.5, "num_beam_groups": 2,
    "constraints": ["a"], "force_words_ids": [[1]], "compile_config": {"mode": "default"},
    "disable_compile": True, "use_mtp": True,
}
BAD_CONFIGS: list[dict[str, Any]] = [
    {"max_new_tokens": 0}, {"max_new_tokens": -3}, {"num_return_sequences": 2},
    {"num_return_sequences": 3, "num_beams": 2}, {"early_stopping": "sometimes"}, {"assistant_ensemble_weight": 1.0},
    {"cache_implementation": "paper"}, {"forced_eos_token_id": [1, 2], "suppress_tokens": [1, 2, 3]},
    {"forced_bos_token_id": 1, "suppress_tokens": [1]},
]
GOOD_CONFIGS: list[dict[str, Any]] = [
    {}, {"max_length": 1}, {"temperature": 0.0}, {"num_return_sequences": 2, "num_beams": 2},
    {"num_return_sequences": 2, "do_sample": True}, {"early_stopping": "never"}, {"cache_implementation": "paged"},
    {"cache_implementation": "hybrid"}, {"forced_eos_token_id": [1, 2], "suppress_tokens": [1]}, {"pad_token_id": -1},
]
BAD_CALLS: list[dict[str, Any]] = [
    *BAD_CONFIGS, {"max_length": 4}, {"max_length": 3},
    {"do_sample": True, "temperature": 0.0}, {"do_sample": True, "temperature": -0.5},
    {"do_sample": True, "temperature": 2}, {"do_sample": True, "top_k": -1}, {"do_sample": True, "top_p": -0.1},
    {"do_sample": True, "min_p": 1.5}, {"do_sample": True, "min_p": -0.1}, {"do_sample": True, "top_h": 0.0},
    {"do_sample": True, "top_h": 1.5}, {"do_sample": True, "typical_p": 0.0},
    {"repetition_penalty": 0.0}, {"repetition_penalty": -1.5}, {"repetition_penalty": 2},
    {"encoder_repetition_penalty": 0.0}, {"temprature": 0.5}, {"attention_masks": [[1, 1, 1, 1]]},
    {"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "high"}, {"num_beam_groups": 2, "num_beams": 2},
    {"constraints": ["a"]}, {"force_words_ids": [[1]]},
]
GOOD_CALLS: list[dict[str, Any]] = [
    {"temperature": 0.0, "top_k": 20, "top_p": -1.0, "min_p": 7.0}, {"do_sample": True, "temperature": 1},
    {"do_sample": True, "top_p": 1.5, "typical_p": 2.0}, {"do_sample": True, "top_p": 0.0, "top_k": 0},
    {"repetition_penalty": 1, "num_return_sequences": 1}, {"eos_token_id": -1, "min_length": 6},
    {"eos_token_id": [3, -1], "min_new_tokens": 2}, {"eos_token_id": [-1, 3], "pad_token_id": -1},
    {"eos_token_id": None, "min_new_tokens": 3}, {"min_length": -1, "max_length": 5},
    {"length_penalty": 2.0, "early_stopping": True, "num_assistant_tokens": 5},
    {"suppress_tokens": [], "guidance_scale": 1, "cache_implementation": "static"},
    {"output_scores": True, "return_dict_in_generate": True, "use_cache": False},
    {"output_scores": True, "output_logits": True},
]
# fmt: on


def ours(model: dict[str, Any] | None = None, config: Any = None, length: int = 4, **keywords: Any) -> ResolvedConfig:
    """resolve() of a prompt of `length` tokens, with the model's defaults as a dict."""
    defaults, sizes = GenerationConfig(**(model or {})), {"input_length": length, "max_position_embeddings": CONTEXT}
    return resolve(defaults, config, keywords, **sizes, arguments=("input_ids", "attention_mask"))


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="the oracle is Transformers' GenerationConfig")


@pytest.fixture(scope="module")
def generate(transformers: Any) -> Callable[..., dict[str, Any]]:
    """Transformers' generate() of a tiny Qwen2 up to its decoding loop: what the loop would have got."""
    torch = pytest.importorskip("torch", reason="Transformers' generate() needs torch: pip install flaxqwen[test]")
    tiny = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.Qwen2Config(**tiny, **heads, max_position_embeddings=CONTEXT)
    language_model = transformers.Qwen2ForCausalLM(config).eval()

    def loop(model: Any, input_ids: Any, logits_processor: Any, generation_config: Any, **_: Any) -> Any:
        return input_ids, logits_processor, generation_config

    def run(
        model: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        length: int = 4,
        decode: bool = False,
        **keywords: Any,
    ) -> dict[str, Any]:
        language_model.generation_config = transformers.GenerationConfig(**(model or {}))
        if config is not None:
            config = transformers.GenerationConfig(**config)
        keywords |= {} if decode else {"custom_generate": loop}
        input_ids = torch.arange(10, 10 + length)[None]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = language_model.generate(input_ids, config, attention_mask=torch.ones_like(input_ids), **keywords)
        return {} if decode else effective(*found, length)

    return run


def effective(input_ids: Any, processors: Any, config: Any, input_length: int) -> dict[str, Any]:
    """The options that act, read from what Transformers built of them."""
    found = {type(processor).__name__: processor for processor in processors}

    def value(processor: str, attribute: str, default: Any) -> Any:
        return getattr(found[processor], attribute) if processor in found else default

    eos, pad = config._eos_token_tensor, config._pad_token_tensor
    return {
        "do_sample": bool(config.do_sample),
        "max_length": config.max_length,
        "max_new_tokens": config.max_length - input_length,
        "min_new_tokens": max(value("MinLengthLogitsProcessor", "min_length", 0) - input_length, 0),
        "eos_token_id": () if eos is None else tuple(eos.tolist()),
        "pad_token_id": None if pad is None else pad.item(),
        "bos_token_id": config.bos_token_id,
        "temperature": value("TemperatureLogitsWarper", "temperature", 1.0),
        "top_k": value("TopKLogitsWarper", "top_k", 0),
        "top_p": value("TopPLogitsWarper", "top_p", 1.0),
        "repetition_penalty": value("RepetitionPenaltyLogitsProcessor", "penalty", 1.0),
        "num_return_sequences": input_ids.shape[0],
        "return_dict_in_generate": bool(config.return_dict_in_generate),
        "output_scores": bool(config.return_dict_in_generate and config.output_scores),
        "output_logits": bool(config.return_dict_in_generate and config.output_logits),
        "use_cache": config.use_cache,
    }


def assert_same(resolved: ResolvedConfig, theirs: dict[str, Any]) -> None:
    theirs = theirs | {"eos_token_id": tuple(token for token in theirs["eos_token_id"] if token >= 0)}
    if not theirs["eos_token_id"]:  # a minimum length has nothing to mask
        theirs["min_new_tokens"] = resolved.min_new_tokens
    if theirs["pad_token_id"] is not None and theirs["pad_token_id"] < 0:  # with which it cannot fill a row
        theirs["pad_token_id"] = next(iter(theirs["eos_token_id"]), None)
    assert {name: getattr(resolved, name) for name in theirs} == theirs


def test_names_are_those_of_transformers(transformers: Any) -> None:
    theirs = set(transformers.GenerationConfig().to_dict()) - set(METADATA)
    assert theirs - set(OPTIONS) == {"decoder_start_token_id", "continuous_batching_config"}
    assert set(OPTIONS) - theirs == {"seed", "cache_dtype", "output_logprobs", "top_logprobs"}


def test_defaults_are_those_of_transformers(transformers: Any) -> None:
    theirs = transformers.GenerationConfig._get_default_generation_params()
    assert theirs.pop("max_length") == DEFAULT_NEW_TOKENS
    own = {"top_logprobs": 0}
    assert {name: value for name, value in theirs.items() if value is not None} | own == DEFAULTS
    assert all(getattr(GenerationConfig(), name) is None for name in OPTIONS)


def test_every_option_is_built_or_refused_or_inert() -> None:
    groups = [SUPPORTED, INERT, set(NOT_SUPPORTED)]
    assert set.union(*groups) == set(OPTIONS)
    assert sum(map(len, groups)) == len(OPTIONS)
    assert set(ACTIVE_VALUES) == set(NOT_SUPPORTED)


@pytest.mark.parametrize("name", ACTIVE_VALUES)
def test_unsupported_options_are_refused_by_name(name: str) -> None:
    options = {"do_sample": True, name: ACTIVE_VALUES[name]}
    for model, keywords in (({}, options), (options, {})):
        with pytest.raises(ValueError, match=rf"\b{name}=") as error:
            ours(model, **keywords)
        assert "not supported" in str(error.value)
    for value in NOT_SUPPORTED[name][0]:
        ours(do_sample=True, **{name: value})


def test_options_of_sampling_do_nothing_without_it() -> None:
    sampling = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1, "top_h": 0.5, "typical_p": 0.9}
    sampling |= {"epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4}
    assert ours(sampling | {"do_sample": True}, do_sample=False) == ours() == ours(do_sample=None, top_k=7)
    assert ours(do_sample=True).top_k == 50
    assert ours(do_sample=True, top_k=None).top_k == 0


@pytest.mark.parametrize("values", BAD_CONFIGS, ids=str)
def test_configs_that_cannot_be_made(transformers: Any, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (Transformers' wording is not ours to fix)
        transformers.GenerationConfig(**values)
    with pytest.raises(ValueError, match=next(iter(values))):
        GenerationConfig(**values)


@pytest.mark.parametrize("values", GOOD_CONFIGS, ids=str)
def test_configs_that_can_be_made(transformers: Any, values: dict[str, Any]) -> None:
    transformers.GenerationConfig(**values)
    assert GenerationConfig(**values).to_dict() == values


@pytest.mark.parametrize("keywords", BAD_CALLS, ids=str)
def test_calls_that_both_refuse(generate: Callable[..., Any], keywords: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (Transformers' wording is not ours to fix)
        generate(decode=True, **keywords)
    with pytest.raises(ValueError, match="|".join(keywords)):
        ours(**keywords)


@pytest.mark.parametrize("keywords", GOOD_CALLS, ids=str)
def test_calls_that_both_accept(generate: Callable[..., Any], keywords: dict[str, Any]) -> None:
    assert_same(ours(**keywords), generate(**keywords))


LENGTHS = st.integers(1, 40)
CHOICES: dict[str, st.SearchStrategy[Any]] = {
    "do_sample": st.booleans(),
    "temperature": st.floats(0.1, 2.0),
    "top_k": st.integers(0, 60),
    "top_p": st.floats(0.0, 1.2),
    "repetition_penalty": st.floats(0.5, 2.0),
    "max_length": LENGTHS,
    "max_new_tokens": LENGTHS,
    "min_length": st.integers(0, 20),
    "min_new_tokens": st.integers(0, 20),
    "eos_token_id": st.integers(0, 96) | st.lists(st.integers(0, 96), min_size=1, max_size=3),
    "pad_token_id": st.integers(0, 96),
    "bos_token_id": st.integers(0, 96),
    "return_dict_in_generate": st.booleans(),
    "output_scores": st.booleans(),
    "output_logits": st.booleans(),
    "use_cache": st.booleans(),
}
# max_length=None and use_cache=None make Transformers fail.
KEYWORDS = {
    name: strategy if name in ("max_length", "use_cache") else st.none() | strategy
    for name, strategy in CHOICES.items()
} | {"num_return_sequences": st.integers(1, 3)}


@settings(max_examples=150, deadline=None)
@given(
    model=st.fixed_dictionaries({}, optional=CHOICES),
    config=st.none() | st.fixed_dictionaries({}, optional=CHOICES),
    keywords=st.fixed_dictionaries({}, optional=KEYWORDS),
    length=st.integers(1, 30),
)
def test_precedence_is_that_of_transformers(
    generate: Callable[..., Any],
    model: dict[str, Any],
    config: dict[str, Any] | None,
    keywords: dict[str, Any],
    length: int,
) -> None:
    try:
        theirs = generate(model, config, length, **keywords)
    except ValueError:
        theirs = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if theirs is None:
            with pytest.raises(ValueError):  # noqa: PT011 (any of them)
                ours(model, config, length, **keywords)
            return
        resolved = ours(model, config, length, **keywords)
    assert_same(resolved, theirs)


def test_default_length_stays_in_the_context(generate: Callable[..., Any]) -> None:
    for length in (CONTEXT - 30, CONTEXT - 5):
        assert ours(length=length).max_length == generate(length=length)["max_length"]
    for run in (ours, generate):
        with pytest.raises(ValueError, match="max_length"):
            run(length=CONTEXT)


def test_explicit_none_beats_every_default(generate: Callable[..., Any]) -> None:
    defaults = {"eos_token_id": [3, 4], "pad_token_id": 5, "max_new_tokens": 9, "repetition_penalty": 1.1}
    for config in (None, {"eos_token_id": 7}):
        none = dict.fromkeys(("eos_token_id", "pad_token_id", "max_new_tokens", "repetition_penalty"))
        theirs, resolved = generate(defaults, config, **none), ours(defaults, config, **none)
        assert (resolved.eos_token_id, resolved.pad_token_id) == (theirs["eos_token_id"], theirs["pad_token_id"])
        assert (resolved.eos_token_id, resolved.pad_token_id) == ((), None)
        assert resolved.max_new_tokens == theirs["max_new_tokens"] == DEFAULT_NEW_TOKENS
        assert resolved.repetition_penalty == 1.0
    assert ours(defaults, {"eos_token_id": None}).eos_token_id == (3, 4)
    assert ours(defaults, {"eos_token_id": ()}).eos_token_id == ()
    assert ours({"max_length": 9}, max_length=None).max_new_tokens == DEFAULT_NEW_TOKENS  # Transformers fails


def test_a_length_that_cannot_be_kept_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="max_length=50 has no effect: max_new_tokens=9 wins"):
        assert ours({"max_new_tokens": 9}, max_length=50).max_length == 13
    with pytest.warns(UserWarning, match="minimum of 24 tokens is beyond the maximum of 9"):
        assert ours(max_length=9, min_new_tokens=20).min_new_tokens == 20
    assert ours({"max_length": 50}, max_new_tokens=9).max_length == 13  # no warning: a warning is an error here


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 5.0}, "max_new_tokens is 5.0, expected an integer"),
        ({"max_new_tokens": True}, "max_new_tokens is True, expected an integer"),
        ({"temperature": "0.7"}, "temperature is '0.7', expected a number"),
        ({"do_sample": 1}, "do_sample is 1, expected true or false"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id is .*, expected an integer"),
        ({"num_return_sequences": 0}, "num_return_sequences must be greater than 0, found 0"),
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": 2**32}, "seed must be from 0"),
    ],
    ids=str,
)
def test_values_of_another_kind_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**values)
    with pytest.raises(ValueError, match=message):
        ours(**values)


def test_unknown_names_name_the_nearest() -> None:
    for name, nearest in (("temprature", "temperature"), ("max_tokens", "max_new_tokens"), ("input_id", "input_ids")):
        with pytest.raises(ValueError, match=f"'{name}'; did you mean '{nearest}'"):
            ours(**{name: 1})
    with pytest.raises(ValueError, match=r"'zzz'$"):
        ours(zzz=None)
    with pytest.raises(ValueError, match="'temprature'; did you mean 'temperature'"):
        ours(config={"temprature": 0.5})
    with pytest.raises(ValueError, match="'extra'"):
        ours(extra={})


def test_configs_are_hashable_and_frozen() -> None:
    nested = GenerationConfig(
        eos_token_id=[1, 2],
        bad_words_ids=([1, 2], [3]),
        watermarking_config={"keys": [1, 2]},
        sequence_bias={(1, 2): 0.5},
        extra={"a": {"b": [1]}},
    )
    assert nested.eos_token_id == (1, 2)
    assert nested.bad_words_ids == ((1, 2), (3,))
    assert nested.sequence_bias == (((1, 2), 0.5),)
    again = GenerationConfig.from_dict(json.loads(nested.to_json_string()))
    assert again == nested
    assert hash(again) == hash(nested)
    assert len({ours(), ours(temperature=0.5), ours(max_new_tokens=20), ours(seed=1)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        nested.temperature = 0.5
    assert repr(GenerationConfig(top_k=3)) == "GenerationConfig(top_k=3)"


def test_numbers_of_other_libraries_become_plain() -> None:
    config = GenerationConfig(
        eos_token_id=np.asarray([1, 2]),
        pad_token_id=jnp.asarray(3),
        temperature=np.float32(0.5),
        max_new_tokens=np.int64(4),
    )
    assert config.to_dict() == {"eos_token_id": [1, 2], "pad_token_id": 3, "temperature": 0.5, "max_new_tokens": 4}
    assert {type(value) for value in config.to_dict().values()} == {list, int, float}


def test_coerce_takes_every_form_of_a_config(transformers: Any) -> None:
    values = {"do_sample": True, "temperature": 0.5, "eos_token_id": [1, 2], "max_new_tokens": 4}
    plain = GenerationConfig(**values)
    assert GenerationConfig.coerce(plain) is plain
    assert GenerationConfig.coerce(values) == plain
    assert GenerationConfig.coerce(None) == GenerationConfig()
    theirs = transformers.GenerationConfig(**values, house="own")
    coerced = GenerationConfig.coerce(theirs)
    assert coerced.extra["house"] == "own"
    assert dataclasses.replace(coerced, extra={}) == plain
    assert ours(config=theirs) == ours(**values)
    assert GenerationConfig.coerce(values | {"transformers_version": "4.49.0"}).extra
    marked = transformers.GenerationConfig(watermarking_config={"greenlist_ratio": 0.5})
    assert GenerationConfig.coerce(marked).watermarking_config["greenlist_ratio"] == 0.5
    with pytest.raises(ValueError, match="found str"):
        GenerationConfig.coerce("greedy")


def test_merge_keeps_what_somebody_set() -> None:
    merged = merge(GenerationConfig(bos_token_id=1, top_k=5), {"top_k": 6}, {"pad_token_id": 2})
    assert merged == GenerationConfig(bos_token_id=1, top_k=6, pad_token_id=2)


def test_real_files_read_as_in_transformers_and_write_back(shared: Path, transformers: Any, tmp_path: Path) -> None:
    paths = sorted((shared / "data/configs").glob("*/generation_config.json"))
    assert len(paths) >= 5
    for path in paths:
        config = GenerationConfig.from_pretrained(path.parent)
        theirs = transformers.GenerationConfig.from_pretrained(path.parent)
        read = {name: value for name, value in theirs.to_dict().items() if value is not None}
        version = {"transformers_version": config.extra["transformers_version"]}
        assert config.to_dict() == read | version == json.loads(path.read_text())
        config.save_pretrained(tmp_path / "ours")
        theirs.save_pretrained(tmp_path / "theirs")
        written = [json.loads((tmp_path / side / path.name).read_text()) for side in ("ours", "theirs")]
        assert written[0] == written[1] | version
        text = (tmp_path / "theirs" / path.name).read_text()
        assert (tmp_path / "ours" / path.name).read_text() == text.replace(
            written[1]["transformers_version"], version["transformers_version"]
        )
        assert transformers.GenerationConfig.from_pretrained(tmp_path / "ours") == theirs


def test_real_files_resolve(shared: Path) -> None:
    def read(name: str) -> GenerationConfig:
        return GenerationConfig.from_pretrained(shared / "data/configs" / name)

    context = {"input_length": 5, "max_position_embeddings": 32768}
    instruct = resolve(read("Qwen2.5-0.5B-Instruct"), **context)
    assert (instruct.temperature, instruct.top_k, instruct.top_p, instruct.repetition_penalty) == (0.7, 20, 0.8, 1.1)
    assert (instruct.eos_token_id, instruct.pad_token_id) == ((151645, 151643), 151643)
    base = resolve(read("Qwen2.5-0.5B"), **context)
    assert (base.max_new_tokens, base.eos_token_id, base.pad_token_id) == (2048, (151643,), 151643)
    assert resolve(read("sakura-14b-qwen2.5-v1.0"), **context).encoder_repetition_penalty == 0.9


def test_without_a_file_the_model_config_speaks(shared: Path, transformers: Any) -> None:
    paths = [
        p for p in (shared / "data/configs").glob("*/config.json") if not (p.parent / "generation_config.json").exists()
    ]
    assert any("Audio" in str(path) for path in paths)
    for path in paths:
        theirs = transformers.GenerationConfig.from_model_config(json.loads(path.read_text())).to_dict()
        read = {name: value for name, value in theirs.items() if value is not None and name in OPTIONS}
        assert GenerationConfig.from_pretrained(path.parent).to_dict() == read
        assert read.get("eos_token_id") is not None


def test_model_config_with_outputs_asks_for_the_dict(transformers: Any) -> None:
    for values in ({"output_scores": True, "text_config": {"eos_token_id": 3}}, {"bos_token_id": 1, "top_k": 5}):
        theirs = transformers.GenerationConfig.from_model_config(dict(values)).to_dict()
        read = {name: value for name, value in theirs.items() if value is not None and name in OPTIONS}
        assert GenerationConfig.from_model_config(values).to_dict() == read


def test_unknown_entries_of_a_file_are_kept(tmp_path: Path) -> None:
    values = {"top_k": 5, "chat_format": "chatml", "nested": {"list": [1, {"x": None}]}, "extra": 1, "null": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    config = GenerationConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "deep" / "copy")
    assert json.loads((tmp_path / "deep" / "copy" / "generation_config.json").read_text()) == values
    assert resolve(config, input_length=4, max_position_embeddings=CONTEXT) == ours({"top_k": 5})


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    with pytest.raises(FileNotFoundError, match=r"neither generation_config.json nor config.json"):
        GenerationConfig.from_pretrained(tmp_path)
    for text in ("{", "[1]", '{"max_new_tokens": 0}', '{"temperature": "hot"}', '"\udcff'):
        path.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match=r"generation_config\.json: "):
            GenerationConfig.from_pretrained(tmp_path)
    path.unlink()
    (tmp_path / "config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id"):
        GenerationConfig.from_pretrained(tmp_path)


def test_a_failed_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GenerationConfig(top_k=1).save_pretrained(tmp_path)
    whole = (tmp_path / "generation_config.json").read_text()
    write = Path.write_text

    def full_disk(path: Path, text: str, **keywords: Any) -> int:
        write(path, text[:5], **keywords)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        GenerationConfig(top_k=2).save_pretrained(tmp_path)
    assert (tmp_path / "generation_config.json").read_text() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["generation_config.json"]
