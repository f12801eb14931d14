"""The host's side and the compiled loop: which programs run, when, what they hold in memory, and for how long."""

from __future__ import annotations

import dataclasses
import math
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from flaxqwen.generation import decoding, inputs, loop
from flaxqwen.generation.config import GenerationConfig
from flaxqwen.generation.programs import Programs
from flaxqwen.generation.stopping import Stopping
from flaxqwen.ops import cpu_kernels
from flaxqwen.ops.dispatch import choose_attention
from tests.generation.test_generate import EOS, models
from tests.reference import random_ids

KEEP = {"keep_scores": False, "keep_logits": False}


@pytest.fixture(scope="module")
def tiny_models():
    return models(max_position_embeddings=2048)


def begin(mine, ids, new_tokens, ends=(), **options):
    """A state after prefill, and how tokens are chosen."""
    from flaxqwen.generation.config import resolve

    B, P = ids.shape
    options |= {"max_new_tokens": new_tokens}
    options = resolve(GenerationConfig(), None, options, input_length=P, max_position_embeddings=2048)
    request = inputs.Inputs(ids, np.ones((B, P), bool))
    control = decoding.Control(Stopping(eos_token_id=tuple(ends), fills=bool(ends)))
    choice = decoding.make_choice(mine, request, options, 1, control)
    state, _ = loop.prefill(
        mine.module,
        mine.variables,
        inputs.make_prompt(request, 32, 2048),
        choice,
        None,
        capacity=2048,
        copies=1,
        cache_dtype=np.dtype("float32"),
        **KEEP,
    )
    return state, choice


@pytest.mark.parametrize("platform_chunk", [(1, 0), (3, 1), (8, 2)], ids=str)
def test_tokens_do_not_depend_on_chunks(platform_chunk, rng, tiny_models, monkeypatch):
    """Nor on how many programs are dispatched before the first is read."""
    _, mine = tiny_models
    ids = random_ids(rng, (2, 7))
    options = {"max_new_tokens": 14, "eos_token_id": EOS, "pad_token_id": 3, "return_dict_in_generate": True}
    options |= {"do_sample": True, "top_k": 0, "seed": 5}
    want = mine.generate(ids, **options)
    monkeypatch.setitem(decoding.CHUNK, "cpu", platform_chunk)
    got = mine.generate(ids, **options)
    np.testing.assert_array_equal(got.sequences, want.sequences)
    n = int(want.past_key_values.length[0])
    for ours, other in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
        # A program that runs on past the last token writes out of sight only.
        finished = np.isin(np.asarray(want.sequences)[:, 7:], EOS).argmax(1)
        rows = [row for row in range(2) if finished[row] == 0]
        np.testing.assert_allclose(ours.key[rows, :, :n], other.key[rows, :, :n], atol=1e-6)


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_programs_are_dispatched_before_the_last_is_read(ahead, rng, tiny_models, monkeypatch):
    """An accelerator has its next program when one ends: so many are dispatched beyond the one that is read."""
    assert decoding.DEFAULT_CHUNK[1] >= 1
    _, mine = tiny_models
    events = []

    class Seen(Programs):
        def run(self, program, *arguments, **static):
            events.extend(["dispatched"] * (program is loop.decode))
            return super().run(program, *arguments, **static)

    def read(results):
        events.append("read")
        return device_get(results)

    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", read)
    monkeypatch.setattr(decoding, "make_pace", lambda model, steps, began: decoding.Pace(steps, False, began))
    monkeypatch.setitem(decoding.CHUNK, "cpu", (2, ahead))
    dataclasses.replace(mine, programs=Seen()).generate(random_ids(rng, (2, 7)), max_new_tokens=9)
    programs = 4  # of 2 steps, after that of prefill
    want = ["dispatched"] * ahead
    for done in range(programs + 1):
        want += ["read"] + ["dispatched"] * (done + ahead < programs)
    assert events == want


