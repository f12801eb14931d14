"""The programs of decoding cut open at the scores, for processors that run on the host.

`prefill` and `decode` stand in for those of loop.py, with the same arguments and results. The model, each run of
processors that can be traced, and the choice of the token are programs of their own; between them the host's processors
are called with numpy arrays.

Axes: B batch, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.typing import DTypeLike

from flaxqwen.cache import KVCache
from flaxqwen.generation import loop
from flaxqwen.generation.callables import HostCall, check_scores
from flaxqwen.generation.processors import LogitsProcessor
from flaxqwen.generation.sampling import TokenChoice, constrain, guide, process
from flaxqwen.ops.cpu import jit_in_order


@partial(
    jit_in_order,
    static_argnames=("module", "capacity", "cache_dtype", "copies", "keep_states"),
    donate_argnames="cache",
)
def _run_prompt(
    module: nn.Module, variables: loop.Variables, prompt: loop.Prompt, cache: KVCache | None, **static: Any
) -> tuple[loop.DecodeState, jax.Array, loop.States]:
    return loop.settled(module, loop.run_prompt(module, variables, prompt, cache, **static))


@partial(jit_in_order, static_argnames=("module", "keep_states"), donate_argnames="state")
def _run_newest(
    module: nn.Module, variables: loop.Variables, state: loop.DecodeState, keep_states: tuple[str, ...]
) -> tuple[loop.DecodeState, jax.Array, loop.States]:
    return loop.settled(module, loop.run_newest(module, variables, state, keep_states))


_append = jax.jit(loop.append, donate_argnames="state")
_process = jax.jit(process)
_log_probs = jax.jit(loop.log_probs, static_argnums=2)


@jax.jit
def _begin(choice: TokenChoice, logits: jax.Array, automaton: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Logits [B, V], and the scores that processors begin with."""
    logits, scores = guide(choice, logits.astype(np.float32))
    return logits, constrain(choice, scores, automaton)


class AllowedTokens(HostCall):
    """-inf for all but the tokens that prefix_allowed_tokens_fn(row, its tokens so far) lists.

    Source: PrefixConstrainedLogitsProcessor in transformers/generation/logits_process.py.
    """

    def __init__(self, function: Callable[[int, Any], Any], beams: int = 1) -> None:
        super().__init__(self.mask)
        self.beams = beams
        self.name = "prefix_allowed_tokens_fn"
        self.allowed = function

    def mask(self, input_ids: Any, scores: Any) -> np.ndarray:
        """Scores [B, V]; where the allowed tokens of all of a prompt's rows are -inf already, they have 0.

        Raises:
          ValueError: no token is allowed, or one that is out of the vocabulary.
        """
        given = np.asarray(scores)
        allowed_tokens = np.zeros(given.shape, bool)
        for row, tokens in enumerate(input_ids):
            allowed = np.asarray(self.allowed(row // self.beams, tokens), np.int64).reshape(-1)
            if not allowed.size or allowed.min() < 0 or allowed.max() >= given.shape[1]:
                raise ValueError(
                    f"{self.name} returned {allowed.tolist()} for row {row}; expected token ids from 0 to "
                    f"{given.shape[1] - 1}, one at least"
                )
            allowed_tokens[row, allowed] = True
        masked = np.where(allowed_tokens, given, -np.inf)
        dead = np.isneginf(masked).reshape(-1, self.beams * given.shape[1]).all(axis=1)
        return np.where(np.repeat(dead, self.beams)[:, None] & allowed_tokens, 0, masked)


def prefill(
    module: nn.Module,
    variables: loop.Variables,
    prompt: loop.Prompt,
    choice: TokenChoice,
    cache: KVCache | None,
    *,
    capacity: int,
    cache_dtype: DTypeLike,
    copies: int,
    keep_scores: bool,
    keep_logits: bool,
    keep_states: tuple[str, ...] = (),
    keep_top: int | None = None,
) -> tuple[loop.DecodeState, loop.StepOutput]:
    """As loop.prefill."""
    shape = {"capacity": capacity, "cache_dtype": cache_dtype, "copies": copies}
    state, logits, states = _run_prompt(module, variables, prompt, cache, **shape, keep_states=keep_states)
    return _extend(loop.begin(state, choice), choice, logits, keep_scores, keep_logits, states, keep_top)


def decode(
    module: nn.Module,
    variables: loop.Variables,
    state: loop.DecodeState,
    choice: TokenChoice,
    wanted: None = None,
    *,
    steps: int,
    keep_scores: bool,
    keep_logits: bool,
    keep_states: tuple[str, ...] = (),
    keep_top: int | None = None,
) -> tuple[loop.DecodeState, loop.StepOutput]:
    """As loop.decode, for one step."""
    assert steps == 1
    assert wanted is None
    state, logits, states = _run_newest(module, variables, state, keep_states=keep_states)
    return _extend(state, choice, logits, keep_scores, keep_logits, states, keep_top)


def _extend(
    state: loop.DecodeState,
    choice: TokenChoice,
    logits: jax.Array,
    keep_scores: bool,
    keep_logits: bool,
    states: loop.States,
    keep_top: int | None,
) -> tuple[loop.DecodeState, loop.StepOutput]:
    """Choose the next token of each row from logits [B, V], and append it."""
    logits, scores = _begin(choice.replace(processors=(), criteria=()), logits, state.automaton)
    scores = process_on_host(choice.processors, state.input_ids, state.cur_len, scores)
    state, tokens = _append(state, choice.replace(processors=()), scores)
    kept = scores if keep_scores else None, logits if keep_logits else None
    # Off the device at once: the state is donated to the next step, and `finished` with it.
    output = loop.StepOutput(tokens, state.finished, *kept, logprobs=_log_probs(logits, tokens, keep_top))
    output = jax.device_get(output.replace(**loop.of_prompts(states, tokens)))
    return state, jax.tree.map(lambda a: a[None], output)


def process_on_host(
    processors: tuple[LogitsProcessor, ...], input_ids: jax.Array, cur_len: jax.Array, scores: Any
) -> jax.Array:
    """Scores [B, V] processed: host processors between the runs of those that are traced."""
    vocab_size = scores.shape[1]
    for on_host, group in itertools.groupby(processors, lambda processor: isinstance(processor, HostCall)):
        if not on_host:
            scores = _process(tuple(group), input_ids, scores, cur_len)
            continue
        seen = np.asarray(input_ids)[:, : int(cur_len)]
        for processor in group:
            assert isinstance(processor, HostCall)
            scores = processor(seen, np.asarray(scores))
            check_scores(processor.name, scores, len(seen), vocab_size)
        scores = scores.astype(np.float32)
    return scores
