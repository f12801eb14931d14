"""Greedy decoding and sampling, the host's side: dispatch programs, read their results, stop in time.

Axes: B batch (prompts), n new tokens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from flaxqwen.cache import KVCache, grow_cache, repeat_cache
from flaxqwen.distributed import agree
from flaxqwen.generation import host, loop
from flaxqwen.generation.callables import HostCall
from flaxqwen.generation.config import ResolvedConfig
from flaxqwen.generation.grammar import Grammar
from flaxqwen.generation.host import AllowedTokens
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
from flaxqwen.generation.processors import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    MinLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    build_processors,
    pad_ids,
)
from flaxqwen.generation.sampling import TokenChoice
from flaxqwen.generation.stopping import HostCriteria, Stopping
from flaxqwen.sharding import module_sharding

# (steps per program, programs dispatched before the first is read). On a CPU the host is the device, and nothing is won
# by running ahead; a model of 2M parameters takes 0.41 ms a step in programs of 8, 0.50 of 4, 0.35 of 32.
CHUNK = {"cpu": (8, 0)}
DEFAULT_CHUNK = (32, 1)
# A CPU's program is to take so long: a stream then has the tokens of a small model some at a time, of a large one each.
PACE_SECONDS = 0.25

# The processors of options that act before prefix_allowed_tokens_fn.
BEFORE_ALLOWED = (
    SequenceBiasLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    EncoderNoRepeatNGramLogitsProcessor,
    NoBadWordsLogitsProcessor,
    MinLengthLogitsProcessor,
)


@dataclass(frozen=True)
class Control:
    """What a call asks for besides its options, checked: a user's own processors, and what ends the rows.

    processors: to act before the warpers. allowed: of prefix_allowed_tokens_fn. grammar: of regex or json_schema.
    """

    stopping: Stopping
    processors: tuple[Any, ...] = ()
    allowed: AllowedTokens | None = None
    grammar: Grammar | None = None

    @property
    def processes_on_host(self) -> bool:
        """Whether scores pass through the host at every step."""
        return self.allowed is not None or any(isinstance(call, HostCall) for call in self.processors)

    @property
    def stepwise(self) -> bool:
        """Whether the host is asked at every step."""
        return self.processes_on_host or bool(self.stopping.host)


@dataclass
class Pace:
    """How many steps the next program of a CPU runs: as many as take PACE_SECONDS, by the time of those before.

    It asks at every step whether one more is wanted, so that none is lost at the end of a sequence. An accelerator
    would wait for the host each time: its programs run all their steps. So do those on a mesh, maybe of several
    processes, whose clocks differ.
    """

    steps: int  # of a program, at most
    is_kept: bool
    began: float
    count: int = 1

    def next(self, left: int) -> tuple[np.int32 | None, int]:
        """What the next program is told, where `left` steps are, and how many it then runs at most."""
        count = min(self.count, left)
        return (np.int32(count), count) if self.is_kept else (None, self.steps)

    def see(self) -> float:
        """A program's results have come: the time."""
        began, self.began = self.began, time.monotonic()
        self.count = int(np.clip(self.count * PACE_SECONDS / max(self.began - began, 1e-6), 1, self.steps))
        return self.began


def make_pace(model: CausalLM, steps: int, began: float = 0.0) -> Pace:
    """Of programs of `steps`, from this time on."""
    is_kept = steps > 1 and platform(model.params) == "cpu" and module_sharding(model.module) is None
    return Pace(steps, is_kept, began)


