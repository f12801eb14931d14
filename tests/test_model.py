"""A model called, counted and saved: its forward is the module's, whatever arrays it is given."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from flaxqwen import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Qwen2Config,
    init_cache,
)
from flaxqwen.convert.staging import Staging
from flaxqwen.generation.config import GenerationConfig
from flaxqwen.model import Model
from flaxqwen.models.qwen2 import Qwen2ForCausalLM
from tests.reference import close, padded_mask, pair, random_ids, th, tiny, torch

SMALL: dict[str, Any] = {"num_hidden_layers": 1, "vocab_size": 157}
V, D = 157, 64


@pytest.fixture(scope="module")
def models() -> tuple[Any, Model]:
    """Transformers' model, and ours with the same weights."""
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, **SMALL)
    return theirs, Model(module, params, module.config, GenerationConfig(eos_token_id=(3, 5), top_k=7))


@pytest.fixture
def model(models: tuple[Any, Model]) -> Model:
    return models[1]


@pytest.fixture
def ids(rng: np.random.Generator) -> np.ndarray:
    return random_ids(rng, (2, 8), V)


def same(ours: Any, other: Any) -> None:
    """Equal pytrees of arrays."""
    assert jax.tree.structure(ours) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(other), strict=True):
        assert a.shape == b.shape
        assert np.array_equal(a, b)


@contextmanager
def compilations() -> Iterator[list[float]]:
    """The seconds of each program that XLA compiles meanwhile."""
    seconds: list[float] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def run_theirs(theirs: Any, **inputs: Any) -> Any:
    with torch.no_grad():
        return theirs(**{k: th(v) if isinstance(v, np.ndarray) else v for k, v in inputs.items()})


def test_call_is_the_modules_forward(model: Model, ids: np.ndarray):
    mask = padded_mask([8, 5], 8, "left")
    options = {"output_attentions": True, "output_hidden_states": True}

    @jax.jit
    def forward(params: Any, ids: jax.Array, mask: jax.Array) -> Any:
        return model.module.apply({"params": params}, ids, mask, labels=ids, **options)

    got = model(ids, mask, labels=ids, **options)
    same(got, forward(model.params, ids, mask.astype(bool)))
    assert len(got.attentions) == 1
    assert len(got.hidden_states) == 2


def test_call_takes_lists_and_arrays_of_every_library(model: Model, ids: np.ndarray):
    mask = np.ones_like(ids)
    want, masked = model(ids).logits, model(ids, mask).logits
    others = [ids.tolist(), tuple(map(tuple, ids)), ids.astype(np.int64), jnp.asarray(ids), torch.tensor(ids), th(ids)]
    masks = [mask.tolist(), mask.astype(bool), mask.astype(np.float32), jnp.asarray(mask), torch.tensor(mask)]
    with compilations() as compiled:
        for other in others:
            assert np.array_equal(model(other).logits, want)
        for other in masks:
            assert np.array_equal(model(ids, attention_mask=other).logits, masked)
    assert not compiled  # all of them are one program


def test_call_takes_torch_embeddings(models: tuple[Any, Model], ids: np.ndarray):
    theirs, model = models
    embeds = theirs.model.embed_tokens(th(ids))
    assert embeds.requires_grad
    close(model(inputs_embeds=embeds).logits, model(ids).logits, relative=1e-6)
    rounded = embeds.bfloat16()
    close(model(inputs_embeds=rounded).logits, run_theirs(theirs, inputs_embeds=rounded.float()).logits)


def test_call_keeps_the_logits_asked_for(model: Model, ids: np.ndarray):
    every = model(ids).logits
    for keep in (1, 3, np.int64(3)):
        close(model(ids, logits_to_keep=keep).logits, every[:, -int(keep) :], relative=1e-6)
    close(model(ids, num_logits_to_keep=3).logits, every[:, -3:], relative=1e-6)
    close(model(ids, logits_to_keep=np.array([0, 6])).logits, every[:, [0, 6]], relative=1e-6)
    close(model(ids, logits_to_keep=[1, 5]).logits, every[:, [1, 5]], relative=1e-6)
    assert model(ids, return_dict=False)[0].shape == (2, 8, V)


