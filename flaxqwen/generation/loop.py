"""The compiled programs of generation: prefill, and a chunk of decoding steps under one `lax.scan`.

Both are pure: the state goes in, donated, and comes out. Static are the module, the shapes, the number of steps and the
filled-length bound that attention reads; everything else is traced, so that no value compiles a second time.

Axes: B batch, T prompt tokens (padded to a bucket), S cache capacity, W columns of the sequence buffer, D model,
N query heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from flaxqwen.cache import KVCache, init_cache
from flaxqwen.generation.sampling import (
    TokenChoice,
    advance,
    choose,
    constrain,
    fill_finished,
    guide,
    is_plain,
    process,
    stopped,
)
from flaxqwen.models.outputs import CausalLMOutputWithPast
from flaxqwen.models.qwen2_audio import ENCODER_PARTS
from flaxqwen.ops.cpu import jit_in_order
from flaxqwen.sharding import module_sharding, settle

Variables = dict[str, Any]  # of the module: {"params": ...}, and "lora" beside it where there are adapters
States = dict[str, tuple[jax.Array, ...]]  # of each layer, by the names of StepOutput
STATES = ("attentions", "hidden_states")
KEEP = ("keep_scores", "keep_logits", "keep_states", "keep_top")


class DecodeState(flax.struct.PyTreeNode):
    """The scan's carry. With guidance, the cache, slot_mask and position have 2B rows: the negative prompts' follow.

    cache: keys and values of every token but the newest.
    slot_mask: [B, S] bool, False at padding; None when there is none.
    input_ids: [B, W] int32, the sequences as Transformers lays them out: left-padded prompt, then the new tokens.
    cur_len: int32 scalar, columns of input_ids that are filled.
    position: [B] int32, position id of the newest token.
    finished: [B] bool, rows that have had an end-of-sequence token, or that a criterion has stopped.
    automaton: [B] int32, the grammar's states; None without one.
    """

    cache: KVCache
    slot_mask: jax.Array | None
    input_ids: jax.Array
    cur_len: jax.Array
    position: jax.Array
    finished: jax.Array
    automaton: jax.Array | None = None


class LogProbs(flax.struct.PyTreeNode):
    """By the model alone, in nats.

    chosen: [B] float32, of the new tokens. top, tokens: [B, n] float32 and int32, of the likeliest.
    """

    chosen: jax.Array
    top: jax.Array
    tokens: jax.Array


class StepOutput(flax.struct.PyTreeNode):
    """What steps give the host.

    tokens: [steps, B] int32. finished: [steps, B] bool, rows that have ended with this token or before.
    If asked for: scores, logits: [steps, B, V] float32, processed and raw; attentions: [steps, B, N, T, S] of each
    layer; hidden_states: [steps, B, T, D] of each layer and one more; logprobs: [steps, B, ...].
    """

    tokens: jax.Array
    finished: jax.Array
    scores: jax.Array | None = None
    logits: jax.Array | None = None
    attentions: tuple[jax.Array, ...] | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    logprobs: LogProbs | None = None


class Audio(flax.struct.PyTreeNode):
    """Encoded audio, and where prompts have it.

    vectors: [C, P, D], P for each clip. index: [B, T] int32, of each token's vector among all C * P; -1: text.
    """

    vectors: jax.Array
    index: ArrayLike


class Prompt(flax.struct.PyTreeNode):
    """The part of the prompts that the cache does not hold yet, padded on the right to a bucket.

    tokens: [B, T] int32, or embeddings [B, T, D]. position_ids: [B, T] int32.
    slot_mask: [B, S] bool over cache slots, or None. With guidance these have 2B rows.
    input_ids: [B, W] int32, the whole sequences so far; cur_len: int32 scalar, their length.
    last: int32 scalar, index into tokens of the last real one.
    audio: of tokens, or None.
    """

    tokens: ArrayLike
    position_ids: ArrayLike
    slot_mask: ArrayLike | None
    input_ids: ArrayLike
    cur_len: ArrayLike
    last: ArrayLike
    audio: Audio | None = None


@partial(
    jit_in_order,
    static_argnames=("module", "capacity", "cache_dtype", "copies", *KEEP),
    donate_argnames="cache",
)
def prefill(
    module: nn.Module,
    variables: Variables,
    prompt: Prompt,
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
) -> tuple[DecodeState, StepOutput]:
    """Run the prompts and choose the first token.

    Args:
      module, variables: a causal language model.
      prompt: see Prompt.
      choice: how the token is chosen.
      cache: to continue (donated), or None for a new one of `capacity` slots and of cache_dtype.
      copies: continuations per prompt; the prompt runs once and its cache is repeated.
      keep_scores, keep_logits: whether StepOutput has them. keep_states: of "attentions", "hidden_states" likewise.
      keep_top: how many of the likeliest tokens it has; None: no log-probabilities at all.
    """
    state, logits, states = run_prompt(
        module,
        variables,
        prompt,
        cache,
        capacity=capacity,
        cache_dtype=cache_dtype,
        copies=copies,
        keep_states=keep_states,
    )
    state, output = _extend(begin(state, choice), choice, logits, keep_scores, keep_logits, states, keep_top)
    return settled(module, (state, jax.tree.map(lambda a: a[None], output)))


def begin(state: DecodeState, choice: TokenChoice) -> DecodeState:
    """The state of a prompt's end, with the grammar's first states."""
    return state if choice.grammar is None else state.replace(automaton=jnp.asarray(choice.grammar.first))


@partial(jit_in_order, static_argnames=("module", "capacity", "cache_dtype"), donate_argnames="cache")
def fill(
    module: nn.Module,
    variables: Variables,
    prompt: Prompt,
    cache: KVCache | None,
    *,
    capacity: int,
    cache_dtype: DTypeLike,
) -> KVCache:
    """The cache with one more part of the prompts in it. Arguments as of `prefill`."""
    state, _, _ = run_prompt(module, variables, prompt, cache, capacity=capacity, cache_dtype=cache_dtype, copies=1)
    return settled(module, state.cache)


def run_prompt(
    module: nn.Module,
    variables: Variables,
    prompt: Prompt,
    cache: KVCache | None,
    *,
    capacity: int,
    cache_dtype: DTypeLike,
    copies: int,
    keep_states: tuple[str, ...] = (),
) -> tuple[DecodeState, jax.Array, States]:
    """The state after the prompts, logits [B, V] of the first token, and states kept. Arguments as of `prefill`."""
    tokens = jnp.asarray(prompt.tokens)
    if cache is None:
        config = module.config.get_text_config()
        cache = init_cache(config, tokens.shape[0], capacity, cache_dtype).replace(bound=tokens.shape[1])
    # Rows are aligned, and stay so: one length for all keeps the writes plain slices.
    cache = cache.replace(length=jnp.max(cache.length))
    start = cache.length
    if (audio := prompt.audio) is not None:
        embeds: Any = module.apply(variables, tokens, jnp.asarray(audio.index), audio.vectors, method="embed")
        tokens = embeds
    logits, cache, states = run_model(
        module,
        variables,
        tokens,
        keep_states,
        attention_mask=prompt.slot_mask,
        position_ids=prompt.position_ids,
        past_key_values=cache,
        logits_to_keep=jnp.asarray(prompt.last)[None],
    )
    # What was written after the last real token is out of sight, and overwritten step by step.
    cache = cache.replace(length=start + prompt.last + 1)
    position = jnp.asarray(prompt.position_ids)[:, prompt.last]
    rows = (cache.layers, prompt.slot_mask, prompt.input_ids, position, logits, states)
    layers, slot_mask, input_ids, position, logits, states = _repeat(rows, copies)
    cache = cache.replace(layers=layers)
    finished = jnp.zeros(input_ids.shape[0], bool)
    return DecodeState(cache, slot_mask, input_ids, jnp.asarray(prompt.cur_len), position, finished), logits, states


@partial(jit_in_order, static_argnames=("module", "steps", *KEEP), donate_argnames="state")
def decode(
    module: nn.Module,
    variables: Variables,
    state: DecodeState,
    choice: TokenChoice,
    wanted: ArrayLike | None = None,
    *,
    steps: int,
    keep_scores: bool,
    keep_logits: bool,
    keep_states: tuple[str, ...] = (),
    keep_top: int | None = None,
) -> tuple[DecodeState, StepOutput]:
    """`steps` decoding steps under one scan. state.cache.bound covers the last of them.

    wanted: int32 scalar, how many steps to run at most, and none once every row has ended; the results of the others
      are zeros. None: run all, so that the device need not ask before each.
    """

    def step(state: DecodeState, _: None) -> tuple[DecodeState, StepOutput]:
        # Ties the weights to the carry: else XLA hoists float32 copies of bfloat16 weights out of the loop on CPU
        # (1,980 MB of temporaries at 0.5B).
        weights, state = jax.lax.optimization_barrier((without_encoder(variables), state))
        state, logits, states = run_newest(module, weights, state, keep_states)
        return _extend(state, choice, logits, keep_scores, keep_logits, states, keep_top)

    results = (
        jax.lax.scan(step, state, None, length=steps) if wanted is None else _scan_wanted(step, state, wanted, steps)
    )
    return settled(module, results)


def _scan_wanted(
    step: Callable[[DecodeState, None], tuple[DecodeState, StepOutput]],
    state: DecodeState,
    wanted: ArrayLike,
    steps: int,
) -> tuple[DecodeState, StepOutput]:
    """lax.scan of `steps` steps that ends after those that are `wanted`, or when every row has ended."""
    output = jax.eval_shape(step, state, None)[1]
    outputs = jax.tree.map(lambda a: jnp.zeros((steps, *a.shape), a.dtype), output)

    def is_wanted(carry: tuple[jax.Array, DecodeState, StepOutput]) -> jax.Array:
        done, state, _ = carry
        return (done < jnp.minimum(wanted, steps)) & ~state.finished.all()

    def run(carry: tuple[jax.Array, DecodeState, StepOutput]) -> tuple[jax.Array, DecodeState, StepOutput]:
        done, state, outputs = carry
        state, output = step(state, None)
        return done + 1, state, jax.tree.map(lambda a, piece: a.at[done].set(piece), outputs, output)

    return jax.lax.while_loop(is_wanted, run, (jnp.int32(0), state, outputs))[1:]


def run_newest(
    module: nn.Module, variables: Variables, state: DecodeState, keep_states: tuple[str, ...]
) -> tuple[DecodeState, jax.Array, States]:
    """Run the newest token of each row: the state with it in the cache, logits [B, V] of the next one, states kept."""
    newest = jax.lax.dynamic_slice_in_dim(state.input_ids, state.cur_len - 1, 1, axis=1)
    logits, cache, states = run_model(
        module,
        variables,
        for_each_prompt(newest, state.position),
        keep_states,
        attention_mask=state.slot_mask,
        position_ids=state.position[:, None],
        past_key_values=state.cache,
    )
    return state.replace(cache=cache), logits, states


def without_encoder(variables: Variables) -> Variables:
    """Those that decoding uses: a barrier, unlike the compiler, would keep Qwen2-Audio's encoder as an argument."""

    def kept(tree: Any) -> Any:
        model = {name: part for name, part in tree["model"].items() if name not in ENCODER_PARTS}
        return tree | {"model": model}

    return {name: kept(tree) if "model" in tree else tree for name, tree in variables.items()}


