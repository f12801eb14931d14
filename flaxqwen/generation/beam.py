"""Beam search and beam sampling: compiled steps over the beams of all prompts; search.py has the host's side.

The algorithm is that of `_beam_search` in transformers/generation/utils.py, with its arithmetic in its order, so that
the same hypotheses win. A prompt keeps M running hypotheses and the M best finished ones; a step scores every
continuation of the running ones and keeps the best C, of which M go on and those which end compete with the finished.

Axes: B prompts, M beams of a prompt, C candidates of a prompt (or any number of hypotheses), W columns of the sequence
buffer, V vocabulary, P columns of the prompts, n new tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from flaxqwen.cache import KVCache
from flaxqwen.generation.loop import (
    Prompt,
    States,
    Variables,
    for_each_prompt,
    of_prompts,
    run_model,
    run_prompt,
    settled,
    without_encoder,
)
from flaxqwen.generation.sampling import TokenChoice, advance, constrain, guide, process, with_end
from flaxqwen.ops.cpu import jit_in_order

# Added to the score of a hypothesis that must not win, as in Transformers: it still wins over -inf.
EXCLUDED = -1.0e9

BLOCK = 128  # cache slots that a reorder moves at a time


class BeamChoice(flax.struct.PyTreeNode):
    """How beams are chosen. Values are traced; the two numbers of hypotheses are static.

    token: the processors, the end-of-sequence ids, the seed, and whether to draw.
    prompt_length, max_length: int32, columns; a hypothesis of max_length has ended.
    prompt_slots: int32, cache slots of a prompt: its columns, unless it is of embeddings or has guidance's padding.
    kept: int32, how many of the candidates count: max(2, 1 + number of end-of-sequence ids) * M, so that M of them go
        on whatever ends.
    length_penalty: float32, the power of the length that scores are divided by.
    stop_when_full, never: bool, early_stopping=True and early_stopping="never".
    beams, candidates: M and C; C is `kept` rounded up, so that few programs exist.
    """

    token: TokenChoice
    prompt_length: ArrayLike
    max_length: ArrayLike
    prompt_slots: ArrayLike
    kept: ArrayLike
    length_penalty: ArrayLike
    stop_when_full: ArrayLike
    never: ArrayLike
    beams: int = flax.struct.field(pytree_node=False)
    candidates: int = flax.struct.field(pytree_node=False)


class Beams(flax.struct.PyTreeNode):
    """Hypotheses, the same number for each prompt.

    sequences: [B, C, W] int32, the prompt and the new tokens.
    sources: [B, C, W] int32, at each new token's column: the row of B * M that it continued; -1 elsewhere.
    scores: [B, C] float32, sum of log-probabilities; of finished hypotheses, divided by the length's power.
    ended: [B, C] bool.
    """

    sequences: jax.Array
    sources: jax.Array
    scores: jax.Array
    ended: jax.Array


class BeamState(flax.struct.PyTreeNode):
    """The scan's carry. With guidance, the cache, slot_mask and position have the rows of negative prompts too.

    cache: keys and values of every token of the running beams but the newest, [B * M] rows; its length is a scalar.
    slot_mask: [B * M, S] bool, False at padding; None when there is none.
    position: [B * M] int32, position id of the newest token.
    running: M beams a prompt that go on, the best first.
    finished: the M best that have ended, the best first; until there are M, stand-ins with a score of EXCLUDED.
    cur_len: int32 scalar, columns of the running sequences that are filled.
    improvable: [B] bool, whether a running beam may still become better than a finished one.
    done: bool scalar, the search is over: further steps change nothing.
    automaton: [B * M] int32, the grammar's states of the running beams; None without one.
    """

    cache: KVCache
    slot_mask: jax.Array | None
    position: jax.Array
    running: Beams
    finished: Beams
    cur_len: jax.Array
    improvable: jax.Array
    done: jax.Array
    automaton: jax.Array | None = None


class BeamOutput(flax.struct.PyTreeNode):
    """What steps give the host: whether the search was over before the step, and after it, [steps] bool.

    If asked for: scores, logits: [steps, B * M, V] float32, processed log-probabilities and raw logits; attentions and
    hidden_states as of loop.StepOutput.
    """

    idle: jax.Array
    done: jax.Array
    scores: jax.Array | None = None
    logits: jax.Array | None = None
    attentions: tuple[jax.Array, ...] | None = None
    hidden_states: tuple[jax.Array, ...] | None = None


@partial(
    jit_in_order,
    static_argnames=("module", "capacity", "cache_dtype", "copies", "keep_scores", "keep_logits", "keep_states"),
    donate_argnames="cache",
)
def prefill(
    module: nn.Module,
    variables: Variables,
    prompt: Prompt,
    choice: BeamChoice,
    cache: KVCache | None,
    *,
    capacity: int,
    cache_dtype: DTypeLike,
    copies: int,
    keep_scores: bool,
    keep_logits: bool,
    keep_states: tuple[str, ...] = (),
) -> tuple[BeamState, BeamOutput]:
    """Run the prompts and choose the beams' first tokens; the arguments are those of loop.prefill.

    copies: M, or 1 where the prompts' rows have been repeated already.
    """
    shape: dict[str, Any] = {"capacity": capacity, "cache_dtype": cache_dtype, "copies": copies}
    state, logits, states = run_prompts(module, variables, prompt, choice, cache, **shape, keep_states=keep_states)
    state, output = _advance(state, choice, logits, keep_scores, keep_logits, states)
    return settled(module, (state, jax.tree.map(lambda a: a[None], output)))


def run_prompts(
    module: nn.Module, variables: Variables, prompt: Prompt, choice: BeamChoice, cache: KVCache | None, **static: Any
) -> tuple[BeamState, jax.Array, States]:
    """The state after the prompts, logits [B * M, V] of the first tokens, states kept. Arguments as of `prefill`."""
    rows, logits, states = run_prompt(module, variables, prompt, cache, **static)
    M = choice.beams
    sequences = rows.input_ids.reshape(-1, M, rows.input_ids.shape[1])
    B = len(sequences)
    # All beams of a prompt are equal: only the first may be continued.
    scores = jnp.full((B, M), EXCLUDED, jnp.float32)
    hypotheses = Beams(sequences, jnp.full_like(sequences, -1), scores, jnp.zeros((B, M), bool))
    state = BeamState(
        cache=rows.cache,
        slot_mask=rows.slot_mask,
        position=rows.position,
        running=hypotheses.replace(scores=scores.at[:, 0].set(0.0)),
        finished=hypotheses,
        cur_len=rows.cur_len,
        improvable=jnp.ones(B, bool),
        done=jnp.zeros((), bool),
        automaton=None if choice.token.grammar is None else jnp.asarray(choice.token.grammar.first),
    )
    return state, logits, states


@partial(
    jit_in_order,
    static_argnames=("module", "steps", "keep_scores", "keep_logits", "keep_states"),
    donate_argnames="state",
)
def decode(
    module: nn.Module,
    variables: Variables,
    state: BeamState,
    choice: BeamChoice,
    *,
    steps: int,
    keep_scores: bool,
    keep_logits: bool,
    keep_states: tuple[str, ...] = (),
) -> tuple[BeamState, BeamOutput]:
    """`steps` steps of the search under one scan. state.cache.bound covers the last of them."""

    def step(state: BeamState, _: None) -> tuple[BeamState, BeamOutput]:
        # Ties the weights to the carry, as in loop.decode.
        weights, state = jax.lax.optimization_barrier((without_encoder(variables), state))
        state, logits, states = run_newest(module, weights, state, keep_states)
        before = state.done, state.cur_len
        state, output = _advance(state, choice, logits, keep_scores, keep_logits, states)
        return follow_parents(state, choice, *before), output

    return settled(module, jax.lax.scan(step, state, None, length=steps))


def run_newest(
    module: nn.Module, variables: Variables, state: BeamState, keep_states: tuple[str, ...]
) -> tuple[BeamState, jax.Array, States]:
    """Run the newest token of each beam: the state with it in the cache, logits [B * M, V] of the next, states kept."""
    newest = jax.lax.dynamic_slice_in_dim(state.running.sequences, state.cur_len - 1, 1, axis=2)
    logits, cache, states = run_model(
        module,
        variables,
        for_each_prompt(newest.reshape(-1, 1), state.position),
        keep_states,
        attention_mask=state.slot_mask,
        position_ids=state.position[:, None],
        past_key_values=state.cache,
    )
    return state.replace(cache=cache), logits, states


def follow_parents(state: BeamState, choice: BeamChoice, was_done: jax.Array, cur_len: jax.Array) -> BeamState:
    """The state whose cache is that of the beams which were continued at column cur_len, unless all was done."""
    parents = _column(state.running.sources, cur_len).reshape(-1)
    parents = jnp.where(was_done, jnp.arange(len(parents)), parents)
    if choice.token.guidance is not None:
        parents = jnp.concatenate([parents, parents + len(parents)])
    return state.replace(cache=_reorder(state.cache, parents, choice.prompt_slots))


def _advance(
    state: BeamState, choice: BeamChoice, logits: jax.Array, keep_scores: bool, keep_logits: bool, states: States
) -> tuple[BeamState, BeamOutput]:
    """One step of the search, from the logits [B * M, V] of the running beams' next tokens; none, once it is done."""
    logits, scores = first_scores(state, choice, logits)
    scores = process(choice.token.processors, beams_of(state), scores, state.cur_len)
    found, counts = propose(state, choice, scores)
    after = conclude(state, choice, found, counts)
    output = BeamOutput(state.done, after.done, scores if keep_scores else None, logits if keep_logits else None)
    return after, output.replace(**of_prompts(states, scores))


