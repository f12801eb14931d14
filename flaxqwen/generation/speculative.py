"""The compiled program of assisted decoding: rounds of drafting several tokens and verifying them in one pass.

A draft is a guess of the next K tokens, by a smaller model or by looking the newest tokens up in the text. The model
runs all of them at once, and keeps them as far as it agrees: greedily, as far as it would have chosen the same;
sampling, by the rejection rule of Leviathan et al. 2023, which leaves its distribution exactly as it is. Rows advance
by different lengths; what a cache holds of rejected tokens is out of sight, and overwritten.

Axes: B batch, K most drafts of a round, S cache capacity, W columns of the sequence buffer, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flaxqwen.cache import KVCache
from flaxqwen.generation.loop import DecodeState, Variables, run_model, settled, without_encoder
from flaxqwen.generation.processors.base import column
from flaxqwen.generation.sampling import (
    TokenChoice,
    advance,
    constrain,
    draw,
    process,
    row_keys,
    stopped,
    with_end,
)
from flaxqwen.models.outputs import CausalLMOutputWithPast
from flaxqwen.ops.cpu import jit_in_order
from flaxqwen.ops.largest import first_largest

DRAFTED, ACCEPTED = 1, 2  # what a row's key is folded with, besides the draw itself


class DraftChoice(flax.struct.PyTreeNode):
    """How drafts are made and judged. All values are traced.

    token: how tokens are chosen, by the draft model as well.
    max_length: int32, columns at which a row ends.
    threshold: float32, drafting stops after a token of a lower probability.
    weight: float32, drafts are judged by weight * p + (1 - weight) * q; 1 is exact.
    heuristic: bool, whether the number of drafts follows the last round's success.
    ngram: int32, the most newest tokens that are looked up.
    """

    token: TokenChoice
    max_length: ArrayLike
    threshold: ArrayLike
    weight: ArrayLike
    heuristic: ArrayLike
    ngram: ArrayLike


class RoundState(flax.struct.PyTreeNode):
    """The scan's carry.

    rows: as in plain decoding, but that cur_len and the cache's length are [B].
    draft_cache: of the draft model; it holds every token but the two newest, or more. None without such a model.
    drafts: [B] int32, how many tokens are drafted in the next round, from 1 to K.
    """

    rows: DecodeState
    draft_cache: KVCache | None
    drafts: jax.Array


class RoundOutput(flax.struct.PyTreeNode):
    """What rounds give the host.

    tokens: [rounds, B, K + 1] int32, of which the first `count` [rounds, B] are new. finished: [rounds, B] bool.
    scores, logits: [rounds, B, K + 1, V] float32, if asked for.
    """

    tokens: jax.Array
    count: jax.Array
    finished: jax.Array
    scores: jax.Array | None = None
    logits: jax.Array | None = None


class Drafts(flax.struct.PyTreeNode):
    """tokens: [B, K] int32. scores: [B, K, V] float32, what they were drawn by; None where they were looked up.
    proposed: [B, K] bool, those that there are."""

    tokens: jax.Array
    scores: jax.Array | None
    proposed: jax.Array


@partial(
    jit_in_order,
    static_argnames=("module", "draft_module", "most", "rounds", "keep_scores", "keep_logits"),
    donate_argnames="state",
)
def decode(
    module: nn.Module,
    variables: Variables,
    draft_module: nn.Module | None,
    draft_variables: Variables | None,
    state: RoundState,
    choice: DraftChoice,
    *,
    most: int,
    rounds: int,
    keep_scores: bool,
    keep_logits: bool,
) -> tuple[RoundState, RoundOutput]:
    """`rounds` rounds under one scan. The bounds of the caches cover the last of them.

    Args:
      draft_module, draft_variables: the draft model; None: drafts are looked up in the text.
      most: K.
    """

    used = without_encoder(variables), None if draft_variables is None else without_encoder(draft_variables)

    def step(state: RoundState, _: None) -> tuple[RoundState, RoundOutput]:
        # Ties the weights to the carry, as in loop.decode.
        weights, state = jax.lax.optimization_barrier((used, state))
        if draft_module is None:
            drafts = look_up(state, choice, most)
        else:
            V = module.config.get_text_config().vocab_size
            state, drafts = draft(draft_module, weights[1], state, choice, most, V)
        return verify(module, weights[0], state, choice, drafts, keep_scores, keep_logits)

    return settled(module, jax.lax.scan(step, state, None, length=rounds))


def draft(
    module: nn.Module, variables: Variables, state: RoundState, choice: DraftChoice, most: int, vocab_size: int
) -> tuple[RoundState, Drafts]:
    """Up to `most` tokens of the draft model's own; scores are of the target's vocabulary."""
    rows, token = state.rows, choice.token
    assert state.draft_cache is not None
    B = rows.input_ids.shape[0]
    # Its cache may be smaller than the target's.
    seen = None if rows.slot_mask is None else rows.slot_mask[:, : state.draft_cache.capacity]

    def run(weights: Variables, tokens: jax.Array, at: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Scores [B, V] after tokens [B, T], the newest of which has position `at` [B]."""
        positions = jnp.maximum(at[:, None] + jnp.arange(1 - tokens.shape[1], 1), 0)
        inputs = {"attention_mask": seen, "position_ids": positions, "past_key_values": cache}
        logits, cache, _ = run_model(module, weights, tokens, (), **inputs, logits_to_keep=1)
        return fit_vocabulary(logits.astype(jnp.float32), vocab_size), cache

    def choose(i: jax.Array, carry: Any, logits: jax.Array) -> Any:
        """The i-th draft, from logits [B, V]."""
        input_ids, drafts, going, cache, automaton = carry
        scores = process(token.processors, input_ids, constrain(token, logits, automaton), rows.cur_len + i)
        scores = with_end(token, scores)
        if token.do_sample:
            keys = jax.vmap(partial(jax.random.fold_in, data=DRAFTED))(row_keys(token, rows.position + 1 + i))
            tokens = draw(keys, scores)
        else:
            tokens = first_largest(scores, token.on_one_device)
        drafts = Drafts(
            jax.lax.dynamic_update_index_in_dim(drafts.tokens, tokens, i, axis=1),
            jax.lax.dynamic_update_index_in_dim(drafts.scores, scores, i, axis=1),
            jax.lax.dynamic_update_index_in_dim(drafts.proposed, going, i, axis=1),
        )
        probability = jnp.take_along_axis(jax.nn.softmax(scores), tokens[:, None], axis=1)[:, 0]
        going &= (probability >= choice.threshold) & (i + 1 < state.drafts)
        automaton = advance(token, automaton, tokens)
        return write_tokens(input_ids, tokens, rows.cur_len + i), drafts, going, cache, automaton

    # The last token of a round that went all the way has not been run yet: the two newest are.
    newest = jnp.take_along_axis(rows.input_ids, rows.cur_len[:, None] - jnp.array([2, 1]), axis=1)
    logits, cache = run(variables, newest, rows.position, state.draft_cache.replace(length=rows.cur_len - 2))
    empty = Drafts(
        jnp.zeros((B, most), jnp.int32), jnp.zeros((B, most, vocab_size), jnp.float32), jnp.zeros((B, most), bool)
    )
    carry = choose(jnp.int32(0), (rows.input_ids, empty, ~rows.finished, cache, rows.automaton), logits)

    def more(loop: Any) -> jax.Array:
        i, (_, _, going, *_) = loop
        return (i < most) & jnp.any(going)

    def step(loop: Any) -> Any:
        i, carry = loop
        weights, (input_ids, drafts, going, cache, automaton) = jax.lax.optimization_barrier((variables, carry))
        tokens = jax.lax.dynamic_slice_in_dim(drafts.tokens, i - 1, 1, axis=1)
        logits, cache = run(weights, tokens, rows.position + i, cache)
        return i + 1, choose(i, (input_ids, drafts, going, cache, automaton), logits)

    _, (_, drafts, _, cache, _) = jax.lax.while_loop(more, step, (jnp.int32(1), carry))
    return state.replace(draft_cache=cache), drafts


