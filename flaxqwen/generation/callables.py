"""A user's own processors and criteria: traced into the compiled loop where they can be, else called on the host.

A callable is compiled in when it works under jax's tracing, computes the same when it is called again, and takes
`cur_len` (input_ids is then the buffer [B, S] of which the first cur_len columns count) or, a processor, never looks at
input_ids. All others see what Transformers would give them, input_ids [B, cur_len], as numpy arrays or as torch
tensors, once a step.

Axes: B batch, S columns of the sequence buffer, V vocabulary.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

PROBE_COLUMNS = 32


class Static:
    """Makes any callable hashable: by its own equality where it has one, else by identity; and by what it computes.

    program: a digest of that: the attributes of an object may have changed since the last call.
    """

    def __init__(self, function: Callable[..., Any], program: bytes = b"") -> None:
        self.function = function
        try:
            self.key: Any = (function, hash(function), program)
        except TypeError:
            self.key = (id(function), program)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.key == other.key


class Traced(flax.struct.PyTreeNode):
    """A user's callable inside the compiled loop. It is static: programs are made once for each, and keep it alive."""

    static: Static = flax.struct.field(pytree_node=False)
    takes_cur_len: bool = flax.struct.field(pytree_node=False)

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        if not self.takes_cur_len:
            return self.static.function(Unread(), scores)
        return by_rows(self.static.function, input_ids, scores, cur_len)


class TracedPytree(flax.struct.PyTreeNode):
    """The same for a callable that is a pytree: its values are traced. kind: its class, see processors.base."""

    function: Callable[..., Any]
    kind: type = flax.struct.field(pytree_node=False)

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: ArrayLike | None = None) -> jax.Array:
        return by_rows(self.function, input_ids, scores, cur_len)


def by_rows(function: Callable[..., Any], input_ids: jax.Array, scores: jax.Array, cur_len: Any) -> jax.Array:
    """What a user's callable gives; where cur_len is [B], which it does not expect, of each row by itself."""
    if not jnp.ndim(cur_len):
        return function(input_ids, scores, cur_len=cur_len)

    def alone(ids: jax.Array, row: jax.Array, length: jax.Array) -> jax.Array:
        result = jnp.asarray(function(ids[None], row[None], cur_len=length))
        return result.reshape(result.shape[1:])

    return jax.vmap(alone)(input_ids, scores, cur_len)


class Unread:
    """Stands for input_ids where nothing may depend on them: any use raises."""

    def __getattr__(self, name: str) -> Any:
        raise TypeError(f"input_ids.{name} is used by a callable without a parameter `cur_len`")

    def __eq__(self, other: object) -> bool:
        raise TypeError("input_ids are compared by a callable without a parameter `cur_len`")

    def __bool__(self) -> bool:
        raise TypeError("input_ids are tested by a callable without a parameter `cur_len`")


class HostCall:
    """A user's callable on the host: called with numpy arrays, or with torch tensors if that is what it works on."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = describe(function)
        self.takes_cur_len = takes_cur_len(function)
        self.wants_torch: bool | None = True if is_transformers(function) else None  # None: not known yet

    def __call__(self, input_ids: np.ndarray, scores: Any) -> np.ndarray:
        """input_ids [B, n] int32; scores [B, V] float32, a tuple of those, or None. -> what it returns, as numpy's."""
        arguments = {"cur_len": input_ids.shape[1]} if self.takes_cur_len else {}
        if self.wants_torch is None:
            try:
                result = self.function(input_ids, jax.tree.map(np.array, scores), **arguments)
            except (TypeError, AttributeError):
                if "torch" not in sys.modules:
                    raise
                self.wants_torch = True
            else:
                self.wants_torch = False
                return to_numpy(result)
        if self.wants_torch:
            return to_numpy(self.function(to_torch(input_ids), jax.tree.map(to_torch, scores), **arguments))
        # Copies: what comes from a device is read-only, and people write into scores.
        return to_numpy(self.function(input_ids, jax.tree.map(np.array, scores), **arguments))


def wrap(
    name: str,
    functions: Any,
    rows: int,
    vocab_size: int,
    check: Callable[[str, Any, int, int], None],
    need_cur_len: bool = False,
) -> tuple[Any, ...]:
    """Each of a user's callables as what the loop can take.

    Args:
      name: of the argument, for errors.
      functions: a list of callables, or None.
      rows, vocab_size: B and V of the call.
      check: raises ValueError for a result that is not as expected; gets the name of the callable, the result or only
        its shape and dtype, B and V.
      need_cur_len: only those that take it are traced.

    Returns:
      Of each a HostCall, or what can be traced: a Traced, a TracedPytree, or a processor of ours as it is.

    Raises:
      ValueError: not a list of callables; a parameter that nobody would fill.
    """
    if functions is None:
        return ()
    if not isinstance(functions, Sequence) or isinstance(functions, str):
        raise ValueError(f"{name} must be a list of callables, found {type(functions).__name__}")
    return tuple(_wrap(name, function, rows, vocab_size, check, need_cur_len) for function in functions)


