"""Processors of rows of different lengths: each row as if it were alone."""

from __future__ import annotations

import numpy as np
import pytest

from flaxqwen import generation as ours
from tests.generation.processors.oracle import V, run

B, S = 3, 24
PROMPTS = np.random.default_rng(0).integers(0, V, (B, 9)).astype(np.int32)
FLOAT = 1.7
PROCESSORS = {
    "repetition": ours.RepetitionPenaltyLogitsProcessor(FLOAT),
    "encoder repetition": ours.EncoderRepetitionPenaltyLogitsProcessor(FLOAT, PROMPTS[:1]),
    "sequence bias": ours.SequenceBiasLogitsProcessor({(1, 2): 3.0, (2,): -1.0, (0, 1, 2): 2.0}),
    "bad words": ours.NoBadWordsLogitsProcessor([[1, 2], [0], [2, 2, 1]]),
    "n-grams": ours.NoRepeatNGramLogitsProcessor(2),
    "encoder n-grams": ours.EncoderNoRepeatNGramLogitsProcessor(2, PROMPTS[0] % 3),
    "min length": ours.MinLengthLogitsProcessor(12, [3, 5]),
    "min new tokens": ours.MinNewTokensLengthLogitsProcessor(4, 8, 3),
    "forced bos": ours.ForcedBOSTokenLogitsProcessor(4),
    "forced eos": ours.ForcedEOSTokenLogitsProcessor(11, [5, 6]),
    "suppress at begin": ours.SuppressTokensAtBeginLogitsProcessor([1, 2], 10),
    "length penalty": ours.ExponentialDecayLengthPenalty((2, 1.3), [3, 4], 5),
    "left hash": ours.WatermarkLogitsProcessor(V),
    "self hash": ours.WatermarkLogitsProcessor(V, seeding_scheme="selfhash", context_width=3),
    "SynthID": ours.SynthIDTextWatermarkLogitsProcessor(3, [5, 9, 30], 2**10, 1, 8, prompt_length=1),
    "SynthID, first n-grams skipped": ours.SynthIDTextWatermarkLogitsProcessor(
        3, [5, 9], 2**10, 1, 8, skip_first_ngram_calls=True, prompt_length=1
    ),
    "top k": ours.TopKLogitsWarper(5),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_each_row_is_as_alone(name, rng):
    """Lengths that the values above distinguish, in a buffer whose later columns must not matter."""
    for lengths in ([1, 10, 17], [11, 13, 2], [9, 5, 24]):
        ids = rng.integers(0, 3, (B, S)).astype(np.int32)
        scores = rng.standard_normal((B, V)).astype(np.float32)
        want = [run(PROCESSORS[name], ids[i : i + 1], scores[i : i + 1], n)[0] for i, n in enumerate(lengths)]
        np.testing.assert_array_equal(run(PROCESSORS[name], ids, scores, np.asarray(lengths)), np.stack(want))
