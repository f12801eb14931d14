"""The KV cache in int8, and prompts in chunks: against Transformers with the same cache, and with the whole prompt."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from flaxqwen.config import Qwen2Config
from flaxqwen.generation import loop
from flaxqwen.generation.config import GenerationConfig
from flaxqwen.generation.inputs import Inputs, make_prompt
from flaxqwen.generation.sampling import TokenChoice
from flaxqwen.model import Model
from flaxqwen.models.qwen2 import Qwen2ForCausalLM
from tests.reference import close, counted_compilations, params_of, random_ids, th, tiny, torch, torch_model

GREEDY = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
# An integer that float32 rounds the other way moves a logit by a few 1e-4 of the largest.
ROUNDED = 2e-3


@pytest.fixture(scope="module")
def models() -> tuple[Any, Model]:
    config = tiny(max_position_embeddings=512)
    theirs = torch_model("Qwen2ForCausalLM", config)
    ours = Qwen2Config.from_dict(config)
    return theirs, Model(Qwen2ForCausalLM(ours), params_of(theirs), ours, GenerationConfig())


def int8_cache() -> Any:
    """A cache of Transformers that remembers what 8 bits a value, and a scale for each token and head, can."""
    import transformers

    def rounded(x: Any) -> Any:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return torch.round(x / scale) * scale

    class Int8(transformers.DynamicCache):
        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            return super().update(rounded(key_states), rounded(value_states), *args, **kwargs)

    return Int8()


def logits_of(output: Any) -> np.ndarray:
    return np.stack([np.asarray(step) for step in output.logits], axis=1)


@pytest.mark.parametrize("option", [{"cache_dtype": "int8"}, {"cache_implementation": "quantized"}], ids=str)
def test_int8_cache(models: Any, rng: np.random.Generator, option: dict[str, Any]):
    """The logits of Transformers with such a cache; a plain one is further off than rounding is."""
    theirs, ours = models
    ids = random_ids(rng, (3, 21))
    mask = np.ones_like(ids)
    mask[0, :7] = 0
    got = ours.generate(ids, attention_mask=mask, max_new_tokens=9, **GREEDY, **option)
    sequences = th(got.sequences[:, :-1])
    whole = torch.cat([th(mask), torch.ones(3, 8, dtype=torch.long)], dim=1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)

    def reference(cache: Any) -> np.ndarray:
        with torch.no_grad():
            out = theirs(sequences, attention_mask=whole, position_ids=positions, past_key_values=cache)
        return out.logits[:, 20:].numpy()

    want = reference(int8_cache())
    close(logits_of(got), want, ROUNDED)
    assert np.abs(logits_of(got) - reference(None)).max() > 2 * np.abs(logits_of(got) - want).max()
    layer = got.past_key_values.layers[0]
    assert (layer.key.dtype, layer.value_scale.dtype) == (np.int8, np.float32)
    assert layer.key_scale.shape == (*layer.key.shape[:3], 1)


def test_int8_cache_in_every_way_of_decoding(models: Any, rng: np.random.Generator):
    """Several sequences of a prompt, prompt lookup, a second turn: the same tokens as greedy decoding gives."""
    _, ours = models
    ids = random_ids(rng, (1, 12))
    options = GREEDY | {"cache_dtype": "int8", "max_new_tokens": 8}
    plain = ours.generate(ids, **options)
    again = ours.generate(ids, **options | {"do_sample": True, "top_k": 1, "num_return_sequences": 2})
    np.testing.assert_array_equal(again.sequences, plain.sequences.repeat(2, axis=0))
    lookup = ours.generate(ids, **options | {"prompt_lookup_num_tokens": 3})
    np.testing.assert_array_equal(lookup.sequences, plain.sequences)
    first = ours.generate(ids, **options | {"max_new_tokens": 4})
    assert first.past_key_values.layers[0].key.dtype == np.int8
    second = ours.generate(first.sequences, past_key_values=first.past_key_values, **GREEDY, max_new_tokens=4)
    np.testing.assert_array_equal(second.sequences, plain.sequences)


def test_prompts_in_chunks(models: Any, rng: np.random.Generator):
    """The whole prompt's logits and tokens, with padding, from a cache, and for several sequences of a prompt."""
    chunk = 40
    theirs, ours = models
    ids = random_ids(rng, (2, 97))
    mask = np.ones_like(ids)
    mask[1, :20] = 0
    options = GREEDY | {"max_new_tokens": 6}
    got = ours.generate(ids, attention_mask=mask, prefill_chunk_size=chunk, **options)
    want = theirs.generate(th(ids), attention_mask=th(mask), pad_token_id=0, **options)
    np.testing.assert_array_equal(got.sequences, want.sequences.numpy())
    close(logits_of(got), torch.stack(want.logits, dim=1))
    first = ours.generate(ids[:1, :30], **options | {"max_new_tokens": 1})
    longer = np.concatenate([first.sequences, ids[:1, 31:]], axis=1)
    rest = ours.generate(longer, past_key_values=first.past_key_values, prefill_chunk_size=chunk, **options)
    np.testing.assert_array_equal(rest.sequences, ours.generate(longer, **options).sequences)
    several = options | {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    twice = ours.generate(ids[:1], prefill_chunk_size=chunk, **several)
    np.testing.assert_array_equal(twice.sequences, got.sequences[:1].repeat(2, axis=0))


def test_chunks_share_programs_and_bound_memory(models: Any, rng: np.random.Generator):
    """Another length of as many slots compiles nothing; the temporaries of a chunk are those of no longer prompt."""
    _, ours = models
    options = GREEDY | {"max_new_tokens": 2, "prefill_chunk_size": 32}
    ours.generate(random_ids(rng, (1, 200)), **options)
    with counted_compilations() as compiled:
        ours.generate(random_ids(rng, (1, 170)), **options)
    assert not compiled

    def temporaries(tokens: int) -> int:
        request = Inputs(random_ids(rng, (1, tokens)), np.ones((1, tokens), bool))
        prompt = make_prompt(request, tokens, 512)
        shape = {"capacity": 512, "cache_dtype": np.dtype(np.float32)}
        lowered = loop.fill.lower(ours.module, ours.variables, prompt, None, **shape)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(32) < temporaries(256) / 4


def test_what_does_not_go_together_is_refused(models: Any):
    _, ours = models
    for options, message in (
        ({"prefill_chunk_size": 0}, "prefill_chunk_size must be a positive number of tokens"),
        ({"prefill_chunk_size": 8, "output_attentions": True}, "does not go with output_attentions"),
        ({"cache_dtype": "int4"}, "cache_dtype must be 'int8'"),
        ({"cache_implementation": "quantized", "cache_config": {"nbits": 4}}, "a quantised cache has one form here"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.generate(np.ones((1, 4), int), return_dict_in_generate=True, **options)


def test_the_int8_cache_is_updated_in_place(models: Any):
    """Of the decoding program: every byte of the cache is aliased, and no temporary is as large as a layer of it."""
    _, ours = models
    call = {"keep_scores": False, "keep_logits": False}
    prompt = make_prompt(Inputs(np.ones((1, 32), np.int32), np.ones((1, 32), bool)), 32, 4096)
    choice = TokenChoice((), np.zeros(1, np.int32), np.int32(0), np.uint32(0))
    shape = {"capacity": 4096, "cache_dtype": np.dtype(np.int8), "copies": 1}
    traced = loop.prefill.trace(ours.module, ours.variables, prompt, choice, None, **shape, **call)
    state, _ = traced.out_info
    state = state.replace(cache=state.cache.replace(bound=512))
    memory = loop.decode.lower(ours.module, ours.variables, state, choice, steps=4, **call).compile().memory_analysis()
    cache = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state.cache.layers))
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < cache / 4


def test_max_cache_len_makes_room_for_later_calls(models: Any, rng: np.random.Generator):
    """Calls of other lengths within it use one cache shape, so one program: a later, longer one compiles nothing."""
    _, ours = models
    ids = random_ids(rng, (1, 20))
    short = ours.generate(ids, max_new_tokens=4, max_cache_len=600, **GREEDY)
    assert short.past_key_values.capacity >= 600
    whole = ours.generate(ids, max_new_tokens=40, **GREEDY)
    np.testing.assert_array_equal(short.sequences, whole.sequences[:, :24])
    with counted_compilations() as compiled:
        long = ours.generate(np.repeat(ids, 20, axis=1)[:, :30], max_new_tokens=460, max_cache_len=600, **GREEDY)
    assert not compiled
    assert long.past_key_values.capacity == short.past_key_values.capacity
    with pytest.raises(ValueError, match="max_cache_len must be a positive number of tokens, found 0"):
        ours.generate(ids, max_cache_len=0)
