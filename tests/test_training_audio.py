"""The training step of Qwen2-Audio against PyTorch and peft, and against itself: accumulated, recomputed, scanned."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxqwen import GenerationConfig, LoraConfig, Model
from flaxqwen.config import Qwen2AudioConfig
from flaxqwen.convert import to_path
from flaxqwen.models.qwen2_audio import Qwen2AudioForConditionalGeneration
from flaxqwen.training import (
    TrainState,
    assemble_adapter,
    count_items,
    loss_sum,
    make_eval_step,
    make_optimizer,
    make_schedule,
    make_train_step,
    stack_layers,
    unstack_layers,
)
from tests.models.test_qwen2_audio import (  # noqa: F401
    BINS,
    CLIPS,
    FRAMES,
    config_dict,
    expanded,
    models,
    older_prompt,
    random_labels,
    theirs_of,
)
from tests.reference import close, random_ids, th, torch, torch_losses

STEPS, WIDTH = 10, 100
SETTINGS: dict[str, Any] = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1, "max_grad_norm": 1.0}
Batch = dict[str, np.ndarray]


def make_batch(rng: np.random.Generator, clips: tuple[int, ...], side: str = "left") -> Batch:
    """Rows with clips, of one width; what the mask hides has labels, which do not count."""
    batch = expanded(older_prompt(rng, clips, side))
    room = WIDTH - batch["input_ids"].shape[1]
    for name in ("input_ids", "attention_mask", "position_ids"):
        batch[name] = np.pad(batch[name], ((0, 0), (room, 0) if side == "left" else (0, room)))
    hidden = batch["attention_mask"] == 0
    batch["labels"] = np.where(hidden, random_ids(rng, hidden.shape), random_labels(rng, batch["attention_mask"]))
    return batch


def our_losses(
    step: Any, state: TrainState, batches: list[Batch], frozen: Any = None
) -> tuple[list[float], TrainState]:
    step = jax.jit(step, donate_argnums=0)
    losses = []
    for batch in batches:
        state, metrics = step(state, batch, frozen or {})
        losses.append(float(metrics["loss"]))
    return losses, state


def test_steps_as_in_pytorch(models, rng: np.random.Generator):  # noqa: F811
    """The loss of each step within 1e-4, with clipping, decay and warm-up; the table of positions stays as it was."""
    theirs, module, params = models
    batches = [make_batch(rng, CLIPS[2], side) for side in ("left", "right") * (STEPS // 2)]
    schedule = make_schedule(STEPS, 1e-3, warmup_steps=2)
    optimizer = make_optimizer(schedule, **SETTINGS)
    state = TrainState.create({"params": jax.tree.map(jnp.copy, params)}, optimizer)
    losses, state = our_losses(make_train_step(module, optimizer), state, batches)
    np.testing.assert_allclose(losses, torch_losses(copy.deepcopy(theirs), batches, schedule, **SETTINGS), rtol=1e-4)
    towers = [tree["model"]["audio_tower"] for tree in (state.trainable["params"], params)]
    np.testing.assert_array_equal(*(tower["embed_positions"]["weight"] for tower in towers))
    assert np.abs(np.subtract(*(tower["conv1"]["weight"] for tower in towers))).max() > 1e-3


def test_gradients_as_in_pytorch(models, rng: np.random.Generator):  # noqa: F811
    theirs, module, params = models
    batch = make_batch(rng, CLIPS[1])
    model = copy.deepcopy(theirs)
    model(**{name: th(values) for name, values in batch.items()}).loss.backward()
    value, gradients = gradients_of(module, params, batch)
    items = int(count_items(module, batch))
    assert items < (batch["labels"][:, 1:] >= 0).sum()  # some are hidden
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = gradients
            for key in to_path(name):
                own = own[key]
            close(own / items, parameter.grad, 1e-4)


# Of both halves by one name, of the tower alone, of the projector and of the decoder alone.
ADAPTED = ("q_proj", "v_proj", "fc1", "out_proj", "linear", "up_proj")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_adapters_train_as_in_peft(models, rng: np.random.Generator, tmp_path: Path):  # noqa: F811
    """Losses within 1e-4, with layers computed again; peft loads what is saved, with our logits."""
    peft = pytest.importorskip("peft", reason="adapters are compared with the peft library")
    theirs, module, params = models
    base = Model(module, params, module.config, GenerationConfig())
    config = LoraConfig(r=3, lora_alpha=6, target_modules=ADAPTED)
    fresh = base.add_adapter(config, seed=int(rng.integers(1000)))
    fresh.save_adapter(tmp_path / "start")
    batches = [make_batch(rng, CLIPS[2]) for _ in range(STEPS)]
    optimizer = make_optimizer(schedule := make_schedule(STEPS, 1e-2, warmup_steps=2), **SETTINGS)
    step = make_train_step(fresh.module, optimizer, remat="full", assemble=assemble_adapter(module, config))
    state = TrainState.create({"adapter": jax.tree.map(jnp.copy, fresh.adapter())}, optimizer)
    losses, state = our_losses(step, state, batches, {"params": params})
    start = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "start", is_trainable=True)
    np.testing.assert_allclose(losses, torch_losses(start, batches, schedule, **SETTINGS), rtol=1e-4)

    trained = fresh.replace_adapter("default", state.trainable["adapter"])
    trained.save_adapter(tmp_path / "trained")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "trained").eval()
    inputs = {name: values for name, values in batches[0].items() if name != "labels"}
    with torch.no_grad():
        wanted = loaded(**{name: th(values) for name, values in inputs.items()}).logits
    valid = inputs["attention_mask"].astype(bool)
    close(trained(**inputs).logits, wanted, where=valid)
    assert np.abs(np.asarray(base(**inputs).logits) - wanted.numpy())[valid].max() > 1e-2


@functools.partial(jax.jit, static_argnames=("module", "chunk", "remat"))
def gradients_of(module: Any, params: Any, batch: Batch, **options: Any) -> tuple[Any, Any]:
    """The summed loss of a batch, and its gradients."""
    return jax.value_and_grad(lambda p: loss_sum(module, {"params": p}, batch, **options))(params)


@pytest.mark.parametrize("is_scanned", [False, True])
def test_memory_saved_changes_nothing(models, rng: np.random.Generator, is_scanned: bool):  # noqa: F811
    """The loss in chunks that do not divide the tokens; layers of both halves computed again, or in scans."""
    _, module, params = models
    batch = make_batch(rng, CLIPS[1])
    value, gradients = gradients_of(module, params, batch)
    tree = stack_layers(params) if is_scanned else params
    sizes = len(tree["model"]["audio_tower"]), len(tree["model"]["language_model"])
    assert sizes == ((5, 3) if is_scanned else (6, 4))
    other, found = gradients_of(module, tree, batch, chunk=37, remat="full" if is_scanned else "dots")
    close(other, value, 1e-6)
    found = unstack_layers(found) if is_scanned else found
    assert jax.tree.structure(found) == jax.tree.structure(gradients)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), found, gradients)


def test_layers_are_computed_again(models, rng: np.random.Generator):  # noqa: F811
    """With remat nothing of a layer's MLP is kept from the forward pass, in the encoder nor in the decoder."""
    _, module, params = models
    batch = make_batch(rng, CLIPS[1])
    widths = {module.config.audio_config.encoder_ffn_dim, module.config.text_config.intermediate_size}

    def kept(remat: Any) -> set[int]:
        def backward(params: Any) -> Any:
            return jax.vjp(lambda p: loss_sum(module, {"params": p}, batch, remat=remat), params)[1]

        return {leaf.shape[-1] for leaf in jax.tree.leaves(jax.eval_shape(backward, params)) if leaf.ndim == 3} & widths

    assert kept("none") == widths
    assert not kept("full")


