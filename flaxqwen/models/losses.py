"""The losses of the heads, in float32 (transformers/loss/loss_utils.py).

Axes: B batch, T tokens, V vocabulary (or labels).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal
from jax.typing import ArrayLike

IGNORE_INDEX = -100


def cross_entropy(
    logits: jax.Array, labels: jax.Array, num_items: ArrayLike | None = None, ignore_index: int = IGNORE_INDEX
) -> jax.Array:
    """Mean cross-entropy in nats over the labels that are not ignore_index; NaN if there is none, as in PyTorch.

    A label that is no class, for which PyTorch raises an error, gives NaN, and NaN gradients.

    Args:
      logits: [..., V].
      labels: [...] int; ignore_index marks what does not count.
      num_items: divides the sum in place of the count (gradient accumulation).

    Raises:
      ValueError: not one label for each of the logits' positions.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels are {list(labels.shape)}; expected {list(logits.shape[:-1])}, one for each position")
    counted, index, valid = _classes(labels, logits.shape[-1], ignore_index)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    picked = valid * jnp.take_along_axis(log_probs, index[..., None], axis=-1)[..., 0]
    total = -jnp.sum(jnp.where(counted, picked, 0.0))
    return total / (jnp.sum(counted) if num_items is None else num_items)


def _classes(labels: jax.Array, count: int, ignore_index: int = IGNORE_INDEX) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each label: whether it counts, its class (0 where it has none), and 1, or NaN where it counts and has none."""
    counted, known = labels != ignore_index, (labels >= 0) & (labels < count)
    return counted, jnp.where(counted & known, labels, 0), jnp.where(known | ~counted, 1.0, jnp.nan)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked_cross_entropy(
    head: Callable[[Any, jax.Array], jax.Array], weights: Any, hidden: jax.Array, labels: jax.Array
) -> jax.Array:
    """The summed cross-entropy in nats of a head, in a loop over chunks, whose logits alone are in memory.

    The gradients of a chunk are computed with its loss, so that its logits need not be computed again (as in Liger
    Kernel, Hsu et al. 2024). It has no forward-mode derivative.

    Args:
      head: (weights, [..., D]) -> logits [..., V]; it closes over no array.
      weights: a pytree. Of leaves that are not trained no gradient is computed.
      hidden: [chunks, ..., D].
      labels: [chunks, ...] int; IGNORE_INDEX marks what does not count.
    """

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + cross_entropy(head(weights, part[0]), part[1], num_items=1), None

    return jax.lax.scan(add, jnp.zeros(()), (hidden, labels))[0]


def _chunked_forward(
    head: Callable[[Any, jax.Array], jax.Array], weights: Any, hidden: CustomVJPPrimal, labels: CustomVJPPrimal
) -> tuple[jax.Array, tuple[Any, jax.Array]]:
    """The loss, and its gradients to weights (None where they are not trained; summed in float32) and to hidden."""
    leaves, structure = jax.tree.flatten(weights, is_leaf=lambda leaf: isinstance(leaf, CustomVJPPrimal))
    trained = [leaf.value for leaf in leaves if leaf.perturbed]

    def spread(values: list[jax.Array], rest: Callable[[CustomVJPPrimal], Any]) -> Any:
        own = iter(values)
        return jax.tree.unflatten(structure, [next(own) if leaf.perturbed else rest(leaf) for leaf in leaves])

    def logits_of(trained: list[jax.Array], x: jax.Array) -> jax.Array:
        return head(spread(trained, lambda leaf: leaf.value), x)

    def add(totals: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        logits, pull = jax.vjp(logits_of, trained, part[0])
        loss, of_logits = _loss_and_gradient(logits, part[1])
        of_trained, of_hidden = pull(of_logits.astype(logits.dtype))
        return jax.tree.map(jnp.add, totals, (loss, of_trained)), of_hidden

    zeros = (jnp.zeros(()), [jnp.zeros(leaf.shape, jnp.float32) for leaf in trained])
    (loss, of_trained), of_hidden = jax.lax.scan(add, zeros, (hidden.value, labels.value))
    of_trained = [total.astype(leaf.dtype) for total, leaf in zip(of_trained, trained, strict=True)]
    return loss, (spread(of_trained, lambda _: None), of_hidden)


def _loss_and_gradient(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The summed cross-entropy of logits [..., V], and its gradient to them: softmax less one at the label."""
    logits, (counted, index, valid) = logits.astype(jnp.float32), _classes(labels, logits.shape[-1])
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(logits, index[..., None], axis=-1)
    chosen = jnp.arange(logits.shape[-1]) == index[..., None]
    gradient = jnp.where(counted[..., None], (jnp.exp(logits - total) - chosen) * valid[..., None], 0.0)
    # XLA would compute it within both products that follow, a transposed one among them: 8.4 s on a CPU, and 6.9 apart
    # (1,024 tokens, 152k x 896).
    return jnp.sum(jnp.where(counted, (total - picked)[..., 0] * valid, 0.0)), jax.lax.optimization_barrier(gradient)


