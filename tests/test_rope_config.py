"""Rope parameters: what Transformers reads and writes, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from flaxqwen.config import config_from_dict
from tests.test_config import ROPES, TINY, assert_reads_the_same, assert_refused


@pytest.mark.parametrize("rope_type", ROPES)
@pytest.mark.parametrize("theta", [{}, {"rope_theta": 5e5}])
@pytest.mark.parametrize("age", ["new", "old", "older"])
def test_rope_in_every_form(rope_type: str, theta: dict[str, float], age: str) -> None:
    rope = {"type" if age == "older" else "rope_type": rope_type, **ROPES[rope_type]}
    values = {"rope_parameters": rope | theta} if age == "new" else {"rope_scaling": rope, **theta}
    assert_reads_the_same({**TINY, **values})
    read = config_from_dict({**TINY, **values}).rope_parameters
    assert (read.rope_type, read.rope_theta) == (rope_type, theta.get("rope_theta", 10000))


@pytest.mark.parametrize("rope_type", ["yarn", "llama3", "longrope"])
def test_trained_length_defaults_to_max_position_embeddings(rope_type: str) -> None:
    rope = {k: v for k, v in ROPES[rope_type].items() if k != "original_max_position_embeddings"}
    values = {**TINY, "rope_scaling": {"rope_type": rope_type, **rope}}
    assert config_from_dict(values).rope_parameters.original_max_position_embeddings == 128
    assert_reads_the_same(values)


# What is refused. Every case differs from TINY, which is accepted, by the keys shown; the pattern is in the message.
SCALED = {"rope_type": "yarn", "factor": 2.0}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rope_scaling": {"type": "mrope"}}, "rope_type is 'mrope'.*known: default, linear"),
    ({"rope_scaling": {"type": "su"}}, "rope_type is 'su'"),
    ({"rope_scaling": {"rope_type": None}}, "rope_type is None"),
    ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}}, "'linear' and type 'yarn'"),
    ({"rope_scaling": {**SCALED, "mrope_section": [2, 2]}}, "has mrope_section"),
    ({"rope_scaling": {**SCALED, "low_freq_factor": 1.0}}, "'yarn' does not use low_freq_factor"),
    ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "'default' does not use factor"),
    ({"rope_scaling": {"type": "yarn"}}, "'yarn' needs factor"),
    ({"rope_scaling": {"type": "linear", "factor": None}}, "'linear' needs factor"),
    ({"rope_scaling": {"type": "dynamic"}}, "'dynamic' needs factor"),
    ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "'llama3' needs high_freq_factor, low_freq_factor"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4}}, "'longrope' needs long_factor"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1] * 4, "long_factor": [1] * 3}}, "long_fac.*expected 4"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [0] * 4, "long_factor": [1] * 4}}, "short_factor.*than 0"),
    ({"rope_scaling": {**ROPES["llama3"], "type": "llama3", "high_freq_factor": 1.0}}, "high_freq_factor is 1.0"),
    ({"rope_scaling": {"type": "yarn", "factor": 0}}, "factor is 0.0, expected more than 0"),
    ({"rope_scaling": {"type": "yarn", "factor": "2"}}, "factor is '2', expected a number"),
    ({"rope_scaling": {**SCALED, "original_max_position_embeddings": 2.5}}, "original_max_position_embeddings is 2.5"),
    ({"rope_scaling": {**SCALED, "truncate": 1}}, "truncate is 1, expected true or false"),
    ({"rope_scaling": SCALED, "original_max_position_embeddings": 64}, "64, belongs in rope_parameters"),
    ({"rope_scaling": "yarn"}, "is 'yarn', expected an object"),
    ({"rope_scaling": SCALED, "rope_parameters": {"rope_type": "default"}}, "rope_scaling is .*keep one"),
    ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta outside.*keep one"),
    ({"rope_theta": None}, "rope_theta is None, expected a number"),
    ({"rope_theta": -1.0}, "rope_theta is -1.0"),
    ({"rope_theta": 10**400}, "rope_theta is 1000"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused_by_name(values: dict[str, Any], message: str) -> None:
    assert_refused(values, message)
