"""From generation options to processors, in Transformers' order (`_get_logits_processor` in generation/utils.py).

Axes: B prompts, P their columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flaxqwen.generation.callables import HostCall
from flaxqwen.generation.config import ResolvedConfig
from flaxqwen.generation.processors.base import LogitsProcessor
from flaxqwen.generation.processors.constraints import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinLengthLogitsProcessor,
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

GREEN_LIST_KEYS = ("greenlist_ratio", "bias", "hashing_key", "seeding_scheme", "context_width")
SYNTHID_DEFAULTS = {"context_history_size": 1024, "sampling_table_seed": 0, "sampling_table_size": 2**16}
SYNTHID_KEYS = ("ngram_len", "keys", *SYNTHID_DEFAULTS, "skip_first_ngram_calls", "debug_mode")


def build_processors(
    options: ResolvedConfig,
    prompt_ids: np.ndarray,
    attention_mask: np.ndarray,
    copies: int,
    vocab_size: int,
    custom: Sequence[LogitsProcessor] = (),
) -> tuple[LogitsProcessor, ...]:
    """The processors that the options ask for, in the order in which they act.

    Args:
      prompt_ids, attention_mask: [B, P] int32 and bool, padded on the left.
      copies: rows of scores for each prompt, next to each other: continuations, or beams.
      vocab_size: columns of the scores.
      custom: a user's own, which act before the warpers; one of the type of a default one acts in its place.

    Raises:
      ValueError: what Transformers' processors refuse; token ids out of the vocabulary.
    """
    check_vocabulary(options, vocab_size)
    defaults = _history(options, prompt_ids, attention_mask, copies, vocab_size) + _constraints(options, prompt_ids)
    processors = _merge(defaults, custom)
    if options.do_sample:
        processors += _warpers(options)
    if options.watermarking_config is not None:
        processors.append(_watermark(options.watermarking_config, prompt_ids.shape[1], vocab_size))
    if options.renormalize_logits:
        processors.append(LogitNormalization())
    return tuple(processors)


def _history(
    options: ResolvedConfig, prompt_ids: np.ndarray, attention_mask: np.ndarray, copies: int, vocab_size: int
) -> list[LogitsProcessor]:
    """Those that look at which tokens the sequence, or the prompt, holds."""
    found: list[LogitsProcessor] = []
    if options.sequence_bias is not None:
        bias = SequenceBiasLogitsProcessor(list(options.sequence_bias))
        bias.sequence_bias.require_in_vocabulary(vocab_size)
        found.append(bias)
    if options.encoder_repetition_penalty != 1.0:
        found.append(EncoderRepetitionPenaltyLogitsProcessor(options.encoder_repetition_penalty, prompt_ids))
    if options.repetition_penalty != 1.0:
        padding = None if attention_mask.all() else np.repeat(attention_mask.argmax(axis=1), copies).astype(np.int32)
        found.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty, padding))
    if options.no_repeat_ngram_size > 0:
        found.append(NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size))
    if options.encoder_no_repeat_ngram_size > 0:
        found.append(EncoderNoRepeatNGramLogitsProcessor(options.encoder_no_repeat_ngram_size, prompt_ids))
    if options.bad_words_ids is not None:
        words = NoBadWordsLogitsProcessor(options.bad_words_ids, options.eos_token_id)
        words.bad_words_ids.require_in_vocabulary(vocab_size)
        found.append(words)
    return found


def _constraints(options: ResolvedConfig, prompt_ids: np.ndarray) -> list[LogitsProcessor]:
    """Those that look at the length. min_length covers min_new_tokens: the options have been brought in agreement."""
    length, eos = prompt_ids.shape[1], options.eos_token_id
    found: list[LogitsProcessor] = []
    if options.min_length > 0 and eos:
        found.append(MinLengthLogitsProcessor(options.min_length, eos))
    if options.forced_bos_token_id is not None:
        found.append(ForcedBOSTokenLogitsProcessor(options.forced_bos_token_id))
    if options.forced_eos_token_id is not None:
        found.append(ForcedEOSTokenLogitsProcessor(options.max_length, options.forced_eos_token_id))
    if options.remove_invalid_values:
        found.append(InfNanRemoveLogitsProcessor())
    if options.exponential_decay_length_penalty is not None:
        if not eos:
            raise ValueError("exponential_decay_length_penalty raises the score of eos_token_id, which is not set")
        found.append(ExponentialDecayLengthPenalty(options.exponential_decay_length_penalty, eos, length))
    if options.suppress_tokens:
        found.append(SuppressTokensLogitsProcessor(options.suppress_tokens))
    if options.begin_suppress_tokens:
        forced = length <= 1 and options.forced_bos_token_id is not None  # generation begins after that token
        found.append(SuppressTokensAtBeginLogitsProcessor(options.begin_suppress_tokens, length + forced))
    return found


def _merge(defaults: list[LogitsProcessor], custom: Sequence[LogitsProcessor]) -> list[LogitsProcessor]:
    """The user's own after the defaults, or in place of a default of the same type, be it ours or Transformers'."""
    own = {_kind(processor): processor for processor in reversed(custom)}
    for name in sorted(_kind(processor) for processor in defaults if _kind(processor) in own):
        warnings.warn(f"the {name} in logits_processor acts in place of the one that the options ask for", stacklevel=5)
    merged = [own.get(_kind(processor), processor) for processor in defaults]
    return merged + [processor for processor in custom if not any(processor is other for other in merged)]


def _kind(processor: Any) -> str:
    """The class of a processor, by its name if it is ours or, called on the host, Transformers'."""
    kind = type(processor.function if isinstance(processor, HostCall) else processor)
    known = kind.__module__.partition(".")[0] in ("flaxqwen", "transformers")
    return kind.__name__ if known else f"{kind.__module__}.{kind.__qualname__}"


