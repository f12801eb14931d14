"""generate() and what it is made of; the logits processors are exported here, by Transformers' names."""

from __future__ import annotations

import importlib
from typing import Any

_PROCESSORS = "flaxqwen.generation.processors"
_OUTPUTS = "flaxqwen.generation.outputs"

# Public name -> where it lives. Imported on first use, as in flaxqwen itself.
_HOMES = {
    "GenerateDecoderOnlyOutput": _OUTPUTS,
    "compute_transition_scores": _OUTPUTS,
    "EncoderNoRepeatNGramLogitsProcessor": _PROCESSORS,
    "EncoderRepetitionPenaltyLogitsProcessor": _PROCESSORS,
    "EpsilonLogitsWarper": _PROCESSORS,
    "EtaLogitsWarper": _PROCESSORS,
    "ExponentialDecayLengthPenalty": _PROCESSORS,
    "ForcedBOSTokenLogitsProcessor": _PROCESSORS,
    "ForcedEOSTokenLogitsProcessor": _PROCESSORS,
    "InfNanRemoveLogitsProcessor": _PROCESSORS,
    "LogitNormalization": _PROCESSORS,
    "LogitsProcessor": _PROCESSORS,
    "MinLengthLogitsProcessor": _PROCESSORS,
    "MinNewTokensLengthLogitsProcessor": _PROCESSORS,
    "MinPLogitsWarper": _PROCESSORS,
    "NoBadWordsLogitsProcessor": _PROCESSORS,
    "NoRepeatNGramLogitsProcessor": _PROCESSORS,
    "RepetitionPenaltyLogitsProcessor": _PROCESSORS,
    "SequenceBiasLogitsProcessor": _PROCESSORS,
    "SuppressTokensAtBeginLogitsProcessor": _PROCESSORS,
    "SuppressTokensLogitsProcessor": _PROCESSORS,
    "SynthIDTextWatermarkLogitsProcessor": _PROCESSORS,
    "TemperatureLogitsWarper": _PROCESSORS,
    "TopHLogitsWarper": _PROCESSORS,
    "TopKLogitsWarper": _PROCESSORS,
    "TopPLogitsWarper": _PROCESSORS,
    "TypicalLogitsWarper": _PROCESSORS,
    "WatermarkLogitsProcessor": _PROCESSORS,
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flaxqwen.generation' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