def fit_vocabulary(logits: jax.Array, vocab_size: int) -> jax.Array:
    """logits [B, V'] of a model with the same tokenizer and a vocabulary padded to another size."""
    missing = vocab_size - logits.shape[-1]
    if missing <= 0:
        return logits[:, :vocab_size]
    return jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf)


def look_up(state: RoundState, choice: DraftChoice, most: int) -> Drafts:
    """What followed the newest tokens, as many of them as possible up to choice.ngram, where they first stood.

    Source: PromptLookupCandidateGenerator in transformers/generation/candidate_generator.py.
    """
    ids, length = state.rows.input_ids, state.rows.cur_len[:, None]
    place = jnp.arange(ids.shape[1])[None]
    mask = state.rows.slot_mask
    first = 0 if mask is None else jnp.argmax(mask[: ids.shape[0]], axis=1, keepdims=True)

    def compare(k: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        run, equal = carry  # [B, W]: how many tokens before this place equal the newest
        before = (place - 1 - k >= first) & (jnp.roll(ids, k + 1, axis=1) == column(ids, length - 1 - k))
        equal &= before
        return run + equal, equal

    none = jnp.zeros(ids.shape, jnp.int32)
    run, _ = jax.lax.fori_loop(0, jnp.asarray(choice.ngram), compare, (none, place < length))
    longest = jnp.max(run, axis=1, keepdims=True)
    start = jnp.argmax(run == longest, axis=1)[:, None]
    index = start + jnp.arange(most)
    proposed = (longest > 0) & (index < length) & (jnp.arange(most) < state.drafts[:, None])
    return Drafts(jnp.take_along_axis(ids, index, axis=1, mode="clip"), None, proposed)


def verify(
    module: nn.Module,
    variables: Variables,
    state: RoundState,
    choice: DraftChoice,
    drafts: Drafts,
    keep_scores: bool,
    keep_logits: bool,
) -> tuple[RoundState, RoundOutput]:
    """Run the newest token and the drafts through the model, and append those that it keeps and one of its own."""
    rows, K = state.rows, drafts.tokens.shape[1]
    start = rows.cur_len
    input_ids = rows.input_ids
    for i in range(K):
        input_ids = write_tokens(input_ids, drafts.tokens[:, i], start + i)
    output = module.apply(
        variables,
        jnp.take_along_axis(input_ids, start[:, None] + jnp.arange(-1, K), axis=1),
        attention_mask=rows.slot_mask,
        position_ids=rows.position[:, None] + jnp.arange(K + 1),
        past_key_values=rows.cache.replace(length=start - 1),
        use_cache=True,
        return_dict=True,
    )
    assert isinstance(output, CausalLMOutputWithPast)
    assert output.logits is not None
    assert output.past_key_values is not None
    logits = output.logits.astype(jnp.float32).swapaxes(0, 1)  # [K + 1, B, V]

    def consider(carry: Any, step: Any) -> Any:
        rows, going = carry
        i, logits, tokens, scores_q, proposed = step
        at = start + i
        scores = constrain(choice.token, logits, rows.automaton)
        scores = process(choice.token.processors, rows.input_ids, scores, at)
        tokens, accepted = judge(choice, with_end(choice.token, scores), tokens, scores_q, proposed, rows.position + 1)
        ids = write_tokens(rows.input_ids, tokens, jnp.where(going, at, rows.input_ids.shape[1]))
        ended = going & stopped(choice.token, ids, scores, at + 1, tokens)
        automaton = advance(choice.token, rows.automaton, tokens)
        rows = rows.replace(
            input_ids=ids,
            cur_len=rows.cur_len + going,
            position=rows.position + going,
            finished=rows.finished | ended,
            automaton=None if automaton is None else jnp.where(going, automaton, rows.automaton),
        )
        emitted = (tokens, scores if keep_scores else None, logits if keep_logits else None)
        return (rows, going & accepted & ~ended & (at + 1 < choice.max_length)), emitted

    def with_last(a: jax.Array | None) -> jax.Array | None:
        """[K + 1, B, ...], step by step, with nothing proposed in the last."""
        return None if a is None else jnp.pad(jnp.moveaxis(a, 1, 0), ((0, 1),) + ((0, 0),) * (a.ndim - 1))

    steps = (jnp.arange(K + 1), logits, *map(with_last, (drafts.tokens, drafts.scores, drafts.proposed)))
    going = ~rows.finished & (start < choice.max_length)
    (rows, _), kept = jax.lax.scan(consider, (rows.replace(input_ids=input_ids), going), steps)
    rows = rows.replace(cache=output.past_key_values.replace(length=rows.cur_len - 1))
    count = rows.cur_len - start
    all_kept = count == jnp.sum(drafts.proposed, axis=1) + 1
    adapted = jnp.clip(jnp.where(all_kept, state.drafts + 2, state.drafts - 1), 1, K)
    state = state.replace(rows=rows, drafts=jnp.where(choice.heuristic, adapted, state.drafts))
    tokens, scores, raw = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), kept)
    return state, RoundOutput(tokens, count, rows.finished, scores, raw)