def beams_of(state: BeamState) -> jax.Array:
    """[B * M, W]: the running sequences."""
    return state.running.sequences.reshape(-1, state.running.sequences.shape[-1])


def first_scores(state: BeamState, choice: BeamChoice, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits [B * M, V], and the log-probabilities that processors begin with."""
    logits, scores = guide(choice.token, logits.astype(jnp.float32))
    if choice.token.guidance is None:
        scores = jax.nn.log_softmax(scores)
    return logits, constrain(choice.token, scores, state.automaton)


def conclude(state: BeamState, choice: BeamChoice, found: Beams, counts: jax.Array) -> BeamState:
    """The state after a step that found these candidates, of which those count; the cache is still the parents'."""
    M = choice.beams
    running = _best(found.replace(scores=found.scores + jnp.where(found.ended, EXCLUDED, 0.0)), M)
    finished = _finish(state, choice, found)
    cur_len = state.cur_len + 1
    improvable = state.improvable & _may_improve(choice, running, finished, cur_len)
    full = jnp.all(finished.ended) & choice.stop_when_full
    done = ~jnp.any(improvable) | full | jnp.all(found.ended | ~counts)
    after = state.replace(
        position=state.position + 1,
        running=running,
        finished=finished,
        cur_len=cur_len,
        improvable=improvable,
        done=done,
        automaton=_follow(state, choice, running),
    )
    # Once done, a step writes to the cache out of sight, and the rest stays as it is.
    after = jax.tree.map(partial(jnp.where, state.done), state.replace(cache=None), after.replace(cache=None))
    length = state.cache.length - 1 + (after.cur_len - state.cur_len)
    return after.replace(cache=state.cache.replace(length=length))


def _follow(state: BeamState, choice: BeamChoice, running: Beams) -> jax.Array | None:
    """The grammar's states [B * M] of the beams that go on, which have a new token each."""
    if state.automaton is None:
        return None
    parents, tokens = (_column(a, state.cur_len).reshape(-1) for a in (running.sources, running.sequences))
    return advance(choice.token, state.automaton[parents], tokens)


def propose(state: BeamState, choice: BeamChoice, scores: jax.Array) -> tuple[Beams, jax.Array]:
    """The best C continuations of each prompt's running beams, or C drawn without replacement.

    scores: [B * M, V] float32, of each beam's next token.
    Returns them, and which of them count: [C] bool.
    """
    B, M, _ = state.running.sequences.shape
    V = scores.shape[-1]
    scores = with_end(choice.token, scores)
    total = scores.reshape(B, M, V) + state.running.scores[..., None]
    # The highest of scores with Gumbel noise are draws without replacement, in their order (Kool et al. 2019).
    ranking = total + _gumbel(choice.token, state.position, total.shape) if choice.token.do_sample else total
    # Of each beam first: a GPU's kernel takes rows no longer than a vocabulary. Ties are broken as in one pass.
    each, tokens = jax.lax.top_k(ranking, min(choice.candidates, V))
    picked = jax.lax.top_k(each.reshape(B, -1), choice.candidates)[1]
    beams = picked // each.shape[-1]
    tokens = _pick(tokens.reshape(B, -1), picked)
    total = _pick(total.reshape(B, -1), beams * V + tokens)
    counts = jnp.arange(choice.candidates) < choice.kept
    found = _take(state.running, beams)
    rows = jnp.arange(B)[:, None] * M + beams
    ended = jnp.isin(tokens, jnp.asarray(choice.token.eos_ids)) | (state.cur_len + 1 >= choice.max_length)
    sequences = _set_column(found.sequences, tokens, state.cur_len)
    for criterion in choice.token.criteria:
        flat, parents = sequences.reshape(-1, sequences.shape[-1]), scores[rows.reshape(-1)]
        ended |= jnp.broadcast_to(criterion(flat, parents, state.cur_len + 1), flat.shape[:1]).reshape(ended.shape)
    found = Beams(
        sequences=sequences,
        sources=_set_column(found.sources, rows, state.cur_len),
        scores=jnp.where(counts, total, -jnp.inf),
        ended=ended,
    )
    return found, counts


def _gumbel(token: TokenChoice, position: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[B, M, V] noise; each prompt has its own key, folded by the next token's position in its row."""
    base = jax.random.key(token.seed)

    def draw(row: jax.Array, at: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(base, row), at), shape[1:])

    return jax.vmap(draw)(jnp.arange(shape[0]), position[: shape[0] * shape[1] : shape[1]] + 1)


def _finish(state: BeamState, choice: BeamChoice, found: Beams) -> Beams:
    """The M best of the finished and of what has ended among the first M candidates (`_update_finished_beams`)."""
    M = choice.beams
    ended = found.ended & (jnp.arange(choice.candidates) < M)
    full = jnp.all(state.finished.ended, axis=1, keepdims=True) & choice.stop_when_full
    scores = _normalise(choice, found.scores, state.cur_len + 1 - choice.prompt_length)
    # One by one: at 1e9 a float32 has steps of 64, and the sums' rounding decides what is a tie.
    for excluded in (full, ~state.improvable[:, None], ~ended):
        scores = scores + jnp.where(excluded, EXCLUDED, 0.0)
    found = found.replace(scores=scores, ended=ended)
    return _best(jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), state.finished, found), M)