def _chunked_backward(
    _: Callable[[Any, jax.Array], jax.Array], gradients: tuple[Any, jax.Array], scale: jax.Array
) -> tuple[Any, jax.Array, None]:
    weights, hidden = jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), gradients)
    return weights, hidden, None


chunked_cross_entropy.defvjp(_chunked_forward, _chunked_backward, symbolic_zeros=True)


def causal_lm_loss(
    logits: jax.Array,
    labels: jax.Array | None,
    shift_labels: jax.Array | None = None,
    num_items_in_batch: ArrayLike | None = None,
) -> jax.Array:
    """Each token predicts the next: logits [B, T, V] against labels [B, T] moved left by one, or shift_labels as is."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)
    return cross_entropy(logits, shift_labels, num_items_in_batch)


def sequence_classification_loss(logits: jax.Array, labels: jax.Array, problem_type: str | None) -> jax.Array:
    """logits [B, labels]: mean squared error, cross-entropy or binary cross-entropy, by problem_type.

    With None, the kind follows from the number of labels and the dtype of `labels`, as in Transformers.

    Raises:
      ValueError: labels of another shape than their kind has; an unknown problem_type.
    """
    num_labels = logits.shape[-1]
    if problem_type is None:
        if num_labels == 1:
            problem_type = "regression"
        else:
            integer = jnp.issubdtype(labels.dtype, jnp.integer)
            problem_type = "single_label_classification" if integer else "multi_label_classification"
    match problem_type:
        case "regression":
            if num_labels == 1 and labels.shape == logits.shape[:1]:
                labels = labels[:, None]
            _check_scores(labels, logits)
            return jnp.mean(jnp.square(logits.astype(jnp.float32) - labels))
        case "single_label_classification":
            return cross_entropy(logits, labels.reshape(-1))
        case "multi_label_classification":
            _check_scores(labels, logits)
            x, y = logits.astype(jnp.float32), labels.astype(jnp.float32)
            return jnp.mean(jnp.maximum(x, 0) - x * y + jnp.log1p(jnp.exp(-jnp.abs(x))))
    raise ValueError(
        f"problem_type {problem_type!r} is unknown; it is one of regression, single_label_classification, "
        "multi_label_classification"
    )


def _check_scores(labels: jax.Array, logits: jax.Array) -> None:
    if labels.shape != logits.shape:
        raise ValueError(f"labels are {list(labels.shape)}; expected {list(logits.shape)}, one for each score")


def question_answering_loss(
    start_logits: jax.Array, end_logits: jax.Array, start_positions: jax.Array, end_positions: jax.Array
) -> jax.Array:
    """Mean of the cross-entropies of the first and last token of the answer; logits [B, T], positions [B].

    A position outside the row is ignored, as in Transformers.
    """
    outside = start_logits.shape[1]
    losses = [
        cross_entropy(logits, jnp.clip(positions.reshape(-1), 0, outside), ignore_index=outside)
        for logits, positions in ((start_logits, start_positions), (end_logits, end_positions))
    ]
    return (losses[0] + losses[1]) / 2
