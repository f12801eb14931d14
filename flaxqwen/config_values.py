"""Immutable values for the fields of a config, and the checks they pass."""

from __future__ import annotations

import contextlib
import functools
import os
import reprlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

Key = TypeVar("Key")
Value = TypeVar("Value", covariant=True)

_KINDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    NoneType: "null",
}


class FrozenMapping(Mapping[Key, Value]):
    """A read-only, hashable mapping; what is inside is frozen with it. Equal to a dict of the same items."""

    def __init__(self, items: Mapping[Key, Value] | None = None) -> None:
        self._items = {key: freeze(value) for key, value in (items or {}).items()}

    def __getitem__(self, key: Key) -> Value:
        return self._items[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


class DerivedInt(int):
    """An integer that followed from other fields; `dataclasses.replace` of those derives it anew."""


class DerivedTuple(tuple[str, ...]):
    """A tuple that followed from other fields; `dataclasses.replace` of those derives it anew."""


def freeze(value: Any) -> Any:
    """JSON's dicts and lists -> FrozenMappings and tuples, at every depth."""
    if isinstance(value, Mapping) and not isinstance(value, FrozenMapping):
        return FrozenMapping(value)
    return tuple(map(freeze, value)) if isinstance(value, list) else value


def thaw(value: Any) -> Any:
    """What `freeze` froze, and whatever has a `to_dict`, as JSON's dicts and lists."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    return [thaw(item) for item in value] if isinstance(value, tuple) else value


def assign(config: Any, **values: Any) -> None:
    """Set fields of a frozen dataclass; for its own __post_init__ alone."""
    for name, value in values.items():
        object.__setattr__(config, name, value)


def show(value: Any) -> str:
    """A value for an error message: its repr, cut to one short line."""
    return reprlib.repr(thaw(value))


def freeze_fields(config: Any, prefix: str = "") -> None:
    """Freeze every field of a dataclass and hold it to its annotation; a float field gets a float.

    Raises:
      ValueError: a value of another type; names the field, after `prefix`.
    """
    cls: Any = type(config)
    for name, kind in _field_kinds(cls):
        value = freeze(getattr(config, name))
        if not _fits(value, kind):
            raise ValueError(f"{prefix}{name} is {show(value)}, expected {_describe(kind)}")
        is_float = float in (get_args(kind) if isinstance(kind, UnionType) else (kind,))
        assign(config, **{name: float(value) if is_float and value is not None else value})


@functools.cache  # of what a class says once and for all: to read it takes 2 ms, in each call of generate()
def _field_kinds(cls: type) -> tuple[tuple[str, Any], ...]:
    hints = get_type_hints(cls)
    return tuple((f.name, hints[f.name]) for f in fields(cls))


def _fits(value: Any, kind: Any) -> bool:
    arguments = get_args(kind)
    if isinstance(kind, UnionType):
        return any(_fits(value, choice) for choice in arguments)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if get_origin(kind) is Mapping:
        items = value.items() if isinstance(value, Mapping) else [(None, None)]
        return all(_fits(key, arguments[0]) and _fits(item, arguments[1]) for key, item in items)
    if kind is Any:
        return True
    if isinstance(value, bool):  # a bool is an int to Python, not to JSON
        return kind is bool
    if kind is float:  # NaN compares false, and no integer too large for a float gets through
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return isinstance(value, kind)


def _describe(kind: Any) -> str:
    if isinstance(kind, UnionType):
        return " or ".join(map(_describe, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a list, each item {_describe(get_args(kind)[0])}"
    return "an object" if get_origin(kind) is Mapping else _KINDS.get(kind, f"a {getattr(kind, '__name__', kind)}")


def check_at_least(low: float, config: Any, *names: str) -> None:
    """Raise ValueError for the first of the named fields that is below `low`."""
    for name in names:
        if getattr(config, name) < low:
            raise ValueError(f"{name} is {getattr(config, name)}, expected {low} or more")


def check_at_most(high: float, config: Any, *names: str) -> None:
    """Raise ValueError for the first of the named fields that is above `high`."""
    for name in names:
        if getattr(config, name) > high:
            raise ValueError(f"{name} is {getattr(config, name)}, expected {high} or less")


def check_probability(config: Any, *names: str) -> None:
    """Raise ValueError for the first of the named fields that is neither None nor from 0 to 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}, expected a number from 0 to 1")


def check_known(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ValueError if `value` is not one of those known."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}, which is not supported; known: {', '.join(known)}")


def merge(values: dict[str, Any], name: str, value: Any, source: str) -> None:
    """Give `values[name]` the value found under its other name, `source`; ValueError where the two disagree."""
    if values.get(name) not in (None, value):
        raise ValueError(f"{source} is {show(value)}, but {name} is {show(values[name])}: keep one of them")
    values[name] = value


@contextlib.contextmanager
def errors_of(source: str | os.PathLike[str]) -> Iterator[None]:
    """Begin the message of a ValueError with where the values came from."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(source)}: {error}") from None
