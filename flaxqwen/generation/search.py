"""Beam search and beam sampling, the host's side: dispatch programs until the search is over.

Axes: B prompts, M beams of a prompt, C candidates of a prompt, V vocabulary, P columns of the prompts, n new tokens,
N query heads, T tokens of a step, S slots that they see, D model.
"""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from typing import Any

import flax.struct
import jax
import numpy as np

from flaxqwen.cache import KVCache, repeat_cache
from flaxqwen.distributed import agree
from flaxqwen.generation import beam
from flaxqwen.generation.beam import BeamChoice, BeamOutput, BeamState
from flaxqwen.generation.callables import HostCall, check_verdict
from flaxqwen.generation.config import ResolvedConfig
from flaxqwen.generation.decoding import DEFAULT_CHUNK, Control, kept, make_choice, start
from flaxqwen.generation.host import process_on_host
from flaxqwen.generation.inputs import SMALLEST_CACHE, CausalLM, Inputs, bucket, platform, prompt_cache
from flaxqwen.generation.loop import STATES, Prompt, States, Variables, of_prompts, settled
from flaxqwen.generation.outputs import layer_states
from flaxqwen.models.outputs import ModelOutput
from flaxqwen.ops.cpu import jit_in_order

# As decoding.CHUNK: up to a program's steps are lost at the end of a search.
CHUNK = {"cpu": (4, 0)}


class GenerateBeamDecoderOnlyOutput(ModelOutput, flax.struct.PyTreeNode):
    """Transformers' output of return_dict_in_generate with beams. R = num_return_sequences, the best first.

    sequences: [B R, P + n] int32, prompts included. sequences_scores: [B R] float32, if scores are asked for: the sum
    of the log-probabilities over n ** length_penalty. scores, logits: a [B M, V] float32 for each step, processed
    log-probabilities and raw logits, if asked for. beam_indices: [B R, n] int32, the row of `scores` that each token
    was chosen from, -1 after the end. past_key_values: the cache of the beams still running, all tokens but the last.
    """

    sequences: np.ndarray
    sequences_scores: np.ndarray | None = None
    scores: tuple[np.ndarray, ...] | None = None
    logits: tuple[np.ndarray, ...] | None = None
    beam_indices: np.ndarray | None = None
    attentions: tuple[tuple[np.ndarray, ...], ...] | None = None
    hidden_states: tuple[tuple[np.ndarray, ...], ...] | None = None
    past_key_values: KVCache | None = None


def check_beams(options: ResolvedConfig, streams: bool) -> None:
    """ValueError for what cannot go with beams: it would have to know which tokens stand before the end."""
    asked = {"a streamer": streams, "output_logprobs (output_scores has them)": options.output_logprobs}
    found = [name for name, present in asked.items() if present]
    if found:
        raise ValueError(f"{'; '.join(found)} cannot be used with num_beams={options.num_beams}; use num_beams=1")


def search(
    model: CausalLM, request: Inputs, options: ResolvedConfig, control: Control, cache: KVCache | None = None
) -> GenerateBeamDecoderOnlyOutput:
    """Beam search, or with do_sample beam sampling: dispatch programs until one says that the search is over.

    Args:
      request: the prompts.
      options: num_beams and the rest.
      control: what else the call asks for.
      cache: of a beginning of the prompts; it is donated.
    """
    begun, seconds = time.monotonic(), control.stopping.seconds
    steps, ahead = (1, 0) if control.stepwise else CHUNK.get(platform(model.params), DEFAULT_CHUNK)
    programs: Any = HostSteps(control.stopping.host, options.output_scores) if control.stepwise else beam
    choice = make_beam_choice(model, request, options, control)
    copies = options.num_beams
    if cache is not None:  # the rows must part before the rest of the prompt is run: the cache is donated
        request, cache, copies = request.repeat(copies), repeat_cache(cache, copies=copies), 1
    keep = kept(options)
    room = options.max_new_tokens + steps
    state, output = start(programs.prefill, model, request, choice, cache, room, options, copies=copies, **keep)
    queue, dispatched = deque([output]), 1
    outputs: list[BeamOutput] = []
    while not outputs or not outputs[-1].done[-1]:
        while dispatched < options.max_new_tokens and len(queue) <= ahead:
            bound = min(bucket(request.length + dispatched + steps, SMALLEST_CACHE), state.cache.capacity)
            state = state.replace(cache=state.cache.replace(bound=bound))
            # Every candidate of the next step ends, in every process.
            if seconds is not None and bool(agree(time.monotonic() - begun > seconds)):
                choice = choice.replace(max_length=np.int32(request.input_ids.shape[1] + dispatched + 1))
            state, output = programs.decode(model.module, model.variables, state, choice, steps=steps, **keep)
            queue.append(output)
            dispatched += steps
        outputs.append(jax.device_get(queue.popleft()))
    return _result(state, outputs, options, request)


