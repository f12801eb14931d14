"""Attention by kernels equals the plain one, runs where it is for, and leaves alone what it does not serve."""

from __future__ import annotations

import dataclasses
import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxqwen import AutoModelForCausalLM, Qwen2Config
from flaxqwen.cache import init_cache
from flaxqwen.ops import cpu_kernels
from flaxqwen.ops.dispatch import DEFAULTS, Attention, choose_attention
from flaxqwen.sharding import Sharding, make_mesh
from tests.ops.test_kernels import pallas_calls
from tests.reference import close, padded_mask, random_ids, tiny

SPLASH = Attention(prefill="splash", interpret=True)


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
