"""Assisted decoding and prompt lookup, the host's side: what drafts, and rounds put together to steps.

Axes: B batch, n new tokens, K most drafts of a round.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.typing import DTypeLike

from flaxqwen.cache import KVCache, repeat_cache
from flaxqwen.config import Qwen2AudioConfig, Qwen2Config
from flaxqwen.distributed import agree
from flaxqwen.generation import loop, speculative
from flaxqwen.generation.config import GenerationConfig, ResolvedConfig
from flaxqwen.generation.decoding import Control, kept, make_choice, start
from flaxqwen.generation.inputs import SMALLEST_CACHE, CausalLM, Inputs, bucket, platform
from flaxqwen.ops.cpu import jit_in_order

# (rounds per program, programs dispatched before the first is read), as decoding.CHUNK.
ROUNDS = {"cpu": (1, 0)}
DEFAULT_ROUNDS = (8, 1)
LARGEST_DRAFT = 64
SCHEDULES = ("constant", "heuristic", "heuristic_transient")


@dataclass(frozen=True)
class Drafter:
    """What drafts.

    model: the draft model; None: the text itself, where the newest tokens stood before.
    count: drafts of a round (at first). heuristic: two more after a round that kept all of them, else one less.
    threshold: drafting stops after a token of a lower probability.
    weight: drafts are judged by weight * p + (1 - weight) * q; 1 is exact.
    ngram: the most newest tokens that are looked up.
    """

    model: CausalLM | None
    count: int
    heuristic: bool = False
    threshold: float = 0.0
    weight: float = 1.0
    ngram: int = 2

    @property
    def most(self) -> int:
        """K, of which there are few values: with it, a round runs 2, 3, 4, 6, 8, 12, ... tokens of the model."""
        count = min(2 * self.count, LARGEST_DRAFT) if self.heuristic else self.count
        power = bucket(count + 1, 2)
        return (power * 3 // 4 if count + 1 <= power * 3 // 4 else power) - 1


@dataclass(frozen=True)
class EarlyExit:
    """A model cut off after its first layers, with its own final norm and head: a draft that takes no memory.

    Source: Elhoushi et al. 2024, LayerSkip; EarlyExitCandidateGenerator in transformers/generation.
    """

    model: CausalLM
    layers: int

    @property
    def config(self) -> Qwen2Config | Qwen2AudioConfig:
        """The model's, with fewer layers."""
        config = self.model.config
        text = config.get_text_config().first_layers(self.layers)
        return replace(config, text_config=text) if isinstance(config, Qwen2AudioConfig) else text

    @property
    def module(self) -> nn.Module:
        """Of fewer layers; it does not look at the rest of the parameters."""
        return self.model.module.clone(config=self.config)

    params = property(lambda self: self.model.params)
    variables = property(lambda self: self.model.variables)
    generation_config = property(lambda self: self.model.generation_config)
    programs = property(lambda self: self.model.programs)


def make_drafter(
    model: CausalLM,
    assistant: CausalLM | None,
    options: ResolvedConfig,
    keywords: Mapping[str, Any],
    request: Inputs,
    control: Control,
) -> Drafter | None:
    """What drafts in a call, if anything does.

    Options of drafting are those of the call's keywords, else of the draft model's own generation_config, as in
    Transformers.

    Raises:
      ValueError: what Transformers refuses.
    """
    if assistant is not None and not isinstance(getattr(assistant, "module", None), nn.Module):
        raise ValueError(f"assistant_model must be a model of flaxqwen, found {type(assistant).__name__}")
    lookup, name = options.prompt_lookup_num_tokens, "assistant_model"
    if options.assistant_early_exit is not None:
        if assistant is not None:
            raise ValueError("assistant_model and assistant_early_exit both draft: give one of them")
        layers = min(options.assistant_early_exit, model.config.get_text_config().num_hidden_layers)
        assistant, name = EarlyExit(model, layers), "assistant_early_exit"
    if assistant is None and lookup is None:
        if options.assistant_ensemble_weight is not None:
            raise ValueError("assistant_ensemble_weight needs an assistant_model, whose drafts it weighs")
        return None
    if assistant is None:
        name = "prompt_lookup_num_tokens"
    elif lookup is not None:
        raise ValueError(f"{name} and prompt_lookup_num_tokens both draft: give one of them")
    if options.num_beams > 1:
        raise ValueError(f"{name} goes with greedy decoding and sampling only, found num_beams={options.num_beams}")
    if not options.use_cache:
        raise ValueError(f"{name} needs use_cache=True")
    if request.guided is not None:
        raise ValueError(f"{name} cannot go with guidance_scale={options.guidance_scale}")
    drafter = _lookup(options) if assistant is None else _assistant(assistant, options, keywords)
    if reason := _hindrance(options, request, control):
        warnings.warn(f"{name} is left aside, {reason}: plain decoding gives the same", stacklevel=4)
        return None
    return drafter