def _wrap(
    name: str,
    function: Any,
    rows: int,
    vocab_size: int,
    check: Callable[[str, Any, int, int], None],
    need_cur_len: bool,
) -> Any:
    if not callable(function):
        raise ValueError(f"{name} must be a list of callables, found {function!r} in it")
    required = [
        p.name
        for p in parameters(function)[2:]
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name != "cur_len"
    ]
    if required:
        raise ValueError(f"{name}: {describe(function)} needs {required[0]!r}; expected (input_ids, scores, cur_len)")
    if is_transformers(function) or (need_cur_len and not takes_cur_len(function)):
        return HostCall(function)
    is_ours = type(function).__module__.startswith("flaxqwen.")
    is_pytree = not jax.tree_util.treedef_is_leaf(jax.tree.structure(function))
    traced: Any = function
    if not is_pytree:
        traced = Traced(Static(function), takes_cur_len(function))
    elif not is_ours:
        traced = TracedPytree(function, type(function))
    first = _trace(traced, rows, vocab_size)
    # One that draws random numbers, or counts its calls, has to be asked at every step.
    if first is None or not (is_ours or first == _trace(traced, rows, vocab_size)):
        return HostCall(function)
    shape, program = first
    check(describe(function), shape, rows, vocab_size)
    return traced if is_pytree else traced.replace(static=Static(function, program))


def _trace(function: Callable[..., Any], rows: int, vocab_size: int) -> tuple[Any, bytes] | None:
    """Shape and dtype of what it returns under tracing, and a digest of what it computes.

    None where it cannot be traced, or does nothing to trace.
    """
    ids = jax.ShapeDtypeStruct((rows, PROBE_COLUMNS), jnp.int32)
    scores = jax.ShapeDtypeStruct((rows, vocab_size), jnp.float32)
    untouched = []

    def probe(ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> Any:
        result = function(ids, scores, cur_len)
        untouched.append(result is scores or not isinstance(result, jax.core.Tracer))
        return result

    try:
        lowered = jax.jit(probe).lower(ids, scores, jax.ShapeDtypeStruct((), jnp.int32))
    except Exception:  # whatever it is: on the host it works, or says what is wrong with real values
        return None
    # One that hands its scores through is there for what it does beside: to look, to count, at every step.
    if untouched[-1]:
        return None
    return lowered.out_info, hashlib.sha256(lowered.as_text().encode()).digest()


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a call; none where it has no signature that can be read."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []


def takes_cur_len(function: Callable[..., Any]) -> bool:
    return any(parameter.name == "cur_len" for parameter in parameters(function))


def describe(function: Any) -> str:
    """The name of a function, or of an object's class."""
    return getattr(function, "__name__", type(function).__name__)


def is_transformers(function: Any) -> bool:
    """Whether this is an object of Transformers' classes, or of a class made from one."""
    return any(kind.__module__.partition(".")[0] == "transformers" for kind in type(function).__mro__)


def check_scores(name: str, result: Any, rows: int, vocab_size: int) -> None:
    """ValueError unless a processor returned [B, V] numbers."""
    if tuple(result.shape) != (rows, vocab_size) or not jnp.issubdtype(result.dtype, jnp.floating):
        raise ValueError(
            f"{name} returned {result.dtype} {tuple(result.shape)}; expected scores, floats of shape "
            f"{(rows, vocab_size)}"
        )


def check_verdict(name: str, result: Any, rows: int, vocab_size: int) -> None:
    """ValueError unless a criterion returned a bool, or one for each row."""
    if tuple(result.shape) not in ((), (rows,)) or result.dtype != bool:
        raise ValueError(f"{name} returned {result.dtype} {tuple(result.shape)}; expected a bool, or {rows} of them")


def to_numpy(value: Any) -> np.ndarray:
    """numpy's array of numpy's, jax's or torch's, or of a Python number."""
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def to_torch(array: np.ndarray) -> Any:
    """A torch tensor of its own memory; integers are int64, as torch's token ids. Who needs it has imported torch."""
    return sys.modules["torch"].tensor(np.asarray(array, np.int64 if np.issubdtype(array.dtype, np.integer) else None))
