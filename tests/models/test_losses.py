"""The chunked cross-entropy against torch's, and what its gradient costs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxqwen.models.losses import IGNORE_INDEX, chunked_cross_entropy, cross_entropy
from tests.reference import close, torch

CHUNKS, TOKENS, D, V = 3, 7, 16, 53


def project(weights: Any, x: jax.Array) -> jax.Array:
    return x @ weights["weight"].T + weights["bias"]


@pytest.fixture
def inputs(rng: np.random.Generator) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """Weights, hidden [chunks, tokens, D] and labels, a third of them ignored."""
    weights = {"weight": rng.normal(size=(V, D)), "bias": rng.normal(size=V)}
    labels = rng.integers(0, V, (CHUNKS, TOKENS))
    labels = np.where(rng.random(labels.shape) < 0.3, IGNORE_INDEX, labels)
    hidden = rng.normal(size=(CHUNKS, TOKENS, D))
    return (*jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (weights, hidden)), jnp.asarray(labels))


def test_loss_and_gradients_are_torchs(inputs):
    """Times a factor, as a mean over micro-batches has it."""
    weights, hidden, labels = inputs
    factor = 0.37
    value, (of_weights, of_hidden) = jax.value_and_grad(
        lambda w, x: factor * chunked_cross_entropy(project, w, x, labels), argnums=(0, 1)
    )(weights, hidden)
    theirs = {name: torch.tensor(np.asarray(a), requires_grad=True) for name, a in weights.items()}
    x = torch.tensor(np.asarray(hidden), requires_grad=True)
    logits = (x @ theirs["weight"].T + theirs["bias"]).reshape(-1, V)
    loss = factor * torch.nn.functional.cross_entropy(
        logits, torch.tensor(np.asarray(labels)).long().reshape(-1), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    loss.backward()
    assert float(value) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert float(factor * chunked_cross_entropy(project, weights, hidden, labels)) == pytest.approx(float(value))
    close(of_hidden, x.grad, 1e-5)
    for name, tensor in theirs.items():
        close(of_weights[name], tensor.grad, 1e-5)


@pytest.mark.parametrize("label", [-1, -101, V, 99999])
def test_labels_that_are_no_class_are_seen(inputs, label):
    """The loss and each gradient that it is in are NaN, where PyTorch raises: no step is taken by the others alone."""
    weights, hidden, labels = inputs
    labels = labels.at[1, 2].set(label)

    def plain(w: Any, x: jax.Array) -> jax.Array:
        return cross_entropy(project(w, x), labels, num_items=1)

    for loss in (plain, lambda w, x: chunked_cross_entropy(project, w, x, labels)):
        value, (of_weights, of_hidden) = jax.value_and_grad(loss, argnums=(0, 1))(weights, hidden)
        assert np.isnan(value)
        assert np.isnan(of_weights["weight"]).any()
        rows = np.isnan(of_hidden).all(-1)
        assert rows[1, 2]
        assert rows.sum() == 1


def test_logits_are_computed_once_and_frozen_weights_have_no_gradient(inputs):
    """The products with the table: the logits, the gradient to what the head reads, and, if trained, to the table."""
    weights, hidden, labels = inputs

    def products(argnums: Any) -> int:
        loss = jax.grad(lambda w, x: chunked_cross_entropy(project, w, x, labels), argnums=argnums)
        return str(jax.make_jaxpr(loss)(weights, hidden)).count("dot_general")

    assert products(1) == 2
    assert products((0, 1)) == 3


def test_labels_of_other_positions_are_refused(inputs):
    """Those of one position, or of one row, would go with every other one."""
    logits, labels = jnp.zeros((2, 4, V)), jnp.zeros((2, 4), jnp.int32)
    for one, other in ((logits[:, :1], labels), (logits, labels[:1])):
        with pytest.raises(ValueError, match=r"labels are \[\d, 4\]; expected \[2, \d\], one for each position"):
            cross_entropy(one, other)


def test_integers_are_frozen(inputs):
    """A table of int8 has no gradient, and the others those that a table of the same numbers gives them."""
    weights, hidden, labels = inputs
    table = jnp.round(weights["weight"])

    def of_others(table: jax.Array) -> Any:
        def loss(bias: jax.Array, x: jax.Array) -> jax.Array:
            return chunked_cross_entropy(project, {"weight": table, "bias": bias}, x, labels)

        return jax.grad(loss, argnums=(0, 1))(weights["bias"], hidden)

    jax.tree.map(lambda a, b: close(a, b, 1e-5), of_others(table.astype(jnp.int8)), of_others(table))


def test_sums_of_bfloat16_chunks_are_in_float32(rng: np.random.Generator):
    """The gradient of 64 chunks is as near to the exact one as a single chunk's, whose sum rounds once."""
    hidden = jnp.asarray(rng.normal(size=(64, 4, D)), jnp.bfloat16)
    labels = jnp.asarray(rng.integers(0, V, (64, 4)))
    weight = jnp.asarray(rng.normal(size=(V, D)), jnp.bfloat16)

    def gradient(weight: jax.Array, hidden: jax.Array, labels: jax.Array) -> np.ndarray:
        loss = jax.grad(lambda w: chunked_cross_entropy(lambda w, x: x @ w.T, w, hidden, labels))
        return np.asarray(loss(weight), np.float64)

    exact = gradient(weight.astype(jnp.float32), hidden.astype(jnp.float32), labels)
    one = gradient(weight, hidden.reshape(1, -1, D), labels.reshape(1, -1))
    many = gradient(weight, hidden, labels)
    assert np.abs(many - exact).mean() <= 1.2 * np.abs(one - exact).mean()
