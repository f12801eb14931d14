"""Text that must match a regular expression or a JSON schema: a token-level automaton, walked in the compiled loop.

outlines_core compiles an expression and a vocabulary to an automaton over tokens. Tokens that every state treats alike
share a class, so that its table is of states x classes and not of states x 151,936 tokens.

Axes: B batch, V vocabulary, S states, C classes of tokens, E end-of-sequence ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flaxqwen.generation.processors.base import pad_ids
from flaxqwen.generation.tokens import bytes_of_tokens

FREE = 0  # the state after the end: everything is allowed
SMALLEST = 64  # S and C are padded to powers of two from this on, so that few programs exist
LARGEST_TABLE = 2**26  # entries: 256 MB

# Ends every expression, and is no part of any text. outlines_core 0.2.14 loses what leads from where a text may end to
# where it may not (the point of `[0-9]+(\.[0-9]+)?`); so that no text may end before this, nothing is lost.
END = b"\x00"

# What regular expressions can express of JSON Schema. outlines_core leaves out the rest without a word.
KEYWORDS = frozenset(
    {
        "type", "properties", "required", "additionalProperties", "minProperties", "maxProperties", "items",
        "prefixItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "format", "enum", "const", "anyOf",
        "oneOf", "allOf", "$ref", "$defs", "definitions",
        # These say nothing about what is valid.
        "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$schema", "$id",
        "$comment", "$anchor",
    }
)  # fmt: skip


class Grammar(flax.struct.PyTreeNode):
    """The automaton of some expressions. State 0 is free: it allows every token and is never left.

    token_class: [V] int32. next_state: [S, C] int32, -1 where the token is not allowed. final: [S] bool, states in
    which the text may end. first: [B] int32, where each row begins. ends: [E] int32, the end-of-sequence ids.
    """

    token_class: ArrayLike
    next_state: ArrayLike
    final: ArrayLike
    first: ArrayLike
    ends: ArrayLike

    def mask(self, scores: jax.Array, state: jax.Array) -> jax.Array:
        """Scores [B, V] with -inf for the tokens that state [B] does not allow."""
        allowed_class = jnp.asarray(self.next_state)[state] >= 0  # [B, C]
        allowed = jnp.take(allowed_class, jnp.asarray(self.token_class), axis=1, mode="clip")
        final = jnp.asarray(self.final)[state]
        allowed = allowed.at[:, jnp.asarray(self.ends)].set(final[:, None], mode="drop")
        return jnp.where(allowed, scores, -jnp.inf)

    def with_end(self, scores: jax.Array) -> jax.Array:
        """Processed scores [B, V] in which a row may end where processors have taken all that its state allows."""
        stuck = jnp.all(jnp.isneginf(scores), axis=1)
        end = jnp.asarray(self.ends)[0]
        return scores.at[:, end].set(jnp.where(stuck, 0.0, scores[:, end]), mode="drop")

    def advance(self, state: jax.Array, tokens: jax.Array) -> jax.Array:
        """The states [B] after tokens [B]."""
        classes = jnp.asarray(self.token_class)[tokens]
        return jnp.maximum(jnp.asarray(self.next_state)[state, classes], FREE)


def make_grammar(
    regex: str | Sequence[str] | None,
    json_schema: Any,
    tokenizer: Any,
    rows: int,
    copies: int,
    vocab_size: int,
    eos_token_id: tuple[int, ...],
) -> Grammar | None:
    """The automaton that a call asks for, if any.

    Args:
      regex: what all new text must match, in the syntax of Rust's regex crate; or one for each prompt.
      json_schema: a JSON schema as a dict, its JSON text, or a pydantic model; or a list of one for each prompt.
      rows: prompts. copies: rows of scores for each.

    Raises:
      ValueError: both; no tokenizer; no end-of-sequence token, by which such text ends; an expression or schema that
        cannot be compiled.
    """
    if regex is None and json_schema is None:
        return None
    name = "regex" if json_schema is None else "json_schema"
    if regex is not None and json_schema is not None:
        raise ValueError("regex and json_schema both say what the text must match: give one of them")
    if tokenizer is None:
        raise ValueError(f"{name} needs the tokenizer: pass it to generate() as `tokenizer`")
    if not eos_token_id:
        raise ValueError(f"{name} needs an eos_token_id: the text ends with it where it may")
    given: Any = regex if json_schema is None else json_schema
    several = isinstance(given, Sequence) and not isinstance(given, str)
    each = list(given) if several else [given]
    if several and len(each) != rows:
        raise ValueError(f"{name} is a list of {len(each)}; expected one, or {rows}, as the prompts")
    expressions = tuple(map(check_regex if json_schema is None else regex_of_schema, each))
    token_class, next_state, final, first = _make_tables(tokenizer, len(tokenizer), expressions, vocab_size)
    first = np.repeat(np.broadcast_to(first, rows), copies)
    return Grammar(token_class, next_state, final, first, pad_ids(eos_token_id))


def check_regex(expression: Any) -> str:
    """The expression without ^ and $ around it, as all of a text is to match; ValueError for what is no text."""
    if not isinstance(expression, str) or not expression:
        raise ValueError(f"regex must be a regular expression, found {expression!r}")
    bare = expression.removeprefix("^")
    escapes = len(bare[:-1]) - len(bare[:-1].rstrip("\\"))
    return bare[:-1] if bare.endswith("$") and escapes % 2 == 0 else bare


def regex_of_schema(schema: Any) -> str:
    """The regular expression of a JSON schema; ValueError where outlines_core cannot express it."""
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        _check_schema(json.loads(text))
        return _library().json_schema.build_regex_from_schema(text)
    except (ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]  # outlines_core's next two lines ask for a report
        raise ValueError(f"json_schema cannot be compiled: {reason}") from None


def _check_schema(schema: Any) -> None:
    """ValueError for what outlines_core would leave out, in a schema or in those inside it."""
    if not isinstance(schema, Mapping):
        return
    if unknown := sorted(set(schema) - KEYWORDS):
        raise ValueError(f"{', '.join(unknown)} cannot be enforced: leave it out, and check the text")
    if "pattern" in schema and {"minLength", "maxLength"} & set(schema):
        raise ValueError("pattern goes without minLength and maxLength: put them into the pattern")
    if len(schema.get("allOf", [None])) != 1:
        raise ValueError("allOf of several schemas cannot be enforced: merge them into one")
    for name in ("properties", "$defs", "definitions"):
        if not isinstance(schema.get(name, {}), Mapping):
            raise ValueError(f"{name} is {schema[name]!r}, expected an object")
        for inner in schema.get(name, {}).values():
            _check_schema(inner)
    for name in ("items", "additionalProperties"):
        _check_schema(schema.get(name))
    for name in ("anyOf", "oneOf", "allOf", "prefixItems"):
        for inner in schema.get(name, []):
            _check_schema(inner)


def _library() -> Any:
    """outlines_core, which few calls need."""
    try:
        import outlines_core
    except ImportError:
        raise ImportError('regex and json_schema need outlines_core: pip install "flaxqwen[grammar]"') from None
    return outlines_core


@lru_cache(maxsize=2)
def _vocabulary(tokenizer: Any, size: int) -> Any:
    """The tokens as outlines_core takes them, without added ones, and END as the token after the last."""
    added = set(tokenizer.added_tokens_decoder)
    tokens: dict[bytes, list[int]] = {END: [size]}
    for token, text in bytes_of_tokens(tokenizer, size):
        if text and END not in text and token not in added:
            tokens.setdefault(text, []).append(token)
    return _library().Vocabulary(size + 1, tokens)  # an end-of-sequence id that no token has: ends are ours


@lru_cache(maxsize=16)
def _make_tables(
    tokenizer: Any, size: int, expressions: tuple[str, ...], vocab_size: int
) -> tuple[jax.Array, jax.Array, jax.Array, np.ndarray]:
    """token_class, next_state, final and the first state of each expression; their automata stand side by side."""
    vocabulary = _vocabulary(tokenizer, size)
    edges: list[tuple[int, np.ndarray, np.ndarray]] = []
    final, first = {FREE}, []
    count = FREE + 1
    for expression in expressions:
        automaton = _automaton(expression, vocabulary)
        transitions = automaton.get_transitions()
        number = {state: count + i for i, state in enumerate(sorted({*transitions, *automaton.get_final_states()}))}
        count += len(number)
        first.append(number[automaton.get_initial_state()])
        # END that leads on is one that `.`, or [^x], takes for a character.
        accepting = set(automaton.get_final_states())
        final |= {number[state] for state, tokens in transitions.items() if tokens.get(size) in accepting}
        for state, tokens in transitions.items():
            ids = np.fromiter(tokens.keys(), np.int64, len(tokens))
            targets = np.fromiter((number[target] for target in tokens.values()), np.int64, len(tokens))
            real = ids < min(size, vocab_size)
            edges.append((number[state], ids[real], targets[real]))
    token_class, representatives = _classes(edges, vocab_size)
    S, C = _power_of_two(count), _power_of_two(len(representatives))
    if S * C > LARGEST_TABLE:
        raise ValueError(f"the expression takes {count} states of {len(representatives)} kinds of tokens: too many")
    next_state = np.full((S, C), -1, np.int32)
    next_state[FREE] = FREE
    for state, ids, targets in edges:
        next_state[state, token_class[ids]] = targets
    ended = np.zeros(S, bool)
    ended[list(final)] = True
    return *jax.device_put((token_class, next_state, ended)), np.asarray(first, np.int32)


def _automaton(expression: str, vocabulary: Any) -> Any:
    try:
        return _library().Index(f"(?:{expression})\\x00", vocabulary)
    except ValueError as error:
        raise ValueError(f"regex {expression!r} cannot be compiled: {error}") from None


def _classes(edges: list[tuple[int, np.ndarray, np.ndarray]], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The class of each token, [V] int32, and a token of each class: those of a class have the same edges.

    A token's edges are told by a sum of 64 random bits for each. Of 151,936 tokens two differ and have one sum with a
    probability of 6e-10.
    """
    signature = np.zeros(vocab_size, np.uint64)
    for state, ids, targets in edges:
        signature[ids] += _mix(targets.astype(np.uint64) << np.uint64(32) | np.uint64(state))
    _, representatives, token_class = np.unique(signature, return_index=True, return_inverse=True)
    return token_class.astype(np.int32), representatives


def _mix(values: np.ndarray) -> np.ndarray:
    """64 bits hashed to 64 bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _power_of_two(n: int) -> int:
    return max(SMALLEST, 1 << (n - 1).bit_length())