def for_each_prompt(tokens: jax.Array, position: jax.Array) -> jax.Array:
    """tokens [B, T], and with guidance, where position is [2B], once more for the negative prompts."""
    return jnp.tile(tokens, (position.shape[0] // tokens.shape[0], 1))


def run_model(
    module: nn.Module, variables: Variables, tokens: jax.Array, keep_states: tuple[str, ...], **inputs: Any
) -> tuple[jax.Array, KVCache, States]:
    """The model on new tokens [B, T], into the cache: logits [B, V] of one position, the cache, and states kept."""
    inputs |= {f"output_{name}": name in keep_states for name in STATES}
    inputs["input_ids" if tokens.ndim == 2 else "inputs_embeds"] = tokens
    output = module.apply(variables, use_cache=True, return_dict=True, **inputs)
    assert isinstance(output, CausalLMOutputWithPast)
    assert output.logits is not None
    assert output.past_key_values is not None
    return output.logits[:, 0], output.past_key_values, {name: getattr(output, name) for name in keep_states}


def _extend(
    state: DecodeState,
    choice: TokenChoice,
    logits: jax.Array,
    keep_scores: bool,
    keep_logits: bool,
    states: States,
    keep_top: int | None,
) -> tuple[DecodeState, StepOutput]:
    """Choose the next token of each row from logits [B, V], and append it."""
    narrow = logits
    logits, scores = guide(choice, logits.astype(jnp.float32))
    scores = constrain(choice, scores, state.automaton)
    scores = process(choice.processors, state.input_ids, scores, state.cur_len)
    # To widen the logits of 151,936 tokens takes 0.1 to 0.5 ms on a CPU.
    state, tokens = append(state, choice, scores, narrow if is_plain(choice) else None)
    kept = scores if keep_scores else None, logits if keep_logits else None
    output = StepOutput(tokens, state.finished, *kept, logprobs=log_probs(logits, tokens, keep_top))
    return state, output.replace(**of_prompts(states, tokens))


def log_probs(logits: jax.Array, tokens: jax.Array, count: int | None) -> LogProbs | None:
    """Of tokens [B], and of the `count` likeliest ones, from logits [B, V]; None for None."""
    if count is None:
        return None
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1) - total
    top, ids = jax.lax.top_k(logits, count)
    return LogProbs(chosen[:, 0], top - total, ids)


def of_prompts(states: States, tokens: jax.Array) -> States:
    """Without the rows of negative prompts: as many as tokens [B]."""
    return jax.tree.map(lambda a: a[: tokens.shape[0]], states)


def append(
    state: DecodeState, choice: TokenChoice, scores: jax.Array, ranked: jax.Array | None = None
) -> tuple[DecodeState, jax.Array]:
    """The state with the next token of each row in it, and those tokens [B], from processed scores [B, V].

    ranked: [B, V] of another dtype in the same order, of which the token is chosen. None: the scores.
    """
    position, cur_len = state.position + 1, state.cur_len + 1
    tokens = choose(choice, scores if ranked is None else ranked, position[: scores.shape[0]])
    tokens = fill_finished(choice, tokens, state.finished)
    input_ids = jax.lax.dynamic_update_slice_in_dim(state.input_ids, tokens[:, None], state.cur_len, axis=1)
    finished = state.finished | stopped(choice, input_ids, scores, cur_len, tokens)
    automaton = advance(choice, state.automaton, tokens)
    state = state.replace(input_ids=input_ids, cur_len=cur_len, position=position, finished=finished)
    return state.replace(automaton=automaton), tokens


def _repeat(rows: Any, copies: int) -> Any:
    """Each row `copies` times, next to itself."""
    if copies == 1:
        return jax.tree.map(jnp.asarray, rows)
    return jax.tree.map(lambda a: jnp.repeat(jnp.asarray(a), copies, axis=0), rows)


def settled(module: nn.Module, results: Any) -> Any:
    """A program's results, where the next one expects them on the module's mesh, if it has one."""
    return settle(module_sharding(module), results)