def test_loss_equals_transformers(models: tuple[Any, Model], ids: np.ndarray, rng: np.random.Generator):
    theirs, model = models
    labels = np.where(rng.random(ids.shape) < 0.3, -100, ids).astype(np.int32)
    labels[0, 1] = ids[0, 1]
    want = run_theirs(theirs, input_ids=ids, labels=labels, num_items_in_batch=5).loss.item()
    for given in (labels, labels.tolist(), torch.tensor(labels)):
        assert float(model(ids, labels=given, num_items_in_batch=5).loss) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("side", ["none", "left"])
def test_continuation_equals_transformers(models: tuple[Any, Model], side: str, rng: np.random.Generator):
    """A prompt, then several tokens, then one by one, each with the mask of all that was seen."""
    theirs, model = models
    steps, width = (6, 3, 1, 1, 1), 12
    ids = random_ids(rng, (2, width), V)
    mask = padded_mask([width, width - 4], width, "left")
    valid = mask.astype(bool)
    ours, want, start = None, None, 0
    for step in steps:
        stop = start + step
        inputs: dict[str, Any] = {} if side == "none" else {"attention_mask": mask[:, :stop]}
        new = ids[:, start:stop]
        with compilations() as compiled:
            ours = model(new, **inputs, past_key_values=ours and ours.past_key_values)
        assert start < 10 or not compiled  # a mask that grows with the text compiles nothing
        want = run_theirs(theirs, input_ids=new, **inputs, past_key_values=want and want.past_key_values)
        where = valid[:, start:stop] if side == "left" else None
        close(ours.logits, want.logits, where=where)
        assert np.array_equal(ours.past_key_values.length, [stop, stop])
        start = stop


def test_the_cache_given_is_left_as_it_was(model: Model, ids: np.ndarray):
    cache = model(ids).past_key_values
    before = jax.tree.map(np.array, cache)
    first, again = (model(ids[:, :1], past_key_values=cache) for _ in range(2))
    same(first, again)
    same(cache, before)
    assert (cache.capacity, first.past_key_values.capacity) == (8, 512)
    # One with room is not grown, and rows of different lengths continue at their own.
    roomy = init_cache(model.config, 2, 16, jnp.float32)
    roomy = dataclasses.replace(model(ids, past_key_values=roomy).past_key_values, length=jnp.array([8, 5], jnp.int32))
    out = model(ids[:, :1], past_key_values=roomy)
    assert out.past_key_values.capacity == 16
    whole = model(np.concatenate([ids[1:, :5], ids[1:, :1]], axis=1)).logits
    close(out.logits[1, 0], whole[0, -1])


def test_cache_position_rewinds_a_cache(model: Model, ids: np.ndarray):
    cache = model(ids).past_key_values
    out = model(ids[:, 5:], np.ones((2, 8)), past_key_values=cache, cache_position=[5, 6, 7])
    close(out.logits, model(ids).logits[:, 5:])


def test_use_cache_false_returns_none(model: Model, ids: np.ndarray):
    assert model(ids, use_cache=False).past_key_values is None