def _warpers(options: ResolvedConfig) -> list[LogitsProcessor]:
    """Those that shape the distribution to draw from."""
    # Beams need one token that does not end them, however many do.
    least = max(len(options.eos_token_id), 1) + 1 if options.num_beams > 1 else 1
    found: list[LogitsProcessor] = [TemperatureLogitsWarper(options.temperature)]
    if options.top_h is not None:
        found.append(TopHLogitsWarper(options.top_h))
    if options.top_k != 0:
        found.append(TopKLogitsWarper(options.top_k, min_tokens_to_keep=least))
    if options.top_p < 1.0:
        found.append(TopPLogitsWarper(options.top_p, min_tokens_to_keep=least))
    if options.min_p is not None:
        found.append(MinPLogitsWarper(options.min_p, min_tokens_to_keep=least))
    if options.typical_p < 1.0:
        found.append(TypicalLogitsWarper(options.typical_p, min_tokens_to_keep=least))
    if 0.0 < options.epsilon_cutoff < 1.0:
        found.append(EpsilonLogitsWarper(options.epsilon_cutoff, min_tokens_to_keep=least))
    if 0.0 < options.eta_cutoff < 1.0:
        found.append(EtaLogitsWarper(options.eta_cutoff, min_tokens_to_keep=least))
    return found


def _watermark(config: Mapping[str, Any], prompt_length: int, vocab_size: int) -> LogitsProcessor:
    """The processor of a WatermarkingConfig, or, where it has an ngram_len, of a SynthIDTextWatermarkingConfig."""
    known = SYNTHID_KEYS if "ngram_len" in config else GREEN_LIST_KEYS
    if unknown := sorted(set(config) - set(known)):
        raise ValueError(f"watermarking_config has no {', '.join(unknown)}; expected of {', '.join(known)}")
    if "ngram_len" not in config:
        return WatermarkLogitsProcessor(vocab_size, **config)
    if "keys" not in config:
        raise ValueError("watermarking_config has an ngram_len and no keys, the integers that SynthID's layers hash")
    return SynthIDTextWatermarkLogitsProcessor(**(SYNTHID_DEFAULTS | dict(config)), prompt_length=prompt_length)


def check_vocabulary(options: ResolvedConfig, vocab_size: int) -> None:
    """ValueError for a forced token that the model does not have."""
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        tokens = np.atleast_1d(np.asarray([] if getattr(options, name) is None else getattr(options, name), np.int64))
        outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
        if outside.size:
            raise ValueError(f"{name}={outside[0]} is out of the vocabulary: expected 0 to {vocab_size - 1}")
