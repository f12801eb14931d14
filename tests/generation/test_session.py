"""A long session of mixed calls compiles few programs: more for each kind of decoding and bucket, none for values."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from flaxqwen.demo.data import WORDS, tokenizer_files
from flaxqwen.generation.config import GenerationConfig
from flaxqwen.model import Model
from flaxqwen.models.qwen2 import Qwen2ForCausalLM
from tests.reference import counted_compilations, pair

VOCAB = 256 + len(WORDS) + 3  # the demo model's


def calls(rng: np.random.Generator, draft: Model, tokenizer: Any):
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
    yield plain | {"assistant_model": draft, "num_assistant_tokens": int(rng.integers(4, 6))}
    yield plain | {"regex": f"[a-{rng.choice(list('bcdefgh'))}]+x{{1,{rng.integers(2, 9)}}}", "tokenizer": tokenizer}


def test_two_hundred_calls_compile_at_most_32_programs(rng, tmp_path):
    """Prompts of any length up to a bucket's, of one row; the issue's limit."""
    pytest.importorskip("outlines_core", reason="regex needs it: pip install flaxqwen[grammar]")
    transformers = pytest.importorskip("transformers", reason="for a tokenizer")
    for name, content in tokenizer_files().items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    _, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, vocab_size=VOCAB, num_hidden_layers=1)
    model = Model(module, params, module.config, GenerationConfig())
    draft = replace(model, params=jax.tree.map(lambda p: p * 1.1, params))
    with counted_compilations() as compiled:
        for _ in range(20):
            for options in calls(rng, draft, tokenizer):
                ids = rng.integers(1, VOCAB, (1, int(rng.integers(1, 32))))
                model.generate(ids, **options)
    print(f"{len(compiled)} programs")
    assert len(compiled) <= 32
