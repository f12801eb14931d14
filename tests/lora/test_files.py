"""An adapter's config and file: what they may say, what is refused by name, and that both are written whole."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from safetensors.numpy import load_file, save_file

from flaxqwen import LoraConfig
from tests.lora.test_adapters import adapter_of_peft, logits_of, make_base, peft
from tests.reference import close, random_ids

# Transformers' and peft's own, about each other.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


@pytest.fixture(scope="module")
def untied():
    return make_base(False)


@pytest.mark.parametrize(
    "field",
    [{"target_modules": "["}, {"exclude_modules": "("}, {"rank_pattern": {"(": 3}}, {"alpha_pattern": {"*": 3}}],
)
def test_expressions_that_are_none(field):
    with pytest.raises(ValueError, match="is no regular expression"):
        LoraConfig(**{"target_modules": ["q_proj"]} | field)
    with pytest.raises(ValueError, match="layers_pattern goes with layers_to_transform, as in peft"):
        LoraConfig(target_modules=["q_proj"], layers_pattern="layers")


def test_published_configs_are_understood(shared):
    for path in sorted((shared / "data/lora/configs_only").glob("*.json")):
        values = json.loads(path.read_text())
        ours = LoraConfig.from_dict(values)
        names = [f"model.layers.3.{part}" for part in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm")]
        assert [ours.targets(name, True) for name in names] == [True, True, False]
        assert ours.scaling(names[0]) == values["lora_alpha"] / values["r"]
        theirs = peft.LoraConfig(**{k: v for k, v in ours.to_dict().items() if k not in ("runtime_config",)})
        assert set(theirs.target_modules) == set(values["target_modules"])


def test_a_config_and_tensors_in_place_of_the_folders(untied, tmp_path, rng):
    """As Transformers: each wins over what the folder has, and what is not given is read there."""
    theirs, model = untied
    base, ids = copy.deepcopy(theirs), random_ids(rng, (2, 6), 97)
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    for name in ("a", "b"):
        adapter_of_peft(theirs, tmp_path / name, seed=int(rng.integers(1 << 30)), **config)
    louder = peft.LoraConfig(**config | {"lora_alpha": 60})
    tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
    base.load_adapter(tmp_path / "a", "alpha", peft_config=louder)
    want = logits_of(base, ids)
    close(model.load_adapter(tmp_path / "a", peft_config=louder)(ids).logits, want)
    assert np.abs(np.asarray(model.load_adapter(tmp_path / "a")(ids).logits) - want).max() > 0.01
    given = model.load_adapter(tmp_path / "a", adapter_state_dict=tensors)
    close(given(ids).logits, model.load_adapter(tmp_path / "b")(ids).logits)
    with pytest.raises(ValueError, match="give peft_model_id, or peft_config and adapter_state_dict"):
        model.load_adapter(adapter_state_dict=tensors)


@pytest.mark.parametrize("failing", ["weights", "config"])
def test_a_write_that_fails_leaves_the_adapter_as_it_was(failing, untied, tmp_path, monkeypatch):
    _, model = untied
    config = LoraConfig(r=2, target_modules=["q_proj"])
    model.add_adapter(config).save_adapter(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner, name = (Path, "write_text") if failing == "config" else (safetensors.numpy, "save_file")
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(OSError, match="No space left on device"):
        model.add_adapter(dataclasses.replace(config, lora_alpha=64), seed=1).save_adapter(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_peft_does_not_combine_is_refused():
    with pytest.raises(ValueError, match="lora_bias goes without use_dora"):
        LoraConfig(use_dora=True, lora_bias=True)
    with pytest.raises(ValueError, match="lora_bias"):
        peft.LoraConfig(use_dora=True, lora_bias=True)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("fan_in_fan_out", True, "fan_in_fan_out=True"),
        ("layer_replication", [[0, 2]], "layer_replication"),
        ("trainable_token_indices", [3], "trainable_token_indices"),
        ("alora_invocation_tokens", [1, 2], "alora_invocation_tokens"),
        ("use_qalora", True, "use_qalora"),
        ("target_parameters", ["x"], "target_parameters"),
        ("a_field_of_the_future", 1, "a_field_of_the_future"),
        ("peft_type", "IA3", "peft_type is 'IA3'"),
        ("init_lora_weights", "pissa", "init_lora_weights is 'pissa'"),
        ("bias", "some", "bias is 'some'"),
        ("r", 0, "expected ranks above 0"),
        ("target_modules", ["c_attn"], "names no linear layer"),
        ("target_modules", 5, "target_modules is 5, expected a list, each item a string or a string or null"),
        ("modules_to_save", "lm_head", "modules_to_save is 'lm_head', expected a list"),
        ("lora_alpha", "16", "lora_alpha is '16', expected a number"),
        ("lora_alpha", float("nan"), "lora_alpha is nan, expected a number"),
        ("alpha_pattern", {"q_proj": "x"}, "alpha_pattern is .*expected an object"),
        ("layers_to_transform", "x", "layers_to_transform is 'x', expected"),
        ("use_dora", "yes", "use_dora is 'yes', expected true or false"),
        ("r", True, "r is True, expected an integer"),
    ],
)
def test_configs_that_would_change_the_numbers_are_refused(field, value, message, untied, tmp_path):
    _, model = untied
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, field: value}))
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path)
