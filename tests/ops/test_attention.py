"""Attention in blocks is numpy's, and its scores never stand in memory whole."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxqwen.ops import attention as ops_attention
from flaxqwen.ops.attention import Visibility, attend_in_blocks, attend_to_seen_blocks
from tests.ops.heads import WINDOWS, B, H, S, T, exact, heads_of, left_padding, slots_from
from tests.reference import close

seen_blocks = jax.jit(partial(attend_to_seen_blocks, interpret=False), static_argnames="window")


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("start", [0, 200, 256])
def test_seen_blocks(rng, start, window, groups):
    """Two blocks of queries over four of slots; rows at their own slots, and padded. 1.2e-6 at most in 120 draws."""
    tokens, slots = 256, 512
    heads = heads_of(rng, groups, tokens, slots)
    for visibility in (
        Visibility(slots_from(start, tokens)),
        Visibility(jnp.concatenate([slots_from(start, tokens), slots_from(17, tokens)])),
        Visibility(slots_from(start, tokens), left_padding([start // 2, 0], slots)),
    ):
        got = seen_blocks(*heads, visibility, window=WINDOWS[window])
        close(got, exact(*heads, visibility, WINDOWS[window]), relative=2e-6)


def test_seen_blocks_with_segments_and_padding(rng):
    """A token sees its own segment alone; what padding itself sees is nobody's concern, but is finite."""
    segments = jnp.asarray(np.sort(rng.integers(0, 4, (B, 256)), axis=1), jnp.int32)
    mask = left_padding([0, 140], 256)
    visibility, heads = Visibility(slots_from(0, 256), mask, segments, segments), heads_of(rng, 2, 256, 256)
    got = seen_blocks(*heads, visibility, window=None)
    close(got, exact(*heads, visibility, None), relative=2e-6, where=np.asarray(mask))
    assert np.isfinite(np.asarray(got)).all()


def test_seen_blocks_in_a_gradient_and_in_bfloat16(rng):
    """Gradients are the plain one's; bfloat16 is no further from float32 than the plain one's is."""
    heads, dy = heads_of(rng, 2, 256, 256), jnp.asarray(rng.normal(size=(B, 256, 4, H)), jnp.float32)
    visibility = Visibility(slots_from(0, 256))
    ours, plain = (
        jax.grad(lambda *heads, run=run: jnp.vdot(run(*heads, visibility, window=70), dy), (0, 1, 2))(*heads)
        for run in (seen_blocks, attend_in_blocks)
    )
    for mine, other in zip(ours, plain, strict=True):
        close(mine, other, relative=1e-5)
    rounded = [a.astype(jnp.bfloat16) for a in heads]
    want = attend_in_blocks(*(a.astype(jnp.float32) for a in rounded), visibility)
    found = [run(*rounded, visibility, window=None) for run in (seen_blocks, attend_in_blocks)]
    assert found[0].dtype == jnp.bfloat16
    errors = [np.abs(np.asarray(got, np.float32) - want).mean() for got in found]
    assert errors[0] <= 1.1 * errors[1]


def test_scores_do_not_grow_with_the_slots(rng):
    """1,024 tokens over 32,768 slots have as many at a time as over 8,192; over these all that there are."""
    sizes = []
    for slots in (8192, 32768):
        query, key = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 1024, 4, H), (1, 2, slots, H)))
        run = jax.jit(lambda query, key, value, slots: attend_in_blocks(query, key, value, Visibility(slots)))
        lowered = run.lower(query, key, key, jax.ShapeDtypeStruct((1, 1024), jnp.int32))
        sizes.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    scores = 4 * 1024 * 8192 * 4
    assert scores <= sizes[0]
    assert sizes[1] <= sizes[0] + scores / 8


def test_few_queries_at_a_time(rng, monkeypatch):
    """Blocks of 11 queries, and a rest."""
    monkeypatch.setattr(ops_attention, "MOST_SCORES", 11 * S)
    visibility, heads = Visibility(slots_from(200), left_padding([0, 230])), heads_of(rng, 4)
    got = attend_in_blocks(*heads, visibility, 70)
    real = np.arange(200, 200 + T)[None] >= np.asarray([0, 230])[:, None]
    close(got, exact(*heads, visibility, 70), relative=1e-6, where=real)
