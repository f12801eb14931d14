"""Configs against Transformers: what both read from the same JSON, and what Transformers reads of what we write."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import jax
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxqwen.config import (
    ACTIVATIONS,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2Config,
    RopeParameters,
    config_from_dict,
    config_from_file,
)
from flaxqwen.ops.activations import ACTIVATION

TINY: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 4},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 24, "truncate": False},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {"short_factor": [1.0, 1.5, 2, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0], "factor": 4.0},
}


def read_by_transformers(values: dict[str, Any]) -> dict[str, Any]:
    """Every attribute of the config that Transformers makes of `values`, its own version aside."""
    values = copy.deepcopy(values)  # it fills in rope_parameters in place
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    attributes = config.to_dict()
    del attributes["transformers_version"]
    return attributes


def assert_reads_the_same(values: dict[str, Any]) -> None:
    """Our config of `values` survives its own JSON, has Transformers' attributes, and is written to an equal config."""
    config = config_from_dict(values)
    again = config_from_dict(json.loads(config.to_json_string()))
    assert again == config
    assert hash(again) == hash(config)
    expected = read_by_transformers(values)
    assert read_by_transformers(config.to_dict()) == expected
    assert_attributes(config, expected)


def assert_attributes(config: Any, expected: dict[str, Any]) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in ("audio_config", "text_config"):
            assert_attributes(value, expected[field.name])
        elif field.name == "num_labels":
            assert value == len(expected["id2label"])
        elif field.name == "rope_parameters":
            assert value.to_dict() == expected[field.name]
        elif field.name == "head_dim":
            assert value == (expected.get("head_dim") or expected["hidden_size"] // expected["num_attention_heads"])
        elif field.name in ("classifier_dropout", "hidden_dropout"):
            assert value == expected.get(field.name)
        elif field.name != "extra":
            assert (list(value) if isinstance(value, tuple) else value) == expected[field.name], field.name


def assert_refused(values: dict[str, Any], message: str) -> None:
    """TINY is accepted, and with `values` in it refused in one line."""
    config_from_dict(TINY)
    with pytest.raises(ValueError, match=message) as caught:
        config_from_dict({**TINY, **values})
    assert "\n" not in str(caught.value)


def test_every_real_config_reads_and_writes_as_in_transformers(shared: Path, tmp_path: Path) -> None:
    paths = sorted((shared / "data" / "configs").glob("*/config.json"))
    assert len(paths) >= 40
    for path in paths:
        values = json.loads(path.read_text())
        assert_reads_the_same(values)
        config = config_from_file(path.parent)
        assert config == config_from_dict(values)
        config.save_pretrained(tmp_path)
        written, source = (
            transformers.AutoConfig.from_pretrained(folder).to_dict() for folder in (tmp_path, path.parent)
        )
        assert written.pop("_name_or_path") != source.pop("_name_or_path")  # the folders
        assert written == source, path


def test_facts_of_real_configs(shared: Path) -> None:
    read = {path.name: config_from_file(path) for path in (shared / "data" / "configs").iterdir() if path.is_dir()}
    tiny = read["Qwen2.5-0.5B"]
    assert (tiny.head_dim, tiny.sliding_window, tiny.tie_word_embeddings, tiny.dtype) == (64, None, True, "bfloat16")
    assert read["Qwen2.5-Math-7B-Instruct"].rope_parameters.rope_theta == 10000
    assert set(read["QwQ-32B-early-sliding"].layer_types) == {"full_attention"}
    assert read["Qwen2.5-7B-Instruct-1M"].max_position_embeddings == 1010000
    assert read["Qwen2.5-7B-Instruct-1M"].context_length == 262144
    assert tiny.context_length == tiny.max_position_embeddings
    assert read["Qwen2.5-32B-Instruct-AWQ"].quantization_config["quant_method"] == "awq"
    assert tiny.quantization_config is None
    yarn = read["Qwen2.5-Coder-32B-Instruct-yarn"].rope_parameters
    assert (yarn.rope_type, yarn.factor, yarn.rope_theta) == ("yarn", 4.0, 1e6)
    assert read["Qwen2.5-Coder-32B-Instruct-yarn"].context_length == 131072
    audio = read["Qwen2-Audio-7B"]
    assert (audio.text_config.hidden_size, audio.text_config.num_key_value_heads) == (4096, 32)
    assert (audio.text_config.rms_norm_eps, audio.audio_config.encoder_layers) == (1e-5, 32)


def test_what_says_nothing_is_not_written() -> None:
    written = Qwen2Config.from_dict({**TINY, "num_labels": 2}).to_dict()
    assert {name: written[name] for name in TINY} == TINY
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000}
    silent = ("id2label", "label2id", "num_labels", "problem_type", "return_dict", "output_attentions", "head_dim")
    assert not written.keys() & {*silent, "extra", "dtype", "torch_dtype", "rope_theta", "rope_scaling"}


