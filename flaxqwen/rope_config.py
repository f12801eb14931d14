"""Parameters of the rotary embedding, as `rope_parameters` in config.json states them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from flaxqwen.config_values import FrozenMapping, check_known, freeze_fields, thaw

# rope_type -> the parameters it needs, and those it may have. A missing original_max_position_embeddings is the
# model's max_position_embeddings.
ROPE_PARAMETERS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "yarn": (
        {"factor"},
        {"original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"}
        | {"mscale", "mscale_all_dim"},
    ),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {"original_max_position_embeddings"}),
    "longrope": (
        {"short_factor", "long_factor"},
        {"original_max_position_embeddings", "factor", "attention_factor"},
    ),
}
_ANY_TYPE = {"rope_type", "rope_theta", "partial_rotary_factor"}


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """The rope type and its parameters (RopeParameters in transformers/modeling_rope_utils.py).

    None means not given. A parameter that the rope type needs and lacks, or has and does not use, is refused.
    `extra` carries what says nothing more: nulls, and `type`, the older name of rope_type.
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    partial_rotary_factor: float | None = None
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    extra: Mapping[str, Any] = field(default_factory=FrozenMapping)

    def __post_init__(self) -> None:
        freeze_fields(self, "rope_parameters: ")
        check_known("rope_type", self.rope_type, tuple(ROPE_PARAMETERS))
        needed, allowed = ROPE_PARAMETERS[self.rope_type]
        given = set(self._given())
        if missing := needed - given:
            raise ValueError(f"rope_type {self.rope_type!r} needs {_names(missing)} in rope_parameters; not found")
        if unused := given - needed - allowed - _ANY_TYPE:
            raise ValueError(f"rope_type {self.rope_type!r} does not use {_names(unused)}: remove from rope_parameters")
        if self.partial_rotary_factor not in (None, 1.0):
            raise ValueError(f"partial_rotary_factor is {self.partial_rotary_factor}; only 1.0 is supported")
        for name in ("rope_theta", "factor", "attention_factor", "original_max_position_embeddings", "low_freq_factor"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"rope_parameters: {name} is {value}, expected more than 0")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and high <= low:
            raise ValueError(f"rope_parameters: high_freq_factor is {high}, expected more than low_freq_factor, {low}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read the `rope_parameters` of config.json, or the older `rope_scaling`.

        Raises:
          ValueError: an unknown rope type or parameter; one that is missing, not used, or of another JSON type.
        """
        known = {f.name for f in fields(cls)} - {"extra"} | {"type"}
        if unknown := set(values) - known:
            raise ValueError(f"rope_parameters has {_names(unknown)}, which no supported rope_type knows")
        older = values.get("type")
        rope_type = values.get("rope_type", older or "default")
        if older not in (None, rope_type):
            raise ValueError(f"rope_parameters has rope_type {rope_type!r} and type {older!r}: keep one of them")
        given = {key: value for key, value in values.items() if value is not None and key != "type"}
        extra = {key: value for key, value in values.items() if key not in given}
        for name in ("rope_type", "rope_theta"):  # these have no null
            if name in extra:
                given[name] = extra.pop(name)
        return cls(**{"rope_type": rope_type, **given}, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """The `rope_parameters` of config.json: what was given, and rope_type and rope_theta always."""
        return {**thaw(self.extra), **thaw(self._given())}

    def _given(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        return {name: value for name, value in values.items() if value is not None}


def _names(keys: set[str]) -> str:
    return ", ".join(sorted(keys))
