"""Qwen2ForCausalLM equals Transformers': logits, hidden states, attentions, loss, gradients."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxqwen.cache import init_cache
from flaxqwen.config import Qwen2Config
from flaxqwen.models.qwen2 import Qwen2ForCausalLM, Qwen2MLP, Qwen2Model
from tests.reference import close, counted_compilations, padded_mask, pair, random_ids, th, tiny, torch

ROPE_LENGTH = 48
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-mscale": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
        "mscale": 0.8, "mscale_all_dim": 0.5, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False,
    },
    "yarn-null": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": None},
    "yarn-attention-factor": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.3,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 32,
        "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.5 + 0.4 * i for i in range(8)],
    },
}  # fmt: skip

VARIANTS = {
    "grouped-query": {},
    "multi-query": {"num_key_value_heads": 1},
    "multi-head": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "wide-head": {"head_dim": 24},
    "sliding": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "sliding-by-layer-types": {
        "use_sliding_window": True,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def theirs_of(model, **inputs):
    with torch.no_grad():
        return model(**{k: th(v) if isinstance(v, np.ndarray) else v for k, v in inputs.items()})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_forward(variant, side, rng):
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, seed=int(rng.integers(99)), **VARIANTS[variant])
    B, T = 3, 19
    inputs = {"input_ids": random_ids(rng, (B, T))}
    valid = np.ones((B, T), bool)
    if side != "none":
        inputs["attention_mask"] = padded_mask([T, 7, 12], T, side)
        valid = inputs["attention_mask"].astype(bool)
    want = theirs_of(theirs, **inputs, output_hidden_states=True, output_attentions=True)
    # One program: of a model op by op there are a hundred, twice the time.
    run = jax.jit(partial(module.apply, output_hidden_states=True, output_attentions=True))
    got = run({"params": params}, **inputs)
    close(got.logits, want.logits, where=valid)
    assert len(got.hidden_states) == len(want.hidden_states) == 3
    assert len(got.attentions) == len(want.attentions) == 2
    for ours, other in zip(got.hidden_states, want.hidden_states, strict=True):
        close(ours, other, where=valid)
    for ours, other in zip(got.attentions, want.attentions, strict=True):
        close(np.swapaxes(ours, 1, 2), other.transpose(1, 2), where=valid)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("length", [20, ROPE_LENGTH, 100])
def test_rope_types(rope, length, rng):
    """Below the original context, and past it; a short max_position_embeddings makes dynamic NTK grow."""
    changes = {"rope_parameters": ROPES[rope] | {"rope_theta": 5000.0}, "max_position_embeddings": 64}
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, **changes)
    ids = random_ids(rng, (2, length))
    close(jax.jit(module.apply)({"params": params}, ids).logits, theirs_of(theirs, input_ids=ids).logits)


def test_positions_far_out(rng):
    """Angles of positions in the tens of thousands keep float32's accuracy."""
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, rope_theta=1e6, max_position_embeddings=131072)
    ids = random_ids(rng, (2, 9))
    positions = np.sort(rng.integers(0, 32768, (2, 9))).astype(np.int32)
    want = theirs_of(theirs, input_ids=ids, position_ids=positions, attention_mask=np.ones((2, 9), np.int32))
    close(jax.jit(module.apply)({"params": params}, ids, position_ids=positions).logits, want.logits)


def test_inputs_embeds(rng):
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM)
    embeds = rng.standard_normal((2, 11, 64)).astype(np.float32)
    close(
        jax.jit(module.apply)({"params": params}, inputs_embeds=embeds).logits,
        theirs_of(theirs, inputs_embeds=embeds).logits,
    )


@pytest.mark.parametrize("kind", ["bool", "additive", "per-head"])
def test_mask_4d(kind, rng):
    """A 4D mask is used as it is: no causality is added."""
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM)
    T = 13
    visible = rng.random((2, 4 if kind == "per-head" else 1, T, T)) < 0.6
    visible |= np.eye(T, dtype=bool)
    additive = np.where(visible, 0.0, np.finfo(np.float32).min).astype(np.float32)
    if kind == "additive":
        additive = np.where(visible, rng.standard_normal(visible.shape), additive).astype(np.float32)
    ids = random_ids(rng, (2, T))
    want = theirs_of(theirs, input_ids=ids, attention_mask=additive)
    got = module.apply({"params": params}, ids, attention_mask=visible if kind == "bool" else additive)
    close(got.logits, want.logits)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("variant", ["grouped-query", "sliding"])