@pytest.mark.parametrize("kind", [Qwen2Config, Qwen2AudioConfig, Qwen2AudioEncoderConfig])
def test_defaults(kind: type) -> None:
    assert kind() == config_from_dict({"model_type": kind.model_type})
    assert_reads_the_same({"model_type": kind.model_type})


@pytest.mark.parametrize(
    "values",
    [
        {"dtype": "float16"},
        {"torch_dtype": "float16", "dtype": "float16"},
        {"torch_dtype": None, "rope_scaling": None, "rope_parameters": None, "layer_types": None},
        {"rope_scaling": {}},
        {"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 7},
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": None, "attention_factor": 1.5}},
        {"partial_rotary_factor": 1.0},
        {"head_dim": None},
        {"head_dim": 8},
        {"head_dim": 16},
        {"num_key_value_heads": None},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
        {"eos_token_id": [1, 2], "pad_token_id": 0, "bos_token_id": 3},
        {"num_labels": 3},
        {"num_labels": 2},
        {"id2label": None, "label2id": None, "num_labels": 3, "architectures": None, "problem_type": None},
        {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}},
        {"id2label": {"0": "only"}, "problem_type": "regression"},
        {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}},
        {"classifier_dropout": 0.25, "hidden_dropout": None},
        {"output_attentions": True, "output_hidden_states": True, "return_dict": False},
        {"architectures": ["Qwen2ForCausalLM"], "_name_or_path": "somewhere", "quantization_config": {"bits": [4, {}]}},
        {"use_mrope": False, "is_causal": True, "temperature": 0.5, "anything": [{"a": None}, 1.5]},
    ],
    ids=lambda values: ",".join(values),
)
def test_reads_the_same(values: dict[str, Any]) -> None:
    assert_reads_the_same({**TINY, **values})


def test_audio_reads_the_same() -> None:
    text = {key: value for key, value in TINY.items() if key != "model_type"}
    encoder = {
        "num_hidden_layers": 2,
        "hidden_size": 24,
        "num_attention_heads": 3,
        "encoder_ffn_dim": 40,
        "dropout": 0.5,
    }
    values = {"model_type": "qwen2_audio", "text_config": text, "audio_config": encoder, "audio_token_id": 63}
    assert_reads_the_same(values)
    config = config_from_dict(values)
    assert isinstance(config, Qwen2AudioConfig)
    assert (config.audio_config.d_model, config.audio_config.encoder_layers, config.audio_token_index) == (24, 2, 63)
    assert_reads_the_same({"model_type": "qwen2_audio", "text_config": None, "audio_config": None})


