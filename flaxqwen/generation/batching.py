"""Continuous batching: a batch in which a row that ends is replaced by the next prompt, so that it stays full.

A row is as if it were alone: it is prefilled alone, has its own length, options and draws, and no padding. Programs:
`admit` for each bucket of prompt lengths, whatever the options; `begin`, and `decode` for each filled-length bound.

Axes: B rows, T prompt tokens (padded to a bucket), S cache capacity and columns of the sequence buffer, V vocabulary,
E end-of-sequence ids.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from flaxqwen.cache import KVCache, LayerCache, init_cache
from flaxqwen.generation.config import ResolvedConfig, resolve
from flaxqwen.generation.grammar import Grammar, make_grammar
from flaxqwen.generation.inputs import (
    SMALLEST_CACHE,
    SMALLEST_PROMPT,
    CausalLM,
    bucket,
    cache_dtype,
    check_input_ids,
    platform,
)
from flaxqwen.generation.loop import Variables, run_model, settled
from flaxqwen.generation.processors import LogitsProcessor, build_processors, pad_ids
from flaxqwen.generation.sampling import Criterion, draw, keys_alone, process
from flaxqwen.generation.stopping import make_stopping
from flaxqwen.ops.cpu import jit_in_order
from flaxqwen.ops.largest import first_largest

Key = TypeVar("Key")
Layers = tuple[LayerCache, ...]

# Steps per program: a row that ends waits for the program's end, half of its steps on average.
STEPS = {"cpu": 4}
DEFAULT_STEPS = 8
LARGEST_HALVED = 8192  # up to here there are two buckets of prompts for each power of two

# Options of generate() that are not of one row's text, and the values which leave them without effect.
NOT_OF_A_ROW: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "guidance_scale": (None, 1.0),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "token_healing": (None, False),
    "prefill_chunk_size": (None,),
    "max_time": (None,),
    "return_dict_in_generate": (False,),
}
NUMPY_TYPES = {int: np.int32, float: np.float32}  # of what jax takes for a number without a type


class Row(flax.struct.PyTreeNode):
    """How one row's tokens are chosen, and when it ends; in RowsState every leaf has an axis of rows in front.

    processors, criteria, grammar: as in TokenChoice, of a batch of one. eos_ids: [E] int32.
    seed: uint32; the draws are those of generate() with this seed and one prompt. limit: int32, tokens at which the row
      ends, prompt included. do_sample: draw, or take the highest score.
    """

    processors: tuple[LogitsProcessor, ...]
    eos_ids: ArrayLike
    seed: ArrayLike
    limit: ArrayLike
    criteria: tuple[Criterion, ...] = ()
    grammar: Grammar | None = None
    do_sample: bool = flax.struct.field(pytree_node=False, default=False)


class RowsState(flax.struct.PyTreeNode):
    """A running batch, its cache apart.

    input_ids: [B, S] int32. cur_len: [B] int32, tokens of each row; the cache has all of them but the newest.
    finished: [B] bool, rows that have ended, or never began: they stand still. automaton: [B] int32, the grammars'
    states; None without. rows: what is asked for.
    """

    input_ids: jax.Array
    cur_len: jax.Array
    finished: jax.Array
    automaton: jax.Array | None
    rows: Row


@dataclass(frozen=True)
class Request:
    """A text to continue, checked.

    tokens: [P] int32. row: with arrays of numpy or jax. options: of the call of generate() that it stands for.
    cache_dtype: of keys and values.
    """

    tokens: np.ndarray
    row: Row
    options: ResolvedConfig
    cache_dtype: np.dtype

    @property
    def capacity(self) -> int:
        """Slots that its cache needs."""
        return max(self.options.max_length, prompt_bucket(len(self.tokens)))

    @property
    def signature(self) -> tuple[Any, ...]:
        """What decides which programs it runs in: requests of equal signatures share them, and may share a batch."""
        leaves, structure = jax.tree.flatten(self.row)
        return structure, self.cache_dtype, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def make_request(model: CausalLM, tokens: ArrayLike, options: Mapping[str, Any], tokenizer: Any = None) -> Request:
    """What generate(tokens[None], tokenizer=tokenizer, **options) asks for, as a row of a batch.

    Args:
      tokens: [P] int. options: of GenerationConfig, and regex or json_schema.

    Raises:
      ValueError: what generate() refuses; options that are not of one row's text; more tokens than the context.
    """
    given = dict(options)
    constraint = given.pop("regex", None), given.pop("json_schema", None)
    config = model.config.get_text_config()
    ids = check_input_ids(np.asarray(tokens)[None], config)
    resolved = resolve(
        model.generation_config,
        None,
        given,
        input_length=ids.shape[1],
        max_position_embeddings=config.max_position_embeddings,
        arguments=("regex", "json_schema"),
    )
    for name, neutral in NOT_OF_A_ROW.items():
        if getattr(resolved, name) not in neutral:
            raise ValueError(f"{name}={getattr(resolved, name)!r} is not for batches of rows that come and go")
    if resolved.max_length > config.context_length:
        raise ValueError(
            f"prompt and new tokens come to {resolved.max_length}, the model's context is {config.context_length}"
        )
    stopping, resolved = make_stopping(resolved, None, tokenizer, 1, config.vocab_size)
    row = Row(
        processors=build_processors(resolved, ids, np.ones(ids.shape, bool), 1, config.vocab_size),
        eos_ids=pad_ids(stopping.eos_token_id),
        seed=np.uint32(resolved.seed or 0),
        limit=np.int32(resolved.max_length),
        criteria=stopping.traced,
        grammar=make_grammar(*constraint, tokenizer, 1, 1, config.vocab_size, resolved.eos_token_id),
        do_sample=resolved.do_sample,
    )
    row = jax.tree.map(_to_array, row)
    return Request(ids[0], row, resolved, cache_dtype(model, resolved))


def _to_array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf, NUMPY_TYPES.get(type(leaf)))


@dataclass
class Counts:
    """What a batch has done: prompt tokens, and with the padding of their buckets; new tokens; steps of rows."""

    prompt_tokens: int = 0
    padded_tokens: int = 0
    new_tokens: int = 0
    row_steps: int = 0


def prompt_bucket(n: int) -> int:
    """The length that a prompt of n is padded to: 32, 48, 64, 96, 128, ...; 15% more on average, a third at most."""
    if n > LARGEST_HALVED:
        return bucket(n, SMALLEST_PROMPT)
    whole = bucket(n, SMALLEST_PROMPT) if n <= 2048 else 1 << (n - 1).bit_length()
    half = whole // 4 * 3
    return half if SMALLEST_PROMPT <= n <= half else whole


@partial(jax.jit, static_argnames=("module", "rows", "capacity", "cache_dtype"))
def empty(module: nn.Module, *, rows: int, capacity: int, cache_dtype: DTypeLike) -> Layers:
    """The cache of a batch of free rows."""
    return settled(module, init_cache(module.config, rows, capacity, cache_dtype).layers)


@partial(jax.jit, static_argnames=("module", "rows", "capacity"))
def free(module: nn.Module, row: Row, *, rows: int, capacity: int) -> RowsState:
    """The state of a batch of free rows, for requests of the signature of `row`."""
    state = RowsState(
        input_ids=jnp.zeros((rows, capacity), jnp.int32),
        cur_len=jnp.ones(rows, jnp.int32),
        finished=jnp.ones(rows, bool),
        automaton=None if row.grammar is None else jnp.zeros(rows, jnp.int32),
        rows=jax.tree.map(lambda leaf: jnp.zeros((rows, *leaf.shape), leaf.dtype), row),
    )
    return settled(module, state)


@partial(jit_in_order, static_argnames="module", donate_argnames="layers")
def admit(
    module: nn.Module, variables: Variables, layers: Layers, tokens: ArrayLike, length: ArrayLike, place: ArrayLike
) -> tuple[Layers, jax.Array]:
    """Run a prompt alone, and put its keys and values in the place of a row; nothing else of the cache moves.

    tokens: [T] int32, of which the first `length` count. place: int32, of the row.

    Returns:
      The cache; logits [1, V] of the prompt's end.
    """
    tokens = jnp.asarray(tokens)
    cache = init_cache(module.config, 1, tokens.shape[0], layers[0].key.dtype)
    logits, filled, _ = run_model(
        module, variables, tokens[None], (), past_key_values=cache.replace(length=jnp.zeros((), jnp.int32)),
        logits_to_keep=jnp.reshape(jnp.asarray(length) - 1, 1),
    )  # fmt: skip
    return settled(module, (jax.tree.map(partial(_put, jnp.asarray(place)), layers, filled.layers), logits))


@partial(jax.jit, static_argnames="module", donate_argnames="state")
def begin(
    module: nn.Module,
    state: RowsState,
    logits: jax.Array,
    tokens: ArrayLike,
    length: ArrayLike,
    row: Row,
    place: ArrayLike,
) -> tuple[RowsState, tuple[jax.Array, jax.Array]]:
    """Choose the first token after a prompt, and put the row in its place.

    logits: [1, V], of `admit`. tokens: [S] int32, of which the first `length` count.

    Returns:
      The state; the token, and whether the row has ended with it.
    """
    single = RowsState(
        input_ids=jnp.asarray(tokens)[None],
        cur_len=jnp.reshape(jnp.asarray(length), 1),
        finished=jnp.zeros(1, bool),
        automaton=None if row.grammar is None else jnp.asarray(row.grammar.first),
        rows=jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], row),
    )
    single, token = extend(single, logits)
    state = jax.tree.map(partial(_put, jnp.asarray(place)), state, single)
    return settled(module, (state, (token[0], single.finished[0])))


def _put(place: jax.Array, whole: jax.Array, new: jax.Array) -> jax.Array:
    """`whole` with `new`, of one row, at a row."""
    return jax.lax.dynamic_update_slice(whole, new.astype(whole.dtype), (place, *(0,) * (whole.ndim - 1)))


@partial(jit_in_order, static_argnames=("module", "steps", "bound"), donate_argnames=("layers", "state"))
def decode(
    module: nn.Module, variables: Variables, layers: Layers, state: RowsState, *, steps: int, bound: int
) -> tuple[Layers, RowsState, tuple[jax.Array, jax.Array]]:
    """`steps` steps of all rows: the tokens, and which rows have ended with them or before, both [steps, B].

    bound: attention reads so many slots: no row may grow longer.
    """

    def step(carry: tuple[Layers, RowsState], _: None) -> tuple[tuple[Layers, RowsState], tuple[jax.Array, jax.Array]]:
        weights, (layers, state) = jax.lax.optimization_barrier((variables, carry))  # as in loop.decode
        slot = (state.cur_len - 1)[:, None]
        newest = jnp.take_along_axis(state.input_ids, slot, axis=1)
        cache = KVCache(layers, slot[:, 0], bound)
        logits, filled, _states = run_model(module, weights, newest, (), position_ids=slot, past_key_values=cache)
        state, tokens = extend(state, logits)
        return (filled.layers, state), (tokens, state.finished)

    (layers, state), output = jax.lax.scan(step, (layers, state), None, length=steps)
    return settled(module, (layers, state, output))


def extend(state: RowsState, logits: jax.Array) -> tuple[RowsState, jax.Array]:
    """The state with the next token of each row that goes on, and those tokens [B], from logits [B, V]."""
    rows, length = state.rows, state.cur_len
    scores = jax.vmap(_score)(rows, state.input_ids, length, state.automaton, logits.astype(jnp.float32))
    # Position ids are slots: there is no padding.
    tokens = draw(keys_alone(jnp.asarray(rows.seed), length), scores) if rows.do_sample else first_largest(scores)
    input_ids = state.input_ids.at[jnp.arange(len(tokens)), length].set(tokens, mode="drop")
    ended = jax.vmap(_ends)(rows, input_ids, length + 1, tokens, scores)
    automaton = None if state.automaton is None else jax.vmap(_advance)(rows, state.automaton, tokens)
    state = state.replace(
        input_ids=input_ids,
        cur_len=jnp.where(state.finished, length, length + 1),
        finished=state.finished | ended,
        automaton=automaton,
    )
    return state, tokens


def _score(row: Row, ids: jax.Array, length: jax.Array, automaton: jax.Array | None, logits: jax.Array) -> jax.Array:
    """Scores [V] of one row."""
    scores = logits[None]
    if row.grammar is not None and automaton is not None:
        scores = row.grammar.mask(scores, automaton[None])
    scores = process(row.processors, ids[None], scores, length)
    return (scores if row.grammar is None else row.grammar.with_end(scores))[0]


def _ends(row: Row, ids: jax.Array, length: jax.Array, token: jax.Array, scores: jax.Array) -> jax.Array:
    """Whether one row ends with its newest token, of `length`."""
    ended = jnp.any(token == jnp.asarray(row.eos_ids)) | (length >= jnp.asarray(row.limit))
    for criterion in row.criteria:
        ended |= criterion(ids[None], scores[None], length)[0]
    return ended


def _advance(row: Row, automaton: jax.Array, token: jax.Array) -> jax.Array:
    assert row.grammar is not None
    return row.grammar.advance(automaton[None], token[None])[0]


@dataclass
class _Running:
    """A row of the batch that is at work: its request's key, tokens so far, and the first one, on the device."""

    key: Any
    length: int
    first: tuple[jax.Array, jax.Array] | None
    tokens: list[int]


