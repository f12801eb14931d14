"""Models made from a config: random weights as Transformers draws them, and the shapes of every published geometry."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import flaxqwen
from flaxqwen import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Qwen2AudioConfig,
    Qwen2Config,
    initialization,
)
from flaxqwen.auto import param_shapes
from flaxqwen.convert import to_name, to_path
from flaxqwen.convert.memory import SMALLEST
from flaxqwen.sharding import Sharding, make_mesh
from tests.conftest import find_shared
from tests.pages import flags_at, has_huge_pages
from tests.reference import leaves_of, random_ids, tiny, torch

SMALL: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 157, "pad_token_id": 11}
# Parameters of Qwen2ForCausalLM, a tied head counted once, by the name of a config's folder.
COUNTS = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "cogito-v1-preview-qwen-14B": 14_765_947_904,  # a shorter vocabulary
}


@has_huge_pages
def test_weights_lie_in_huge_pages(tmp_path: Path):
    """All 9, drawn, quantized and read from a checkpoint; no norms and biases."""
    config = Qwen2Config(vocab_size=4100, hidden_size=1024, intermediate_size=1030, num_hidden_layers=1)
    models = [AutoModelForCausalLM.from_config(config, dtype="bfloat16", quantize=scheme) for scheme in (None, "int8")]
    models[0].save_pretrained(tmp_path)
    for model in (*models, AutoModelForCausalLM.from_pretrained(tmp_path)):
        weights = [leaf for leaf in jax.tree.leaves(model.params) if leaf.nbytes >= SMALLEST]
        assert len(weights) == 9
        assert all("hg" in flags_at(weight.unsafe_buffer_pointer()) for weight in weights)


def test_large_weights_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch):
    """The same on a mesh; no part like another. The embedding of 0.5B takes a fifth of the memory of one piece."""
    draw = partial(initialization._draw_normal, dtype=jnp.bfloat16, zero_row=3)
    sizes = []
    for most in (1 << 40, initialization.LARGEST_DRAW):
        monkeypatch.setattr(initialization, "LARGEST_DRAW", most)
        jax.clear_caches()
        lowered = draw.func.lower(jax.random.key(0), 0.02, shape=(151936, 896), place=None, **draw.keywords)
        sizes.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    assert sizes[1] < sizes[0] / 3
    assert [initialization._blocks_of(shape) for shape in ((151936, 896), (4864, 896), (151937, 896))] == [16, 1, 1]
    monkeypatch.setattr(initialization, "LARGEST_DRAW", 1000)
    sharding = Sharding.fit(make_mesh(devices=jax.devices()[:1]), Qwen2Config())
    places = (None, (("mlp", "up_proj", "weight"), sharding))
    alone, cut = (np.asarray(draw(jax.random.key(1), 0.5, shape=(60, 100), place=place)) for place in places)
    assert np.array_equal(alone, cut)
    assert not alone[3].any()
    parts = np.delete(alone, 3, axis=0).astype(np.float64)
    assert len(np.unique(parts, axis=0)) == 59
    assert stats.kstest(parts.ravel(), "norm", (0, 0.5)).pvalue > 1e-3


def test_random_weights_are_distributed_as_in_transformers():
    """Norms one, biases zero, the padding row zero, all else normal: each tensor against the same of Transformers."""
    import transformers

    values = tiny(**SMALL, initializer_range=0.07)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForTokenClassification.from_config(transformers.Qwen2Config.from_dict(values))
    model = flaxqwen.AutoModelForTokenClassification.from_config(Qwen2Config.from_dict(values), seed=3)
    ours, state = leaves_of(model), theirs.state_dict()
    assert set(ours) == set(state)
    for name, leaf in ours.items():
        want = state[name].numpy()
        assert (leaf.shape, leaf.dtype) == (want.shape, want.dtype)
        if want.min() == want.max():
            assert np.array_equal(leaf, want), name
            continue
        assert np.array_equal((leaf == 0).all(axis=1), (want == 0).all(axis=1)), name
        drawn = leaf[leaf != 0]
        assert drawn.size >= leaf.size - 64
        assert stats.kstest(drawn, "norm", (0, 0.07)).pvalue > 1e-3, name
    assert not ours["model.embed_tokens.weight"][SMALL["pad_token_id"]].any()
    flat = {name: leaf.ravel()[:2048] for name, leaf in ours.items() if leaf.size > 4096}
    correlation = np.corrcoef(list(flat.values())) - np.eye(len(flat))
    assert np.abs(correlation).max() < 0.15  # every tensor is drawn apart


def test_parts_of_audio_are_drawn_by_their_own_configs():
    text = tiny(**SMALL, initializer_range=0.1)
    audio = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "d_model": 64, "num_mel_bins": 8}
    values = {"text_config": text, "audio_config": audio | {"initializer_range": 0.05, "max_source_positions": 40}}
    ours = leaves_of(flaxqwen.AutoModelForSeq2SeqLM.from_config(Qwen2AudioConfig.from_dict(values)))
    for name, leaf in ours.items():
        if name.endswith("norm.weight") or leaf.ndim == 1:
            continue
        wanted = 0.05 if "audio_tower" in name else 0.1
        assert stats.kstest(leaf[leaf != 0], "norm", (0, wanted)).pvalue > 1e-4, name
        if "embed_tokens" in name:
            assert not leaf[SMALL["pad_token_id"]].any()


def test_random_weights_follow_the_seed():
    config = Qwen2Config.from_dict(tiny(**SMALL))
    first, again, other = (leaves_of(AutoModelForCausalLM.from_config(config, seed=seed)) for seed in (5, 5, 6))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["lm_head.weight"], other["lm_head.weight"])
    # A decoder has the same weights whatever head is on it.
    base = leaves_of(AutoModelForSequenceClassification.from_config(config, seed=5))
    assert all(np.array_equal(first[name], base[name]) for name in first if name.startswith("model."))


def test_random_weights_have_the_configs_dtype():
    import transformers

    values = tiny(**SMALL, dtype="bfloat16", initializer_range=0.0)
    config = Qwen2Config.from_dict(values)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config.from_dict(values))
    model = AutoModelForCausalLM.from_config(config)
    assert (str(theirs.dtype), model.dtype, model.config) == ("torch.bfloat16", jnp.bfloat16, config)
    weight = np.asarray(model.params["lm_head"]["weight"], np.float32)
    assert np.std(weight) == pytest.approx(0.02, rel=0.05)  # a range of 0 means the default, as there
    assert np.std(theirs.lm_head.weight.float().detach().numpy()) == pytest.approx(0.02, rel=0.05)
    assert np.abs(weight).max() > 3.2 * 0.02  # of 10,048 draws; drawn in bfloat16 there would be none
    wide = AutoModelForCausalLM.from_config(config, dtype="float32")
    assert (wide.dtype, wide.config.dtype, wide.module.config.dtype) == (np.float32, "float32", "float32")
    assert AutoModelForCausalLM.from_config(dataclasses.replace(config, dtype=None)).dtype == np.float32
    with pytest.raises(ValueError, match="dtype 'int4'"):
        AutoModelForCausalLM.from_config(config, dtype="int4")


def test_a_random_model_runs(rng: np.random.Generator):
    model = AutoModelForCausalLM.from_config(Qwen2Config.from_dict(tiny(**SMALL, tie_word_embeddings=True)))
    assert model(random_ids(rng, (2, 9), SMALL["vocab_size"])).logits.shape == (2, 9, SMALL["vocab_size"])
    assert model.generation_config.pad_token_id == SMALL["pad_token_id"]


GEOMETRY = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
GEOMETRY += ("num_key_value_heads", "head_dim", "tie_word_embeddings")
FILES = sorted((find_shared() or Path("-")).glob("data/configs/*/config.json"))
CONFIGS = [path for path in FILES if json.loads(path.read_text())["model_type"] == "qwen2"]


@functools.cache
def shapes_of(**geometry: Any) -> dict[str, tuple[int, ...]]:
    shapes = param_shapes(AutoModelForCausalLM.module_of(Qwen2Config(**geometry)))
    return {to_name(path): shape for path, shape in shapes.items()}


def shapes_of_config(config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by name. Tracing 80 layers takes a second: configs of one geometry share it."""
    return shapes_of(**{name: getattr(config, name) for name in GEOMETRY})


