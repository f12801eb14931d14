"""Adapters against the peft library: every kind, loaded and saved, merged, several in a batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flaxqwen import Model
from flaxqwen.generation.config import GenerationConfig
from flaxqwen.models.qwen2 import Qwen2ForCausalLM
from tests.reference import close, pair, random_ids, th, torch

peft = pytest.importorskip("peft", reason="adapters are compared with the peft library: pip install flaxqwen[test]")

# Transformers' and peft's own, about each other.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 5, "lora_alpha": 8, "use_rslora": True, "target_modules": ATTENTION},
    "dora": {"r": 3, "use_dora": True, "target_modules": [*ATTENTION, "down_proj"]},
    "patterns": {
        "r": 4,
        "rank_pattern": {"q_proj": 2, r".*layers\.1\.self_attn\.v_proj": 6, "^model.layers.0.mlp.up_proj": 3},
        "alpha_pattern": {"v_proj": 3, "layers.0.mlp.up_proj": 20},
        "target_modules": ["q_proj", "v_proj", "up_proj"],
    },
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "regex": {
        "r": 4,
        "target_modules": r".*\.1\.(self_attn\.o_proj|mlp\.(gate|up)_proj)",
        "exclude_modules": ["up_proj"],
    },
    "layers": {"r": 4, "target_modules": ["k_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "saved": {"r": 4, "target_modules": ["k_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "head": {"r": 4, "target_modules": ["lm_head", "gate_proj"], "lora_bias": True},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "o_proj"]},
    "biases": {"r": 4, "target_modules": ["q_proj", "o_proj"], "bias": "all"},
    "lora-biases": {"r": 4, "target_modules": ["q_proj", "o_proj"], "bias": "lora_only"},
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request):
    return make_base(request.param)


@pytest.fixture(scope="module")
def untied():
    return make_base(False)


def make_base(tied: bool):
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, tie_word_embeddings=tied, vocab_size=97)
    return theirs, Model(module, params, module.config, GenerationConfig())


def adapter_of_peft(theirs: Any, folder: Path, seed: int = 0, **config: Any) -> Any:
    """A random adapter of peft on a copy of the model, saved into the folder."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(copy.deepcopy(theirs), peft.LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            elif parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def logits_of(theirs: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return theirs(input_ids=th(ids)).logits.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_peft(kind, base, tmp_path, rng):
    """What peft saves gives peft's logits here, beside the weights and merged; what we save, peft loads again."""
    theirs, model = base
    ids = random_ids(rng, (2, 9), 97)
    theirs_adapted = adapter_of_peft(theirs, tmp_path / "theirs", seed=int(rng.integers(1 << 30)), **KINDS[kind])
    if kind == "lora-biases":  # peft trains these, and leaves them out of the file
        add_biases(theirs_adapted, tmp_path / "theirs")
    want = logits_of(theirs_adapted, ids)
    before = np.asarray(model(ids).logits)
    assert np.abs(want - before).max() > 1e-2 * np.abs(before).max()
    adapted = model.load_adapter(tmp_path / "theirs")
    close(adapted(ids).logits, want)
    assert (np.asarray(adapted.disable_adapters()(ids).logits) == before).all()
    if kind != "head":
        merged = adapted.merge_adapter()
        close(merged(ids).logits, want)
        close(adapted.merge_and_unload()(ids).logits, want)
        assert (np.asarray(merged.unmerge_adapter()(ids).logits) == np.asarray(adapted(ids).logits)).all()
    else:
        with pytest.raises(ValueError, match="no bias that lora_bias could be merged into"):
            adapted.merge_adapter()
    adapted.save_adapter(tmp_path / "ours")
    mine, file = (
        load_file(tmp_path / "ours/adapter_model.safetensors"),
        load_file(tmp_path / "theirs/adapter_model.safetensors"),
    )
    assert set(mine) == set(file)
    assert all((mine[name] == file[name]).all() for name in file)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "ours").eval()
    close(logits_of(back, ids), want)


def add_biases(theirs_adapted: Any, folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    state = theirs_adapted.state_dict()
    biases = {name: tensor.numpy() for name, tensor in state.items() if name.endswith("q_proj.base_layer.bias")}
    assert biases
    save_file(load_file(path) | biases, path, metadata={"format": "pt"})
