"""Training: a pure step from (state, batch) to (state, metrics), its loss, and its optimiser.

    optimizer = make_optimizer(steps=1000, learning_rate=1e-5)
    state = TrainState.create({"params": params}, optimizer)
    step = jax.jit(make_train_step(module, optimizer), donate_argnums=0)
    state, metrics = step(state, batch)

Axes: A accumulated micro-batches, B batch, T tokens, D model, V vocabulary, C tokens of a chunk of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from flaxqwen.models.losses import IGNORE_INDEX, cross_entropy
from flaxqwen.ops.linear import Linear

Variables = dict[str, Any]
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]

# Tokens whose logits are in memory at once: 1,024 x 152k in float32 are 0.6 GB, where 8,192 would be 5.
LOSS_CHUNK = 1024


class TrainState(flax.struct.PyTreeNode):
    """All that a step changes.

    step: [] int32, how many steps were taken.
    trainable: what is trained, in the dtype in which it is kept: {"params": ...} or {"lora": ...}.
    opt_state: of optax.
    """

    step: jax.Array
    trainable: Variables
    opt_state: optax.OptState

    @classmethod
    def create(cls, trainable: Variables, optimizer: optax.GradientTransformation) -> TrainState:
        """The state before the first step."""
        return cls(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))


def make_optimizer(
    *,
    steps: int,
    learning_rate: float,
    warmup_steps: int = 0,
    final_learning_rate: float = 0.0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    max_grad_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019) with clipping, a linear warm-up and a cosine to final_learning_rate.

    Args:
      steps: of the whole run, the warm-up included.
      weight_decay: of matrices; norms and biases do not decay, as in Transformers' Trainer.
      max_grad_norm: the global norm to which gradients are clipped; None: they are not.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup_steps else learning_rate, learning_rate, warmup_steps, max(steps, warmup_steps + 1),
        final_learning_rate,
    )  # fmt: skip
    adamw = optax.adamw(schedule, *betas, eps, weight_decay=weight_decay, mask=_decays)
    return adamw if max_grad_norm is None else optax.chain(optax.clip_by_global_norm(max_grad_norm), adamw)


def _decays(trainable: Variables) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, trainable)


def loss_sum(module: Any, variables: Variables, batch: Batch, chunk: int = LOSS_CHUNK) -> jax.Array:
    """The summed cross-entropy of a batch in nats, float32; the logits of `chunk` tokens are in memory at a time.

    Args:
      module: a Qwen2ForCausalLM.
      batch: see make_train_step.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = module.apply(variables, **inputs, method=_hidden)
    labels = jnp.pad(batch["labels"][:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)
    tokens, D = labels.size, hidden.shape[-1]
    hidden, labels = hidden.reshape(tokens, D), labels.reshape(tokens)

    @jax.checkpoint  # the backward pass computes the logits of a chunk again
    def of_chunk(x: jax.Array, y: jax.Array) -> jax.Array:
        return cross_entropy(module.apply(variables, x, method=_head), y, num_items=1)

    if tokens <= chunk:
        return of_chunk(hidden, labels)
    missing = -tokens % chunk
    hidden = jnp.pad(hidden, ((0, missing), (0, 0))).reshape(-1, chunk, D)
    labels = jnp.pad(labels, (0, missing), constant_values=IGNORE_INDEX).reshape(-1, chunk)
    return jax.lax.scan(lambda total, part: (total + of_chunk(*part), None), jnp.zeros(()), (hidden, labels))[0]


def _hidden(module: Any, **inputs: Any) -> jax.Array:
    """[B, T, D], what the head reads."""
    return module.model(**inputs, use_cache=False, return_dict=True).last_hidden_state


def _head(module: Any, x: jax.Array) -> jax.Array:
    return module.model.embed_tokens.attend(x) if module.config.tie_word_embeddings else module.lm_head(x)


def count_items(batch: Batch) -> jax.Array:
    """How many tokens of a batch have a loss."""
    return jnp.sum(batch["labels"][..., 1:] != IGNORE_INDEX)


def make_train_step(
    module: nn.Module, optimizer: optax.GradientTransformation, *, loss_chunk: int = LOSS_CHUNK
) -> Callable[[TrainState, Batch, Variables], tuple[TrainState, Metrics]]:
    """A pure step of training, to be jitted with the state donated.

    Returns:
      step(state, batch, frozen={}) -> (state, metrics). The batch has input_ids and labels, and may have segment_ids,
      position_ids and attention_mask: each [B, T], or [A, B, T] to sum the gradients of A micro-batches. Labels are
      moved by one in the loss, -100 is ignored; the loss is the mean over all labels of all micro-batches. `frozen` are
      the collections that are not trained. Metrics: loss (nats), grad_norm before clipping, items (labels).
    """

    def step(state: TrainState, batch: Batch, frozen: Variables | None = None) -> tuple[TrainState, Metrics]:
        items = count_items(batch)

        def loss(trainable: Variables, micro: Batch) -> jax.Array:
            return loss_sum(module, {**(frozen or {}), **trainable}, micro, loss_chunk) / jnp.maximum(items, 1)

        # Each linear layer behind a barrier on CPU: without, XLA fuses the derivative of SiLU into a transposed copy of
        # the cotangent, which takes 34 ms where the derivative alone takes 5 (6,144 tokens, 384 features).
        apart = nn.intercept_methods(_apart) if jax.default_backend() == "cpu" else nullcontext()
        with apart:
            value, gradients = _accumulate(jax.value_and_grad(loss), state.trainable, batch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {"loss": value, "grad_norm": optax.global_norm(gradients), "items": items}
        return TrainState(state.step + 1, trainable, opt_state), metrics

    return step


def _apart(method: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    y = method(*args, **kwargs)
    return jax.lax.optimization_barrier(y) if isinstance(context.module, Linear) else y


def _accumulate(gradient: Callable, trainable: Variables, batch: Batch) -> tuple[jax.Array, Variables]:
    """The summed loss and gradients of micro-batches [A, B, T]; of one batch [B, T] as they are."""
    if batch["input_ids"].ndim == 2:
        return gradient(trainable, batch)
    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trainable))

    def add(total: Any, micro: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(trainable, micro)), None

    return jax.lax.scan(add, zeros, dict(batch))[0]
