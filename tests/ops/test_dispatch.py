"""Attention by kernels equals the plain one, runs where it is for, and leaves alone what it does not serve."""

from __future__ import annotations

import dataclasses
import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

from flaxqwen import AutoModelForCausalLM, Qwen2Config
from flaxqwen.cache import init_cache
from flaxqwen.ops import attention as ops_attention
from flaxqwen.ops import cpu_kernels, kernels
from flaxqwen.ops.attention import Visibility, attend_in_blocks, attend_to_seen_blocks
from flaxqwen.ops.dispatch import DEFAULTS, Attention, choose_attention
from flaxqwen.sharding import Sharding, make_mesh
from tests.ops.heads import WINDOWS, B, H, S, T, exact, heads_of, left_padding, slots_from
from tests.reference import close, padded_mask, random_ids, tiny

SPLASH = Attention(prefill="splash", interpret=True)
STARTS = {"first": 0, "goes on": 200, "goes on at a block": 256}


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
@pytest.mark.parametrize("library", ["jax.nn", "tokamax"])
def test_dot_product(rng, library, start, slots, padded, window):
    """How cuDNN is asked, and tokamax, answered by XLA: another implementation of each, of the same call."""
    pytest.importorskip(library, reason="an extra of its own: pip install flaxqwen[tokamax]")
    ask = {"jax.nn": kernels.dot_product, "tokamax": kernels.tokamax}[library]
    visibility = Visibility(slots_from(start), None if padded is None else left_padding(padded, slots))
    heads = heads_of(rng, 4, slots=slots)
    with jax.default_matmul_precision("highest"):
        got = ask(*heads, visibility, WINDOWS[window], interpret=False, implementation="xla")
    real = np.arange(start, start + T)[None] >= np.asarray(padded or [0, 0])[:, None]
    close(got, exact(*heads, visibility, WINDOWS[window]), relative=1e-6, where=real)
    assert np.isfinite(np.asarray(got)).all()


uses_what_moved = pytest.mark.filterwarnings(
    "ignore:jax.experimental.pallas.dot was moved:DeprecationWarning"
)  # tokamax


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


@pytest.fixture(scope="module")
def model():
    config = tiny(max_position_embeddings=1024, use_sliding_window=True, sliding_window=150, max_window_layers=1)
    return AutoModelForCausalLM.from_config(Qwen2Config.from_dict(config), seed=2)


