"""warmup(): compile the programs that later calls of generate() need, before the first of them has to wait.

Axes: B batch (prompts), P columns of the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from flaxqwen.generation import loop
from flaxqwen.generation.decoding import CHUNK, DEFAULT_CHUNK, bounded, kept, make_choice, make_pace, start
from flaxqwen.generation.generate import ARGUMENTS, Call, prepare
from flaxqwen.generation.inputs import CausalLM, platform

# The arguments of generate() that are no data: those that a warm-up can have, besides the fields of GenerationConfig.
TAKEN = ("generation_config", "logits_processor", "stopping_criteria", "tokenizer", "regex", "json_schema")


def warmup(model: CausalLM, batch_sizes: Sequence[int], prompt_lengths: Sequence[int], **options: Any) -> None:
    """Compile what generate() needs for prompts of these shapes, without padding and, in batches, with it.

    Each program runs once on made-up tokens: prefill, and one chunk of decoding for each length that attention reads.

    Args:
      batch_sizes: numbers of prompts in a call. prompt_lengths: their tokens, padding included.
      options: of those calls, as of generate(), max_new_tokens above all. Of the values only those count that decide
        the program: temperature, seed, stop tokens and the like may differ later.

    Raises:
      ValueError: no sizes; options that generate() refuses, and calls that cannot be warmed up: with prompts of their
        own, beams, drafts, token healing or callables on the host.
    """
    for name, sizes in (("batch_sizes", batch_sizes), ("prompt_lengths", prompt_lengths)):
        if isinstance(sizes, int) or not sizes or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"{name} must be a list of whole numbers above 0, found {sizes!r}")
    refused = [name for name in (*ARGUMENTS, "adapter_names") if name in options and name not in TAKEN]
    if refused:
        raise ValueError(
            f"warmup() does not take {', '.join(refused)}: it makes prompts up; call generate() itself once"
        )
    options = {"seed": 0} | options  # numpy's global generator is left alone
    for rows in batch_sizes:
        for length in prompt_lengths:
            ids = np.zeros((rows, length), np.int32)
            for padded in (False, True) if rows > 1 and length > 1 else (False,):
                mask = np.ones_like(ids)
                mask[0, 0] = not padded
                run_programs(prepare(model, ids, attention_mask=mask, **options))


def run_programs(call: Call) -> None:
    """Run each program of a call once, as decoding.run has them; nothing is stopped, and no result is read."""
    model, request, options, control = call.model, call.request, call.options, call.control
    found = {
        f"num_beams={options.num_beams}": options.num_beams > 1,
        "drafts": call.drafter is not None,
        "token_healing": options.token_healing,
        "callables on the host": control.stepwise,
    }
    if refused := [name for name, present in found.items() if present]:
        raise ValueError(f"warmup() does not cover {', '.join(refused)}: call generate() itself once")
    steps, _ = CHUNK.get(platform(model.params), DEFAULT_CHUNK)
    copies, keep = options.num_return_sequences, kept(options)
    choice = make_choice(model, request, options, copies, control)
    room = options.max_new_tokens + steps
    state, _ = start(loop.prefill, model, request, choice, None, room, options, copies=copies, **keep)
    seen: set[int | None] = set()
    for dispatched in range(1, options.max_new_tokens, steps):
        state = state.replace(cache=bounded(state.cache, request.length + dispatched + steps))
        if state.cache.bound not in seen:
            seen.add(state.cache.bound)
            arguments = (model.module, model.variables, state, choice, make_pace(model, steps).next(1)[0])
            state, _ = model.programs.run(loop.decode, *arguments, steps=steps, **keep)
    jax.block_until_ready(state)
