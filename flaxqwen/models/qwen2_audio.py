"""Qwen2-Audio: the audio tower, its projection into the decoder, and the language model that hears.

Names of modules and parameters are those of transformers/models/qwen2_audio/modeling_qwen2_audio.py, so that the
parameter tree is the checkpoint. Audio takes the place of its tokens by a gather, so every shape is static.

Axes: B batch, T new tokens, C clips (of the whole batch), W mel bins, F mel frames, L encoder positions (F / 2),
P positions after pooling (L / 2), E width of the encoder, D width of the decoder, N heads, H head dim, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flaxqwen.cache import KVCache
from flaxqwen.config import Qwen2AudioConfig, Qwen2AudioEncoderConfig
from flaxqwen.models.layers import layer_runner
from flaxqwen.models.losses import IGNORE_INDEX, causal_lm_loss
from flaxqwen.models.outputs import (
    BaseModelOutput,
    Qwen2AudioCausalLMOutputWithPast,
    Qwen2AudioModelOutputWithPast,
)
from flaxqwen.models.qwen2 import Qwen2Model
from flaxqwen.ops.activations import ACTIVATION
from flaxqwen.ops.attention import Visibility, attend, attend_in_blocks, attend_to_all
from flaxqwen.ops.convolution import Conv1d
from flaxqwen.ops.dispatch import Attention
from flaxqwen.ops.linear import Embed, Linear
from flaxqwen.ops.norm import LayerNorm
from flaxqwen.sharding import Sharding, constrain

LAYER_NORM_EPS = 1e-5  # PyTorch's default, which no config changes
FRAMES_PER_POSITION = 2  # the stride of conv2
ENCODER_PARTS = ("audio_tower", "multi_modal_projector")  # of Qwen2AudioModel: they run over clips, not over rows


class Qwen2AudioAttention(nn.Module):
    """Attention of every position to every other that is audio; k has no bias."""

    config: Qwen2AudioEncoderConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    sharding: Sharding | None = None

    def setup(self) -> None:
        config = self.config
        linear = partial(
            Linear, config.d_model, stddev=config.initializer_range, dtype=self.dtype, param_dtype=self.param_dtype,
            sharding=self.sharding, by_rows=True,
        )  # fmt: skip
        self.q_proj, self.v_proj, self.out_proj = (linear(use_bias=True) for _ in range(3))
        self.k_proj = linear()
        self.dropout = nn.Dropout(config.attention_dropout)

    def __call__(
        self, x: jax.Array, visibility: Visibility, output_attentions: bool, deterministic: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """x [C, L, E] -> ([C, L, E], attention weights [C, N, L, L] or None)."""
        C, L, E = x.shape
        N = self.config.encoder_attention_heads
        query, key, value = (
            constrain(self.sharding, p(x).reshape(C, L, N, E // N), "batch", None, "heads", None)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        heads = (query, key.swapaxes(1, 2), value.swapaxes(1, 2))
        drop, weights = not deterministic and self.config.attention_dropout > 0, None
        if output_attentions or drop:
            y, weights = attend(*heads, visibility, dropout=lambda w: self.dropout(w, deterministic=not drop))
        elif visibility.full is None:
            y = attend_to_all(*heads, visibility.slot_mask)
        else:
            y = attend_in_blocks(*heads, visibility)
        return self.out_proj(y.reshape(C, L, E)), weights


class Qwen2AudioEncoderLayer(nn.Module):
    """Attention and MLP, each behind a layer norm and added to the residual stream."""

    config: Qwen2AudioEncoderConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    sharding: Sharding | None = None

    def setup(self) -> None:
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        linear = partial(
            Linear, use_bias=True, stddev=config.initializer_range, dtype=self.dtype, param_dtype=self.param_dtype,
            sharding=self.sharding, by_rows=True,
        )  # fmt: skip
        self.self_attn_layer_norm = LayerNorm(LAYER_NORM_EPS, self.param_dtype)
        self.self_attn = Qwen2AudioAttention(config, *dtypes, self.sharding)
        self.final_layer_norm = LayerNorm(LAYER_NORM_EPS, self.param_dtype)
        self.fc1 = linear(config.encoder_ffn_dim)
        self.fc2 = linear(config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)

    def __call__(
        self, x: jax.Array, visibility: Visibility, output_attentions: bool, deterministic: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """As Qwen2AudioAttention: x [C, L, E] -> ([C, L, E], attention weights or None)."""
        y, weights = self.self_attn(self.self_attn_layer_norm(x), visibility, output_attentions, deterministic)
        x = constrain(self.sharding, x + self.dropout(y, deterministic=deterministic), "batch", None, None)
        y = ACTIVATION[self.config.activation_function](self.fc1(self.final_layer_norm(x)))
        y = self.fc2(self.activation_dropout(y, deterministic=deterministic))
        x = constrain(self.sharding, x + self.dropout(y, deterministic=deterministic), "batch", None, None)
        if x.dtype == jnp.float16:  # as in Transformers: the sum of many layers overflows
            limit = float(jnp.finfo(x.dtype).max) - 1000
            x = jnp.clip(x, -limit, limit)
        return x, weights


class Qwen2AudioEncoder(nn.Module):
    """Log-mel features -> one vector for each 40 ms: Whisper's encoder, then a mean over pairs.

    config: geometry.
    dtype: compute dtype; None computes in the dtype of the parameters.
    param_dtype: dtype in which `init` creates parameters.
    sharding: how the model lies on a mesh; None: on one device.
    """

    config: Qwen2AudioEncoderConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    sharding: Sharding | None = None

    def setup(self) -> None:
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        self.conv1 = Conv1d(config.d_model, 3, 1, config.initializer_range, *dtypes)
        self.conv2 = Conv1d(config.d_model, 3, FRAMES_PER_POSITION, config.initializer_range, *dtypes)
        self.embed_positions = Embed(
            config.max_source_positions, config.d_model, None, config.initializer_range, *dtypes
        )
        self.layers = [Qwen2AudioEncoderLayer(config, *dtypes, self.sharding) for _ in range(config.encoder_layers)]
        self.layer_norm = LayerNorm(LAYER_NORM_EPS, self.param_dtype)
        self.dropout = nn.Dropout(config.dropout)

    def __call__(
        self,
        input_features: jax.Array,
        attention_mask: jax.Array | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        deterministic: bool = True,
    ) -> BaseModelOutput | tuple:
        """Encode clips.

        Args:
          input_features: [C, W, F] log-mel, F twice the config's max_source_positions.
          attention_mask: [C, L] bool, True at audio; or as it is, [C, 1, L, L] bool (True: visible) or float (added).
          output_attentions, output_hidden_states, return_dict: as in Transformers; defaults from the config.
          deterministic: False applies dropout (needs a "dropout" rng).

        Returns:
          last_hidden_state [C, P, E]; hidden_states are [C, L, E], but for the last one, which is that.

        Raises:
          ValueError: features or a mask of another shape; layer drop in training, which is not supported.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = self.forward(
            input_features, attention_mask, deterministic, bool(output_attentions), bool(output_hidden_states)
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def forward(
        self,
        input_features: jax.Array,
        attention_mask: jax.Array | None,
        deterministic: bool,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        positions: int | None = None,
    ) -> BaseModelOutput:
        """As __call__, but for return_dict; positions: L, where the mask has less than that (None: all)."""
        config = self.config
        if not deterministic and config.encoder_layerdrop > 0:
            raise ValueError(f"encoder_layerdrop is {config.encoder_layerdrop}; training supports 0 alone")
        x = self.dropout(self.embed(input_features, positions), deterministic=deterministic)
        visibility = all_to_all(attention_mask, x.shape)
        run = layer_runner(self, static=(2, 3))
        given, attentions = [], []
        for layer in self.layers:
            given.append(x)
            x, weights = run(layer, x, visibility, output_attentions, deterministic)
            if weights is not None:
                attentions.append(weights)
        last = self.pool(x)
        hidden_states = (*given, last) if output_hidden_states else None
        return BaseModelOutput(last, hidden_states, tuple(attentions) if output_attentions else None)

    def embed(self, input_features: jax.Array, positions: int | None = None) -> jax.Array:
        """Features [C, W, F] -> [C, L, E], what the first layer reads: two convolutions, and where each vector is."""
        L = self.config.max_source_positions
        if (found := input_features.shape[1:]) != (wanted := (self.config.num_mel_bins, FRAMES_PER_POSITION * L)):
            raise ValueError(
                f"input_features has shape {input_features.shape}; expected [clips, {wanted[0]} mel bins, {wanted[1]} "
                f"frames], found {found}: pad or cut every clip to {wanted[1]} frames"
            )
        L = positions or L
        input_features = input_features[..., : FRAMES_PER_POSITION * L]
        gelu = ACTIVATION["gelu"]  # here, whatever activation_function says
        x = gelu(self.conv1(input_features.swapaxes(1, 2).astype(self.dtype or self.embed_positions.weight.dtype)))
        x = gelu(self.conv2(x))
        # The table is fixed in Transformers too: no gradient.
        return x + jax.lax.stop_gradient(self.embed_positions(jnp.arange(L)))

    def pool(self, x: jax.Array) -> jax.Array:
        """What the last layer gives, [C, L, E] -> [C, P, E]: the normalised means of pairs."""
        C, L, E = x.shape
        pairs = x[:, : L - L % 2].reshape(C, L // 2, 2, E)
        return self.layer_norm((pairs[:, :, 0] + pairs[:, :, 1]) / 2)


def all_to_all(attention_mask: jax.Array | None, shape: tuple[int, ...]) -> Visibility:
    """Who sees whom in an encoder of x [C, L, E]: every slot counts as past, and the mask decides."""
    C, L, _ = shape
    last = jnp.full((1, L), L - 1, jnp.int32)
    if attention_mask is None:
        return Visibility(last)
    if attention_mask.shape == (C, L):
        return Visibility(last, attention_mask.astype(bool))
    if attention_mask.shape != (C, 1, L, L):
        raise ValueError(f"attention_mask has shape {attention_mask.shape}; expected {(C, L)} or {(C, 1, L, L)}")
    return Visibility(last, full=attention_mask)


def audio_lengths(frames: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mel frames -> (encoder positions, audio tokens); of jax or numpy (_get_feat_extract_output_lengths)."""
    positions = (frames - 1) // 2 + 1
    return positions, (positions - 2) // 2 + 1


def audio_positions(feature_attention_mask: jax.Array, count: int) -> jax.Array:
    """Which of the first `count` encoder positions are audio, [C, count] bool, by a mask of frames [C, F]."""
    positions, _ = audio_lengths(feature_attention_mask.sum(-1).astype(jnp.int32))
    return jnp.arange(count) < positions[:, None]


class Qwen2AudioMultiModalProjector(nn.Module):
    """From the width of the encoder to that of the decoder."""

    config: Qwen2AudioConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    sharding: Sharding | None = None

    def setup(self) -> None:
        text, dtypes = self.config.text_config, (self.dtype, self.param_dtype)
        self.linear = Linear(text.hidden_size, True, text.initializer_range, *dtypes, self.sharding)

    def __call__(self, audio_features: jax.Array) -> jax.Array:
        """[C, P, E] -> [C, P, D]."""
        return self.linear(audio_features)


class Qwen2AudioModel(nn.Module):
    """The audio tower, the projector and the decoder, without a head.

    Fields as Qwen2AudioEncoder; attention: of the decoder, see ops/dispatch.py.
    """

    config: Qwen2AudioConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    sharding: Sharding | None = None
    attention: Attention = Attention()

    def setup(self) -> None:
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        self.audio_tower = Qwen2AudioEncoder(config.audio_config, *dtypes, self.sharding)
        self.multi_modal_projector = Qwen2AudioMultiModalProjector(config, *dtypes, self.sharding)
        self.language_model = Qwen2Model(config.text_config, *dtypes, self.sharding, self.attention)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        input_features: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        feature_attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: jax.Array | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        deterministic: bool = True,
    ) -> Qwen2AudioModelOutputWithPast | tuple:
        """Run the decoder over tokens and the audio that takes the place of some. Arguments as Qwen2Model's, and:

        Args:
          input_ids: [B, T] int, with one audio token for each vector of audio (the processor writes them so; older
            prompts with one for each clip go through expand_audio_tokens first).
          input_features: [C, W, F] log-mel of all clips, in the order of their tokens. Not with inputs_embeds, and not
            looked at beside a single token, as in Transformers: that is a step of decoding.
          feature_attention_mask: [C, F] of 0 and 1: which frames are audio. A clip of none takes no token.

        Raises:
          ValueError: as Qwen2Model and Qwen2AudioEncoder; features without their mask or without input_ids.
        """
        output = self.forward(
            input_ids, input_features, attention_mask, feature_attention_mask, position_ids, past_key_values,
            inputs_embeds, use_cache, output_attentions, output_hidden_states, deterministic,
        )  # fmt: skip
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def forward(
        self,
        input_ids: jax.Array | None,
        input_features: jax.Array | None,
        attention_mask: jax.Array | None,
        feature_attention_mask: jax.Array | None,
        position_ids: jax.Array | None,
        past_key_values: KVCache | None,
        inputs_embeds: jax.Array | None,
        use_cache: bool | None,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
        deterministic: bool = True,
        keep: int | jax.Array = 0,
    ) -> Qwen2AudioModelOutputWithPast:
        """As __call__, but for return_dict. keep: as of Qwen2Model.forward."""
        if self.is_initializing():  # whatever the arguments, the tower's parameters are made
            audio = self.config.audio_config
            frames = FRAMES_PER_POSITION * audio.max_source_positions
            self.encode(jnp.zeros((1, audio.num_mel_bins, frames)), jnp.ones((1, frames), jnp.int32))
        if input_features is not None:
            if input_ids is None:
                raise ValueError("input_features needs input_ids, whose audio tokens say where the audio goes")
            if feature_attention_mask is None:
                raise ValueError("input_features needs feature_attention_mask, which says how long each clip is")
            if input_ids.shape[1] > 1:
                audio_features = self.encode(input_features, feature_attention_mask, deterministic)
                inputs_embeds = self.merge(input_ids, audio_features, feature_attention_mask, inputs_embeds)
                input_ids = None
        output = self.language_model.forward(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_attentions,
            output_hidden_states, deterministic=deterministic, keep=keep,
        )  # fmt: skip
        return Qwen2AudioModelOutputWithPast(
            last_hidden_state=output.last_hidden_state,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            attention_mask=attention_mask,
        )

    def encode(
        self,
        input_features: jax.Array,
        feature_attention_mask: jax.Array,
        deterministic: bool = True,
        positions: int | None = None,
    ) -> jax.Array:
        """Features [C, W, F] and their mask [C, F] -> audio as the decoder's embeddings [C, P, D].

        positions: how many of the encoder's are computed: one more than any clip has, or all, for the same audio.
        """
        is_audio = audio_positions(feature_attention_mask, positions or self.config.audio_config.max_source_positions)
        encoded = self.audio_tower.forward(input_features, is_audio, deterministic, positions=positions)
        return self.multi_modal_projector(encoded.last_hidden_state)

    def merge(
        self,
        input_ids: jax.Array,
        audio_features: jax.Array,
        feature_attention_mask: jax.Array,
        inputs_embeds: jax.Array | None = None,
    ) -> jax.Array:
        """[B, T, D]: the embeddings of input_ids [B, T], with audio [C, P, D] in place of the audio tokens.

        NaN where those are not as many as the clips take: the wrong audio would be heard in silence.
        """
        if inputs_embeds is not None:
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        embeds = self.language_model.embed(input_ids, None)
        _, tokens = audio_lengths(feature_attention_mask.sum(-1).astype(jnp.int32))
        is_audio = input_ids == self.config.audio_token_index
        embeds = jnp.where(jnp.sum(is_audio) == jnp.sum(tokens), embeds, jnp.nan)
        return place_audio(is_audio, audio_features, tokens, embeds)


def place_audio(is_audio: jax.Array, audio_features: jax.Array, tokens: jax.Array, embeds: jax.Array) -> jax.Array:
    """embeds [B, T, D] with the valid audio, in order, where is_audio [B, T]: a gather, without moving the features.

    audio_features: [C, P, D], of which the first tokens[c] of clip c are valid.
    """
    ends = jnp.cumsum(tokens)
    place = jnp.cumsum(is_audio.reshape(-1)).reshape(is_audio.shape) - 1  # of each audio token among all of the batch
    clip = jnp.minimum(jnp.searchsorted(ends, place, side="right"), tokens.shape[0] - 1)
    index = clip * audio_features.shape[1] + place - (ends - tokens)[clip]
    return take_audio(jnp.where(is_audio, index, -1), audio_features, embeds)


def take_audio(index: jax.Array, audio_features: jax.Array, embeds: jax.Array) -> jax.Array:
    """embeds [B, T, D] with the vectors of audio_features [C, P, D] at their index [B, T] among all C * P; -1: none."""
    audio = audio_features.reshape(-1, audio_features.shape[-1])[index]
    return jnp.where(index[..., None] >= 0, audio.astype(embeds.dtype), embeds)


def visible_labels(labels: jax.Array, attention_mask: jax.Array | None, cache: KVCache | None = None) -> jax.Array:
    """labels [..., T], but -100 where a mask of as many axes, [..., M], hides the token, as in Transformers.

    cache: of the tokens before them, which the mask is of as well; it may be as wide as the cache's capacity.
    """
    if attention_mask is None or attention_mask.ndim != labels.ndim:
        return labels
    seen = jnp.zeros((), jnp.int32) if cache is None else jnp.asarray(cache.length)
    columns = jnp.broadcast_to(seen[..., None] + jnp.arange(labels.shape[-1]), labels.shape)
    return jnp.where(jnp.take_along_axis(attention_mask, columns, axis=-1) != 0, labels, IGNORE_INDEX)


class Qwen2AudioForConditionalGeneration(nn.Module):
    """Qwen2AudioModel with a language-model head. Fields as Qwen2AudioModel."""

    config: Qwen2AudioConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    sharding: Sharding | None = None
    attention: Attention = Attention()

    def setup(self) -> None:
        text, dtypes = self.config.text_config, (self.dtype, self.param_dtype)
        self.model = Qwen2AudioModel(self.config, *dtypes, self.sharding, self.attention)
        self.lm_head = Linear(text.vocab_size, False, text.initializer_range, *dtypes, self.sharding)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        input_features: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        feature_attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: jax.Array | None = None,
        labels: jax.Array | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | jax.Array = 0,
        deterministic: bool = True,
    ) -> Qwen2AudioCausalLMOutputWithPast | tuple:
        """Run the model and its head. Arguments as Qwen2AudioModel's, and:

        Args:
          labels: [B, T] int; moved by one here. -100 is ignored, and so are tokens that a 2D attention_mask hides.
          logits_to_keep: n keeps the last n positions (0: all); [P] or [B, P] int keeps those positions.

        Raises:
          ValueError: as Qwen2AudioModel; a bool logits_to_keep, whose result would have no static shape.
        """
        output = self.model.forward(
            input_ids, input_features, attention_mask, feature_attention_mask, position_ids, past_key_values,
            inputs_embeds, use_cache, output_attentions, output_hidden_states, deterministic, logits_to_keep,
        )  # fmt: skip
        logits = self.lm_head(output.last_hidden_state)
        loss = None
        if labels is not None:
            loss = causal_lm_loss(logits, visible_labels(labels, attention_mask, past_key_values))
        result = Qwen2AudioCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            attention_mask=output.attention_mask,
        )
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()

    def encode(
        self, input_features: jax.Array, feature_attention_mask: jax.Array, positions: int | None = None
    ) -> jax.Array:
        """As Qwen2AudioModel.encode."""
        return self.model.encode(input_features, feature_attention_mask, positions=positions)

    def embed(self, input_ids: jax.Array, index: jax.Array, audio_features: jax.Array) -> jax.Array:
        """[B, T, D]: the embeddings of input_ids [B, T], with encoded audio as take_audio places it."""
        return take_audio(index, audio_features, self.model.language_model.embed(input_ids, None))
