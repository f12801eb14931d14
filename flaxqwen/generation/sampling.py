"""Choosing the next token: processors, then argmax or a draw. Pure, and apart from the loop.

Axes: B batch, S columns of the sequence buffer, V vocabulary, E end-of-sequence ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flaxqwen.generation.grammar import Grammar
from flaxqwen.generation.processors import LogitsProcessor
from flaxqwen.ops.largest import first_largest

DRAW_BLOCK = 512  # tokens: about the root of the vocabulary


class Criterion(Protocol):
    """Anything with this call ends rows, traced into the decoding program: after a token was appended, -> [B] bool."""

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike) -> jax.Array: ...


class TokenChoice(flax.struct.PyTreeNode):
    """How the next token is chosen. Values are traced; which processors there are, and do_sample, are static.

    processors: applied in order.
    eos_ids: [E] int32, filled up with processors.NO_ID; all NO_ID: nothing ends a row.
    pad_id: int32, what finished rows are filled with; below 0, they go on, until the last row has ended.
    seed: uint32, of all draws.
    criteria: each ends the rows for which it holds, besides the end-of-sequence ids.
    guidance: float32, the scale of classifier-free guidance: logits then have twice the rows, the second half those of
      the negative prompts. None: there is none.
    grammar: what all new text must match; None: anything.
    do_sample: draw, or take the highest score.
    on_one_device: whether the model has no Sharding, so that a CPU may look for it by our kernel.
    """

    processors: tuple[LogitsProcessor, ...]
    eos_ids: ArrayLike
    pad_id: ArrayLike
    seed: ArrayLike
    criteria: tuple[Criterion, ...] = ()
    guidance: ArrayLike | None = None
    grammar: Grammar | None = None
    do_sample: bool = flax.struct.field(pytree_node=False, default=False)
    on_one_device: bool = flax.struct.field(pytree_node=False, default=False)


def process(
    processors: Sequence[LogitsProcessor], input_ids: jax.Array, logits: jax.Array, cur_len: ArrayLike
) -> jax.Array:
    """Scores [B, V] float32 from logits [B, V], given the first cur_len columns of input_ids [B, S]."""
    scores = logits.astype(jnp.float32)
    for processor in processors:
        scores = processor(input_ids, scores, cur_len)
    return scores


def is_plain(choice: TokenChoice) -> bool:
    """Whether the token that is chosen is the one with the highest of the logits as they are."""
    return not (choice.do_sample or choice.processors) and choice.guidance is None and choice.grammar is None


def guide(choice: TokenChoice, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logits [B, V] of the prompts' rows, and what processors begin with: those, or guided log-probabilities.

    logits: [B, V] float32, or with guidance [2B, V]. Guidance moves the log-probabilities of the prompts away from
    those of the negative prompts (Sanchez et al. 2023; UnbatchedClassifierFreeGuidanceLogitsProcessor in
    transformers/generation/logits_process.py).
    """
    if choice.guidance is None:
        return logits, logits
    prompt, negative = jnp.split(logits, 2)
    wanted, unwanted = jax.nn.log_softmax(prompt), jax.nn.log_softmax(negative)
    return prompt, jnp.asarray(choice.guidance) * (wanted - unwanted) + unwanted


def constrain(choice: TokenChoice, scores: jax.Array, automaton: jax.Array | None) -> jax.Array:
    """Scores [B, V] with -inf for what the grammar does not allow in states `automaton` [B]."""
    return scores if choice.grammar is None or automaton is None else choice.grammar.mask(scores, automaton)


def with_end(choice: TokenChoice, scores: jax.Array) -> jax.Array:
    """Processed scores [B, V] in which a row with a grammar may end where nothing else is left to it."""
    return scores if choice.grammar is None else choice.grammar.with_end(scores)


def advance(choice: TokenChoice, automaton: jax.Array | None, tokens: jax.Array) -> jax.Array | None:
    """The grammar's states [B] after tokens [B]."""
    return None if choice.grammar is None or automaton is None else choice.grammar.advance(automaton, tokens)


def choose(choice: TokenChoice, scores: jax.Array, position: jax.Array) -> jax.Array:
    """[B] int32: the next token of each row, from scores [B, V]; drawn by the keys of its position [B], or highest."""
    scores = with_end(choice, scores)
    if choice.do_sample:
        return draw(row_keys(choice, position), scores)
    return first_largest(scores, choice.on_one_device)


def row_keys(choice: TokenChoice, position: jax.Array) -> jax.Array:
    """[B] keys, each row's own, folded by a token's position [B] in its row.

    So a row's text does not depend on what else is in the batch, on padding, or on how steps are cut into programs.
    """
    base = jax.random.key(choice.seed)
    rows = jnp.arange(position.shape[0])
    return jax.vmap(lambda row, at: jax.random.fold_in(jax.random.fold_in(base, row), at))(rows, position)


def keys_alone(seeds: jax.Array, position: jax.Array) -> jax.Array:
    """[B] keys: those of `row_keys` for the first row of a call with each seed of seeds [B]."""
    return jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), at))(
        seeds, position
    )


def draw(keys: jax.Array, scores: jax.Array) -> jax.Array:
    """[B] int32 from scores [B, V], by inversion: a block of tokens by its mass, then a token of the block.

    Two random numbers a row, and sums. Gumbel-max takes V random numbers, 3.5 ms on CPU at V = 151,936; this 0.5.
    """
    B, V = scores.shape
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    blocks = jnp.pad(weights, ((0, 0), (0, -V % DRAW_BLOCK))).reshape(B, -1, DRAW_BLOCK)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _invert(jnp.sum(blocks, axis=-1), uniform[:, 0])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * DRAW_BLOCK + _invert(inside, uniform[:, 1])).astype(jnp.int32)


def _invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """[B]: the first place where the cumulated weights [B, n] pass a part `uniform` [B] of their sum; never at a 0."""
    total = jnp.cumsum(weights, axis=-1)
    passed = (total > uniform[:, None] * total[:, -1:]) & (weights > 0)  # rounding may lift the sum at a 0
    return jnp.where(jnp.any(passed, axis=-1), jnp.argmax(passed, axis=-1), jnp.argmax(weights, axis=-1))


def fill_finished(choice: TokenChoice, tokens: jax.Array, finished: jax.Array) -> jax.Array:
    """tokens [B] int32, the pad id in rows that are finished [B] bool."""
    pad = jnp.asarray(choice.pad_id, jnp.int32)
    return jnp.where(finished & (pad >= 0), pad, tokens)


def stopped(
    choice: TokenChoice, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike, tokens: jax.Array
) -> jax.Array:
    """[B] bool: rows that end with the newest tokens [B], the last of the cur_len columns of input_ids [B, S]."""
    ended = jnp.isin(tokens, jnp.asarray(choice.eos_ids))
    for criterion in choice.criteria:
        ended |= criterion(input_ids, scores, cur_len)
    return ended