def make_beam_choice(model: CausalLM, request: Inputs, options: ResolvedConfig, control: Control) -> BeamChoice:
    """The options in the program's terms."""
    M, ends = options.num_beams, max(len(options.eos_token_id), 1)
    return BeamChoice(
        token=make_choice(model, request, options, M, control),
        prompt_length=np.int32(request.input_ids.shape[1]),
        max_length=np.int32(options.max_length),
        prompt_slots=np.int32(request.length),
        kept=np.int32((1 + ends) * M),
        length_penalty=np.float32(options.length_penalty),
        stop_when_full=np.bool_(options.early_stopping is True),
        never=np.bool_(options.early_stopping == "never"),
        beams=M,
        candidates=min((1 + bucket(ends, 1)) * M, M * model.config.get_text_config().vocab_size),
    )


def _result(
    state: BeamState, outputs: list[BeamOutput], options: ResolvedConfig, request: Inputs
) -> GenerateBeamDecoderOnlyOutput:
    """The best hypotheses of each prompt, cut at the longest one's end."""
    prompt_length = request.input_ids.shape[1]
    finished = jax.device_get(state.finished)
    best = jax.tree.map(lambda a: a[:, : options.num_return_sequences].reshape(-1, *a.shape[2:]), finished)
    ends = prompt_length + (best.sources >= 0).sum(axis=1)
    sequences = np.where(np.arange(best.sequences.shape[1]) < ends[:, None], best.sequences, _fill(options))
    count = int(sum((~output.idle).sum() for output in outputs))

    def steps_of(name: str) -> tuple[np.ndarray, ...] | None:
        """The first `count` steps of scores or logits, if they were asked for."""
        if not getattr(options, f"output_{name}"):
            return None
        return tuple(step for output in outputs for step in getattr(output, name))[:count]

    cache = None
    if options.use_cache:
        length = np.full(state.position.shape, request.length + count - 1, np.int32)
        cache = prompt_cache(state.cache.replace(length=length, bound=None), request)
    return GenerateBeamDecoderOnlyOutput(
        sequences=sequences[:, : ends.max()].astype(np.int32),
        sequences_scores=best.scores if options.output_scores else None,
        scores=steps_of("scores"),
        logits=steps_of("logits"),
        **states_of(outputs, count, request),
        beam_indices=best.sources[:, prompt_length : ends.max()],
        past_key_values=cache,
    )


def _fill(options: ResolvedConfig) -> int:
    """What stands after the end of a hypothesis. As in Transformers, a pad id of 0 is taken for none."""
    return (options.pad_token_id or options.eos_token_id[0]) if options.eos_token_id else -1


def states_of(outputs: list[BeamOutput], count: int, request: Inputs) -> dict[str, Any]:
    """The attentions and hidden states of the first `count` steps, if they were asked for."""
    found = {}
    for name in STATES:
        if getattr(outputs[0], name) is not None:
            steps = [(len(output.done), getattr(output, name)) for output in outputs]
            found[name] = tuple(layer_states(steps, name, request))[:count]
    return found


