"""Classifier-free guidance gives Transformers' tokens and scores; with beams, those of a search that recomputes it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from flaxqwen.generation.config import GenerationConfig
from flaxqwen.model import Model
from flaxqwen.models.qwen2 import Qwen2ForCausalLM
from tests.reference import (
    close,
    counted_compilations,
    padded_mask,
    pair,
    params_of,
    random_ids,
    th,
    tiny,
    torch,
    torch_model,
)

VOCAB, NEW = 61, 14
KEEP = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
GIVEN = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 3, "eos_token_id": 7}


@pytest.fixture(scope="module")
def ours():
    _, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, vocab_size=VOCAB, num_hidden_layers=1)
    return Model(module, params, module.config, GenerationConfig())


def random_model(ours, rng):
    theirs = torch_model("Qwen2ForCausalLM", tiny(vocab_size=VOCAB, num_hidden_layers=1), seed=int(rng.integers(2**31)))
    return theirs, replace(ours, params=params_of(theirs))


@pytest.mark.parametrize("negative", ["none", "shorter", "longer", "right", "hole"])
def test_greedy_tokens_are_theirs(negative, ours, rng):
    """50 models in all, two left-padded rows each, with another processor after the guidance.

    Negative prompts padded on the left, on the right, or with a hole, which have the positions of their columns.
    """
    for index in range(10):
        theirs, mine = random_model(ours, rng)
        ids, mask = random_ids(rng, (2, 9), VOCAB), padded_mask([9, 5], 9, "left")
        given = GIVEN | KEEP | {"guidance_scale": [0.5, 1.7, 3.0][index % 3], "repetition_penalty": 1.2}
        prompts = {"attention_mask": mask}
        if negative != "none":
            width = 4 if negative == "shorter" else 13
            negative_mask = padded_mask([width, width - 2], width, "right" if negative == "right" else "left")
            negative_mask[1] = np.roll(negative_mask[1], 1 if negative == "hole" else 0)
            prompts |= {
                "negative_prompt_ids": random_ids(rng, (2, width), VOCAB),
                "negative_prompt_attention_mask": negative_mask,
            }
        want = theirs.generate(th(ids), **{name: th(value) for name, value in prompts.items()}, **given)
        got = mine.generate(ids, **prompts, **given)
        np.testing.assert_array_equal(got.sequences, want.sequences)
        for step, (a, b) in enumerate(zip(got.scores + got.logits, want.scores + want.logits, strict=True)):
            rows = [r for r in range(2) if 7 not in want.sequences[r, 9 : 9 + step % len(got.scores)]]
            close(a[rows], b[rows])


def test_beams_are_those_of_a_search_that_recomputes(ours, rng):
    """Transformers' processor does not reorder its cache with the beams; one that has none is right."""
    for _ in range(6):
        theirs, mine = random_model(ours, rng)
        ids, negative = random_ids(rng, (1, 9), VOCAB), random_ids(rng, (1, 5), VOCAB)

        def guided(input_ids, scores, theirs=theirs, negative=negative):
            rows = torch.cat([th(negative).expand(len(input_ids), -1), input_ids[:, 9:]], dim=1)
            other = theirs(rows).logits[:, -1].log_softmax(-1)
            return 1.7 * (scores.log_softmax(-1) - other) + other

        options = GIVEN | KEEP | {"num_beams": 3, "num_return_sequences": 3}
        with torch.no_grad():
            want = theirs.generate(th(ids), attention_mask=th(np.ones_like(ids)), logits_processor=[guided], **options)
        got = mine.generate(
            ids, attention_mask=np.ones_like(ids), negative_prompt_ids=negative, guidance_scale=1.7, **options
        )
        np.testing.assert_array_equal(got.sequences, want.sequences)
        np.testing.assert_allclose(got.sequences_scores, want.sequences_scores, rtol=1e-5, atol=1e-5)


def test_rows_samples_and_states(ours, rng):
    """Several continuations of one prompt are rows of their own; states and cache are those of the prompts' rows."""
    _, mine = random_model(ours, rng)
    ids, negative = random_ids(rng, (2, 6), VOCAB), random_ids(rng, (2, 9), VOCAB)
    given = {"attention_mask": np.ones_like(ids), "negative_prompt_ids": negative, "guidance_scale": 2.0, "seed": 4}
    given |= {"do_sample": True, "max_new_tokens": 5, "eos_token_id": None, "num_return_sequences": 2}
    got = mine.generate(ids, output_hidden_states=True, **KEEP, **given)
    np.testing.assert_array_equal(got.sequences, mine.generate(ids, **given))
    assert got.sequences.shape == (4, 11)
    assert [layers[0].shape for layers in got.hidden_states] == [(4, 6, 64)] + [(4, 1, 64)] * 4
    assert got.past_key_values.length.tolist() == [10] * 4
    full = mine(got.sequences[:, :10], use_cache=True, output_hidden_states=True)
    for layer, other in zip(got.past_key_values.layers, full.past_key_values.layers, strict=True):
        close(layer.value[:, :, :10], other.value[:, :, :10])
    close(got.hidden_states[0][-1], np.asarray(full.hidden_states[-1])[:, :6])


def test_values_compile_nothing(ours, rng):
    _, mine = random_model(ours, rng)
    ids, negative = random_ids(rng, (1, 6), VOCAB), random_ids(rng, (1, 5), VOCAB)
    negative[negative == GIVEN["pad_token_id"]] = 4  # which would be masked, and then be another program
    mine.generate(ids, negative_prompt_ids=negative, guidance_scale=2.0, **GIVEN)
    with counted_compilations() as compiled:
        mine.generate(ids, negative_prompt_ids=negative[:, 1:], guidance_scale=0.3, **GIVEN)
    assert not compiled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"negative_prompt_ids": [[1, 2], [3, 4]]}, "negative_prompt_ids has 2 rows, expected 1"),
        ({"negative_prompt_ids": [[1, VOCAB]]}, f"token id {VOCAB} is out of the vocabulary"),
        ({"negative_prompt_ids": [[1, 2]], "negative_prompt_attention_mask": [[1]]}, r"has shape \(1, 1\)"),
        ({"negative_prompt_attention_mask": [[1]]}, "needs negative_prompt_ids"),
        ({"inputs_embeds": np.zeros((1, 3, 64)), "inputs": None}, "guidance_scale cannot go with inputs_embeds"),
    ],
)
def test_refusals(changes, message, ours):
    given = {"inputs": np.array([[1, 2, 4]]), "guidance_scale": 2.0} | GIVEN | changes
    with pytest.raises(ValueError, match=message):
        ours.generate(**given)


def test_negative_prompts_without_guidance_are_said_to_do_nothing(ours):
    with pytest.warns(UserWarning, match="no effect without a guidance_scale"):
        ours.generate(np.array([[1, 2, 4]]), negative_prompt_ids=[[1]], **GIVEN)
