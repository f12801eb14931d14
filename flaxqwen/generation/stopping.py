"""What ends a generation besides its length: end-of-sequence ids, stop strings, the clock, and a user's own criteria.

Axes: B batch, n new tokens, S columns of the sequence buffer, V vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flaxqwen.generation.callables import HostCall, check_verdict, wrap
from flaxqwen.generation.config import ResolvedConfig
from flaxqwen.generation.sampling import Criterion
from flaxqwen.generation.stop_strings import stop_strings_of


@dataclass(frozen=True)
class Stopping:
    """When rows end, and whether a row that has is filled up.

    traced: criteria inside the compiled loop. host: criteria that are called between steps.
    eos_token_id: ids that end a row. seconds: of the host's clock, for all rows; None for no limit.
    fills: whether rows that have ended are filled with the pad token. As in Transformers, they go on where nothing but
      criteria can end a row, until the last row has ended.
    """

    traced: tuple[Criterion, ...] = ()
    host: tuple[HostCall, ...] = ()
    eos_token_id: tuple[int, ...] = ()
    seconds: float | None = None
    fills: bool = False


def make_stopping(
    options: ResolvedConfig, criteria: Any, tokenizer: Any, rows: int, vocab_size: int
) -> tuple[Stopping, ResolvedConfig]:
    """What ends the rows of a call; and its options, whose length a MaxLengthCriteria of the user replaces.

    Raises:
      ValueError: stop_strings without a tokenizer; criteria that are none.
    """
    # Scores are a tuple, of all steps, to those of Transformers' signature: in the loop there are the newest alone.
    calls = wrap("stopping_criteria", criteria, rows, vocab_size, check_verdict, need_cur_len=True)
    eos, seconds = options.eos_token_id, options.max_time
    fills = bool(eos) or any(hasattr(_function(call), "eos_token_id") for call in calls)
    # Transformers' own are done without calling them; they take the place of what the options say.
    known: dict[str, list[Any]] = {"MaxLengthCriteria": [], "MaxTimeCriteria": [], "EosTokenCriteria": []}
    own: list[Any] = []
    stop_strings = options.stop_strings
    for call in calls:
        function = _function(call)
        kind = type(function).__name__ if type(function).__module__.startswith("transformers.") else ""
        if kind in known:
            known[kind].append(function)
            continue
        own.append(call)
        if kind == "StopStringCriteria":
            stop_strings = None
    if lengths := [criterion.max_length for criterion in known["MaxLengthCriteria"]]:
        options = _with_length(options, min(lengths))
    if times := [criterion.initial_timestamp + criterion.max_time for criterion in known["MaxTimeCriteria"]]:
        seconds = min(times) - time.time()
    if ends := [np.asarray(criterion.eos_token_id).reshape(-1) for criterion in known["EosTokenCriteria"]]:
        eos = tuple(np.unique(np.concatenate(ends)).tolist())
    if stop_strings is not None:
        own.append(stop_strings_of(tokenizer, stop_strings, vocab_size))
    host = tuple(call for call in own if isinstance(call, HostCall))
    traced = tuple(call for call in own if not isinstance(call, HostCall))
    return Stopping(traced, host, eos, seconds, fills), options


def _function(call: Any) -> Any:
    return call.function if isinstance(call, HostCall) else getattr(call, "static", call)


def _with_length(options: ResolvedConfig, max_length: int) -> ResolvedConfig:
    prompt = options.max_length - options.max_new_tokens
    if max_length <= prompt:
        raise ValueError(f"MaxLengthCriteria(max_length={max_length}) leaves no room after a prompt of {prompt}")
    if options.forced_eos_token_id is not None and max_length != options.max_length:
        # Forced at the options' own length, which a shorter text does not reach.
        if max_length > options.max_length:
            raise ValueError("forced_eos_token_id cannot go with a MaxLengthCriteria past max_length: give max_length")
        options = replace(options, forced_eos_token_id=None)
    return replace(options, max_length=max_length, max_new_tokens=max_length - prompt)


class HostCriteria:
    """Calls a user's criteria after each step, with all tokens so far, as Transformers does."""

    def __init__(self, criteria: tuple[HostCall, ...], prompts: np.ndarray, room: int, keep_scores: bool) -> None:
        rows, self.length = prompts.shape
        self.criteria = criteria
        self.input_ids = np.zeros((rows, self.length + room), np.int32)
        self.input_ids[:, : self.length] = prompts
        self.scores: tuple[np.ndarray, ...] | None = () if keep_scores else None

    def __call__(self, tokens: np.ndarray, scores: np.ndarray | None) -> np.ndarray:
        """[B] bool: which rows end with `tokens` [B], whose scores [B, V] are kept if asked for."""
        self.input_ids[:, self.length] = tokens
        self.length += 1
        if self.scores is not None and scores is not None:
            self.scores += (scores,)
        ended = np.zeros(len(tokens), bool)
        for criterion in self.criteria:
            verdict = criterion(self.input_ids[:, : self.length], self.scores)
            check_verdict(criterion.name, verdict, len(tokens), 0)
            ended |= verdict
        return ended