def test_call_inside_transformations(model: Model, ids: np.ndarray):
    """Tracers cannot be looked at: the host's checks are for what is concrete."""
    want = model(ids).logits
    mask = np.ones((2, 8), np.int32)
    close(jax.jit(lambda ids, mask: model(ids, mask).logits)(ids, mask), want, relative=1e-6)
    close(jax.vmap(lambda row: model(row[None]).logits[0])(ids), want, relative=1e-6)

    def loss(params: Any) -> jax.Array:
        return dataclasses.replace(model, params=params)(ids, labels=ids).loss

    def plain(params: Any) -> jax.Array:
        return model.module.apply({"params": params}, ids, labels=ids).loss

    got, wanted = jax.grad(loss)(model.params), jax.jit(jax.grad(plain))(model.params)
    jax.tree.map(lambda a, b: close(a, b, relative=1e-5), got, wanted)

    @jax.jit
    def step(cache: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        out = model(token, past_key_values=cache)
        return out.past_key_values, out.logits

    cache, logits = jax.lax.scan(step, init_cache(model.config, 2, 8, jnp.float32), ids.T[:, :, None])
    close(np.swapaxes(logits[:, :, 0], 0, 1), want)
    assert cache.capacity == 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1, V]], f"token id {V} is out of the vocabulary: expected 0 to {V - 1}"),
        ([[1, -1]], "token id -1 is out of the vocabulary"),
        ([[1, 2**32 + 1]], f"token id {2**32 + 1} is out of the vocabulary"),
        (torch.tensor([[V]]), f"token id {V} is out of the vocabulary"),
        (jnp.array([[V]]), f"token id {V} is out of the vocabulary"),
        ([1, 2], r"input_ids has shape \(2,\); expected \[batch, tokens\]"),
        ([[]], r"input_ids has shape \(1, 0\); expected \[batch, tokens\], none of them 0"),
        ([[1.0, 2.0]], "input_ids is float64; expected integers"),
        ("text", r"input_ids has shape \(\); expected"),
        ([[1, 2], [3]], "input_ids is no array: .*inhomogeneous"),
    ],
)
def test_ids_that_are_none_are_refused(given: Any, message: str, model: Model):
    with pytest.raises(ValueError, match=message):
        model(given)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((2, 7)), r"attention_mask has shape \(2, 7\); expected 2 rows of 8 tokens$"),
        (np.ones((2, 9)), r"\(2, 9\); expected 2 rows of 8"),
        (np.ones((3, 8)), r"\(3, 8\); expected 2 rows"),
        (np.ones((1, 8)), r"\(1, 8\); expected 2 rows"),
        (np.ones(8), r"\(8,\); expected"),
        (np.ones((2, 8, 8)), r"\(2, 8, 8\); expected"),
        (np.ones((3, 1, 8, 8), bool), r"\(3, 1, 8, 8\); expected 2 rows"),
        (np.ones((2, 1, 8, 9), bool), r"\(2, 1, 8, 9\); expected 2 rows of 8"),
        (np.ones((2, 3, 8, 8), bool), r"expected \[batch, 1 or 4, 8, slots\]"),
        (np.full((2, 8), -1e9), "values other than 0 and 1"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: np.ndarray, message: str, model: Model, ids: np.ndarray):
    with pytest.raises(ValueError, match=message):
        model(ids, mask)


def test_masks_of_a_continuation_cover_what_was_seen(model: Model, ids: np.ndarray):
    cache = model(ids).past_key_values
    for columns in (1, 8, 10):
        with pytest.raises(ValueError, match=r"expected 2 rows of 9 tokens: 8 in past_key_values and 1 new$"):
            model(ids[:, :1], np.ones((2, columns)), past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values has 2 rows; expected 1, as the new tokens"):
        model(ids[:1, :1], past_key_values=cache)
    with pytest.raises(TypeError, match="past_key_values is a tuple; expected the KVCache"):
        model(ids[:, :1], past_key_values=tuple(cache.layers))


def test_4d_masks(model: Model, ids: np.ndarray):
    causal = np.tril(np.ones((8, 8), bool))[None, None]
    want = model(ids).logits
    close(model(ids, causal).logits, want, relative=1e-6)
    close(model(ids, np.repeat(causal, 2, axis=0)).logits, want, relative=1e-6)


def test_unknown_arguments_are_type_errors(model: Model, ids: np.ndarray):
    with pytest.raises(TypeError, match="Qwen2ForCausalLM has no argument 'output_attention'; did you mean"):
        model(ids, output_attention=True)
    for value in (None, 1, "x"):  # None is no way around it
        with pytest.raises(TypeError, match="has no argument 'head_mask'"):
            model(ids, head_mask=value)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(ids, inputs_embeds=np.zeros((2, 8, D), np.float32))
    with pytest.raises(ValueError, match=r"inputs_embeds has shape \(8, 64\); expected \[batch, tokens, hidden_size\]"):
        model(inputs_embeds=np.zeros((8, D), np.float32))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": [[1, -1]]}, f"labels has -1; expected 0 to {V - 1}, or -100 for what does not count"),
        ({"shift_labels": np.array([[V, 2]])}, f"shift_labels has {V}; expected 0 to {V - 1}"),
        ({"logits_to_keep": np.array([0, 2])}, "logits_to_keep has 2; expected -2 to 1"),
        ({"logits_to_keep": np.array([[-3]])}, "logits_to_keep has -3; expected -2 to 1"),
    ],
)
def test_labels_and_positions_that_are_none_are_refused(given: Any, message: str, model: Model):
    with pytest.raises(ValueError, match=message):
        model([[1, 2]], **given)


