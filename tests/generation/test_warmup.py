"""model.warmup(): later calls of the same shapes compile nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from flaxqwen.generation.config import GenerationConfig
from flaxqwen.model import Model
from flaxqwen.models.qwen2 import Qwen2ForCausalLM
from tests.reference import counted_compilations, padded_mask, pair, random_ids, tiny

# Of no other test: its programs are compiled here.
OWN = {"vocab_size": 337, "max_position_embeddings": 2048, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def model():
    _, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, **OWN)
    return Model(module, params, module.config, GenerationConfig())


def test_calls_of_these_shapes_compile_nothing(rng, model):
    """In both buckets that decoding reads as it crosses 512 tokens, with and without padding, whatever the values."""
    options = {"max_new_tokens": 24, "do_sample": True, "top_k": 5, "eos_token_id": [3]}
    before = np.random.get_state()
    with counted_compilations() as compiled:
        model.warmup([1, 2], [9, 500], **options)
    assert compiled
    after = np.random.get_state()
    assert after[2] == before[2], "numpy's global generator has moved"
    assert (after[1] == before[1]).all()
    changed = options | {"temperature": 0.7, "top_k": 9, "eos_token_id": None}
    with counted_compilations() as compiled:
        for length in (9, 500):
            model.generate(random_ids(rng, (1, length), 337), **changed, seed=1)
            model.generate(random_ids(rng, (2, length), 337), **changed)
            mask = padded_mask([length, length - 4], length, "left")
            model.generate(random_ids(rng, (2, length), 337), attention_mask=mask, **changed)
    assert not compiled


OPTIONS = {
    "chunks": {"prefill_chunk_size": 16},
    "copies-in-chunks": {"prefill_chunk_size": 16, "num_return_sequences": 2, "do_sample": True},
    "int8-cache": {"cache_dtype": "int8"},
    "guidance": {"guidance_scale": 1.5},
    "log-probabilities": {"return_dict_in_generate": True, "top_logprobs": 3},
    "one-token": {"max_new_tokens": 1},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_that_make_programs(rng, model, options):
    """Prompts in parts, other caches, rows that are repeated or guided: nothing is left to compile."""
    chosen = {"max_new_tokens": 6} | OPTIONS[options]
    model.warmup([1], [40], **chosen)
    with counted_compilations() as compiled:
        model.generate(random_ids(rng, (1, 40), 337), **chosen)
    assert not compiled


OTHER_PROCESS = """
import json, sys
from flaxqwen.cli.entry import keep_compiled_programs
keep_compiled_programs()
import jax
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rsplit("/")[-1]))
from flaxqwen import AutoModelForCausalLM, Qwen2Config
method, config, arguments, options = map(json.loads, sys.argv[1:])
model = AutoModelForCausalLM.from_config(Qwen2Config.from_dict(config))
events.clear()
getattr(model, method)(*arguments, **options)
print(events.count("cache_hits"), events.count("cache_misses"))
"""


def test_another_process_finds_them_in_the_cache(rng, tmp_path):
    """One process warms up, the next one generates: from JAX's persistent cache, as the command line sets it up."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMP")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path)}
    counts = []
    for method, arguments in (("warmup", [[1], [7]]), ("generate", [random_ids(rng, (1, 7)).tolist()])):
        texts = [json.dumps(part) for part in (method, tiny(num_hidden_layers=1), arguments, {"max_new_tokens": 6})]
        command = [sys.executable, "-c", OTHER_PROCESS, *texts]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        counts.append(tuple(map(int, done.stdout.split())))
    assert counts == [(0, 2), (2, 0)]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], [8]), {}, "batch_sizes must be a list"),
        (([1], 8), {}, "prompt_lengths must be a list"),
        (([1], [0]), {}, "prompt_lengths must be a list"),
        (([1], [8]), {"input_ids": [[1]]}, "warmup\\(\\) does not take input_ids"),
        (([1], [8]), {"num_beams": 2}, "does not cover num_beams=2"),
        (([1], [8]), {"prompt_lookup_num_tokens": 3}, "does not cover drafts"),
        (([1], [8]), {"max_new_token": 4}, "max_new_token"),
    ],
)
def test_refused(model, arguments, options, message):
    with counted_compilations() as compiled, pytest.raises((TypeError, ValueError), match=message):
        model.warmup(*arguments, **options)
    assert not compiled