def run(
    model: CausalLM, request: Inputs, options: ResolvedConfig, control: Control, cache: KVCache | None = None
) -> Iterator[tuple[loop.StepOutput, KVCache]]:
    """The host's part of the loop: dispatch programs, read their results, stop in time.

    On an accelerator results are read one program late, while the next one runs; see CHUNK.

    Yields:
      StepOutput of numpy arrays, [steps, B, ...], cut at the step that ends the last row, and the cache, which is valid
      only with the last yield.
    """
    begun, stopping = time.monotonic(), control.stopping
    programs = host if control.processes_on_host else loop
    steps, ahead = (1, 0) if control.stepwise else CHUNK.get(platform(model.params), DEFAULT_CHUNK)
    pace = make_pace(model, steps, begun)
    copies = options.num_return_sequences
    if cache is not None and copies > 1:  # the rows must part before the shared prompt is run: the cache is donated
        request, cache, copies = request.repeat(copies), repeat_cache(cache, copies=copies), 1
    choice = make_choice(model, request, options, copies, control)
    keep = kept(options)
    ask = HostCriteria(stopping.host, request.repeat(copies).input_ids, options.max_new_tokens, options.output_scores)
    room, length = options.max_new_tokens + steps, request.length

    def ready(state: loop.DecodeState, dispatched: int) -> loop.DecodeState:
        return state.replace(cache=bounded(state.cache, length + dispatched + steps))

    def lower_decode(state: loop.DecodeState) -> jax.stages.Lowered:
        arguments = (model.module, model.variables, ready(state, 1), choice, pace.next(1)[0])
        return loop.decode.lower(*arguments, steps=steps, **keep)

    follow = lower_decode if programs is loop and options.max_new_tokens > 1 and _compiles_ahead(model, cache) else None
    state, output = start(
        programs.prefill, model, request, choice, cache, room, options, follow, copies=copies, **keep
    )  # fmt: skip
    queue = deque([(output, 1)])
    dispatched, done = 1, 0
    finished = np.zeros(len(request.input_ids) * copies, bool)
    while done < options.max_new_tokens and not finished.all():
        while dispatched < options.max_new_tokens and len(queue) <= ahead:
            wanted, count = pace.next(options.max_new_tokens - dispatched)
            arguments = (model.module, model.variables, ready(state, dispatched), choice, wanted)
            state, output = model.programs.run(programs.decode, *arguments, steps=steps, **keep)
            queue.append((output, count))
            dispatched += count
        output, count = queue.popleft()
        output = cut(jax.device_get(output), min(count, options.max_new_tokens - done))
        done += len(output.tokens)
        if stopping.host:
            ended = ask(output.tokens[0], None if output.scores is None else output.scores[0])
            output = output.replace(finished=output.finished | ended)
            state = state.replace(finished=output.finished[-1])
        # Every process stops at the same step.
        now = pace.see()
        late = stopping.seconds is not None and bool(agree(now - begun > stopping.seconds))
        finished = output.finished[-1] | late
        lengths = np.full(finished.shape, length + done - 1, np.int32)
        yield output, state.cache.replace(length=lengths, bound=None)


def start(
    prefill: Any,
    model: CausalLM,
    request: Inputs,
    choice: Any,
    cache: KVCache | None,
    room: int,
    options: ResolvedConfig | None = None,
    follow: Callable[[Any], jax.stages.Lowered] | None = None,
    *,
    copies: int,
    **static: Any,
) -> Any:
    """What `prefill`, a program, gives for the columns that the cache does not hold yet.

    Args:
      prefill: loop.prefill, or that of another way of decoding; `choice` and `static` are what it takes.
      cache: is made to have room for `room` tokens more.
      options: cache_dtype, max_cache_len and prefill_chunk_size are read; None: their defaults.
      follow: lowers the program that comes next, for the first of what `prefill` gives; it is compiled meanwhile.
      copies: continuations per prompt.
    """
    chunk = 0 if options is None else options.prefill_chunk_size or 0
    chunks = (request.length - request.cached - 1) // chunk if chunk else 0
    begun = request.cached + chunks * chunk  # where the last part begins
    tokens = bucket(request.length - begun, SMALLEST_PROMPT)
    # The padding of a bucket is written too.
    most = 0 if options is None else options.max_cache_len or 0
    capacity = bucket(max(begun + tokens + room, most), SMALLEST_CACHE)
    if cache is not None:
        capacity = max(capacity, cache.capacity)
        cache = cache if cache.capacity == capacity else grow_cache(cache, capacity=capacity)
    shape = {"capacity": capacity, "cache_dtype": cache_dtype(model, options)}
    for _ in range(chunks):
        stop = request.cached + chunk
        prompt = make_prompt(request, chunk, capacity, stop)
        cache = None if cache is None else bounded(cache, stop)
        cache = model.programs.run(loop.fill, model.module, model.variables, prompt, cache, **shape)
        request = replace(request, cached=stop)
    if chunks and copies > 1:  # the cache is donated
        cache = model.programs.run(repeat_cache, cache, copies=copies)
        request, copies = request.repeat(copies), 1
    prompt = make_prompt(request, tokens, capacity)
    cache = None if cache is None else bounded(cache, request.cached + tokens)
    arguments = (model.module, model.variables, prompt, choice, cache)
    static |= {"copies": copies, **shape}
    if follow is None:
        return model.programs.run(prefill, *arguments, **static)
    next_program = follow(prefill.trace(*arguments, **static).out_info[0])
    with ThreadPoolExecutor(1) as pool:
        pool.submit(next_program.compile)  # an error comes again where the program is called
        return prefill(*arguments, **static)