@st.composite
def qwen2_json(draw: st.DrawFn) -> dict[str, Any]:
    """A config.json that both sides accept: any geometry, any rope, keys of any age."""
    kv_heads, groups, half, layers = (draw(st.integers(1, top)) for top in (4, 4, 8, 6))
    heads, head_dim = kv_heads * groups, 2 * half
    hidden = draw(st.sampled_from([heads * head_dim, 2 * heads * head_dim]))
    window = draw(st.none() | st.integers(1, 64))
    slides = draw(st.booleans())
    types = ["full_attention", "sliding_attention"] if slides and window else ["full_attention"]
    values: dict[str, Any] = {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "use_sliding_window": slides,
        "sliding_window": window,
    }
    head_dim = hidden // heads
    if draw(st.booleans()):
        values["head_dim"] = head_dim = 2 * half
    rope_type = draw(st.sampled_from(list(ROPES)))
    rope = {draw(st.sampled_from(["type", "rope_type"])): rope_type, **ROPES[rope_type]}
    if rope_type == "longrope":
        factors = st.lists(st.floats(0.5, 64), min_size=head_dim // 2, max_size=head_dim // 2)
        rope |= {"short_factor": draw(factors), "long_factor": draw(factors)}
    values[draw(st.sampled_from(["rope_scaling", "rope_parameters"]))] = rope
    dtypes = st.sampled_from(["float32", "bfloat16", "float16"])
    optional = {
        "rope_theta": st.integers(1, 10**7) | st.floats(1, 1e7),
        "layer_types": st.lists(st.sampled_from(types), min_size=layers, max_size=layers),
        "max_window_layers": st.integers(0, 8),
        "vocab_size": st.integers(1, 200000),
        "intermediate_size": st.integers(1, 99),
        "max_position_embeddings": st.integers(1, 10**6),
        "hidden_act": st.sampled_from(ACTIVATIONS),
        "rms_norm_eps": st.floats(0, 1e-3),
        "attention_dropout": st.floats(0, 1) | st.just(0),
        "tie_word_embeddings": st.booleans(),
        "use_cache": st.booleans(),
        "eos_token_id": st.none() | st.integers(0, 99) | st.lists(st.integers(0, 99), max_size=3),
        "num_labels": st.integers(1, 5),
        "use_mrope": st.just(False),
        "note": st.recursive(st.none() | st.booleans() | st.text(), st.lists, max_leaves=4),
        draw(st.sampled_from(["dtype", "torch_dtype"])): dtypes,
    }
    return values | draw(st.fixed_dictionaries({}, optional=optional))


@settings(max_examples=60, deadline=None)
@given(qwen2_json())
def test_any_config_reads_and_writes_as_in_transformers(values: dict[str, Any]) -> None:
    assert_reads_the_same(values)


# What is refused. Every case differs from TINY, which is accepted, by the keys shown; the pattern is in the message.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "llama"}, "model_type is 'llama'; supported: qwen2, qwen2_audio"),
    ({"model_type": None}, "model_type is None; supported: qwen2"),
    ({"hidden_act": "snake"}, "hidden_act is 'snake'.*known: silu"),
    ({"dtype": "int8"}, "dtype is 'int8'"),
    ({"dtype": "float32", "torch_dtype": "bfloat16"}, "torch_dtype is 'bfloat16', but dtype is 'float32'"),
    ({"problem_type": "clustering"}, "problem_type is 'clustering'"),
    ({"problem_type": "single_label_classification", "num_labels": 1}, "num_labels is 1"),
    # geometry
    ({"num_key_value_heads": 3}, "num_attention_heads, 4, is not a multiple of num_key_value_heads, 3"),
    ({"num_key_value_heads": 8}, "num_attention_heads, 4, is not a multiple of num_key_value_heads, 8"),
    ({"hidden_size": 34}, "hidden_size, 34, is not a multiple of num_attention_heads, 4"),
    ({"hidden_size": 36}, "head_dim is 9"),
    ({"head_dim": 7}, "head_dim is 7"),
    ({"head_dim": 0}, "head_dim is 0"),
    ({"head_dim": -8}, "head_dim is -8"),
    *(
        ({name: size}, f"{name} is {size}, expected 1 or more")
        for name in list(TINY)[1:]
        for size in (0, -4)
    ),
    ({"max_window_layers": -1}, "max_window_layers is -1"),
    ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0"),
    ({"initializer_range": -0.02}, "initializer_range is -0.02"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
    ({"attention_dropout": 1.5}, "attention_dropout is 1.5"),
    ({"classifier_dropout": -0.1}, "classifier_dropout is -0.1"),
    ({"num_labels": 0}, "num_labels is 0"),
    ({"num_labels": 3, "id2label": {"0": "no", "1": "yes"}}, "num_labels is 3, but id2label"),
    ({"label2id": {"no": 0, "yes": 1}}, "num_labels is 2, but label2id"),
    ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, but num_hidden_layers is 3"),
    ({"layer_types": ["full_attention", "full_attention", "mamba"]}, "layer_types is 'mamba'"),
    ({"layer_types": ["sliding_attention"] * 3}, "needs use_sliding_window true"),
    ({"layer_types": ["sliding_attention"] * 3, "use_sliding_window": True, "sliding_window": None}, "True and None"),
    # other JSON types
    ({"hidden_size": "32"}, "hidden_size is '32', expected an integer"),
    ({"hidden_size": 32.0}, "hidden_size is 32.0, expected an integer"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True, expected an integer"),
    ({"num_hidden_layers": 2**31}, "num_hidden_layers is 2147483648, expected 4096 or less"),
    ({"head_dim": 10**30}, "head_dim is 10{30}, expected 16777216 or less"),
    ({"max_position_embeddings": 2**31}, "max_position_embeddings is 2147483648, expected 2147483647 or less"),
    ({"num_hidden_layers": None}, "num_hidden_layers is None, expected an integer"),
    ({"use_cache": "yes"}, "use_cache is 'yes', expected true or false"),
    ({"return_dict": None}, "return_dict is None, expected true or false"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', expected a number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"attention_dropout": False}, "attention_dropout is False, expected a number"),
    ({"hidden_act": 1}, "hidden_act is 1, expected a string"),
    ({"layer_types": "full_attention"}, "layer_types is 'full_attention', expected a list"),
    ({"eos_token_id": "1"}, "eos_token_id is '1', expected an integer or a list, each item an integer or null"),
    ({"eos_token_id": [1, None]}, "eos_token_id is "),
    ({"id2label": ["a", "b"]}, "id2label is .*expected an object"),
    ({"id2label": {"first": "a"}}, "id2label is .*expected an object"),
    ({"architectures": "Qwen2ForCausalLM"}, "architectures is .*expected a list"),
    # keys that would change the numbers
    ({"use_mrope": True}, "use_mrope is True"),
    ({"is_causal": False}, "is_causal is False"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder is True"),
    ({"per_layer_config": {"0": {"hidden_size": 8}}}, "per_layer_config is "),
    ({"tie_last_hidden_states": False}, "tie_last_hidden_states is False"),
    ({"token_classification_bias": False}, "token_classification_bias is False"),
    ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config needs original_max"),
    ({"dual_chunk_attention_config": 8}, "dual_chunk_attention_config needs original_max"),
    ({"dual_chunk_attention_config": {"original_max_position_embeddings": 0}}, "dual_chunk_attention_config needs"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused_by_name(values: dict[str, Any], message: str) -> None:
    assert_refused(values, message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_config": {"model_type": "llama"}}, "text_config: model_type is 'llama', expected 'qwen2'"),
        ({"text_config": {"use_mrope": True}}, "text_config: use_mrope"),
        ({"text_config": 3}, "text_config is 3"),
        ({"audio_config": {"d_model": 1281}}, "audio_config: d_model, 1281, is not a multiple"),
        ({"audio_config": {"activation_function": "snake"}}, "audio_config: activation_function is 'snake'"),
        ({"audio_config": {"hidden_size": 64, "d_model": 32}}, "audio_config: hidden_size is 64, but d_model is 32"),
        ({"audio_config": {"encoder_layers": 0}}, "audio_config: encoder_layers is 0"),
        ({"audio_config": {"num_mel_bins": -1}}, "audio_config: num_mel_bins is -1"),
        ({"audio_config": {"dropout": 2}}, "audio_config: dropout is 2"),
        ({"audio_token_index": -1}, "audio_token_index is -1"),
    ],
)
def test_audio_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict({"model_type": "qwen2_audio", **values})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "recursion"),
        (b'["qwen2"]', "expected a JSON object"),
        (b'{"model_type": "qwen2", "vocab_size": 0}', "vocab_size is 0"),
    ],
)
def test_bad_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    for read in (config_from_file, Qwen2Config.from_json_file):
        with pytest.raises(ValueError, match=message) as caught:
            read(path)
        assert str(caught.value).startswith(str(path))
    with pytest.raises(FileNotFoundError, match="absent"):
        config_from_file(tmp_path / "absent")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        config_from_file(tmp_path)


def test_known_activations_are_those_that_exist() -> None:
    assert set(ACTIVATIONS) == set(ACTIVATION)


def test_another_class_refuses() -> None:
    with pytest.raises(ValueError, match="model_type is 'qwen2', expected 'qwen2_audio'"):
        Qwen2AudioConfig.from_dict(TINY)


def test_save_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "new" / "folder"
    config = Qwen2Config.from_dict(TINY)
    config.save_pretrained(folder)
    assert Qwen2Config.from_json_file(folder / "config.json") == config
    before = (folder / "config.json").read_bytes()

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        dataclasses.replace(config, vocab_size=5).save_pretrained(folder)
    assert os.listdir(folder) == ["config.json"]
    assert (folder / "config.json").read_bytes() == before


def test_replace_derives_anew_what_was_derived() -> None:
    config = Qwen2Config.from_dict({**TINY, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1})
    assert config.layer_types == ("full_attention", "sliding_attention", "sliding_attention")
    shorter = dataclasses.replace(config, num_hidden_layers=2, hidden_size=64)
    assert shorter.layer_types == ("full_attention", "sliding_attention")
    assert shorter.head_dim == 16
    assert dataclasses.replace(shorter, num_hidden_layers=3, hidden_size=32) == config
    assert dataclasses.replace(config, num_labels=4).id2label[3] == "LABEL_3"
    assert dataclasses.replace(config, id2label={0: "a", 1: "b", 2: "c"}).num_labels == 3

    listed = Qwen2Config.from_dict(config.to_dict())  # layer_types as they would follow, and head_dim given
    assert dataclasses.replace(listed, num_hidden_layers=2).layer_types == shorter.layer_types
    given = dataclasses.replace(config, head_dim=4, layer_types=("sliding_attention",) * 3)
    assert dataclasses.replace(given, hidden_size=64).head_dim == 4
    with pytest.raises(ValueError, match="layer_types has 3 entries"):
        dataclasses.replace(given, num_hidden_layers=2)


def test_static_argument_of_jit() -> None:
    values = {**TINY, "quantization_config": {"modules": ["a", {"b": 1}]}, "eos_token_id": [1, 2]}
    config, equal = Qwen2Config.from_dict(values), Qwen2Config.from_dict(copy.deepcopy(values))
    traces = 0

    @partial(jax.jit, static_argnames="config")
    def width(x: jax.Array, config: Qwen2Config) -> jax.Array:
        nonlocal traces
        traces += 1
        return x * config.head_dim

    for each in (config, equal, pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert each == config
        assert width(2.0, config=each) == 16.0
    assert traces == 1
    assert width(2.0, config=dataclasses.replace(config, hidden_size=64)) == 32.0
    assert dataclasses.replace(config, rms_norm_eps=1e-5) != config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 8  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.extra["note"] = 1  # type: ignore[index]
    values["quantization_config"]["modules"].clear()  # ours is a copy
    assert config == equal


def test_made_in_python() -> None:
    small = {key: value for key, value in TINY.items() if key != "model_type"}
    rope = RopeParameters(rope_type="linear", factor=2)
    config = Qwen2Config(**small, rope_parameters=rope, extra={"note": [1]})
    assert config == Qwen2Config.from_dict(
        {**TINY, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "note": [1]}
    )
    assert config == Qwen2Config(**small, rope_parameters={"rope_type": "linear", "factor": 2.0}, extra={"note": (1,)})
    assert isinstance(config.rope_parameters.factor, float)
    assert config.head_dropout == 0.1
    assert dataclasses.replace(config, hidden_dropout=0.3).head_dropout == 0.3
    assert dataclasses.replace(config, hidden_dropout=0.3, classifier_dropout=0.0).head_dropout == 0.0
    with pytest.raises(TypeError, match="hiden_size"):
        Qwen2Config(hiden_size=8)  # type: ignore[call-arg]
