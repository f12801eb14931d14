"""The training step against PyTorch, and against itself: packed, accumulated, scanned, recomputed, chunked, sharded."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxqwen.auto import AutoModelForCausalLM
from flaxqwen.config import Qwen2Config
from flaxqwen.convert.names import to_path
from flaxqwen.models.qwen2 import Qwen2ForCausalLM
from flaxqwen.ops.attention import attend_in_blocks
from flaxqwen.ops.dispatch import IMPLEMENTATIONS, Attention, Implementation
from flaxqwen.sharding import make_mesh
from flaxqwen.training import (
    TrainState,
    loss_sum,
    make_eval_step,
    make_optimizer,
    make_schedule,
    make_train_step,
    stack_layers,
    unstack_layers,
)
from tests.reference import close, pair, random_ids, tiny, torch, torch_losses

STEPS, ROWS, WIDTH = 50, 3, 12
SETTINGS: dict[str, Any] = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1, "max_grad_norm": 1.0}


def labels_of(rng: np.random.Generator, ids: np.ndarray) -> np.ndarray:
    """The ids, a third of them ignored."""
    return np.where(rng.random(ids.shape) < 0.3, -100, ids).astype(np.int32)


def leaf(tree: Any, name: str) -> Any:
    """The leaf of a parameter tree by its name in Transformers."""
    for key in to_path(name):
        tree = tree[key]
    return tree


def reach(tree: Any, path: tuple[Any, ...]) -> Any:
    """The leaf of a tree by the path that jax gives it."""
    return functools.reduce(lambda part, key: part[key.key], path, tree)


@pytest.mark.parametrize("tied", [False, True])
def test_fifty_steps_as_in_pytorch(rng: np.random.Generator, tied: bool):
    """The loss of each of 50 steps within 1e-4, with clipping, decay, warm-up, cosine; the first gradients."""
    seed = int(rng.integers(1000))
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, seed, tie_word_embeddings=tied)
    batches = [(ids, labels_of(rng, ids)) for ids in (random_ids(rng, (ROWS, WIDTH)) for _ in range(STEPS))]
    schedule = make_schedule(STEPS, 1e-3, warmup_steps=5, final_learning_rate=1e-4)
    optimizer = make_optimizer(schedule, **SETTINGS)
    state = TrainState.create({"params": params}, optimizer)
    ids, labels = batches[0]

    def mean(variables: Any) -> jax.Array:
        return loss_sum(module, variables, {"input_ids": ids, "labels": labels}) / (labels[:, 1:] >= 0).sum()

    gradients = jax.jit(jax.grad(mean))(state.trainable)["params"]
    loss = theirs(input_ids=torch.tensor(ids).long(), labels=torch.tensor(labels).long(), use_cache=False).loss
    loss.backward()
    for name, parameter in theirs.named_parameters():
        close(leaf(gradients, name), parameter.grad, 1e-4)

    step = jax.jit(make_train_step(module, optimizer), donate_argnums=0)
    losses = []
    for ids, labels in batches:
        state, metrics = step(state, {"input_ids": jnp.asarray(ids), "labels": jnp.asarray(labels)})
        losses.append(float(metrics["loss"]))
    named = [{"input_ids": ids, "labels": labels} for ids, labels in batches]
    np.testing.assert_allclose(losses, torch_losses(theirs, named, schedule, **SETTINGS), rtol=1e-4)


def test_schedule_is_transformers_cosine_with_warmup():
    import transformers

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3.0)
    theirs = transformers.get_cosine_schedule_with_warmup(optimizer, 7, 40)
    ours = make_schedule(40, 3.0, warmup_steps=7)
    for number in range(40):
        assert float(ours(number)) == pytest.approx(theirs.get_last_lr()[0], rel=1e-5, abs=1e-6)
        optimizer.step()
        theirs.step()


@pytest.fixture(scope="module")
def tied_model() -> tuple[Qwen2ForCausalLM, Any]:
    """A tiny module and its parameters."""
    model = AutoModelForCausalLM.from_config(Qwen2Config.from_dict(tiny(tie_word_embeddings=True)), seed=3)
    return model.module, jax.tree.map(lambda a: a * 3, model.params)


@functools.partial(jax.jit, static_argnames=("module", "chunk", "remat"))
def gradients_of(module: Any, params: Any, batch: dict[str, np.ndarray], **options: Any) -> tuple[Any, Any]:
    """The summed loss of a batch, and its gradients."""
    return jax.value_and_grad(lambda p: loss_sum(module, {"params": p}, batch, **options))(params)


def test_packed_rows_equal_separate_runs(tied_model, rng: np.random.Generator):
    """Documents packed into rows, with padding after them: loss and gradients are the sums of those of each alone."""
    module, params = tied_model
    lengths = [(7, 5, 9), (10, 2, 6)]
    ids = random_ids(rng, (2, 24))
    labels = np.full_like(ids, -100)
    segments, positions = np.zeros_like(ids), np.zeros_like(ids)
    alone: list[tuple[Any, Any]] = []
    for row, sizes in enumerate(lengths):
        start = 0
        for number, size in enumerate(sizes, start=1):
            here = (slice(row, row + 1), slice(start, start + size))
            own = labels_of(rng, ids[here])
            labels[here] = own
            labels[row, start] = -100
            segments[here], positions[here] = number, np.arange(size)
            # Padded to one shape, for one program: a causal model does not see what comes later.
            room = ((0, 0), (0, 10 - size))
            batch = {"input_ids": np.pad(ids[here], room), "labels": np.pad(own, room, constant_values=-100)}
            alone.append(gradients_of(module, params, batch))
            start += size
    packed = {"input_ids": ids, "labels": labels, "segment_ids": segments, "position_ids": positions}
    total = jax.tree.map(lambda *leaves: sum(leaves), *(gradients for _, gradients in alone))
    for batch in (packed, {name: packed[name] for name in ("input_ids", "labels", "position_ids")}):
        value, gradients = gradients_of(module, params, batch)
        close(value, sum(value for value, _ in alone), 1e-5)
        jax.tree.map(lambda a, b: close(a, b, 1e-4), gradients, total)


@pytest.mark.parametrize(
    "options", [{"chunk": 7}, {"remat": "full"}, {"remat": "dots"}, {"scan": True}, {"scan": True, "remat": "full"}]
)
def test_memory_saved_changes_nothing(tied_model, rng: np.random.Generator, options: dict[str, Any]):
    """The loss in chunks that do not divide the tokens, layers computed again, layers in a scan."""
    module, params = tied_model
    ids = random_ids(rng, (2, 9))
    batch = {"input_ids": ids, "labels": labels_of(rng, ids)}
    value, gradients = gradients_of(module, params, batch)
    scan = options.get("scan", False)
    options = {name: option for name, option in options.items() if name != "scan"}
    other, theirs = gradients_of(module, stack_layers(params) if scan else params, batch, **options)
    close(value, other, 1e-6)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), gradients, unstack_layers(theirs) if scan else theirs)


def test_stacked_layers_come_back(tied_model):
    _, params = tied_model
    back = unstack_layers(stack_layers(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_logits_are_never_whole(tied_model):
    """The largest array of the program with a vocabulary has 32 of 256 tokens, 8 of each row, forward and backward."""
    module, params = tied_model
    batch = {"input_ids": np.zeros((4, 64), np.int32), "labels": np.zeros((4, 64), np.int32)}
    step = jax.value_and_grad(lambda p: loss_sum(module, {"params": p}, batch, chunk=32))
    text = jax.jit(step).lower(params).compile().as_text()
    shapes = [[int(n) for n in shape.split(",")] for shape in re.findall(r"\[(\d+(?:,\d+)+)\]", text)]
    logits = [math.prod(shape) // 331 for shape in shapes if 331 in shape and module.config.hidden_size not in shape]
    assert max(logits) == 32


def test_accumulation_is_one_large_batch(tied_model, rng: np.random.Generator):
    """Micro-batches with different numbers of labels weigh by their labels, not alike."""
    module, params = tied_model
    ids = random_ids(rng, (3, 2, 8))
    labels = labels_of(rng, ids)
    labels[0, :, 2:] = -100
    optimizer = make_optimizer(1e-3)
    step = jax.jit(make_train_step(module, optimizer))
    state = TrainState.create({"params": params}, optimizer)
    many, metrics = step(state, {"input_ids": ids, "labels": labels})
    once, expected = step(state, {"input_ids": ids.reshape(6, 8), "labels": labels.reshape(6, 8)})
    for name in ("loss", "grad_norm", "items"):
        close(metrics[name], expected[name], 1e-5)
    moments = [optax.tree_utils.tree_get(s.opt_state, "mu") for s in (many, once)]
    jax.tree.map(lambda a, b: close(a, b, 1e-4), *moments)
    assert int(many.step) == 1


def test_bfloat16_arithmetic_keeps_float32_weights(tied_model, rng: np.random.Generator):
    module, params = tied_model
    ids = random_ids(rng, (2, 8))
    batch = {"input_ids": ids, "labels": ids}
    optimizer = make_optimizer(1e-6)
    step = jax.jit(make_train_step(module.clone(dtype=jnp.bfloat16), optimizer))
    state, metrics = step(TrainState.create({"params": params}, optimizer), batch)
    assert {a.dtype for a in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    changed = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.trainable["params"], params)
    assert 0 < max(jax.tree.leaves(changed)) < 2e-6  # lost in bfloat16, whose steps are 2^-8 of the value
    plain = loss_sum(module, {"params": params}, batch) / (2 * 7)
    assert abs(float(metrics["loss"]) - float(plain)) < 0.02 * float(plain)


def test_norms_and_biases_do_not_decay(tied_model):
    """Of plain layers and of stacked ones, whose norms are matrices to look at."""
    _, params = tied_model
    for tree in (params, stack_layers(params)):
        optimizer = make_optimizer(1.0, weight_decay=0.5, max_grad_norm=0)
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, tree), optimizer.init(tree), tree)
        for path, update in jax.tree.leaves_with_path(updates):
            name = jax.tree_util.keystr(path)
            decays = "norm" not in name and "bias" not in name
            assert bool(jnp.any(update != 0)) == decays, name


def test_muon_steps_along_the_factors_of_its_matrices(tied_model, rng: np.random.Generator):
    """From the singular values, in float64: the polynomial of each, five times. AdamW takes the rest, bit for bit."""
    _, params = tied_model
    settings: dict[str, Any] = {"weight_decay": 0.5, "max_grad_norm": 0}
    rate = 0.1
    gradients = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), params)
    muon, adamw = (make_optimizer(rate, optim=optim, **settings) for optim in ("muon", "adamw"))
    updates, others = (o.update(gradients, o.init(params), params)[0] for o in (muon, adamw))
    matrices = 0
    for path, update in jax.tree.leaves_with_path(updates):
        weight, gradient, other = (reach(tree, path) for tree in (params, gradients, others))
        if not any("layers_" in key.key for key in path) or update.ndim < 2:
            assert (np.asarray(update) == other).all(), path
            continue
        matrices += 1
        left, s, right = np.linalg.svd(np.asarray(gradient, np.float64), full_matrices=False)
        s /= np.linalg.norm(s)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        step = 0.2 * max(update.shape) ** 0.5 * (left * s) @ right
        close(update, -rate * (step + 0.5 * np.asarray(weight, np.float64)), 1e-4)
    assert matrices == 7 * sum(name.startswith("layers_") for name in params["model"])
    stacked, gradients = stack_layers(params), stack_layers(gradients)
    update = muon.update(gradients, muon.init(stacked), stacked)[0]
    jax.tree.map(lambda a, b: close(a, b, 1e-5), unstack_layers(update), updates)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optim is 'sgd'; expected one of adamw, muon"):
        make_optimizer(0.1, optim="sgd")  # type: ignore[arg-type]


def test_evaluation_is_the_mean_loss(tied_model, rng: np.random.Generator):
    module, params = tied_model
    ids = random_ids(rng, (2, 9))
    labels = labels_of(rng, ids)
    sums = jax.jit(make_eval_step(module))({"params": params}, {"input_ids": ids, "labels": labels})
    expected = module.apply({"params": params}, ids, labels=labels).loss
    close(sums["loss"] / sums["items"], expected, 1e-6)


def test_state_is_donated(tied_model):
    module, params = tied_model
    optimizer = make_optimizer(1e-3)
    state = TrainState.create({"params": jax.tree.map(jnp.copy, params)}, optimizer)
    batch = {"input_ids": jnp.zeros((2, 8), jnp.int32), "labels": jnp.zeros((2, 8), jnp.int32)}
    compiled = jax.jit(make_train_step(module, optimizer), donate_argnums=0).lower(state, batch).compile()
    held = sum(a.nbytes for a in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= 0.99 * held


def test_attention_is_the_modules(tied_model, monkeypatch: pytest.MonkeyPatch):
    """Each layer of a step asks the table for what the module says of rows without a cache."""
    module, params = tied_model
    calls = []

    def run(*inputs: Any, window: int | None, interpret: bool) -> jax.Array:
        calls.append(window)
        return attend_in_blocks(*inputs, window)

    monkeypatch.setitem(IMPLEMENTATIONS, "watched", Implementation(run, lambda *_: True, ("whole",), "cpu"))
    module = module.clone(attention=Attention(whole="watched"))
    ids = jnp.ones((1, 8), jnp.int32)
    jax.eval_shape(lambda params: loss_sum(module, {"params": params}, {"input_ids": ids, "labels": ids}), params)
    assert len(calls) == module.config.num_hidden_layers


def test_refusals(tied_model):
    module, params = tied_model
    ids = np.zeros((1, 4), np.int32)
    with pytest.raises(ValueError, match=r"a batch has .* found pixels"):
        loss_sum(module, {"params": params}, {"input_ids": ids, "labels": ids, "pixels": ids})
    dropping = Qwen2ForCausalLM(Qwen2Config.from_dict(tiny(attention_dropout=0.1)))
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1"):
        make_train_step(dropping, make_optimizer(1e-3))
    with pytest.raises(ValueError, match="Qwen2ForCausalLM"):
        make_train_step(module.bind({"params": params}).model, make_optimizer(1e-3))  # type: ignore[arg-type]
    kinds = Qwen2Config.from_dict(
        tiny(use_sliding_window=True, sliding_window=4, max_window_layers=1, tie_word_embeddings=True)
    )
    with pytest.raises(ValueError, match="unstack them"):
        loss_sum(Qwen2ForCausalLM(kinds), {"params": stack_layers(params)}, {"input_ids": ids, "labels": ids})


def test_mesh_of_one_device_is_the_same(tied_model, rng: np.random.Generator):
    """The module's constraints are in the step: on a mesh it gives what it gives without."""
    module, params = tied_model
    ids = random_ids(rng, (2, 8))
    batch = {"input_ids": ids, "labels": ids}
    mesh = make_mesh(1, 1, 1)
    meshed = AutoModelForCausalLM.module_of(module.config, mesh=mesh)
    close(loss_sum(meshed, {"params": params}, batch), loss_sum(module, {"params": params}, batch), 1e-6)
