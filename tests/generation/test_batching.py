"""Continuous batching: every row as generate() alone, in few programs, and a cache that stays where it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from flaxqwen import AutoModelForCausalLM, GenerationConfig
from flaxqwen.generation import batching
from flaxqwen.models.qwen2 import Qwen2ForCausalLM
from tests.reference import counted_compilations, pair, random_ids, th

VOCABULARY = 331
NEW = 12
Texts = list[tuple[np.ndarray, dict[str, Any]]]


@pytest.fixture(scope="module")
def both() -> tuple[Any, Any]:
    """Transformers' model and ours."""
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM)
    return theirs, dataclasses.replace(AutoModelForCausalLM.from_config(module.config), params=params)


@pytest.fixture(scope="module")
def model(both) -> Any:
    return both[1]


def continued(model: Any, texts: Texts, rows: int = 3) -> list[list[int]]:
    """The new tokens of each prompt with its options, from one batch."""
    requests = [batching.make_request(model, ids, options) for ids, options in texts]
    assert len({request.signature for request in requests}) == 1
    capacity = max(request.capacity for request in requests)
    found = batching.run(model, iter(enumerate(requests)), rows=rows, capacity=capacity, counts=batching.Counts())
    return [tokens for _, tokens in sorted(found)]


def alone(model: Any, texts: Texts) -> list[list[int]]:
    return [model.generate(ids[None], **options)[0, len(ids) :].tolist() for ids, options in texts]


def prompts(rng: np.random.Generator, count: int, longest: int = 31) -> Iterator[np.ndarray]:
    return (random_ids(rng, (int(rng.integers(1, longest)),)) for _ in range(count))


def ends(rng: np.random.Generator) -> dict[str, Any]:
    """A length, and ids of which one ends most texts before it."""
    return {"max_new_tokens": int(rng.integers(1, NEW)), "eos_token_id": rng.integers(0, VOCABULARY, 12).tolist()}


def test_greedy_rows_are_as_transformers_alone(both, rng):
    """Rows that come and go, of lengths of their own; prompts in two buckets; no text knows of the others."""
    theirs, model = both
    texts = [(ids, ends(rng) | {"do_sample": False}) for ids in prompts(rng, 10)]
    texts[4] = random_ids(rng, (41,)), {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": [7] * 12}
    expected = []
    for ids, options in texts:
        sequences = theirs.generate(
            th(ids[None]), attention_mask=th(np.ones_like(ids[None])), pad_token_id=0, **options
        )
        expected.append(sequences[0, len(ids) :].tolist())
    assert continued(model, texts) == expected
    assert continued(model, texts[::-1]) == expected[::-1]
    assert continued(model, texts[:2]) == expected[:2]  # and one place is never taken


def everything(rng: np.random.Generator) -> dict[str, Any]:
    """Every kind of processor, with values of its own."""
    tokens = rng.permutation(VOCABULARY).tolist()  # apart: one that is forced must not be suppressed
    return {
        "max_new_tokens": int(rng.integers(4, NEW)),
        "min_new_tokens": int(rng.integers(1, 4)),
        "eos_token_id": tokens[:2],
        "do_sample": True,
        "seed": int(rng.integers(2**32)),
        "temperature": float(rng.uniform(0.5, 1.5)),
        "top_k": int(rng.integers(2, 50)),
        "top_p": float(rng.uniform(0.5, 0.95)),
        "min_p": float(rng.uniform(0.01, 0.1)),
        "typical_p": float(rng.uniform(0.7, 0.95)),
        "repetition_penalty": float(rng.uniform(1.05, 1.4)),
        "encoder_repetition_penalty": float(rng.uniform(1.05, 1.4)),
        "no_repeat_ngram_size": int(rng.integers(1, 4)),
        "bad_words_ids": [[token] for token in tokens[9:12]],
        "sequence_bias": [[[int(token)], float(rng.normal())] for token in rng.permutation(VOCABULARY)[:3]],
        "suppress_tokens": tokens[2:5],
        "begin_suppress_tokens": tokens[5:8],
        "forced_eos_token_id": tokens[8],
        "exponential_decay_length_penalty": (int(rng.integers(1, 4)), float(rng.uniform(1.01, 1.1))),
        "cache_dtype": "int8",
    }


def test_sampled_rows_are_as_alone_and_values_compile_nothing(model, rng):
    texts = [(ids, everything(rng)) for ids in prompts(rng, 5)]
    assert continued(model, texts) == alone(model, texts)
    others = [(ids, everything(rng)) for ids in prompts(rng, 5)]
    with counted_compilations() as compiled:
        found = continued(model, others)
    assert compiled == []
    assert found == alone(model, others)


def test_the_cache_stays_where_it_is(model):
    """A row that comes in, and a step, change their slots of the donated cache: no copy, whatever its size."""
    request = batching.make_request(model, np.arange(5), {"max_new_tokens": NEW})
    sizes = []
    for capacity in (2048, 4096):
        shape = {"rows": 8, "capacity": capacity}
        layers = batching.empty.eval_shape(model.module, cache_dtype=np.dtype("float32"), **shape)
        state = batching.free.eval_shape(model.module, request.row, **shape)
        programs = (
            batching.admit.lower(model.module, model.variables, layers, np.zeros(32, np.int32), 5, 1),
            batching.decode.lower(model.module, model.variables, layers, state, steps=4, bound=512),
        )
        found = [program.compile().memory_analysis() for program in programs]
        total = sum(leaf.size * 4 for leaf in jax.tree.leaves(layers))
        assert all(memory.alias_size_in_bytes >= total for memory in found)
        sizes.append([memory.temp_size_in_bytes for memory in found])
        assert max(sizes[-1]) < total / 4
    assert sizes[0] == sizes[1]


def test_prompts_are_padded_little():
    lengths = np.arange(1, 40_000)
    buckets = np.asarray([batching.prompt_bucket(int(n)) for n in lengths])
    assert (buckets >= lengths).all()
    assert (np.diff(buckets) >= 0).all()
    longer = lengths > batching.SMALLEST_PROMPT
    assert ((buckets - lengths) / buckets)[longer].max() < 1 / 3
    assert len(np.unique(buckets[lengths <= 8192])) == 17


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2}, "num_beams=2 is not for batches"),
        ({"do_sample": True, "num_return_sequences": 2}, "num_return_sequences=2 is not for batches"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0 is not for batches"),
        ({"max_time": 1.0}, "max_time=1.0 is not for batches"),
        ({"token_healing": True}, "token_healing=True is not for batches"),
        ({"assistant_early_exit": 1}, "assistant_early_exit=1 is not for batches"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate=True is not for batches"),
        ({"max_new_tokens": 126}, "come to 129, the model's context is 128"),
        ({"max_tokens": 3}, "unknown generation option 'max_tokens'; did you mean 'max_new_tokens'"),
    ],
)
def test_what_is_not_of_a_row_is_refused(model, options, words):
    with pytest.raises(ValueError, match=words):
        batching.make_request(model, [1, 2, 3], options)


def test_the_models_own_options(model, rng):
    """Those of its generation_config, where a line does not say otherwise."""
    config = GenerationConfig(max_new_tokens=4, eos_token_id=tuple(range(12)))
    own = dataclasses.replace(model, generation_config=config)
    texts: Texts = [(ids, {}) for ids in prompts(rng, 3)]
    assert continued(own, texts) == alone(own, texts)