def _compiles_ahead(model: CausalLM, cache: KVCache | None) -> bool:
    """Whether the decoding program is compiled while prefill is: on a CPU that halves the wait for the first call.

    Found compiled already, it costs 3 ms, of a step's 30 to 80 at 0.5B. What is lowered from shapes alone is what a
    call will ask for only where arrays are on no particular device.
    """
    is_free = not next(iter(jax.tree.leaves(model.params))).committed and not model.programs.compiled
    return platform(model.params) == "cpu" and is_free and cache is None


def bounded(cache: KVCache, length: int) -> KVCache:
    """The cache, of which attention reads `length` slots, in a bucket."""
    return cache.replace(bound=min(bucket(length, SMALLEST_CACHE), cache.capacity))


def kept(options: ResolvedConfig) -> dict[str, Any]:
    """What the programs give besides tokens, as their arguments."""
    states = tuple(name for name in loop.STATES if getattr(options, f"output_{name}"))
    keep: dict[str, Any] = {"keep_scores": options.output_scores, "keep_logits": options.output_logits}
    if options.output_logprobs:  # few numbers, few programs
        keep["keep_top"] = bucket(options.top_logprobs, 4) if options.top_logprobs else 0
    return keep | {"keep_states": states}


def cut(output: Any, most: int) -> Any:
    """The first steps of an output of numpy arrays: those that it takes to end every row, and not more than `most`."""
    ended = output.finished[:most].all(axis=1)
    count = int(ended.argmax()) + 1 if ended.any() else len(ended)
    return jax.tree.map(lambda a: a[:count], output)


def make_choice(
    model: CausalLM, request: Inputs, options: ResolvedConfig, copies: int, control: Control
) -> TokenChoice:
    """The processors that are asked for, the draw, and what ends a row."""
    vocab_size = model.config.get_text_config().vocab_size
    build = partial(build_processors, options, request.input_ids, request.prompt_mask, copies, vocab_size)
    processors: tuple[Any, ...] = build(custom=control.processors)
    if control.allowed is not None:
        place = sum(isinstance(processor, BEFORE_ALLOWED) for processor in build())
        processors = (*processors[:place], control.allowed, *processors[place:])
    seed = np.uint32(options.seed or 0)
    if options.seed is None:
        seed = np.uint32(agree(np.random.randint(2**32, dtype=np.uint32)))
    pad = 0 if options.pad_token_id is None else options.pad_token_id
    stopping = control.stopping
    return TokenChoice(
        processors=processors,
        eos_ids=pad_ids(stopping.eos_token_id),
        pad_id=np.int32(pad if stopping.fills else -1),
        seed=seed,
        criteria=stopping.traced,
        guidance=None if request.guided is None else np.float32(options.guidance_scale),
        grammar=control.grammar,
        do_sample=options.do_sample,
        on_one_device=module_sharding(model.module) is None,
    )