def _lookup(options: ResolvedConfig) -> Drafter:
    count, ngram = options.prompt_lookup_num_tokens, options.max_matching_ngram_size
    ngram = 2 if ngram is None else ngram
    assert count is not None
    if count <= 0 or ngram <= 0:
        raise ValueError(
            f"prompt_lookup_num_tokens and max_matching_ngram_size must be greater than 0, found {count} and {ngram}"
        )
    if options.assistant_ensemble_weight is not None:
        raise ValueError("assistant_ensemble_weight weighs the drafts of an assistant_model; a prompt lookup has none")
    return Drafter(None, min(count, LARGEST_DRAFT), ngram=ngram)


def _assistant(assistant: CausalLM, options: ResolvedConfig, keywords: Mapping[str, Any]) -> Drafter:
    own: GenerationConfig = assistant.generation_config

    def option(name: str) -> Any:
        value = keywords.get(name, getattr(own, name))
        return getattr(options, name) if value is None and name not in keywords else value

    count, schedule = option("num_assistant_tokens"), option("num_assistant_tokens_schedule")
    if not isinstance(count, int) or count <= 0:
        raise ValueError(f"num_assistant_tokens must be greater than 0, found {count!r}")
    if schedule not in SCHEDULES:
        raise ValueError(f"num_assistant_tokens_schedule must be one of {', '.join(SCHEDULES)}, found {schedule!r}")
    threshold, weight = option("assistant_confidence_threshold"), options.assistant_ensemble_weight
    return Drafter(
        assistant,
        min(count, LARGEST_DRAFT),
        heuristic=schedule != "constant",
        threshold=threshold or 0.0,
        weight=1.0 if weight is None else weight,
    )


def _hindrance(options: ResolvedConfig, request: Inputs, control: Control) -> str | None:
    """Why several tokens cannot be verified at once, if so."""
    rows = len(request.input_ids) * options.num_return_sequences
    if control.stepwise:
        return "as the host is asked at every step"
    if options.output_attentions or options.output_hidden_states or options.output_logprobs:
        return "as attentions, hidden states and log-probabilities are of single steps"
    if request.input_ids.shape[1] != request.length:
        return "as the prompts have no input_ids"
    if rows > 1 and control.stopping.traced and not control.stopping.fills:
        return "as rows that have stopped go on with the others"
    return None


def run(
    model: CausalLM,
    request: Inputs,
    options: ResolvedConfig,
    control: Control,
    drafter: Drafter,
    cache: KVCache | None = None,
) -> Iterator[tuple[loop.StepOutput, KVCache]]:
    """Decoding by drafts that the model verifies: as decoding.run, with the same greedy tokens and distribution.

    Rows may advance by different lengths; a step is given once all rows have it. What scores and logits hold of a row
    that has ended is 0. The draws of a draft model depend on where rounds begin: one seed gives one text only for one
    number of drafts; with a prompt lookup it is the text of plain sampling. The number of drafts begins anew in every
    call ("heuristic" goes on from call to call in Transformers), and is at most 64.
    """
    begun, seconds = time.monotonic(), control.stopping.seconds
    rounds, ahead = ROUNDS.get(platform(model.params), DEFAULT_ROUNDS)
    K, copies = drafter.most, options.num_return_sequences
    draft_request = request
    if cache is not None and copies > 1:
        request, cache, copies = request.repeat(copies), repeat_cache(cache, copies=copies), 1
        draft_request = request
    choice = make_choice(model, request, options, copies, control)
    keep = {name: value for name, value in kept(options).items() if name != "keep_states"}
    room = options.max_new_tokens + (K + 1) * (1 + rounds * (1 + ahead))
    rows, first = start(loop.prefill, model, request, choice, cache, room, options, copies=copies, **keep)
    B = len(request.input_ids) * copies
    steps = Steps(B, options.max_new_tokens, int(np.asarray(choice.pad_id)))
    steps.add(jax.tree.map(partial(np.expand_dims, axis=2), jax.device_get(first)))
    state = speculative.RoundState(
        rows=rows.replace(
            cur_len=np.full(B, request.length + 1, np.int32),
            cache=rows.cache.replace(length=np.full(B, request.length, np.int32)),
        ),
        draft_cache=None if drafter.model is None else _fill_draft(drafter.model, draft_request, room, copies),
        drafts=np.full(B, drafter.count, np.int32),  # type: ignore[arg-type]  # numpy's go into programs as well
    )
    draft_choice = speculative.DraftChoice(
        token=choice,
        max_length=np.int32(request.length + options.max_new_tokens),
        threshold=np.float32(drafter.threshold),
        weight=np.float32(drafter.weight),
        heuristic=np.bool_(drafter.heuristic),
        ngram=np.int32(drafter.ngram),
    )
    draft = (None, None) if drafter.model is None else (drafter.model.module, drafter.model.variables)
    queue: deque[Any] = deque()
    while True:
        late = seconds is not None and bool(agree(time.monotonic() - begun > seconds))
        ready = steps.take()
        lengths = np.full(B, request.length + steps.shortest - 1, np.int32)
        if ready is not None:
            yield ready, state.rows.cache.replace(length=lengths, bound=None)
        if late or steps.done:
            return
        while len(queue) <= ahead:
            longest = request.length + steps.longest + (len(queue) + 1) * rounds * (K + 1)
            state = _with_bound(state, longest)
            state, output = speculative.decode(
                model.module, model.variables, *draft, state, draft_choice, most=K, rounds=rounds, **keep
            )
            queue.append(output)
        steps.add(jax.device_get(queue.popleft()))


