"""The map of names is a bijection, on the real weight maps and on those of the audio model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flaxqwen.convert import to_name, to_path
from flaxqwen.convert.names import base_prefix, from_linen, is_ignored, layout_of, to_linen, with_prefix

AUDIO = [
    "language_model.model.layers.0.self_attn.q_proj.weight",
    "language_model.model.embed_tokens.weight",
    "language_model.lm_head.weight",
    "audio_tower.layers.31.self_attn_layer_norm.bias",
    "audio_tower.conv1.weight",
    "audio_tower.embed_positions.weight",
    "multi_modal_projector.linear.weight",
]


def test_a_name_becomes_the_path_of_the_modules():
    path = ("model", "layers_0", "self_attn", "q_proj", "weight")
    assert to_path("model.layers.0.self_attn.q_proj.weight") == path
    assert to_name(path) == "model.layers.0.self_attn.q_proj.weight"
    assert to_path("a.0.10.b") == ("a_0_10", "b")


def test_real_weight_maps_go_there_and_back(shared: Path):
    indexes = sorted((shared / "data/configs").glob("*/model.safetensors.index.json"))
    assert len(indexes) == 3
    for index in indexes:
        names = list(json.loads(index.read_text())["weight_map"])
        paths = [to_path(name) for name in names]
        assert [to_name(path) for path in paths] == names
        assert len(set(paths)) == len(names) > 400
        assert base_prefix(names) == "model."
        for path in paths:
            usual, _ = to_linen(path)
            assert from_linen(usual)[0] == path


@pytest.mark.parametrize("name", [*AUDIO, "a.0.10.b", "layers.007.x", "score.weight"])
def test_other_names_go_there_and_back(name: str):
    assert to_name(to_path(name)) == name
    usual, is_reversed = to_linen(to_path(name))
    assert from_linen(usual) == (to_path(name), is_reversed)


@pytest.mark.parametrize("name", ["a..b", "", "0.weight", "fc_1.weight", "a/b", "a.b-c", "a.\u0663"])
def test_names_that_would_not_come_back_are_refused(name: str):
    with pytest.raises(ValueError, match="has no parameter path"):
        to_path(name)


@pytest.mark.parametrize(
    ("name", "leaf", "is_reversed"),
    [
        ("model.embed_tokens.weight", "embedding", False),
        ("audio_tower.embed_positions.weight", "embedding", False),
        ("model.layers.0.input_layernorm.weight", "scale", False),
        ("model.norm.weight", "scale", False),
        ("audio_tower.layer_norm.weight", "scale", False),
        ("audio_tower.layer_norm.bias", "bias", False),
        ("model.layers.0.self_attn.q_proj.weight", "kernel", True),
        ("model.layers.0.self_attn.q_proj.bias", "bias", False),
        ("audio_tower.conv1.weight", "kernel", True),
        ("lm_head.weight", "kernel", True),
    ],
)
def test_linen_leaves(name: str, leaf: str, is_reversed: bool):
    path = to_path(name)
    assert to_linen(path) == ((*path[:-1], leaf), is_reversed)
    assert layout_of([path]) == "checkpoint"
    assert layout_of([to_linen(path)[0]]) == ("checkpoint" if leaf == "bias" else "linen")


@pytest.mark.parametrize(
    ("name", "found", "wanted", "expected"),
    [
        ("layers.0.mlp.up_proj.weight", "", "model.", "model.layers.0.mlp.up_proj.weight"),
        ("model.norm.weight", "model.", "", "norm.weight"),
        ("model.norm.weight", "model.", "transformer.", "transformer.norm.weight"),
        ("lm_head.weight", "model.", "", "lm_head.weight"),
        ("score.weight", "", "model.", "score.weight"),
        ("norm.weight", None, "model.", "norm.weight"),
    ],
)
def test_prefixes_of_the_base_model(name: str, found: str | None, wanted: str | None, expected: str):
    assert with_prefix(name, found, wanted) == expected


def test_buffers_of_old_checkpoints_are_known():
    assert is_ignored("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert is_ignored("rotary_emb.inv_freq")
    assert is_ignored("model.layers.0.self_attn.masked_bias")
    assert not is_ignored("model.layers.0.self_attn.q_proj.bias")
