"""A long session of mixed calls compiles few programs: more for each kind of decoding and bucket, none for values."""

from __future__ import annotations

import numpy as np

from flaxqwen.generation.config import GenerationConfig
from flaxqwen.model import Model
from flaxqwen.models.qwen2 import Qwen2ForCausalLM
from tests.reference import counted_compilations, pair

VOCAB = 61


def calls(rng: np.random.Generator, draft: Model):
    """The kinds of calls that a session mixes, with random values; each is options of generate()."""
    eos = rng.integers(0, VOCAB, int(rng.integers(1, 4))).tolist()
    sampling = {"do_sample": True, "seed": int(rng.integers(2**32))}
    plain = {"eos_token_id": eos, "pad_token_id": 0, "max_new_tokens": int(rng.integers(1, 16))}
    yield plain
    yield plain | {"repetition_penalty": float(rng.uniform(0.8, 1.5))}
    yield plain | sampling | {"temperature": float(rng.uniform(0.3, 2.0)), "top_k": int(rng.integers(1, 20))}
    yield (
        plain
        | sampling
        | {
            "temperature": float(rng.uniform(0.3, 2.0)),
            "top_k": int(rng.integers(1, 20)),
            "top_p": float(rng.uniform(0.3, 0.99)),
            "repetition_penalty": float(rng.uniform(1.01, 1.5)),
        }
    )
    yield plain | {
        "num_beams": 4,
        "length_penalty": float(rng.uniform(-1, 2)),
        "early_stopping": [True, False, "never"][int(rng.integers(3))],
    }
    yield plain | {
        "prompt_lookup_num_tokens": int(rng.integers(4, 6)),
        "max_matching_ngram_size": int(rng.integers(1, 5)),
    }
    yield plain | {"guidance_scale": float(rng.uniform(1.1, 3.0))}
    yield plain | {"return_dict_in_generate": True, "top_logprobs": int(rng.integers(1, 5))}


def test_two_hundred_calls_compile_at_most_32_programs(rng):
    """Prompts of any length up to a bucket's, of one row; the issue's limit."""
    _, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, vocab_size=VOCAB)
    model = Model(module, params, module.config, GenerationConfig())
    with counted_compilations() as compiled:
        for _ in range(25):
            for options in calls(rng, model):
                ids = rng.integers(1, VOCAB, (1, int(rng.integers(1, 32))))
                model.generate(ids, **options)
    print(f"{len(compiled)} programs")
    assert len(compiled) <= 32