@pytest.mark.parametrize("path", CONFIGS, ids=[path.parent.name for path in CONFIGS])
def test_shapes_of_every_published_config(path: Path, shared: Path):
    values = json.loads(path.read_text())
    spec = importlib.util.spec_from_file_location("make_reference", shared / "tools" / "make_reference.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    alive = len(jax.live_arrays())
    config = AutoConfig.from_pretrained(path.parent)
    shapes = shapes_of_config(config)
    assert len(jax.live_arrays()) == alive  # 72B would take 145 GB
    assert shapes == dict(tool.shapes(values))
    sizes = [name for name in COUNTS if shapes_of_config(AutoConfig.from_pretrained(path.parents[1] / name)) == shapes]
    assert [COUNTS[name] for name in sizes] == [sum(map(math.prod, shapes.values()))]


def test_real_weight_maps_have_our_names(shared: Path):
    """The indexes of real checkpoints name each parameter and nothing else."""
    indexes = sorted((shared / "data" / "configs").glob("*/model.safetensors.index.json"))
    assert len(indexes) >= 3
    for index in indexes:
        names = set(json.loads(index.read_text())["weight_map"])
        assert names == set(shapes_of_config(AutoConfig.from_pretrained(index.parent)))
        assert {to_name(to_path(name)) for name in names} == names
