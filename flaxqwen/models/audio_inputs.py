"""Prompts with audio, on the host: counts that must match, and older prompts made new.

Axes: B batch, T tokens, C clips, F mel frames.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from flaxqwen.config import Qwen2AudioEncoderConfig
from flaxqwen.models.losses import IGNORE_INDEX


class AudioPrompt(NamedTuple):
    """input_ids, attention_mask, position_ids and, where there were some, labels: each [B, T] int32."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray | None


def tokens_of(feature_attention_mask: np.ndarray) -> np.ndarray:
    """How many audio tokens each clip of a mask [C, F] takes: [C] (_get_feat_extract_output_lengths)."""
    positions = (np.asarray(feature_attention_mask).astype(np.int64).sum(-1) - 1) // 2 + 1
    return (positions - 2) // 2 + 1


def check_features(
    input_features: ArrayLike, feature_attention_mask: ArrayLike, config: Qwen2AudioEncoderConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Clips as [C, W, F] float32, and their mask as [C, F] int32.

    Raises:
      ValueError: another shape than the encoder takes; a mask of other numbers, or whose ones are not first; features
        that are not finite.
    """
    features, frames = np.asarray(input_features, np.float32), np.asarray(feature_attention_mask)
    bins, length = config.num_mel_bins, 2 * config.max_source_positions
    if features.ndim != 3 or features.shape[1:] != (bins, length) or not len(features):
        raise ValueError(
            f"input_features has shape {features.shape}; expected [clips, {bins} mel bins, {length} frames], at least "
            "one clip"
        )
    if frames.shape != (len(features), length):
        raise ValueError(f"feature_attention_mask has shape {frames.shape}; expected {(len(features), length)}")
    if not np.isin(frames, (0, 1)).all() or (np.diff(frames.astype(np.int32)) > 0).any():
        raise ValueError(
            "feature_attention_mask must be 1 at the frames of a clip, from the first on, and 0 after them"
        )
    if not np.isfinite(features).all():
        raise ValueError("input_features has values that are not finite: look at the samples they were made of")
    return features, frames.astype(np.int32)


def check_audio_tokens(input_ids: np.ndarray, feature_attention_mask: np.ndarray, audio_token: int) -> None:
    """ValueError unless input_ids [B, T] have as many audio tokens as the clips of feature_attention_mask [C, F] take.

    A mismatch would not show in a compiled gather, but in what the model hears.
    """
    found = int((np.asarray(input_ids) == audio_token).sum())
    tokens = tokens_of(feature_attention_mask)
    if found != (expected := int(tokens.sum())):
        hint = ": expand a prompt of one token a clip by expand_audio_tokens" if found == len(tokens) else ""
        raise ValueError(
            f"the prompt has {found} audio tokens ({audio_token}), but the {len(tokens)} clips take {expected}{hint}"
        )


def expand_audio_tokens(
    input_ids: np.ndarray,
    feature_attention_mask: np.ndarray,
    audio_token: int,
    attention_mask: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    pad_token: int = 0,
) -> AudioPrompt:
    """An older prompt, of one audio token a clip, as the processor writes it now: one for each vector of audio.

    Args:
      input_ids: [B, T] int. Rows are padded on one side, which stays; where none is, they are from now on the left.
      feature_attention_mask: [C, F] of 0 and 1, clips in the order of their tokens.
      audio_token: its id (audio_token_index of the config).
      attention_mask: [B, T] of 0 and 1; default: no padding.
      labels: [B, T] int; audio gets -100, which is ignored.
      pad_token: the id at padding.

    Raises:
      ValueError: another number of audio tokens than of clips; an audio token at padding; padding on both sides.
    """
    ids = np.asarray(input_ids)
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    is_audio, tokens = ids == audio_token, tokens_of(feature_attention_mask)
    if (found := int(is_audio.sum())) != len(tokens):
        raise ValueError(
            f"the prompt has {found} audio tokens ({audio_token}), expected one for each of the {len(tokens)} clips"
        )
    if (is_audio & ~mask).any():
        raise ValueError(f"attention_mask hides an audio token ({audio_token})")
    if not mask[:, 0].all() and not mask[:, -1].all():
        raise ValueError("attention_mask has padding on both sides: pad all rows on one")
    repeats = np.ones(ids.shape, np.int64)
    repeats[is_audio] = tokens
    lengths = repeats.sum(-1)  # padding counts, as in Transformers: the widths are the same
    width, left = int(lengths.max()), bool(mask[:, -1].all())
    columns = np.arange(width)[None]
    filled = columns >= width - lengths[:, None] if left else columns < lengths[:, None]

    def spread(values: np.ndarray, padding: int) -> np.ndarray:
        out = np.full(filled.shape, padding, np.int32)
        out[filled] = np.repeat(values.reshape(-1), repeats.reshape(-1))
        return out

    new_mask = spread(mask, 0)
    positions = np.where(new_mask, np.cumsum(new_mask, -1) - 1, 1).astype(np.int32)  # 1 at padding, as there
    if labels is not None:
        labels = spread(np.where(is_audio, IGNORE_INDEX, np.asarray(labels)), IGNORE_INDEX)
    return AudioPrompt(spread(ids, pad_token), new_mask, positions, labels)