def test_cache(variant, side, rng):
    """One call, chunks, or token by token, into a cache with room to spare: the same logits."""
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, **VARIANTS[variant])
    B, T = 3, 18
    ids = random_ids(rng, (B, T))
    mask = np.ones((B, T), np.int32) if side == "none" else padded_mask([T, 5, 11], T, side)
    want = theirs_of(theirs, input_ids=ids, attention_mask=mask).logits
    apply = jax.jit(lambda ids, mask, cache: module.apply({"params": params}, ids, mask, past_key_values=cache))
    for cuts in ([0, T], [0, 7, 8, T], list(range(T + 1))):
        cache, logits = init_cache(module.config, B, 32, jnp.float32), []
        for start, stop in pairwise(cuts):
            padded = np.pad(mask[:, :stop], ((0, 0), (0, 32 - stop)))
            output = apply(ids[:, start:stop], padded, cache)
            cache = output.past_key_values
            logits.append(output.logits)
        close(np.concatenate(logits, axis=1), want, 1e-5, where=mask.astype(bool))
        assert np.asarray(cache.length).tolist() == [T] * B


def test_cache_rows_of_different_length(rng):
    """Rows may stand at different lengths, and a bound on what attention reads changes nothing."""
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM)
    ids = random_ids(rng, (2, 12))
    cache = init_cache(module.config, 2, 40, jnp.float32)
    cache = jax.jit(module.apply)({"params": params}, ids, past_key_values=cache).past_key_values
    cache = cache.replace(length=jnp.asarray([5, 9]), bound=16)
    new = random_ids(rng, (2, 2))
    got = jax.jit(module.apply)({"params": params}, new, past_key_values=cache)
    for row, length in enumerate([5, 9]):
        whole = np.concatenate([ids[row, :length], new[row]])[None]
        close(got.logits[row], theirs_of(theirs, input_ids=whole).logits[0, -2:])
    assert np.asarray(got.past_key_values.length).tolist() == [7, 11]


def test_cache_from_forward_continues_as_theirs(rng):
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM)
    ids, more = random_ids(rng, (2, 9)), random_ids(rng, (2, 3))
    first = theirs_of(theirs, input_ids=ids)
    want = theirs_of(theirs, input_ids=more, past_key_values=first.past_key_values).logits
    cache = jax.jit(module.apply)({"params": params}, ids).past_key_values.grow(20)
    close(jax.jit(module.apply)({"params": params}, more, past_key_values=cache).logits, want)
    at = jnp.arange(9, 12)
    close(jax.jit(module.apply)({"params": params}, more, past_key_values=cache, cache_position=at).logits, want)


@pytest.mark.parametrize("batch", [1, 3])
def test_bfloat16(batch, rng):
    """Logits, with and without a cache, as near to float32's as Transformers' bfloat16 ones are.

    Of 64 tokens the ratio is 1.00 with a standard deviation of 0.04; of 11 that is 0.08, and one in 100 passes 1.2.
    """
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM)
    ids, more = random_ids(rng, (batch, 60)), random_ids(rng, (batch, 4))
    whole = np.concatenate([ids, more], axis=1)
    exact = theirs_of(theirs, input_ids=whole).logits.numpy()
    narrow = theirs_of(theirs.bfloat16(), input_ids=whole).logits.float().numpy()
    narrow_params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    apply = jax.jit(lambda ids, **past: module.apply({"params": narrow_params}, ids, **past))
    first = apply(ids)
    assert first.logits.dtype == jnp.bfloat16
    second = apply(more, past_key_values=first.past_key_values.grow(64))
    for got in (apply(whole).logits, np.concatenate([first.logits, second.logits], axis=1)):
        error, limit = (np.sqrt(np.mean(np.square(x - exact))) for x in (np.asarray(got, np.float32), narrow))
        assert error <= 1.2 * limit


