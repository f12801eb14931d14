"""Audio on its way into prefill: encoded once a call by a program of its own, and placed by an index of its tokens.

Neither prefill nor decoding has the encoder in it: prefill takes vectors where the index says so.

Axes: B batch (prompts), P columns of the prompts, C clips of the whole batch, W mel bins, F mel frames, D model.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flaxqwen.config import Qwen2AudioConfig
from flaxqwen.generation.config import ResolvedConfig
from flaxqwen.generation.inputs import CausalLM, Inputs, bucket, check_input_ids, to_array
from flaxqwen.generation.loop import Audio, Variables
from flaxqwen.models.audio_inputs import check_audio_tokens, check_features, expand_audio_tokens, tokens_of
from flaxqwen.models.qwen2_audio import FRAMES_PER_POSITION
from flaxqwen.ops.cpu import jit_in_order
from flaxqwen.sharding import module_sharding, settle

# Clips are encoded at a length out of so many, up to the whole 30 s: one of 11 s takes a time of 15 s.
LENGTHS = 6


def with_audio(
    model: CausalLM,
    request: Inputs,
    options: ResolvedConfig,
    input_features: ArrayLike | None,
    feature_attention_mask: ArrayLike | None,
    encode: bool = True,
) -> tuple[Inputs, ResolvedConfig]:
    """The prompts with their audio, encoded unless `encode` is False.

    Older prompts, of one audio token a clip, are expanded, and the options' lengths grow as much.

    Raises:
      ValueError: features for a model without an encoder, without their mask, or with inputs_embeds; of another shape,
        or not finite; audio tokens that are not as many as the clips take; an older prompt that continues a cache.
    """
    config = model.config
    if not isinstance(config, Qwen2AudioConfig):
        if input_features is not None or feature_attention_mask is not None:
            raise ValueError(f"input_features are for Qwen2-Audio; the model is {type(model.module).__name__}")
        return request, options
    token = config.audio_token_index
    if input_features is None or feature_attention_mask is None:
        if input_features is not None or feature_attention_mask is not None:
            raise ValueError("input_features and feature_attention_mask go together: give both, of the processor")
        if count := int((request.input_ids[:, request.cached :] == token).sum()):
            raise ValueError(f"the prompt has {count} audio tokens ({token}), but no input_features")
        return request, options
    if request.embeds is not None:
        raise ValueError("input_features cannot go with inputs_embeds: give input_ids, whose audio tokens it replaces")
    given = to_array("input_features", input_features), to_array("feature_attention_mask", feature_attention_mask)
    features, frames = check_features(*given, config.audio_config)
    if _is_older(request.input_ids, frames, token):
        if request.cached:
            raise ValueError("past_key_values needs a prompt with an audio token for each vector of audio")
        if request.positions is not None:
            raise ValueError("position_ids needs a prompt with an audio token for each vector of audio")
        width = request.length
        older = (request.input_ids, frames, token, request.attention_mask, None, options.pad_token_id or 0)
        prompt = expand_audio_tokens(*older)
        ids = check_input_ids(prompt.input_ids, config.text_config)
        request = Inputs(ids, prompt.attention_mask.astype(bool))
        more = request.length - width
        options = replace(options, max_length=options.max_length + more, min_length=options.min_length + more)
    check_audio_tokens(request.input_ids, frames, token)
    if not encode:
        return request, options
    return replace(request, audio=_encode(model, request, features, frames, token)), options


def _is_older(ids: np.ndarray, frames: np.ndarray, audio_token: int) -> bool:
    """Whether there is one audio token for each clip, where clips take another number."""
    return int((ids == audio_token).sum()) == len(frames) != int(tokens_of(frames).sum())


def _encode(
    model: CausalLM, request: Inputs, features: np.ndarray, frames: np.ndarray, audio_token: int
) -> Audio | None:
    """The audio of the columns that the cache does not hold yet, None where there is none."""
    is_audio, tokens = request.input_ids == audio_token, tokens_of(frames)
    clip, place = np.full((2, *is_audio.shape), -1, np.int32)
    clip[is_audio] = np.repeat(np.arange(len(tokens)), tokens)
    place[is_audio] = np.arange(tokens.sum()) - np.repeat(np.cumsum(tokens) - tokens, tokens)
    wanted = np.unique(clip[:, request.cached :])
    wanted = wanted[wanted >= 0]
    if not len(wanted):
        return None
    room = bucket(len(wanted), 1) - len(wanted)  # few programs
    clips = [np.pad(a[wanted], ((0, room),) + ((0, 0),) * (a.ndim - 1)) for a in (features, frames)]
    assert isinstance(model.config, Qwen2AudioConfig)
    whole = model.config.audio_config.max_source_positions
    positions = positions_for(int(frames[wanted].sum(-1).max()), whole)
    count = np.int32(len(wanted))
    vectors = encode_clips(model.module, model.variables, *clips, count, positions=positions)
    # Clips that are not wanted have tokens in the cache alone.
    slot = np.searchsorted(wanted, clip)
    return Audio(vectors, np.where(np.isin(clip, wanted), slot * vectors.shape[1] + place, -1).astype(np.int32))


def positions_for(frames: int, whole: int) -> int:
    """How many of an encoder's `whole` positions are computed where the longest clip has so many mel frames."""
    longest = (frames - 1) // FRAMES_PER_POSITION + 1
    step = -(-whole // LENGTHS)
    return min(-(-(longest + 1) // step) * step, whole)


def repeat_clips(
    ids: np.ndarray, audio_token: int, input_features: ArrayLike, feature_attention_mask: ArrayLike, copies: int
) -> dict[str, np.ndarray]:
    """The features and masks of the clips of rows `ids` [B, P], each row's clips after its tokens are repeated."""
    features = np.asarray(to_array("input_features", input_features))
    frames = np.asarray(to_array("feature_attention_mask", feature_attention_mask))
    tokens = tokens_of(frames)
    ends = np.cumsum((ids == audio_token).sum(axis=1))  # of each row's audio tokens
    rows = np.searchsorted(ends, np.cumsum(tokens) - tokens, side="right")
    order = np.concatenate([np.tile(np.flatnonzero(rows == row), copies) for row in range(len(ids))])
    return {"input_features": features[order], "feature_attention_mask": frames[order]}


@partial(jit_in_order, static_argnames=("module", "positions"))
def encode_clips(
    module: nn.Module, variables: Variables, features: Any, frames: Any, count: Any, *, positions: int
) -> jax.Array:
    """The first `count` of features [C, W, F] with their mask [C, F], one after the other, as vectors [C, P', D].

    One by one a clip of 1,500 positions fills the device, and its scores (20 heads x 1,500 x 1,500) are there once.
    positions: how many of the encoder's are computed, see Qwen2AudioModel.encode.
    """

    def encode(index: Any, vectors: jax.Array) -> jax.Array:
        clip = (jax.lax.dynamic_slice_in_dim(jnp.asarray(a), index, 1) for a in (features, frames))
        encoded: Any = module.apply(variables, *clip, positions=positions, method="encode")
        return jax.lax.dynamic_update_slice(vectors, encoded, (index, 0, 0))

    made = jax.eval_shape(partial(module.apply, method="encode"), variables, features, frames)
    vectors = jax.lax.fori_loop(0, count, encode, jnp.zeros(made.shape, made.dtype))
    return settle(module_sharding(module), vectors)
