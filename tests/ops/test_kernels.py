"""Attention by libraries' kernels is numpy's, interpreted, and each is in the programs that it serves."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

from flaxqwen import AutoModelForCausalLM, Qwen2Config
from flaxqwen.cache import init_cache
from flaxqwen.ops import kernels
from flaxqwen.ops.attention import Visibility, attend_in_blocks
from flaxqwen.ops.dispatch import Attention
from tests.ops.heads import WINDOWS, B, S, T, exact, heads_of, left_padding, slots_from
from tests.reference import close, random_ids, tiny

STARTS = {"first": 0, "goes on": 200, "goes on at a block": 256}
uses_what_moved = pytest.mark.filterwarnings(
    "ignore:jax.experimental.pallas.dot was moved:DeprecationWarning"
)  # tokamax


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("start", STARTS)
def test_splash(rng, start, window, groups):
    """Wherever the prompt goes on in the cache: one program for all of it."""
    heads, visibility = heads_of(rng, groups), Visibility(slots_from(STARTS[start]))
    got = kernels.splash(*heads, visibility, WINDOWS[window], interpret=True)
    close(got, exact(*heads, visibility, WINDOWS[window]), relative=1e-6)


@pytest.mark.parametrize("window", WINDOWS)
def test_splash_with_padding(rng, window):
    """Each row's own; what padding itself sees is nobody's concern, but is finite."""
    padded, start = [0, 230], 200
    visibility = Visibility(slots_from(start), left_padding(padded))
    heads = heads_of(rng, 2)
    got = kernels.splash(*heads, visibility, WINDOWS[window], interpret=True)
    real = np.arange(start, start + T)[None] >= np.asarray(padded)[:, None]
    close(got, exact(*heads, visibility, WINDOWS[window]), relative=1e-6, where=real)
    assert np.isfinite(np.asarray(got)).all()


def test_splash_with_segments(rng):
    """Packed rows: a token sees its own segment alone."""
    segments = jnp.asarray(np.sort(rng.integers(0, 4, (B, T)), axis=1), jnp.int32)
    visibility = Visibility(slots_from(0), None, segments, segments)
    heads = heads_of(rng, 2, slots=T)
    got = kernels.splash(*heads, visibility, None, interpret=True)
    close(got, exact(*heads, visibility, None), relative=1e-6)


def test_splash_sums_in_float32(rng):
    """bfloat16 in and out, off by its rounding from the plain one in float32; no further than that is in bfloat16."""
    exact = heads_of(rng, 2, slots=T)
    visibility = Visibility(slots_from(0))
    rounded = [a.astype(jnp.bfloat16) for a in exact]
    want = attend_in_blocks(*(a.astype(jnp.float32) for a in rounded), visibility)
    ours = kernels.splash(*rounded, visibility, None, interpret=True)
    plain = attend_in_blocks(*rounded, visibility)
    assert ours.dtype == jnp.bfloat16
    errors = [np.abs(np.asarray(got, np.float32) - want).mean() for got in (ours, plain)]
    assert errors[0] <= 1.1 * errors[1]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("padded", [None, [0, 30]])
@pytest.mark.parametrize(("start", "slots"), [(0, T), (200, S)])
@pytest.mark.parametrize(("library", "relative"), [("jax.nn", 1e-6), ("tokamax", 2e-6)])
def test_dot_product(rng, library, relative, start, slots, padded, window):
    """How cuDNN is asked, and tokamax, answered by XLA: another implementation of each, of the same call.

    The answers are off by 9.3e-7 and 1.13e-6 at most in 900 draws.
    """
    pytest.importorskip(library, reason="an extra of its own: pip install flaxqwen[tokamax]")
    ask = {"jax.nn": kernels.dot_product, "tokamax": kernels.tokamax}[library]
    visibility = Visibility(slots_from(start), None if padded is None else left_padding(padded, slots))
    heads = heads_of(rng, 4, slots=slots)
    with jax.default_matmul_precision("highest"):
        got = ask(*heads, visibility, WINDOWS[window], interpret=False, implementation="xla")
    real = np.arange(start, start + T)[None] >= np.asarray(padded or [0, 0])[:, None]
    close(got, exact(*heads, visibility, WINDOWS[window]), relative=relative, where=real)
    assert np.isfinite(np.asarray(got)).all()


@pytest.fixture
def cpu_for_gpu():
    """tokamax takes this CPU for a GPU."""
    tokamax = pytest.importorskip("tokamax", reason="an extra of its own: pip install flaxqwen[tokamax]")
    with tokamax.config.cross_compile(True):
        yield


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("start", "slots", "padded"), [(0, T, [0, 30]), (200, S, None), (200, S, [0, 230])])
@uses_what_moved
@pytest.mark.usefixtures("cpu_for_gpu")
def test_tokamax(rng, start, slots, padded, window, monkeypatch):
    """Its kernel for GPUs, by Triton, interpreted. Where it forms the mask itself JAX's interpreter does not run it."""
    calls, run = [], pallas.pallas_call

    def interpreted(*arguments, **options):
        calls.append(1)
        return run(*arguments, **options, interpret=True)

    monkeypatch.setattr(pallas, "pallas_call", interpreted)
    visibility = Visibility(slots_from(start), None if padded is None else left_padding(padded, slots))
    heads = heads_of(rng, 4, slots=slots)
    with jax.default_matmul_precision("highest"):
        got = kernels.tokamax(*heads, visibility, WINDOWS[window], interpret=False, implementation="triton")
    assert calls
    real = np.arange(start, start + T)[None] >= np.asarray(padded or [0, 0])[:, None]
    close(got, exact(*heads, visibility, WINDOWS[window]), relative=1e-6, where=real)
    assert np.isfinite(np.asarray(got)).all()