def judge(
    choice: DraftChoice,
    scores: jax.Array,
    drafts: jax.Array,
    draft_scores: jax.Array | None,
    proposed: jax.Array,
    position: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The next token of each row, [B] int32, and whether it is the draft: then the next draft can be judged as well.

    Args:
      scores: [B, V] processed, of the model. draft_scores: [B, V], what the drafts were drawn by, or None.
      drafts: [B] int32, of which those that are `proposed` [B] count. position: [B] int32, of the next token.
    """
    token, weight = choice.token, jnp.asarray(choice.weight)
    keys = row_keys(token, position)
    if draft_scores is None:  # what plain decoding chooses, by the same draw
        own = draw(keys, scores) if token.do_sample else first_largest(scores, token.on_one_device)
        return own, proposed & (own == drafts)
    p, q = jax.nn.softmax(scores), jax.nn.softmax(draft_scores)
    if not token.do_sample:
        mixed = weight * p + (1 - weight) * q
        own = jnp.where(proposed & (weight < 1), first_largest(mixed), first_largest(scores))
        return own, proposed & (own == drafts)
    p_draft, q_draft = (jnp.take_along_axis(a, drafts[:, None], axis=1)[:, 0] for a in (p, q))
    ratio = 1 - weight + weight * p_draft / q_draft
    uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, ACCEPTED)))(keys)
    accepted = proposed & (uniform < ratio)
    rest = jnp.maximum(p - q, 0.0)
    some = jnp.sum(rest, axis=1, keepdims=True) > 0  # none where p equals q but for rounding
    own = draw(keys, jnp.where(proposed[:, None] & some, jnp.log(rest), scores))
    return jnp.where(accepted, drafts, own), accepted


def write_tokens(input_ids: jax.Array, tokens: jax.Array, at: jax.Array) -> jax.Array:
    """input_ids [B, W] with tokens [B] in columns `at` [B]; a column past the buffer writes nothing."""
    return input_ids.at[jnp.arange(len(tokens)), at].set(tokens, mode="drop")