def test_long_prompt_in_query_blocks(rng):
    """More than two blocks of queries, and a remainder, with a window and padding: logits, loss and gradients."""
    changes = VARIANTS["sliding"] | {"sliding_window": 700, "max_position_embeddings": 2048}
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, **changes)
    ids, mask = random_ids(rng, (2, 1300)), padded_mask([1300, 900], 1300, "left")
    labels = np.where(mask == 1, ids, -100).astype(np.int32)
    labels[1, 400] = -100  # it would be predicted at a padding, which sees nothing
    want = theirs(input_ids=th(ids), attention_mask=th(mask), labels=th(labels))
    want.loss.backward()

    def loss(params):
        output = module.apply({"params": params}, ids, mask, labels=labels)
        return output.loss, output.logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    close(logits, want.logits.detach(), where=mask.astype(bool))
    assert abs(float(value) - want.loss.item()) <= 1e-6 * abs(want.loss.item())
    for index in range(len(theirs.model.layers)):
        layer = theirs.model.layers[index].self_attn
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            got = gradients["model"][f"layers_{index}"]["self_attn"][name]["weight"]
            close(got, getattr(layer, name).weight.grad, 1e-4)


@pytest.mark.parametrize("keep", [1, 4, np.array([0, 5, 2]), np.array([[1, 3], [8, 0]])], ids=str)
def test_logits_to_keep(keep, rng):
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM)
    ids = random_ids(rng, (2, 9))
    keep_theirs = keep if isinstance(keep, int) else torch.tensor(keep)
    states = theirs(input_ids=th(ids), logits_to_keep=keep_theirs, output_hidden_states=True)
    want = states.logits
    keep = keep if isinstance(keep, int) else jnp.asarray(keep)
    close(module.apply({"params": params}, ids, logits_to_keep=keep).logits, want)
    if isinstance(keep, int):
        close(module.apply({"params": params}, ids, num_logits_to_keep=keep).logits, want)
    whole = jax.jit(partial(module.apply, output_hidden_states=True, logits_to_keep=keep))({"params": params}, ids)
    close(whole.logits, want)
    for mine, other in zip(whole.hidden_states, states.hidden_states, strict=True):  # of all positions all the same
        close(mine, other)
    # Else the last layer's MLP is run for the positions that are kept alone.
    _, seen = module.apply({"params": params}, ids, logits_to_keep=keep, capture_intermediates=True, mutable=True)
    *others, last = (seen["intermediates"]["model"][f"layers_{i}"]["mlp"]["__call__"][0] for i in range(2))
    assert [y.shape[1] for y in others] == [9]
    assert last.shape[1] == want.shape[1] < 9


@pytest.mark.parametrize("how", ["labels", "num_items_in_batch", "shift_labels"])
def test_loss_and_gradients(how, rng):
    """Loss within 1e-6 relative; the gradient of every parameter within 1e-4 of its largest."""
    changes = {"tie_word_embeddings": how != "labels", "pad_token_id": None if how == "labels" else 7}
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, **changes)
    ids, mask = random_ids(rng, (3, 16)), padded_mask([16, 9, 12], 16, "right")
    ids[:, 2] = 7
    labels = np.where(rng.random(ids.shape) < 0.7, ids, -100).astype(np.int32)
    extra = {"labels": {}, "num_items_in_batch": {"num_items_in_batch": 7}, "shift_labels": {"shift_labels": labels}}[
        how
    ]
    want = theirs(
        input_ids=th(ids),
        attention_mask=th(mask),
        labels=th(labels),
        **{k: th(v) if isinstance(v, np.ndarray) else v for k, v in extra.items()},
    )
    want.loss.backward()

    def loss(params):
        return module.apply({"params": params}, ids, mask, labels=labels, deterministic=True, **extra).loss

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert abs(float(value) - want.loss.item()) <= 1e-6 * abs(want.loss.item())
    ours = {
        jax.tree_util.keystr(path, simple=True, separator="."): g for path, g in jax.tree.leaves_with_path(gradients)
    }
    for name, parameter in theirs.named_parameters():
        got = ours.pop(name.replace("layers.", "layers_"))
        close(got, parameter.grad, 1e-4)
    assert not ours


def test_all_labels_ignored_is_nan(rng):
    _, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM)
    ids = random_ids(rng, (1, 5))
    assert np.isnan(jax.jit(module.apply)({"params": params}, ids, labels=np.full((1, 5), -100)).loss)


