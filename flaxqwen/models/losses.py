"""The losses of the heads, in float32 (transformers/loss/loss_utils.py).

Axes: B batch, T tokens, V vocabulary (or labels).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

IGNORE_INDEX = -100


def cross_entropy(
    logits: jax.Array, labels: jax.Array, num_items: ArrayLike | None = None, ignore_index: int = IGNORE_INDEX
) -> jax.Array:
    """Mean cross-entropy in nats over the labels that are not ignore_index; NaN if there is none, as in PyTorch.

    Args:
      logits: [..., V].
      labels: [...] int; ignore_index marks what does not count.
      num_items: divides the sum in place of the count (gradient accumulation).
    """
    counted = labels != ignore_index
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(log_probs, jnp.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
    total = -jnp.sum(jnp.where(counted, picked, 0.0))
    return total / (jnp.sum(counted) if num_items is None else num_items)


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
            wanted = labels.reshape(logits.shape)
            return jnp.mean(jnp.square(logits.astype(jnp.float32) - wanted))
        case "single_label_classification":
            return cross_entropy(logits, labels.reshape(-1))
        case "multi_label_classification":
            x, y = logits.astype(jnp.float32), labels.astype(jnp.float32)
            return jnp.mean(jnp.maximum(x, 0) - x * y + jnp.log1p(jnp.exp(-jnp.abs(x))))
    raise ValueError(
        f"problem_type {problem_type!r} is unknown; it is one of regression, single_label_classification, "
        "multi_label_classification"
    )


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