def _may_improve(choice: BeamChoice, running: Beams, finished: Beams, cur_len: jax.Array) -> jax.Array:
    """[B] bool: whether the best running beam may come to beat the worst finished one (`_check_early_stop_heuristic`).

    Its score is taken as it would be at its present length; with early_stopping="never" and a penalty that favours
    length, at max_length.
    """
    at_the_end = choice.never & (jnp.asarray(choice.length_penalty) > 0.0)
    length = jnp.where(at_the_end, choice.max_length, cur_len) - choice.prompt_length
    best = _normalise(choice, running.scores[:, :1], length)
    worst = jnp.where(finished.ended, jnp.min(finished.scores, axis=1, keepdims=True), EXCLUDED)
    return jnp.any(best > worst, axis=1)


def _normalise(choice: BeamChoice, scores: jax.Array, length: jax.Array) -> jax.Array:
    """Scores over length ** length_penalty, length in new tokens."""
    return scores / length.astype(jnp.float32) ** jnp.asarray(choice.length_penalty, jnp.float32)


def _best(beams: Beams, count: int) -> Beams:
    """The `count` hypotheses of each prompt with the highest scores, the best first."""
    return _take(beams, jax.lax.top_k(beams.scores, count)[1])


def _take(beams: Beams, index: jax.Array) -> Beams:
    """The hypotheses index [B, n] of each prompt."""

    def gather(a: jax.Array) -> jax.Array:
        return _pick(a, index.reshape(index.shape + (1,) * (a.ndim - 2)))

    return jax.tree.map(gather, beams)