def with_attention(model, attention):
    return dataclasses.replace(model, module=model.module.clone(attention=attention))


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 128}])
def test_generate(rng, model, options):
    """Left-padded prompts, whole and in parts, a layer with a window: logits and tokens of the plain one."""
    ids, mask = random_ids(rng, (2, 300)), padded_mask([300, 200], 300, "left")
    options = options | {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    ours, plain = (
        with_attention(model, attention).generate(ids, attention_mask=mask, **options)
        for attention in (SPLASH, Attention())
    )
    assert (ours.sequences == plain.sequences).all()
    close(np.stack(ours.logits), np.stack(plain.logits), relative=1e-5)


def test_decode_in_a_model(rng, model):
    ids = random_ids(rng, (2, 200))
    attention = Attention(decode="pallas", interpret=True)
    ours, plain = (with_attention(model, choice).generate(ids, max_new_tokens=6) for choice in (attention, Attention()))
    assert (ours == plain).all()


def kernels_in(model, ids, **inputs):
    """How many kernels a forward over a cache runs."""
    cache = model(ids[:, :1], use_cache=True).past_key_values.grow(512)
    run = partial(model.module.apply, past_key_values=cache, **inputs)
    return pallas_calls(jax.make_jaxpr(run)(model.variables, ids).jaxpr)


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


def test_what_is_not_served_is_plain(rng, model):
    """Masks of 4 dimensions, attention weights, lengths that blocks do not divide, rows at their own slots."""
    splash, ids = with_attention(model, SPLASH), random_ids(rng, (2, 128))
    assert kernels_in(splash, ids, cache_position=jnp.arange(1, 129)) == 0  # rows have lengths of their own
    aligned = random_ids(rng, (1, 128))
    assert kernels_in(splash, aligned) == 2  # layers
    assert kernels_in(splash, aligned[:, :100]) == 0
    assert kernels_in(splash, aligned, output_attentions=True) == 0
    assert kernels_in(splash, aligned, attention_mask=jnp.ones((1, 1, 128, 129), bool)) == 0
    assert kernels_in(model, aligned) == 0
    by_pages = with_attention(model, Attention(decode="paged", interpret=True))
    assert kernels_in(by_pages, random_ids(rng, (1, 1))) == 0  # float32, heads of 16


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
    model = with_attention(AutoModelForCausalLM.from_config(config, seed=2), attention)
    for count in (1, 128):
        for is_whole in (False, True):
            ids = random_ids(rng, (1, count))
            run = partial(model.module.apply, use_cache=False) if is_whole else model.module.apply
            past = {} if is_whole else {"past_key_values": init_cache(config, 1, 512, jnp.bfloat16)}
            found = pallas_calls(jax.make_jaxpr(partial(run, **past))(model.variables, ids).jaxpr)
            serves = is_whole if attention.whole != "xla" else count == tokens and not is_whole
            assert found == (config.num_hidden_layers if serves else 0), (count, is_whole)


def test_scores_do_not_grow_with_the_slots(rng):
    """1,024 tokens over 32,768 slots have as many at a time as over 8,192; over these all that there are."""
    sizes = []
    for slots in (8192, 32768):
        heads = [
            jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (jnp.zeros((1, 1024, 4, H)), jnp.zeros((1, 2, slots, H)))
        ]
        run = jax.jit(lambda query, key, slots: attend_in_blocks(query, key, key, Visibility(slots)))
        lowered = run.lower(*heads, jax.ShapeDtypeStruct((1, 1024), jnp.int32))
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


@pytest.mark.parametrize("prefill", ["native", "blocks"])
def test_a_long_prompt_on_a_cpu(rng, model, prefill):
    """Logits and tokens of the plain one, without scores [heads, 1024, 1024] in memory: by default, or in blocks."""
    long = dataclasses.replace(model.config, max_position_embeddings=2048)
    model = AutoModelForCausalLM.from_config(long, seed=2)
    assert model.module.attention == Attention(decode="native", prefill="native")
    model = with_attention(model, Attention(decode="native", prefill=prefill))
    ids, mask = random_ids(rng, (2, 1024)), padded_mask([1024, 700], 1024, "left")
    options = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    ours, plain = (
        each.generate(ids, attention_mask=mask, **options) for each in (model, with_attention(model, Attention()))
    )
    assert (ours.sequences == plain.sequences).all()
    close(np.stack(ours.logits), np.stack(plain.logits), relative=1e-5)
    sizes = [temporaries(each, ids) for each in (model, with_attention(model, Attention()))]
    scores = 2 * model.config.num_attention_heads * 1024**2 * 4
    assert sizes[0] < scores / 2
    assert sizes[1] >= scores
    if prefill == "blocks":  # which are for prompts that are long
        assert temporaries(model, ids[:, :128]) == temporaries(with_attention(model, Attention()), ids[:, :128])


def temporaries(model, ids):
    """Bytes of temporaries of a forward of prompts over a cache that they fill."""
    cache = init_cache(model.config, *ids.shape, np.float32)
    run = partial(model.module.apply, past_key_values=cache.replace(length=cache.length[:1]), logits_to_keep=1)
    return jax.jit(run).lower(model.variables, ids).compile().memory_analysis().temp_size_in_bytes


def native_calls(module, variables, ids, **inputs):
    """How many calls of our kernels, of decoding and of prefill, a program has, and its bytes of temporaries."""
    compiled = jax.jit(partial(module.apply, **inputs)).lower(variables, ids).compile()
    targets = [cpu_kernels.target(name, cpu_kernels.INSTRUCTIONS) for name in ("DecodeAttention", "PrefillAttention")]
    calls = [compiled.as_text().count(f'custom_call_target="{target}"') for target in targets]
    return calls, compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures("kernels_for")
def test_generate_on_a_cpu(rng):
    """Left-padded prompts, a layer with a window: by default logits and tokens of the plain one."""
    config = tiny(head_dim=16, use_sliding_window=True, sliding_window=50, max_window_layers=1)
    model = AutoModelForCausalLM.from_config(Qwen2Config.from_dict(config), seed=2)
    ids, mask = random_ids(rng, (2, 100)), padded_mask([100, 70], 100, "left")
    options = {"max_new_tokens": 20, "return_dict_in_generate": True, "output_logits": True}
    ours, plain = (
        each.generate(ids, attention_mask=mask, **options) for each in (model, with_attention(model, Attention()))
    )
    assert (ours.sequences == plain.sequences).all()
    close(np.stack(ours.logits), np.stack(plain.logits), relative=1e-5)


@pytest.mark.usefixtures("kernels_for")
def test_native_where_it_is_for(rng):
    """A step or a prompt over a cache on one device, which is read where it is, whatever the bound; nothing else."""
    config = Qwen2Config.from_dict(tiny(head_dim=16))
    model = AutoModelForCausalLM.from_config(config, seed=2)
    module, layers = model.module, config.num_hidden_layers
    cache = init_cache(config, 2, 4096, np.float32)
    part = cache.replace(bound=2048)
    one, two, many = (random_ids(rng, (2, tokens)) for tokens in (1, 2, 100))
    new = 2 * 4096 * 2 * config.num_key_value_heads * config.head_dim * layers * 4  # the cache that is returned
    for ids, wanted in ((one, [layers, 0]), (many, [0, layers])):
        calls, temporaries = native_calls(module, model.variables, ids, past_key_values=part)
        assert calls == wanted
        assert temporaries < new / layers / 2 / 2  # not a bound's part of a layer's keys
        options = {"past_key_values": cache, "output_attentions": True}
        assert native_calls(module, model.variables, ids, **options)[0] == [0, 0]
        assert native_calls(module, model.variables, ids)[0] == [0, 0]  # no cache
        integers = init_cache(config, 2, 4096, np.int8)
        assert native_calls(module, model.variables, ids, past_key_values=integers)[0] == [0, 0]
        cut = module.clone(sharding=Sharding.fit(make_mesh(devices=jax.devices()[:1]), config))
        assert native_calls(cut, model.variables, ids, past_key_values=part)[0] == [0, 0]
    assert native_calls(module, model.variables, two, past_key_values=part)[0] == [0, 0]


@pytest.mark.parametrize("name", ["xla", "native"])
@pytest.mark.parametrize("tokens", [1, 100])
def test_slots_beyond_the_bound_are_not_read(rng, name, tokens):
    """NaN there, which a mask would not keep out of a sum, changes nothing: rows at one slot, and at their own."""
    config = Qwen2Config.from_dict(tiny(head_dim=16))
    model = AutoModelForCausalLM.from_config(config, seed=2)
    module = model.module.clone(attention=Attention(decode=name, prefill=name))
    first, ids = random_ids(rng, (2, 120)), random_ids(rng, (2, tokens))
    empty = init_cache(config, 2, 1024, np.float32)
    cache = module.apply(model.variables, first, past_key_values=empty).past_key_values
    layers = jax.tree.map(lambda a: a.at[:, :, 256:].set(jnp.nan), cache.layers)
    for length in ([120], [120, 40]):
        past = cache.replace(length=jnp.asarray(length), bound=256)
        want, got = (
            module.apply(model.variables, ids, past_key_values=past.replace(layers=each)).logits
            for each in (cache.layers, layers)
        )
        np.testing.assert_array_equal(got, want)
        assert np.isfinite(np.asarray(got)).all()


def test_native_without_kernels(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "INSTRUCTIONS", None)
    assert choose_attention(None, "cpu") == DEFAULTS["cpu"]  # what it cannot is in blocks, or plain
    with pytest.raises(ValueError, match="'native': no kernels were built for this CPU"):
        choose_attention("native", "cpu")


def test_int8_cache_is_plain(rng, model):
    ids = random_ids(rng, (1, 128))
    ours, plain = (
        with_attention(model, attention).generate(ids, max_new_tokens=3, cache_dtype="int8")
        for attention in (SPLASH, Attention())
    )
    assert (ours == plain).all()


def test_the_table():
    assert choose_attention(None, "cpu") == Attention(decode="native", prefill="native")
    assert choose_attention(None, "cuda") == DEFAULTS["gpu"] == Attention()  # not measured: nothing but by name
    assert choose_attention(None, "tpu") == Attention(prefill="splash")
    assert choose_attention("xla", "tpu") == Attention()
    assert choose_attention("cudnn", "cuda") == Attention(prefill="cudnn", whole="cudnn")
    assert choose_attention("tokamax", "cuda") == Attention(prefill="tokamax", whole="tokamax")
    assert choose_attention("paged", "tpu") == Attention(decode="paged", prefill="splash")
    both = choose_attention({"prefill": "cudnn", "decode": "pallas"}, "gpu")
    assert both == Attention(decode="pallas", prefill="cudnn")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("flash", "'flash' is not known; expected one of xla, blocks, splash, paged, cudnn, tokamax, pallas, native"),
        ("splash", "'splash' is for prefill on a tpu, not for prefill on a cpu"),
        ({"prefil": "xla"}, "has 'prefil'; expected decode, prefill, whole"),
    ],
)
def test_refused(wanted, message):
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(Qwen2Config.from_dict(tiny()), attention_implementation=wanted)


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"'tokamax' needs tokamax: pip install 'flaxqwen\[tokamax\]'"):
        choose_attention("tokamax", "gpu")


def test_the_name_in_transformers(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="did you mean 'attention_implementation'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attention_implementation="xla")
    assert loaded.module.attention == Attention()