def run(
    model: CausalLM,
    requests: Iterator[tuple[Key, Request]],
    *,
    rows: int,
    capacity: int,
    counts: Counts,
) -> Iterator[tuple[Key, list[int]]]:
    """Continue all requests, `rows` at a time; each as it ends, with its new tokens.

    Args:
      requests: all of one signature, each with the key by which it comes back.
      capacity: at least that of every request.
      counts: is added to.
    """
    steps = STEPS.get(platform(model.params), DEFAULT_STEPS)
    capacity = bucket(capacity, SMALLEST_CACHE)
    waiting = deque(islice(requests, rows))
    if not waiting:
        return
    some = waiting[0][1]
    layers = empty(model.module, rows=rows, capacity=capacity, cache_dtype=some.cache_dtype)
    state = free(model.module, some.row, rows=rows, capacity=capacity)
    places: list[_Running | None] = [None] * rows
    ended: list[tuple[Key, list[int]]] = []
    while True:
        for place in range(rows):
            if places[place] is None and waiting:
                key, request = waiting.popleft()
                length, size, at = len(request.tokens), prompt_bucket(len(request.tokens)), np.int32(place)
                ids = np.pad(request.tokens, (0, capacity - length))
                layers, logits = admit(model.module, model.variables, layers, ids[:size], np.int32(length), at)
                state, first = begin(model.module, state, logits, ids, np.int32(length), request.row, at)
                places[place] = _Running(key, length, first, [])
                counts.prompt_tokens += length
                counts.padded_tokens += size
        running = [row for row in places if row is not None]
        if not running:
            yield from ended
            return
        longest = max(row.length + max(len(row.tokens), 1) for row in running)
        bound = min(bucket(longest + steps, SMALLEST_CACHE), capacity)
        layers, state, output = decode(model.module, model.variables, layers, state, steps=steps, bound=bound)
        # What the host has to do is done while the device is at work.
        yield from ended
        waiting.extend(islice(requests, rows - len(waiting)))
        counts.row_steps += steps * rows
        ended = _collect(places, jax.device_get(output))
        counts.new_tokens += sum(len(tokens) for _, tokens in ended)


def _collect(places: list[_Running | None], output: tuple[np.ndarray, np.ndarray]) -> list[tuple[Any, list[int]]]:
    """Give each row its tokens of a program, [steps, B]; those that have ended are returned, and leave their places."""
    ended = []
    for place, row in enumerate(places):
        if row is None:
            continue
        tokens, finished = (array[:, place] for array in output)
        done = False
        if row.first is not None:
            token, done = jax.device_get(row.first)
            row.tokens.append(int(token))
            row.first = None
        if not done:
            count = int(finished.argmax()) + 1 if finished.any() else len(tokens)
            row.tokens += tokens[:count].tolist()
        if done or finished.any():
            ended.append((row.key, row.tokens))
            places[place] = None
    return ended