def test_packed_rows_equal_separate_ones(rng):
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, **VARIANTS["sliding"])
    pieces = [random_ids(rng, (1, n)) for n in (6, 11, 4)]
    ids = np.concatenate(pieces, axis=1)
    segments = np.repeat([3, 1, 2], [6, 11, 4])[None].astype(np.int32)
    positions = np.concatenate([np.arange(p.shape[1]) for p in pieces])[None].astype(np.int32)
    got = jax.jit(module.apply)({"params": params}, ids, position_ids=positions, segment_ids=segments)
    assert got.past_key_values is None
    close(got.logits, np.concatenate([theirs_of(theirs, input_ids=p).logits.numpy() for p in pieces], axis=1))
    for use_cache in (False, True):  # without segment_ids, as Transformers finds them: where there is no cache
        want = theirs_of(theirs, input_ids=ids, position_ids=positions, use_cache=use_cache).logits
        close(module.apply({"params": params}, ids, position_ids=positions, use_cache=use_cache).logits, want)
        assert (np.abs(got.logits - want.numpy()).max() < 1e-3) == (not use_cache)


def test_base_model_and_outputs(rng):
    theirs, module, params = pair("Qwen2Model", Qwen2Model)
    ids = random_ids(rng, (2, 7))
    want, got = theirs_of(theirs, input_ids=ids), module.apply({"params": params}, ids)
    assert list(got.keys()) == list(want.keys()) == ["last_hidden_state", "past_key_values"]
    close(got[0], want[0])
    close(got["last_hidden_state"], want["last_hidden_state"])
    assert len(got.to_tuple()) == len(want.to_tuple())
    as_tuple = module.apply({"params": params}, ids, use_cache=False, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == 1
    with pytest.raises(KeyError, match="hidden_states"):
        got["hidden_states"]


def test_layers_of_a_kind_are_traced_once(rng):
    """In a program; eagerly each one runs, to the same logits."""
    kinds = ["full_attention", "sliding_attention"] * 3
    sliding = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}
    config = Qwen2Config.from_dict(tiny(num_hidden_layers=6, layer_types=kinds, **sliding))
    module, ids, ran = Qwen2ForCausalLM(config), random_ids(rng, (2, 9)), []
    variables = module.init(jax.random.key(int(rng.integers(1000))), ids)

    def note(method, arguments, keywords, context):
        if isinstance(context.module, Qwen2MLP) and context.method_name == "__call__":
            ran.append(context.module)
        return method(*arguments, **keywords)

    with nn.intercept_methods(note):
        logits = jax.jit(lambda variables: module.apply(variables, ids).logits)(variables)
        assert len(ran) == 2
        close(logits, module.apply(variables, ids).logits, 1e-6)
        assert len(ran) == 2 + 6


def test_a_gradient_outside_of_a_program_compiles_once(rng):
    _, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM)
    ids = random_ids(rng, (1, 8))
    gradient = jax.grad(lambda params: module.apply({"params": params}, ids, labels=ids).loss)
    gradient(params)
    with counted_compilations() as compiled:
        gradient(params)
    assert compiled == []


def test_attention_dropout_only_when_training(rng):
    _, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, attention_dropout=0.5)
    ids = random_ids(rng, (1, 8))
    still = module.apply({"params": params}, ids).logits
    runs = [
        module.apply({"params": params}, ids, deterministic=False, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 0, 1)
    ]
    assert runs[0].past_key_values is None
    np.testing.assert_array_equal(runs[0].logits, runs[1].logits)
    assert np.abs(runs[0].logits - runs[2].logits).max() > 1e-3
    assert np.abs(runs[0].logits - still).max() > 1e-3


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "exactly one of input_ids or inputs_embeds"),
        ({"input_ids": np.zeros((1, 3), np.int32), "inputs_embeds": np.zeros((1, 3, 64))}, "exactly one"),
        ({"input_ids": np.zeros((1, 3), np.int32), "attention_mask": np.ones((1, 2))}, r"shape \(1, 2\)"),
        ({"input_ids": np.zeros((1, 3), np.int32), "attention_mask": np.ones((1, 3, 3))}, r"shape \(1, 3, 3\)"),
        ({"input_ids": np.zeros((1, 3), np.int32), "attention_mask": np.ones((1, 3, 3, 3))}, "1 or 4"),
        ({"input_ids": np.zeros((1, 3), np.int32), "attention_mask": np.ones((1, 1, 3, 3), np.int32)}, "bool"),
        ({"input_ids": np.zeros((1, 3), np.int32), "logits_to_keep": np.ones((1, 3), bool)}, "static shape"),
    ],
)
def test_refusals(inputs, message):
    _, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM)
    with pytest.raises(ValueError, match=message):
        module.apply({"params": params}, **inputs)


def test_unknown_arguments_are_type_errors():
    _, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM)
    with pytest.raises(TypeError, match="head_mask"):
        module.apply({"params": params}, np.zeros((1, 3), np.int32), head_mask=None)
