"""Adapters of Qwen2-Audio, on the audio tower, the projector and the decoder, against the peft library."""

from __future__ import annotations

import copy
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flaxqwen import GenerationConfig, LoraConfig, Model
from flaxqwen.convert.names import AUDIO_PREFIXES
from flaxqwen.lora.files import PREFIX
from tests.generation.test_audio import SHORT, newer_prompt
from tests.lora.test_adapters import adapter_of_peft, peft, pytestmark  # noqa: F401
from tests.models.test_qwen2_audio import CLIPS, models, older_prompt, theirs_of  # noqa: F401
from tests.reference import close, th, torch

# Of both halves by one name, of the tower alone, of the projector; and all linear layers, which are not the positions.
TARGETS = {"named": ["q_proj", "v_proj", "fc1", "out_proj", "linear", "up_proj"], "all": "all-linear"}


@pytest.fixture(scope="module")
def model(models) -> Model:  # noqa: F811
    _, module, params = models
    return Model(module, params, module.config, GenerationConfig())


@pytest.mark.parametrize("targets", TARGETS)
def test_adapters_of_peft(models, model, rng, tmp_path: Path, targets: str):  # noqa: F811
    """Logits and greedy tokens with what peft saves; what we save, peft loads, with the same tensors."""
    base, other = copy.deepcopy(models[0]), copy.deepcopy(models[0])  # peft freezes what it is given, others train it
    theirs = adapter_of_peft(base, tmp_path / "theirs", r=3, lora_alpha=6, target_modules=TARGETS[targets])
    inputs = newer_prompt(older_prompt(rng, CLIPS[2], "left"))
    adapted = model.load_adapter(tmp_path / "theirs")
    wanted, valid = theirs_of(theirs, **inputs).logits, inputs["attention_mask"].astype(bool)
    close(adapted(**inputs).logits, wanted, where=valid)
    assert np.abs(wanted.numpy() - np.asarray(model(**inputs).logits)).max() > 0.01
    if targets == "named":
        with torch.no_grad():
            tokens = theirs.generate(**{name: th(value) for name, value in inputs.items()}, **SHORT)
        np.testing.assert_array_equal(adapted.generate(**inputs, **SHORT), tokens)
        with pytest.raises(ValueError, match="'default' adapts the audio tower, whose clips are no rows"):
            adapted(**inputs, adapter_names=["default"] * 4)

    adapted.save_adapter(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(other, tmp_path / "ours")
    wanted_state = peft.get_peft_model_state_dict(theirs)
    state = peft.get_peft_model_state_dict(back)
    assert state.keys() == wanted_state.keys()
    for name, tensor in wanted_state.items():
        np.testing.assert_array_equal(state[name].numpy(), tensor.numpy())


def test_adapters_of_transformers_4(models, model, rng, tmp_path: Path):  # noqa: F811
    """Whose file has the older names of the modules."""
    adapter_of_peft(copy.deepcopy(models[0]), tmp_path, r=3, target_modules=["q_proj", "fc1", "linear", "lm_head"])
    newer = model.load_adapter(tmp_path).get_adapter_state_dict()
    path = tmp_path / "adapter_model.safetensors"
    older = {}
    for name, tensor in load_file(path).items():
        for old, new in AUDIO_PREFIXES:
            if name.startswith(PREFIX + new):
                older[PREFIX + old + name.removeprefix(PREFIX + new)] = tensor
    assert len(older) == len(load_file(path))
    assert not set(older) & set(load_file(path))
    save_file(older, path)
    read = model.load_adapter(tmp_path).get_adapter_state_dict()
    given = model.load_adapter(
        peft_config=model.load_adapter(tmp_path).peft_config["default"], adapter_state_dict=older
    )
    for state in (read, given.get_adapter_state_dict()):
        assert state.keys() == newer.keys()
        assert all(np.array_equal(state[name], newer[name]) for name in newer)


def test_the_encoders_positions_are_not_adapted(model):
    with pytest.raises(ValueError, match="embed_positions are not supported: it is a table of sines"):
        model.add_adapter(LoraConfig(target_modules=["embed_positions"]))


def test_a_new_adapter_targets_both_halves(model):
    """q_proj is in the tower and in the decoder; a regular expression takes one of them."""
    both = model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    one = model.add_adapter(LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    counts = [len(jax.tree.leaves(adapted.adapters.loaded["default"][1])) for adapted in (both, one)]
    assert counts == [2 * (2 + 2), 2 * 2]