@pytest.mark.parametrize(("run", "tokens"), [(kernels.tokamax, T), (kernels.decode, 1)])
@pytest.mark.parametrize("window", WINDOWS)
@uses_what_moved
@pytest.mark.usefixtures("cpu_for_gpu")
def test_lowered_for_gpus(rng, run, tokens, window):
    """The kernels themselves, and the derivatives of those that have them, for a platform that is not here."""
    heads = heads_of(rng, 4, tokens, slots=256 if tokens == 1 else T, dtype=jnp.bfloat16, width=64)
    visibility = Visibility(slots_from(0, tokens))

    def kernels_of(call):
        program = jax.jit(call).trace(*heads)
        return program.lower(lowering_platforms=("cuda",)).as_text().count("@__gpu$xla.gpu.triton(")

    attend = partial(run, visibility=visibility, window=WINDOWS[window], interpret=False)
    forward = kernels_of(attend)
    assert forward >= 1
    if tokens > 1:
        assert kernels_of(jax.grad(lambda *heads: attend(*heads).astype(jnp.float32).sum(), (0, 1, 2))) > forward


@pytest.mark.parametrize("groups", [1, 7])
@pytest.mark.parametrize("lengths", [[300], [0, 511], [127, 128]])
def test_paged(rng, lengths, groups):
    """One token a row, as test_decode, of bfloat16, to which it rounds scaled queries and, interpreted, weights.

    Heads of 256 are scaled by a power of two: what is left is the rounding of weights and of the result, each by half a
    unit in the last place. Those of 128 are no further from what is exact than the plain one's.
    """
    visibility = Visibility(jnp.asarray(lengths, jnp.int32)[:, None])
    for width in (256, 128):
        heads = heads_of(rng, groups, tokens=1, slots=512, dtype=jnp.bfloat16, width=width)
        got, want = kernels.paged(*heads, visibility, None, interpret=True), exact(*heads, visibility, None)
        assert got.dtype == jnp.bfloat16
        if width == 256:
            assert np.abs(np.asarray(got) - want).max() <= 2**-9 * (np.abs(want).max() + np.abs(heads[2]).max()) + 1e-5
        errors = [np.abs(np.asarray(y, np.float64) - want).mean() for y in (got, attend_in_blocks(*heads, visibility))]
        assert errors[0] <= 1.1 * errors[1]


