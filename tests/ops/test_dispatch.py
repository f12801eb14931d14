"""Attention by kernels equals the plain one, runs where it is for, and leaves alone what it does not serve."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxqwen import AutoModelForCausalLM, Qwen2Config
from flaxqwen.cache import init_cache
from flaxqwen.ops import cpu_kernels, kernels
from flaxqwen.ops.attention import Visibility, attend_in_blocks, attend_to_seen_blocks
from flaxqwen.ops.dispatch import DEFAULTS, Attention, choose_attention
from flaxqwen.sharding import Sharding, make_mesh
from tests.reference import close, padded_mask, random_ids, tiny

B, T, S, K, H = 2, 128, 384, 2, 16
SPLASH = Attention(prefill="splash", interpret=True)


def heads_of(rng, groups, tokens=T, slots=S, dtype=jnp.float32):
    """query [B, T, N, H], key and value [B, K, S, H].

    Multiples of 1/256, so that float32 scores are exact in whatever order they are summed; queries times 4, for weights
    that are far from uniform. What is left of rounding are the softmax and its product: 7e-7 at most in 225 draws.
    """
    shapes = (B, tokens, K * groups, H), (B, K, slots, H), (B, K, slots, H)
    query, key, value = (np.round(rng.normal(size=shape) * 256) / 256 for shape in shapes)
    return [jnp.asarray(a, dtype) for a in (4 * query, key, value)]


def exact(query, key, value, visibility, window):
    """numpy's in float64, [B, T, N, H]; 0 where nothing is visible."""
    query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
    key, value = (np.repeat(a, query.shape[2] // K, axis=1) for a in (key, value))
    visible = np.asarray(visibility.visible(key.shape[2], window))[:, None]
    scores = np.einsum("BTNH,BNSH->BNTS", query, key) * H**-0.5
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True)) * visible
    sums = weights.sum(axis=-1, keepdims=True)
    return np.einsum("BNTS,BNSH->BTNH", np.divide(weights, sums, where=sums > 0, out=np.zeros_like(weights)), value)


def slots_from(start, tokens=T):
    return jnp.arange(start, start + tokens, dtype=jnp.int32)[None]


def left_padding(padded, slots=S):
    return jnp.asarray(np.arange(slots)[None] >= np.asarray(padded)[:, None])


WINDOWS = {"full": None, "sliding": 70, "narrow": 5}
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
def test_dot_product(rng, start, slots, padded, window):
    """How cuDNN is asked, answered by XLA: jax.nn's other implementation of the same call."""
    visibility = Visibility(slots_from(start), None if padded is None else left_padding(padded, slots))
    heads = heads_of(rng, 4, slots=slots)
    got = kernels.dot_product(*heads, visibility, WINDOWS[window], interpret=False, implementation="xla")
    real = np.arange(start, start + T)[None] >= np.asarray(padded or [0, 0])[:, None]
    close(got, exact(*heads, visibility, WINDOWS[window]), relative=1e-6, where=real)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", [[300], [0, 511]])
def test_decode(rng, lengths, window):
    """One token a row, at one slot for all rows or at each one's own: numpy's in float64."""
    visibility = Visibility(jnp.asarray(lengths, jnp.int32)[:, None])
    heads = heads_of(rng, 4, tokens=1, slots=512)
    got = kernels.decode(*heads, visibility, WINDOWS[window], interpret=True)
    close(got, exact(*heads, visibility, WINDOWS[window]), relative=1e-6)


native = jax.jit(partial(kernels.decode_on_cpu, interpret=False), static_argnums=4)
NATIVE = {  # rows, heads, queries a head, capacity, slots of the mask, of H numbers
    "0.5B": (3, 2, 7, 512, 384, 64),
    "7B": (2, 4, 7, 200, 200, 128),
    "slots are shared out": (1, 1, 12, 2048, 2000, 32),
    "a query each": (2, 3, 1, 70, 65, 16),
}