def _pick(array: jax.Array, index: jax.Array) -> jax.Array:
    """take_along_axis on axis 1, for an index that is inside by construction."""
    return jnp.take_along_axis(array, index, axis=1, mode="promise_in_bounds")


def _column(array: jax.Array, at: jax.Array) -> jax.Array:
    """[B, M]: one column of [B, M, W]."""
    return jax.lax.dynamic_index_in_dim(array, at, axis=2, keepdims=False)


def _set_column(array: jax.Array, values: jax.Array, at: jax.Array) -> jax.Array:
    """[B, C, W] with values [B, C] in one column."""
    return jax.lax.dynamic_update_index_in_dim(array, values.astype(array.dtype), at, axis=2)


def _reorder(cache: KVCache, parents: jax.Array, prompt_slots: ArrayLike) -> KVCache:
    """The cache with row `parents[i]` in row i; in place, block by block of slots.

    The prompt's slots are equal in all beams of a prompt and stay; what moves grows with the new tokens only. A block
    of all layers at a time is one loop, and its temporaries are block / S of the cache at most.
    """
    S = cache.capacity
    block = BLOCK if S % BLOCK == 0 else S  # a last block that is not whole would move some slots twice

    def move(i: jax.Array, layers: Any) -> Any:
        def gather(a: jax.Array) -> jax.Array:
            slots = jax.lax.dynamic_slice_in_dim(a, i * block, block, axis=2)
            moved = slots.at[parents].get(mode="promise_in_bounds")
            return jax.lax.dynamic_update_slice_in_dim(a, moved, i * block, axis=2)

        return jax.tree.map(gather, layers)

    first, last = jnp.asarray(prompt_slots) // block, -(-cache.length // block)
    return cache.replace(layers=jax.lax.fori_loop(first, last, move, cache.layers))