def wide(tree):
    """bfloat16 as float32."""
    return jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, tree)


def test_paged_in_a_model(rng):
    """Steps of rows at one slot, and at their own: logits are off from float32's as bfloat16's plain ones are.

    At most 1.3 times as far on average in 24 draws; one that does not see slot 7 is 4 times as far.
    """
    config = tiny(head_dim=128, max_position_embeddings=512, torch_dtype="bfloat16")
    model = AutoModelForCausalLM.from_config(Qwen2Config.from_dict(config), seed=2)
    module = model.module.clone(attention=Attention())
    ids, steps = random_ids(rng, (2, 128)), random_ids(rng, (2, 1))
    cache = module.apply(model.variables, ids, past_key_values=init_cache(model.config, 2, 256, jnp.bfloat16))
    for length in (jnp.asarray([128]), jnp.asarray([128, 40])):
        past = cache.past_key_values.replace(length=length)
        exact = module.clone(dtype=jnp.float32).apply(wide(model.variables), steps, past_key_values=wide(past)).logits
        errors = [
            np.abs(module.clone(attention=attention).apply(model.variables, steps, past_key_values=past).logits - exact)
            for attention in (Attention(decode="paged", interpret=True), Attention())
        ]
        assert errors[0].mean() <= 1.5 * errors[1].mean()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", [[300], [0, 511]])
def test_decode(rng, lengths, window):
    """One token a row, at one slot for all rows or at each one's own: numpy's in float64."""
    visibility = Visibility(jnp.asarray(lengths, jnp.int32)[:, None])
    heads = heads_of(rng, 4, tokens=1, slots=512)
    got = kernels.decode(*heads, visibility, WINDOWS[window], interpret=True)
    close(got, exact(*heads, visibility, WINDOWS[window]), relative=1e-6)


def pallas_calls(jaxpr):
    """How many calls of Pallas' kernels a program has, with those of the functions that it calls."""
    inner = [
        getattr(value, "jaxpr", value)
        for equation in jaxpr.eqns
        if equation.primitive.name != "pallas_call"
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns"))
    ]
    own = sum(equation.primitive.name == "pallas_call" for equation in jaxpr.eqns)
    return own + sum(pallas_calls(each) for each in inner if hasattr(each, "eqns"))


@pytest.mark.parametrize(
    ("attention", "tokens"),
    [
        (Attention(prefill="splash"), 128),
        (Attention(prefill="tokamax"), 128),
        (Attention(whole="tokamax"), 128),
        (Attention(decode="paged"), 1),
        (Attention(decode="pallas"), 1),
    ],
    ids=["splash", "tokamax", "tokamax-whole", "paged", "pallas"],
)
@uses_what_moved
@pytest.mark.usefixtures("cpu_for_gpu")
def test_kernels_run_where_they_serve(rng, attention, tokens):
    """Each in every layer of a model of bfloat16 with heads of 128, and in none for the other kinds of call."""
    config = Qwen2Config.from_dict(tiny(head_dim=128, max_position_embeddings=512, torch_dtype="bfloat16"))
    model = AutoModelForCausalLM.from_config(config, seed=2)
    module = model.module.clone(attention=attention)
    for count in (1, 128):
        for is_whole in (False, True):
            ids = random_ids(rng, (1, count))
            past = None if is_whole else init_cache(config, 1, 512, jnp.bfloat16)
            run = partial(module.apply, past_key_values=past, use_cache=not is_whole)
            found = pallas_calls(jax.make_jaxpr(run)(model.variables, ids).jaxpr)
            serves = is_whole if attention.whole != "xla" else count == tokens and not is_whole
            assert found == (config.num_hidden_layers if serves else 0), (count, is_whole)