@pytest.mark.parametrize("window", [None, 70, 5])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("case", NATIVE)
@pytest.mark.usefixtures("kernels_for")
def test_native(rng, case, is_padded, window):
    """Rows at their own slots, numpy's in float64; what lies beyond what a row may see is not read: it is NaN."""
    rows, heads, group, capacity, slots, width = NATIVE[case]
    query = jnp.asarray(rng.normal(size=(rows, 1, heads * group, width)), jnp.float32)
    key, value = rng.normal(size=(2, rows, heads, capacity, width)).astype(np.float32)
    slot, mask = rng.integers(0, slots, (rows, 1)).astype(np.int32), None
    slot[0] = slots - 1
    if is_padded:
        mask = rng.random((rows, slots)) < 0.7
        mask[np.arange(rows), slot[:, 0]] = True
    visibility = Visibility(jnp.asarray(slot), mask)
    seen = np.asarray(visibility.visible(capacity if mask is None else slots, window))[:, 0]
    wanted = np.zeros(query.shape)
    for row, head in np.ndindex(rows, heads * group):
        keys, values = (a[row, head // group, : seen.shape[1]][seen[row]].astype(np.float64) for a in (key, value))
        scores = keys @ np.asarray(query[row, 0, head], np.float64) * width**-0.5
        weights = np.exp(scores - scores.max())
        wanted[row, 0, head] = weights @ values / weights.sum()
    for row in range(rows):
        first = 0 if window is None else max(0, slot[row, 0] - window + 1)
        for unseen in (slice(0, first), slice(slot[row, 0] + 1, None)):
            key[row, :, unseen] = value[row, :, unseen] = np.nan
    # 1.5e-6 at most in 40 draws, of the plain one 1.2e-6: scores of random numbers are sums of float32's rounding.
    close(native(query, key, value, visibility, window), wanted, relative=3e-6)
    rounded = [jnp.asarray(a, jnp.bfloat16) for a in (query, key, value)]
    exact_of_rounded = native(*(a.astype(jnp.float32) for a in rounded), visibility, window)
    ours = native(*rounded, visibility, window)
    assert ours.dtype == jnp.bfloat16
    assert (ours == exact_of_rounded.astype(jnp.bfloat16)).all()


@pytest.mark.usefixtures("kernels_for")
def test_native_does_not_depend_on_other_rows(rng):
    """To the last bit: a row alone, and beside rows that see more parts of the cache or begin in others."""
    heads = heads_of(rng, 7, tokens=1, slots=2048)
    for window in (None, 700):
        visibility = Visibility(jnp.asarray([[1203], [2047]], jnp.int32))
        both = native(*heads, visibility, window)
        for row in (0, 1):
            own = Visibility(visibility.query_slot[row : row + 1])
            alone = native(*(a[row : row + 1] for a in heads), own, window)
            assert (alone[0] == both[row]).all()


@pytest.mark.usefixtures("kernels_for")
def test_native_of_what_rows_share(rng):
    """One slot, or one mask, for all rows; mapped, and queries of another dtype than the cache: as the plain one."""
    query, key, value = heads_of(rng, 3, tokens=1)
    mask = jnp.asarray(rng.random((1, S)) < 0.5).at[0, 200].set(True)
    visibility = Visibility(jnp.full((1, 1), 200, jnp.int32), mask)
    want = attend_in_blocks(query, key, value, visibility)
    close(native(query, key, value, visibility, None), want, relative=2e-6)
    cache = (key.astype(jnp.bfloat16), value.astype(jnp.bfloat16))
    wide = (a.astype(jnp.float32) for a in cache)
    close(native(query, *cache, visibility, None), attend_in_blocks(query, *wide, visibility), relative=2e-6)
    mapped = jax.vmap(lambda *heads: native(*(a[None] for a in heads), visibility, None)[0])(query, key, value)
    close(mapped, want, relative=2e-6)


@pytest.mark.usefixtures("kernels_for")
@pytest.mark.parametrize("place", [0, 3, 70, 120])
def test_native_with_what_is_not_finite(rng, place):
    """NaN in what is seen, wherever it stands, makes NaN of what sees it; a key that is hidden does nothing."""
    query, key, value = heads_of(rng, 4, tokens=1)
    visibility = Visibility(jnp.full((B, 1), 120, jnp.int32))
    for changed in (
        (query.at[0, 0, :4].set(jnp.nan), key, value),
        (query, key.at[0, 0, place].set(jnp.nan), value),
        (query, key, value.at[0, 0, place].set(jnp.nan)),
    ):
        got = native(*changed, visibility, None)
        assert jnp.isnan(got[0, 0, :4]).all()
        assert jnp.isfinite(got[0, 0, 4:]).all()
        assert jnp.isfinite(got[1]).all()
    hidden = Visibility(visibility.query_slot, jnp.ones((B, S), bool).at[:, place].set(place == 120))
    for unseen in (jnp.nan, 3e38):
        if place != 120:
            got = native(query, key.at[0, 0, place].set(unseen), value, hidden, None)
            assert jnp.isfinite(got).all()


def test_native_elsewhere_than_on_a_cpu(rng, monkeypatch):
    """Lowered for a TPU it is the plain one."""
    heads, visibility = heads_of(rng, 4, tokens=1), Visibility(jnp.full((B, 1), 120, jnp.int32))
    monkeypatch.setattr(cpu_kernels, "INSTRUCTIONS", "avx2")
    traced = jax.jit(partial(kernels.decode_on_cpu, window=None, interpret=False)).trace(*heads, visibility)
    assert "DecodeAttention" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "DecodeAttention" not in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_native_without_kernels(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "INSTRUCTIONS", None)
    assert choose_attention(None, "cpu") == DEFAULTS["cpu"]  # decoding is plain
    with pytest.raises(ValueError, match="'native': no kernels were built for this CPU"):
        choose_attention("native", "cpu")


@pytest.mark.usefixtures("kernels_for")
def test_native_where_nothing_is_seen(rng):
    heads = heads_of(rng, 4, tokens=1)
    visibility = Visibility(jnp.full((B, 1), 100, jnp.int32), jnp.zeros((B, S), bool).at[1, 50].set(True))
    got = native(*heads, visibility, None)
    assert (got[0] == 0).all()
    close(got, exact(*heads, visibility, None), relative=1e-6)


@pytest.mark.usefixtures("kernels_for")
def test_native_in_a_gradient(rng):
    """That of the plain one, for the slots of the mask alone."""
    heads, dy = heads_of(rng, 4, tokens=1), jnp.asarray(rng.normal(size=(B, 1, 4 * K, H)), jnp.float32)
    visibility = Visibility(jnp.asarray([[200], [30]], jnp.int32), left_padding([0, 20], 256))

    def of(run, slots):
        return jax.grad(lambda q, k, v: jnp.vdot(run(q, k[:, :, :slots], v[:, :, :slots]), dy), (0, 1, 2))(*heads)

    ours = of(lambda *heads: native(*heads, visibility, None), S)
    for mine, other in zip(ours, of(lambda *heads: attend_in_blocks(*heads, visibility), 256), strict=True):
        close(mine, other, relative=1e-5)


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
    return str(jax.make_jaxpr(run)(model.variables, ids)).count("pallas_call")


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


def test_a_long_prompt_on_a_cpu(rng, model):
    """By default: logits and tokens of the plain one, without scores [heads, 1024, 1024] in memory; short ones are."""
    long = dataclasses.replace(model.config, max_position_embeddings=2048)
    model = AutoModelForCausalLM.from_config(long, seed=2)
    assert model.module.attention == Attention(decode="native", prefill="blocks")
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
    assert temporaries(model, ids[:, :128]) == temporaries(with_attention(model, Attention()), ids[:, :128])


def temporaries(model, ids):
    """Bytes of temporaries of a forward of prompts over a cache that they fill."""
    cache = init_cache(model.config, *ids.shape, np.float32)
    run = partial(model.module.apply, past_key_values=cache.replace(length=cache.length[:1]), logits_to_keep=1)
    return jax.jit(run).lower(model.variables, ids).compile().memory_analysis().temp_size_in_bytes


def native_calls(module, variables, ids, **inputs):
    """How many calls of our kernel a step's program has, and its bytes of temporaries."""
    compiled = jax.jit(partial(module.apply, **inputs)).lower(variables, ids).compile()
    target = cpu_kernels.target("DecodeAttention", cpu_kernels.INSTRUCTIONS)
    return compiled.as_text().count(f'custom_call_target="{target}"'), compiled.memory_analysis().temp_size_in_bytes


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
    """A step over a cache on one device, which it reads where it is, whatever the bound; nothing else."""
    config = Qwen2Config.from_dict(tiny(head_dim=16))
    model = AutoModelForCausalLM.from_config(config, seed=2)
    module, layers = model.module, config.num_hidden_layers
    cache = init_cache(config, 2, 4096, np.float32)
    part = cache.replace(bound=2048)
    ids, two = random_ids(rng, (2, 1)), random_ids(rng, (2, 2))
    calls, temporaries = native_calls(module, model.variables, ids, past_key_values=part)
    assert calls == layers
    new = 2 * 4096 * 2 * config.num_key_value_heads * config.head_dim * layers * 4  # the cache that is returned
    assert temporaries < new / layers / 2 / 2  # not a bound's part of a layer's keys
    assert native_calls(module, model.variables, two, past_key_values=part)[0] == 0
    assert native_calls(module, model.variables, ids)[0] == 0
    assert native_calls(module, model.variables, ids, past_key_values=cache, output_attentions=True)[0] == 0
    integers = init_cache(config, 2, 4096, np.int8)
    assert native_calls(module, model.variables, ids, past_key_values=integers)[0] == 0
    cut = module.clone(sharding=Sharding.fit(make_mesh(devices=jax.devices()[:1]), config))
    assert native_calls(cut, model.variables, ids, past_key_values=part)[0] == 0


def test_int8_cache_is_plain(rng, model):
    ids = random_ids(rng, (1, 128))
    ours, plain = (
        with_attention(model, attention).generate(ids, max_new_tokens=3, cache_dtype="int8")
        for attention in (SPLASH, Attention())
    )
    assert (ours == plain).all()


def test_the_table():
    assert choose_attention(None, "cpu") == Attention(decode="native", prefill="blocks")
    assert choose_attention(None, "cuda") == DEFAULTS["gpu"] == Attention()  # not measured: nothing but by name
    assert choose_attention(None, "tpu") == Attention(prefill="splash")
    assert choose_attention("xla", "tpu") == Attention()
    assert choose_attention("cudnn", "cuda") == Attention(prefill="cudnn", whole="cudnn")
    both = choose_attention({"prefill": "cudnn", "decode": "pallas"}, "gpu")
    assert both == Attention(decode="pallas", prefill="cudnn")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("flash", "'flash' is not known; expected one of xla, blocks, splash, cudnn, pallas, native"),
        ("splash", "'splash' is for prefill on a tpu, not for prefill on a cpu"),
        ({"prefil": "xla"}, "has 'prefil'; expected decode, prefill, whole"),
    ],
)
def test_refused(wanted, message):
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(Qwen2Config.from_dict(tiny()), attention_implementation=wanted)


def test_the_name_in_transformers(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="did you mean 'attention_implementation'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attention_implementation="xla")
    assert loaded.module.attention == Attention()
