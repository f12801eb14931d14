"""Greedy decoding and sampling, the host's side: dispatch programs, read their results, stop in time.

Axes: B batch (prompts), n new tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from flaxqwen.cache import KVCache, grow_cache, repeat_cache
from flaxqwen.generation import loop
from flaxqwen.generation.config import ResolvedConfig
from flaxqwen.generation.inputs import (
    SMALLEST_CACHE,
    SMALLEST_PROMPT,
    CausalLM,
    Inputs,
    bucket,
    cache_dtype,
    make_prompt,
    platform,
)
from flaxqwen.generation.processors import build_processors, pad_ids
from flaxqwen.generation.sampling import TokenChoice

# (steps per program, programs dispatched before the first is read). On a CPU the host is the device: nothing is won by
# running ahead, and up to a program's steps are lost at the end of a sequence.
CHUNK = {"cpu": (4, 0)}
DEFAULT_CHUNK = (32, 1)


def run(
    model: CausalLM, request: Inputs, options: ResolvedConfig, cache: KVCache | None = None
) -> Iterator[tuple[loop.StepOutput, KVCache]]:
    """The host's part of the loop: dispatch programs, read their results one program late, stop in time.

    Yields:
      StepOutput of numpy arrays, [steps, B, ...], cut at the step that ends the last row, and the cache, which is valid
      only with the last yield.
    """
    steps, ahead = CHUNK.get(platform(model.params), DEFAULT_CHUNK)
    copies = options.num_return_sequences
    if cache is not None and copies > 1:  # the rows must part before the shared prompt is run: the cache is donated
        request, cache, copies = request.repeat(copies), repeat_cache(cache, copies=copies), 1
    choice = make_choice(request, options, copies, model.config.vocab_size)
    keep = {"keep_scores": options.output_scores, "keep_logits": options.output_logits}
    room = options.max_new_tokens + steps
    state, output = start(loop.prefill, model, request, choice, cache, room, copies=copies, **keep)
    length, capacity = request.input_ids.shape[1], state.cache.capacity
    queue = deque([output])
    dispatched, done = 1, 0
    finished = np.zeros(len(request.input_ids) * copies, bool)
    while done < options.max_new_tokens and not finished.all():
        while dispatched < options.max_new_tokens and len(queue) <= ahead:
            bound = min(bucket(length + dispatched + steps, SMALLEST_CACHE), capacity)
            state = state.replace(cache=state.cache.replace(bound=bound))
            state, output = loop.decode(model.module, model.params, state, choice, steps=steps, **keep)
            queue.append(output)
            dispatched += steps
        output = jax.device_get(queue.popleft())
        count, finished = count_steps(output.tokens[: options.max_new_tokens - done], finished, options.eos_token_id)
        done += count
        lengths = np.full(finished.shape, length + done - 1, np.int32)
        yield (
            jax.tree.map(partial(_first, count), output),
            state.cache.replace(length=lengths, bound=None),
        )


def start(
    prefill: Callable[..., Any],
    model: CausalLM,
    request: Inputs,
    choice: Any,
    cache: KVCache | None,
    room: int,
    **static: Any,
) -> Any:
    """What `prefill`, a program, gives for the columns that the cache does not hold yet.

    Args:
      prefill: loop.prefill, or that of another way of decoding; `choice` and `static` are what it takes.
      cache: is made to have room for `room` tokens more.
    """
    tokens = bucket(request.input_ids.shape[1] - request.cached, SMALLEST_PROMPT)
    # The padding of a bucket is written too.
    capacity = bucket(request.cached + tokens + room, SMALLEST_CACHE)
    if cache is not None:
        capacity = max(capacity, cache.capacity)
        cache = cache if cache.capacity == capacity else grow_cache(cache, capacity=capacity)
        cache = cache.replace(bound=min(bucket(request.cached + tokens, SMALLEST_CACHE), capacity))
    return prefill(
        model.module,
        model.params,
        make_prompt(request, tokens, capacity),
        choice,
        cache,
        capacity=capacity,
        cache_dtype=cache_dtype(model),
        **static,
    )


def _first(count: int, array: np.ndarray) -> np.ndarray:
    return array[:count]


def count_steps(tokens: np.ndarray, finished: np.ndarray, eos_ids: tuple[int, ...]) -> tuple[int, np.ndarray]:
    """How many of the steps [steps, B] are needed to end every row, and which rows [B] have ended after them."""
    for step, row_tokens in enumerate(tokens):
        finished = finished | np.isin(row_tokens, eos_ids)
        if finished.all():
            return step + 1, finished
    return len(tokens), finished


def make_choice(request: Inputs, options: ResolvedConfig, copies: int, vocab_size: int) -> TokenChoice:
    """The processors that the options ask for, and the draw."""
    processors = build_processors(options, request.input_ids, request.attention_mask, copies, vocab_size)
    seed = np.random.randint(2**32, dtype=np.uint32) if options.seed is None else np.uint32(options.seed)
    pad = 0 if options.pad_token_id is None else options.pad_token_id
    return TokenChoice(processors, pad_ids(options.eos_token_id), np.int32(pad), seed, options.do_sample)
