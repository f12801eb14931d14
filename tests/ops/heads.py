"""Queries, keys and values to draw, and their attention by numpy in float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

B, T, S, K, H = 2, 128, 384, 2, 16


def heads_of(rng, groups, tokens=T, slots=S, dtype=jnp.float32, width=H):
    """query [B, T, N, width], key and value [B, K, S, width].

    Multiples of 1/256, so that float32 scores are exact in whatever order they are summed; queries times 4, for weights
    that are far from uniform. What is left of rounding are the softmax and its product: 7e-7 at most in 225 draws.
    """
    shapes = (B, tokens, K * groups, width), (B, K, slots, width), (B, K, slots, width)
    query, key, value = (np.round(rng.normal(size=shape) * 256) / 256 for shape in shapes)
    return [jnp.asarray(a, dtype) for a in (4 * query, key, value)]


def exact(query, key, value, visibility, window):
    """numpy's in float64, [B, T, N, H]; 0 where nothing is visible."""
    query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
    key, value = (np.repeat(a, query.shape[2] // key.shape[1], axis=1) for a in (key, value))
    visible = np.asarray(visibility.visible(key.shape[2], window))[:, None]
    scores = np.einsum("BTNH,BNSH->BNTS", query, key) * query.shape[3] ** -0.5
    scores = np.where(visible, scores, np.finfo(np.float64).min)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True)) * visible
    sums = weights.sum(axis=-1, keepdims=True)
    return np.einsum("BNTS,BNSH->BTNH", np.divide(weights, sums, where=sums > 0, out=np.zeros_like(weights)), value)


def slots_from(start, tokens=T):
    return jnp.arange(start, start + tokens, dtype=jnp.int32)[None]


def left_padding(padded, slots=S):
    return jnp.asarray(np.arange(slots)[None] >= np.asarray(padded)[:, None])


WINDOWS = {"full": None, "sliding": 70, "narrow": 5}