def _with_bound(state: speculative.RoundState, longest: int) -> speculative.RoundState:
    """The state whose caches are read up to `longest` slots, in a bucket."""

    def bounded(cache: KVCache) -> KVCache:
        return cache.replace(bound=min(bucket(longest, SMALLEST_CACHE), cache.capacity))

    rows = state.rows.replace(cache=bounded(state.rows.cache))
    draft_cache = None if state.draft_cache is None else bounded(state.draft_cache)
    return state.replace(rows=rows, draft_cache=draft_cache)


@partial(jit_in_order, static_argnames=("module", "capacity", "cache_dtype", "copies"))
def _fill(
    module: nn.Module,
    variables: loop.Variables,
    prompt: loop.Prompt,
    _choice: None,
    _cache: None,
    *,
    capacity: int,
    cache_dtype: DTypeLike,
    copies: int,
) -> KVCache:
    state, _, _ = loop.run_prompt(
        module, variables, prompt, None, capacity=capacity, cache_dtype=cache_dtype, copies=copies
    )
    return loop.settled(module, state.cache)


def _fill_draft(model: CausalLM, request: Inputs, room: int, copies: int) -> KVCache:
    """The draft model's cache of the prompts; of embeddings it sees the ids, of audio too, but where it hears it."""
    audio = request.audio if isinstance(model, EarlyExit) else None
    plain = Inputs(request.input_ids, request.attention_mask, audio=audio, positions=request.positions)
    cache = start(_fill, model, plain, None, None, room, copies=copies)
    B = len(request.input_ids) * copies
    return cache.replace(length=np.full(B, request.length, np.int32))


class Steps:
    """Rounds of rows that advance by different lengths, put together to steps of all rows."""

    def __init__(self, rows: int, most: int, pad_id: int) -> None:
        self.most, self.pad_id = most, pad_id
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.kept: dict[str, list[list[np.ndarray]]] = {}
        self.finished = np.zeros(rows, bool)
        self.given = 0

    @property
    def longest(self) -> int:
        """Tokens of the row that has most."""
        return max(map(len, self.tokens))

    @property
    def shortest(self) -> int:
        """Tokens of the row that has fewest."""
        return min(map(len, self.tokens))

    @property
    def done(self) -> bool:
        """Whether every row has ended."""
        return all(self._ended(row) for row in range(len(self.tokens)))

    def _ended(self, row: int) -> bool:
        return bool(self.finished[row]) or len(self.tokens[row]) >= self.most

    def add(self, output: Any) -> None:
        """A RoundOutput of numpy arrays, or the first step as a round of one token."""
        counts_of_rounds = getattr(output, "count", np.ones(output.tokens.shape[:2], np.int32))
        for index, counts in enumerate(counts_of_rounds):
            for row, count in enumerate(counts):
                self.tokens[row] += output.tokens[index, row, :count].tolist()
                for name in ("scores", "logits"):
                    if (values := getattr(output, name)) is not None:
                        rows = self.kept.setdefault(name, [[] for _ in self.tokens])
                        rows[row] += list(values[index, row, :count])
            self.finished = output.finished[index].reshape(-1)

    def take(self) -> Any:
        """The steps that all rows have, or have ended before, [steps, B, ...].

        Returns a StepOutput of numpy arrays, or None.
        """
        open_rows = [len(tokens) for row, tokens in enumerate(self.tokens) if not self._ended(row)]
        until = min(open_rows) if open_rows else self.longest
        begin, self.given = self.given, max(until, self.given)
        if self.given == begin:
            return None
        steps = range(begin, self.given)
        tokens = np.array([[row[t] if t < len(row) else self.pad_id for row in self.tokens] for t in steps], np.int32)
        ends = np.array([len(row) - 1 if self.finished[i] else self.most for i, row in enumerate(self.tokens)])
        finished = np.arange(begin, self.given)[:, None] >= ends
        kept: Any = {name: self._stack(rows, steps) for name, rows in self.kept.items()}
        return loop.StepOutput(tokens, finished, **kept)  # type: ignore[arg-type]  # on the host: numpy's

    def _stack(self, rows: list[list[np.ndarray]], steps: range) -> np.ndarray:
        """[steps, B, V]; 0 where a row has ended before."""
        none = np.zeros_like(rows[0][0])
        return np.stack([np.stack([row[t] if t < len(row) else none for row in rows]) for t in steps])