def test_accumulation_is_one_large_batch(models, rng: np.random.Generator):  # noqa: F811
    """Micro-batches of different numbers of clips; clips without frames make them up, and take no token."""
    _, module, params = models
    parts = [make_batch(rng, clips) for clips in ((0, 1, 3), (1, 0, 1), (0, 0, 1))]
    once = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for part in parts:
        room = 4 - len(part["input_features"])
        part["input_features"] = np.pad(part["input_features"], ((0, room), (0, 0), (0, 0)), constant_values=9)
        part["feature_attention_mask"] = np.pad(part["feature_attention_mask"], ((0, room), (0, 0)))
    many = {name: np.stack([part[name] for part in parts]) for name in once}
    assert many["input_features"].shape == (3, 4, BINS, FRAMES)
    optimizer = make_optimizer(1e-3)
    step = jax.jit(make_train_step(module, optimizer))
    state = TrainState.create({"params": params}, optimizer)
    (left, found), (right, wanted) = step(state, many), step(state, once)
    for name in ("loss", "grad_norm", "items"):
        close(found[name], wanted[name], 1e-5)
    moments = [optax.tree_utils.tree_get(after.opt_state, "mu") for after in (left, right)]
    jax.tree.map(lambda a, b: close(a, b, 1e-4), *moments)


def test_bfloat16_arithmetic_keeps_float32_weights(models, rng: np.random.Generator):  # noqa: F811
    theirs, module, params = models
    batch = make_batch(rng, CLIPS[1])
    optimizer = make_optimizer(1e-6)
    step = jax.jit(make_train_step(module.clone(dtype=jnp.bfloat16), optimizer))
    state, metrics = step(TrainState.create({"params": params}, optimizer), batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    changed = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.trainable["params"], params)
    assert 0 < max(jax.tree.leaves(changed)) < 2e-6  # lost in bfloat16, whose steps are 2^-8 of the value
    plain = theirs_of(theirs, **batch).loss.item()
    assert abs(float(metrics["loss"]) - plain) < 0.02 * plain


def test_evaluation_is_the_mean_loss(models, rng: np.random.Generator):  # noqa: F811
    """With audio and without any: that of the module's own forward."""
    _, module, params = models
    batch = make_batch(rng, CLIPS[2])
    text = {name: random_ids(rng, (2, 9)) for name in ("input_ids", "labels")}
    step = jax.jit(make_eval_step(module))
    for inputs in (batch, text):
        sums = step({"params": params}, inputs)
        close(sums["loss"] / sums["items"], module.apply({"params": params}, **inputs).loss, 1e-6)


def test_refusals(models, rng: np.random.Generator):  # noqa: F811
    _, module, params = models
    batch = make_batch(rng, CLIPS[1])
    deaf = {name: values for name, values in batch.items() if name != "feature_attention_mask"}
    with pytest.raises(ValueError, match="go together; the batch has input_features alone"):
        loss_sum(module, {"params": params}, deaf)
    for name in ("dropout", "activation_dropout", "encoder_layerdrop"):
        dropping = Qwen2AudioForConditionalGeneration(Qwen2AudioConfig.from_dict(config_dict(**{name: 0.1})))
        with pytest.raises(ValueError, match=rf"{name} is 0\.1; training supports 0 alone"):
            make_train_step(dropping, make_optimizer(1e-3))