@partial(
    jit_in_order,
    static_argnames=("module", "capacity", "cache_dtype", "copies", "keep_states"),
    donate_argnames="cache",
)
def _run_prompts(
    module: Any, variables: Variables, prompt: Prompt, choice: BeamChoice, cache: KVCache | None, **static: Any
) -> tuple[BeamState, jax.Array, States]:
    return settled(module, beam.run_prompts(module, variables, prompt, choice, cache, **static))


@partial(jit_in_order, static_argnames=("module", "keep_states"), donate_argnames="state")
def _run_newest(
    module: Any, variables: Variables, state: BeamState, keep_states: tuple[str, ...]
) -> tuple[BeamState, jax.Array, States]:
    return settled(module, beam.run_newest(module, variables, state, keep_states))


_first_scores = jax.jit(beam.first_scores)
_propose = jax.jit(beam.propose)


_conclude = jax.jit(beam.conclude, donate_argnames="state")
_follow_parents = jax.jit(beam.follow_parents, donate_argnames="state")


def bare(choice: BeamChoice) -> BeamChoice:
    """The choice without processors and criteria, which may be the host's."""
    return choice.replace(token=choice.token.replace(processors=(), criteria=()))


class HostSteps:
    """The programs of beam.py cut open, for processors and criteria that are called on the host.

    `prefill` and `decode` stand in for those of beam.py, with the same arguments and results.
    """

    def __init__(self, criteria: tuple[HostCall, ...], keep_scores: bool) -> None:
        self.criteria = criteria
        self.scores: tuple[np.ndarray, ...] | None = () if keep_scores else None

    def prefill(self, module: Any, variables: Any, prompt: Any, choice: BeamChoice, cache: Any, **static: Any) -> Any:
        """As beam.prefill."""
        keep = {name: static.pop(name) for name in ("keep_scores", "keep_logits")}
        state, logits, states = _run_prompts(module, variables, prompt, bare(choice), cache, **static)
        return self._advance(state, choice, logits, states, **keep)

    def decode(
        self, module: Any, variables: Any, state: BeamState, choice: BeamChoice, *, steps: int, **static: Any
    ) -> Any:
        """As beam.decode, for one step."""
        assert steps == 1
        state, logits, states = _run_newest(module, variables, state, keep_states=static.pop("keep_states"))
        before = jax.device_get((state.done, state.cur_len))  # the state is donated
        state, output = self._advance(state, choice, logits, states, **static)
        return _follow_parents(state, bare(choice), *before), output

    def _advance(
        self,
        state: BeamState,
        choice: BeamChoice,
        logits: jax.Array,
        states: Any,
        keep_scores: bool,
        keep_logits: bool,
    ) -> tuple[BeamState, BeamOutput]:
        """One step of the search from the logits [B * M, V]."""
        length, idle = int(state.cur_len), jax.device_get(state.done)
        logits, scores = _first_scores(state, bare(choice), logits)
        scores = process_on_host(choice.token.processors, beam.beams_of(state), state.cur_len, scores)
        traced = bare(choice).replace(token=choice.token.replace(processors=()))
        found, counts = _propose(state, traced, scores)
        if self.criteria:
            found = found.replace(ended=np.asarray(found.ended) | self._ended(found, length + 1, scores))
        state = _conclude(state, bare(choice), found, counts)
        kept = scores if keep_scores else None, logits if keep_logits else None
        output: Any = jax.device_get(BeamOutput(idle, state.done, *kept).replace(**of_prompts(states, scores)))
        return state, jax.tree.map(lambda a: np.asarray(a)[None], output)

    def _ended(self, found: beam.Beams, length: int, scores: Any) -> np.ndarray:
        """[B, C] bool: the candidates for which a criterion holds."""
        sequences = np.asarray(found.sequences)[..., :length]
        if self.scores is not None:
            self.scores += (np.asarray(scores),)
        ended = np.zeros(sequences.shape[:2], bool)
        for criterion in self.criteria:
            verdict = criterion(sequences.reshape(-1, length), self.scores)
            check_verdict(criterion.name, verdict, ended.size, 0)
            ended |= np.broadcast_to(verdict, ended.size).reshape(ended.shape)
        return ended
