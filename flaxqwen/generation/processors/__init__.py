"""Logits processors: small pure objects, named and constructed as in transformers/generation/logits_process.py.

Each is a pytree whose values (temperature, penalty, ...) are traced, so that changing a value never compiles again;
which processors there are is static. Called as `processor(input_ids, scores, cur_len=None)`:

  input_ids: [B, S] int32, of which the first cur_len columns count (all of them, when None): int, or [B] of them.
  scores: [B, V] float32, with -inf for what is excluded.
  returns: [B, V] float32.
"""

from flaxqwen.generation.processors.base import NO_ID, LogitsProcessor, pad_ids
from flaxqwen.generation.processors.build import build_processors
from flaxqwen.generation.processors.constraints import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from flaxqwen.generation.processors.ngrams import EncoderNoRepeatNGramLogitsProcessor, NoRepeatNGramLogitsProcessor
from flaxqwen.generation.processors.penalties import (
    EncoderRepetitionPenaltyLogitsProcessor,
    ExponentialDecayLengthPenalty,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)
from flaxqwen.generation.processors.synthid import SynthIDTextWatermarkLogitsProcessor
from flaxqwen.generation.processors.warpers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from flaxqwen.generation.processors.watermark import WatermarkLogitsProcessor

__all__ = [
    "NO_ID",
    "EncoderNoRepeatNGramLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "ExponentialDecayLengthPenalty",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "LogitsProcessor",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "MinPLogitsWarper",
    "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
    "SuppressTokensLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopHLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TypicalLogitsWarper",
    "WatermarkLogitsProcessor",
    "build_processors",
    "pad_ids",
]