def test_prefill_has_logits_of_the_last_position_alone(tiny_models):
    """No array of the program has a place for each token's."""
    _, mine = tiny_models
    ids, V = np.ones((2, 24), np.int32), mine.config.vocab_size
    _, choice = begin(mine, ids, 8)
    prompt = inputs.make_prompt(inputs.Inputs(ids, ids.astype(bool)), 32, 2048)
    options = {"capacity": 2048, "copies": 1, "cache_dtype": np.dtype("float32"), **KEEP}
    text = loop.prefill.lower(mine.module, mine.variables, prompt, choice, None, **options).as_text()
    widths = {math.prod(map(int, dims.split("x"))) // V for dims in re.findall(rf"tensor<((?:\d+x)*{V})xf32>", text)}
    assert 2 in widths
    assert max(widths) < 2 * 24


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("wanted", [None, np.int32(3)], ids=["all", "wanted"])
@pytest.mark.parametrize("implementation", ["xla", None], ids=["xla", "default"])
def test_the_cache_is_updated_in_place(implementation, wanted, rows, tiny_models):
    """The decoding program aliases its whole state, copies no keys or values, and has no place for a second cache.

    Where our kernels for CPUs read the cache there is no loop but that over the steps.
    """
    _, mine = tiny_models
    attention = choose_attention(implementation, jax.default_backend())
    mine = dataclasses.replace(mine, module=mine.module.clone(attention=attention))
    state, choice = begin(mine, np.ones((rows, 6), np.int32), 8)
    program = loop.decode.lower(mine.module, mine.variables, state, choice, wanted, steps=4, **KEEP).compile()
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache.layers))
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 2
    text = program.as_text()
    shape = "f32[" + ",".join(map(str, state.cache.layers[0].key.shape)) + "]"
    assert shape in text
    assert not re.search(re.escape(shape) + r"\S* copy\(", text)
    if attention.decode == "native" and cpu_kernels.INSTRUCTIONS is not None:
        assert text.count(" while(") == 1


@pytest.mark.parametrize("rows", [1, 4])
def test_a_sampled_step_sorts_nothing(rows, tiny_models):
    """Qwen's own options: the whole program has no sort."""
    _, mine = tiny_models
    own = {"do_sample": True, "top_k": 20, "top_p": 0.8, "temperature": 0.7, "repetition_penalty": 1.1, "seed": 0}
    state, choice = begin(mine, np.ones((rows, 6), np.int32), 8, **own)
    assert len(choice.processors) == 4
    program = loop.decode.lower(mine.module, mine.variables, state, choice, np.int32(3), steps=4, **KEEP).compile()
    assert " sort(" not in program.as_text()


def test_steps_that_nobody_wants_are_not_run(rng, tiny_models):
    """Neither more than are wanted, nor any after the step with which the last row ends."""
    _, mine = tiny_models
    ids = random_ids(rng, (2, 6))

    def decode(wanted, ends=()):
        """What the steps give, and how many were run: by columns of tokens, and by slots that have changed."""
        state, choice = begin(mine, ids, 12, ends)
        before = np.array(state.cache.layers[0].key)
        state, outputs = loop.decode(mine.module, mine.variables, state, choice, wanted, steps=8, **KEEP)
        changed = (np.asarray(state.cache.layers[0].key) != before).any(axis=(0, 1, 3))
        assert changed.sum() == int(state.cur_len) - 7
        return outputs, changed.sum()

    state, _ = begin(mine, ids, 12)
    first = state.input_ids[:, 6]
    outputs, run = decode(None)
    assert run == 8
    tokens = np.asarray(outputs.tokens)
    for wanted in range(10):
        outputs, run = decode(np.int32(wanted))
        assert run == min(wanted, 8)
        np.testing.assert_array_equal(outputs.tokens[:wanted], tokens[:wanted])
    ends = [int(tokens[4, 0]), int(tokens[2, 1])]
    all_tokens = np.concatenate([np.asarray(first)[None], tokens])  # after 0 steps, that of prefill
    last = max(int(np.isin(all_tokens[:, row], ends).argmax()) for row in range(2))
    outputs, run = decode(np.int32(8), ends)
    assert run == last <= 5
    np.testing.assert_array_equal(outputs.finished.all(axis=1)[:last], np.arange(1, last + 1) == last)


def test_programs_run_for_a_while(monkeypatch):
    """Of a CPU as many steps as take a quarter of a second, one at first; of others, all."""
    now = iter([0.1, 0.35, 0.4, 10.0, 10.1, 10.101])
    monkeypatch.setattr(decoding, "time", SimpleNamespace(monotonic=now.__next__))
    pace = decoding.Pace(steps=8, is_kept=True, began=0.0)
    counts = [pace.count]
    for _ in range(6):
        pace.see()
        counts.append(pace.count)
    assert counts == [1, 2, 2, 8, 1, 2, 8]
    assert pace.next(20) == (8, 8)
    assert pace.next(3) == (3, 3)
    assert decoding.Pace(steps=8, is_kept=False, began=0.0).next(3) == (None, 8)