def test_labels_of_heads(rng: np.random.Generator):
    """Classes are num_labels; scores are any numbers."""
    changes = SMALL | {"num_labels": 3, "pad_token_id": 0}
    ids = random_ids(rng, (2, 4), V)
    for cls in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        model = cls.from_config(Qwen2Config.from_dict(tiny(**changes)))
        labels = np.zeros(2 if cls is AutoModelForSequenceClassification else (2, 4), np.int32)
        assert np.isfinite(model(ids, labels=labels).loss)
        with pytest.raises(ValueError, match="labels has 3; expected 0 to 2"):
            model(ids, labels=labels + 3)
    regression = Qwen2Config.from_dict(tiny(**changes | {"num_labels": 1}))
    assert np.isfinite(AutoModelForSequenceClassification.from_config(regression)(ids, labels=np.array([7, -9])).loss)


def test_flags_are_true_or_false(model: Model, ids: np.ndarray):
    same(model(ids, use_cache=1, output_attentions=np.bool_(True)), model(ids, use_cache=True, output_attentions=True))
    assert isinstance(model(ids, return_dict=0), tuple)
    with pytest.raises(TypeError, match="return_dict is 'no'; expected True or False"):
        model(ids, return_dict="no")


def test_only_language_models_generate(model: Model, ids: np.ndarray):
    base = AutoModel.from_config(model.config)
    assert (model.can_generate(), base.can_generate()) == (True, False)
    with pytest.raises(TypeError, match="Qwen2Model has no language-model head: load it by AutoModelForCausalLM"):
        base.generate(ids)


@pytest.mark.parametrize("tied", [False, True])
def test_counts_equal_transformers(tied: bool):
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, **SMALL, tie_word_embeddings=tied)
    model = Model(module, params, module.config, GenerationConfig())
    for exclude in (False, True):
        for trainable in (False, True):
            assert model.num_parameters(trainable, exclude) == theirs.num_parameters(trainable, exclude)
    assert (model.dtype, model.device) == (np.float32, jax.devices()[0])
    assert repr(model) == f"Model(Qwen2ForCausalLM, {theirs.num_parameters():,} parameters, float32)"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("to", ["flax", "pytorch"])
@pytest.mark.parametrize("size", ["5GB", "40KB"])
def test_save_and_load(dtype: str, to: Any, size: str, model: Model, tmp_path: Path):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), model.params)
    saved = dataclasses.replace(model, params=params)
    saved.save_pretrained(tmp_path, to=to, max_shard_size=size)
    stem = "flax_model" if to == "flax" else "model"
    index = tmp_path / f"{stem}.safetensors.index.json"
    assert index.is_file() == (size == "40KB")
    assert (tmp_path / f"{stem}.safetensors").is_file() == (size == "5GB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    same(again.params, saved.params)
    assert again.generation_config == saved.generation_config
    said = {"dtype": dtype, "architectures": ("Qwen2ForCausalLM",)}
    assert again.config == dataclasses.replace(saved.config, **said) == AutoConfig.from_pretrained(tmp_path)
    if to == "pytorch":
        load_in_transformers(tmp_path, dtype, model if dtype == "float32" else None)


def load_in_transformers(folder: Path, dtype: str, model: Model | None) -> None:
    """Nothing is missing, left over or changed; logits are the model's."""
    import transformers

    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert theirs.dtype == getattr(torch, dtype)
    assert theirs.generation_config.eos_token_id == [3, 5]
    assert theirs.generation_config.top_k == 7
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored |= safetensors.numpy.load_file(file)
    assert set(stored) == set(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        kind = {2: np.int16, 4: np.int32}[tensor.element_size()]
        bits = tensor.view(torch.int16 if kind is np.int16 else torch.int32).numpy()
        assert np.array_equal(stored[name].view(kind), bits), name
    if model is not None:
        ids = random_ids(np.random.default_rng(0), (2, 8), V)
        close(model(ids).logits, run_theirs(theirs, input_ids=ids).logits)


@pytest.mark.parametrize("to", ["flax", "pytorch"])
def test_save_and_load_a_head_and_a_tied_model(to: Any, model: Model, tmp_path: Path):
    import transformers

    config = dataclasses.replace(model.config, num_labels=3, tie_word_embeddings=True)
    for auto, theirs in (
        (AutoModelForSequenceClassification, transformers.AutoModelForSequenceClassification),
        (AutoModelForCausalLM, transformers.AutoModelForCausalLM),
        (AutoModel, transformers.AutoModel),
    ):
        folder = tmp_path / auto.__name__
        saved = auto.from_config(config)
        saved.save_pretrained(folder, to=to)
        same(auto.from_pretrained(folder).params, saved.params)
        assert (folder / "generation_config.json").is_file() == saved.can_generate()
        if to == "pytorch":
            loaded, report = theirs.from_pretrained(folder, output_loading_info=True)
            assert not any(report.values()), report
            assert type(loaded).__name__ == type(saved.module).__name__


def test_save_refuses_before_it_writes(model: Model, tmp_path: Path):
    folder = tmp_path / "new"
    for options, message in (
        ({"to": "tensorflow"}, "to='tensorflow' is not one of flax, pytorch"),
        ({"max_shard_size": "5 apples"}, "'5 apples' is not a size"),
        ({"to": "orbax", "max_shard_size": "5GB"}, "orbax cuts by the mesh"),
    ):
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(folder, **options)
        assert not folder.exists()
    model.save_pretrained(folder, to="pytorch")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match=r"holds model\.safetensors, which would no longer be the same model"):
        model.save_pretrained(folder, to="flax")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_full_disk_leaves_the_folder_as_it_was(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "kept"
    model.save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write, room = os.pwrite, 150_000

    def full(fd: int, data: Any, offset: int) -> int:
        nonlocal room
        room -= len(data)
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data, offset)

    changed = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf + 1, model.params))
    for target in (folder, tmp_path / "new"):
        room = 150_000
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left on device"):
            changed.save_pretrained(target)
        monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_config_and_weights_take_their_places_together(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A process that ends right after the weights are there leaves no config of the ones before."""
    model.save_pretrained(tmp_path)
    commit = Staging.commit

    def interrupted(staging: Staging) -> None:
        commit(staging)
        raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "commit", interrupted)
    changed = dataclasses.replace(
        model,
        config=dataclasses.replace(model.config, rms_norm_eps=0.125),
        generation_config=GenerationConfig(top_k=3),
    )
    with pytest.raises(KeyboardInterrupt):
        changed.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rms_norm_eps"] == 0.125
    assert json.loads((tmp_path / "generation_config.json").read_text())["top_k"] == 3


def test_saving_again_replaces_the_weights(model: Model, tmp_path: Path):
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert json.loads((tmp_path / "flax_model.safetensors.index.json").read_text())["weight_map"]
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "flax_model.safetensors",
        "generation_config.json",
    ]
