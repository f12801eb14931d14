"""Qwen2 and Qwen2.5: the decoder, its causal language model, and the parts they are made of.

Names of modules and parameters are those of transformers/models/qwen2/modeling_qwen2.py, so that the parameter tree is
the checkpoint. Everything is a pure function of params, inputs and cache.

Axes: B batch, T new tokens, S cache capacity, M columns of a mask, D model, N query heads, K key/value heads,
H head dim, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from flaxqwen.cache import KVCache, LayerCache
from flaxqwen.config import Qwen2Config
from flaxqwen.models.layers import layer_runner
from flaxqwen.models.losses import causal_lm_loss
from flaxqwen.models.outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from flaxqwen.ops.attention import Visibility, attend
from flaxqwen.ops.dispatch import Attention, find_implementation, run_attention
from flaxqwen.ops.linear import Embed, Linear, project, project_gated
from flaxqwen.ops.norm import RMSNorm
from flaxqwen.ops.rotary import rotary_embedding, rotate
from flaxqwen.sharding import Sharding, constrain, cuts_slots, mask_of_heads, own_heads, settle

Qwen2RMSNorm = RMSNorm


class Qwen2MLP(nn.Module):
    """down(act(gate(x)) * up(x)), gated by the activation of the config (SwiGLU, Shazeer 2020).

    gate and up have weights of their own, as have q, k and v: as one matrix they gain nothing (all products of a 0.5B
    step on 2 cores, float32: 64.1 ms apart, 66.7 ms in one; a TPU's compiler reads as many bytes).
    """

    config: Qwen2Config
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    sharding: Sharding | None = None

    def setup(self) -> None:
        config = self.config
        linear = partial(
            Linear, stddev=config.initializer_range, dtype=self.dtype, param_dtype=self.param_dtype,
            sharding=self.sharding,
        )  # fmt: skip
        self.gate_proj = linear(config.intermediate_size)
        self.up_proj = linear(config.intermediate_size)
        self.down_proj = linear(config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        return self.down_proj(project_gated(self.gate_proj, self.up_proj, self.config.hidden_act, x))


class Qwen2Attention(nn.Module):
    """Grouped-query attention; q, k and v have a bias, o has none."""

    config: Qwen2Config
    layer_index: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    sharding: Sharding | None = None
    attention: Attention = Attention()

    def setup(self) -> None:
        config = self.config
        N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        linear = partial(
            Linear, stddev=config.initializer_range, dtype=self.dtype, param_dtype=self.param_dtype,
            sharding=self.sharding,
        )  # fmt: skip
        self.q_proj = linear(N * H, use_bias=True)
        self.k_proj = linear(K * H, use_bias=True)
        self.v_proj = linear(K * H, use_bias=True)
        self.o_proj = linear(config.hidden_size)
        self.dropout = nn.Dropout(config.attention_dropout)
        sliding = config.layer_types[self.layer_index] == "sliding_attention"
        self.window = config.sliding_window if sliding else None

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        visibility: Visibility,
        cache: KVCache | None,
        output_attentions: bool,
        deterministic: bool,
    ) -> tuple[jax.Array, LayerCache, jax.Array | None]:
        """x [B, T, D], rope (cos, sin) each [B, T, H] -> ([B, T, D], this layer's cache with T more, weights or None).

        `cache` has this layer alone. Without one the new keys and values are the whole of it.
        """
        B, T, _ = x.shape
        query, key, value = project((self.q_proj, self.k_proj, self.v_proj), x)
        query = rotate(self._heads(query, "heads"), *rope)
        key = rotate(self._heads(key, "kv_heads"), *rope).swapaxes(1, 2)  # [B, K, T, H]
        value = self._heads(value, "kv_heads").swapaxes(1, 2)
        drop = not deterministic and self.config.attention_dropout > 0
        is_plain = output_attentions or drop
        kind = "whole" if cache is None else "decode" if T == 1 else "prefill"
        own, bound = (LayerCache(key, value), T) if cache is None else (cache.layers[0], cache.readable)
        found = None
        if not is_plain:
            found = find_implementation(self.attention, kind, query, own, bound, visibility, self.window, self.sharding)
        filled = readable = own
        if cache is not None:
            filled = own.append(
                key, value, cache.length, is_sharded=self.sharding is not None, is_cut=cuts_slots(self.sharding, own),
                is_taken_whole=found is not None and found.whole_cache,
            )  # fmt: skip
            filled = settle(self.sharding, filled)
            readable = jax.tree.map(lambda a: a[:, :, :bound], filled)
        weights = None
        if is_plain:
            heads = (query, readable.key, readable.value, visibility, self.window, readable.scales)
            y, weights = attend(*heads, dropout=lambda w: self.dropout(w, deterministic=not drop))
        else:
            interpret = self.attention.interpret
            y = run_attention(found, query, filled, readable, visibility, self.window, self.sharding, interpret)
        weights = own_heads(self.sharding, weights) if output_attentions and weights is not None else None
        return self.o_proj(y.reshape(B, T, -1)), filled, weights

    def _heads(self, x: jax.Array, axis: str) -> jax.Array:
        """[B, T, heads * H] -> [B, T, heads, H]."""
        heads = x.reshape(*x.shape[:2], -1, self.config.head_dim)
        return constrain(self.sharding, heads, "batch", None, axis, None)


class Qwen2DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    config: Qwen2Config
    layer_index: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    sharding: Sharding | None = None
    attention: Attention = Attention()

    def setup(self) -> None:
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        self.input_layernorm = Qwen2RMSNorm(config.rms_norm_eps, self.param_dtype)
        self.self_attn = Qwen2Attention(config, self.layer_index, *dtypes, self.sharding, self.attention)
        self.post_attention_layernorm = Qwen2RMSNorm(config.rms_norm_eps, self.param_dtype)
        self.mlp = Qwen2MLP(config, *dtypes, self.sharding)

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        visibility: Visibility,
        cache: KVCache | None,
        output_attentions: bool,
        deterministic: bool,
        keep: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache, jax.Array | None]:
        """As Qwen2Attention: x [B, T, D] -> ([B, T, D], LayerCache, attention weights or None).

        keep: positions whose results are wanted, [P] or [B, P]; the first result is then [B, P, D].
        """
        y, filled, weights = self.self_attn(
            self.input_layernorm(x), rope, visibility, cache, output_attentions, deterministic
        )
        x = constrain(self.sharding, x + y, "batch", None, None)
        if keep is not None:
            x = keep_positions(x, keep)
        y = self.mlp(self.post_attention_layernorm(x))
        return constrain(self.sharding, x + y, "batch", None, None), filled, weights


class Qwen2Model(nn.Module):
    """The decoder without a head.

    config: geometry and rope.
    dtype: compute dtype; None computes in the dtype of the parameters.
    param_dtype: dtype in which `init` creates parameters.
    sharding: how the model lies on a mesh; None: on one device.
    attention: how it is computed; see ops/dispatch.py.
    """

    config: Qwen2Config
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    sharding: Sharding | None = None
    attention: Attention = Attention()

    def setup(self) -> None:
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        self.embed_tokens = Embed(
            config.vocab_size, config.hidden_size, config.pad_token_id, config.initializer_range, *dtypes, self.sharding
        )
        self.layers = [
            Qwen2DecoderLayer(config, i, *dtypes, self.sharding, self.attention)
            for i in range(config.num_hidden_layers)
        ]
        self.norm = Qwen2RMSNorm(config.rms_norm_eps, self.param_dtype)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: jax.Array | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> BaseModelOutputWithPast | tuple:
        """Run the layers over new tokens.

        Args:
          input_ids: [B, T] int. Exactly one of this and inputs_embeds.
          attention_mask: [B, M] of 0 and 1 over cache slots, M at least the slots in use (T without a cache); or
            [B, 1 or N, T, M], bool (True: visible) or float (added to the scores), used as it is.
          position_ids: [B, T] int; default: on from the cache's length. Not derived from the mask, as in Transformers.
          past_key_values: the cache to continue. Its capacity must hold T more tokens: XLA clamps what does not fit.
          inputs_embeds: [B, T, D].
          use_cache: return past_key_values. Default: config.use_cache, and False when training (deterministic=False)
            or packed. Without past_key_values the returned cache has room for just these T tokens.
          output_attentions, output_hidden_states, return_dict: as in Transformers; defaults from the config.
          cache_position: [T] int, consecutive: the slots that the new tokens take. Default: at the cache's length.
          segment_ids: [B, T] int, for packed rows: a token sees its own segment only. Give position_ids with it; they
            say it alone where there is neither a mask nor a cache, as in Transformers.
          deterministic: False applies attention dropout (needs a "dropout" rng).

        Raises:
          ValueError: both or none of input_ids and inputs_embeds; a mask whose shape does not fit.
        """
        output = self.forward(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_attentions,
            output_hidden_states, cache_position, segment_ids, deterministic,
        )  # fmt: skip
        return output if _default(return_dict, self.config.return_dict) else output.to_tuple()

    def forward(
        self,
        input_ids: jax.Array | None,
        attention_mask: jax.Array | None,
        position_ids: jax.Array | None,
        past_key_values: KVCache | None,
        inputs_embeds: jax.Array | None,
        use_cache: bool | None,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
        cache_position: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
        keep: int | jax.Array = 0,
    ) -> BaseModelOutputWithPast:
        """As __call__, but for return_dict.

        keep: positions that last_hidden_state is to have, as logits_to_keep of Qwen2ForCausalLM. The last layer's MLP
        is run for them alone: of a prompt's last token, that is 3.7% of 0.5B's products less.
        """
        x = constrain(self.sharding, self.embed(input_ids, inputs_embeds), "batch", None, None)
        config = self.config
        use_cache = _default(use_cache, config.use_cache and deterministic and segment_ids is None)
        output_attentions = _default(output_attentions, config.output_attentions)
        output_hidden_states = _default(output_hidden_states, config.output_hidden_states)

        cache, T = past_key_values, x.shape[1]
        bound = None if cache is None else cache.bound
        if cache is not None and cuts_slots(self.sharding, cache.layers[0]):
            cache = cache.replace(bound=None)  # the slots below would have to be shared out anew
        if cache is not None and cache_position is not None:
            cache = cache.replace(length=jnp.broadcast_to(cache_position[0], cache.length.shape).astype(jnp.int32))
        slots = token_slots(cache, T)
        if position_ids is None:
            position_ids = slots if cache_position is None else cache_position[None]
        elif not use_cache and cache is None and attention_mask is None and segment_ids is None:
            segment_ids = packed_segments(jnp.broadcast_to(position_ids, (x.shape[0], T)))
        position_ids = jnp.broadcast_to(position_ids, (x.shape[0], T))
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = mask_of_heads(self.sharding, attention_mask)
        visibility = make_visibility(config, attention_mask, slots, cache, segment_ids)
        rope = rotary_embedding(config, position_ids, x.dtype)

        at = positions_to_keep(keep, T)
        cuts = at is not None and not output_hidden_states  # which are of all positions
        hidden_states, attentions, filled = [], [], []
        run = layer_runner(self, static=(4, 5), changes=self._first_of_kind)
        for i, layer in enumerate(self.layers):
            hidden_states.append(x)
            own = None if cache is None else cache.replace(layers=(cache.layers[i],))
            kept = at if cuts and i == len(self.layers) - 1 else None
            x, layer_cache, weights = run(layer, x, rope, visibility, own, output_attentions, deterministic, kept)
            filled.append(layer_cache)
            if weights is not None:
                attentions.append(weights)
        x = self.norm(x)
        hidden_states.append(x)

        if not use_cache:
            cache = None
        elif cache is None:
            cache = KVCache(tuple(filled), jnp.full((x.shape[0],), T, jnp.int32))
        else:
            cache = cache.replace(layers=tuple(filled), length=cache.length + T, bound=bound)
        return BaseModelOutputWithPast(
            last_hidden_state=x if at is None or cuts else keep_positions(x, at),
            past_key_values=cache,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _first_of_kind(self, layer: Qwen2DecoderLayer) -> dict[str, int]:
        """The index of the first layer with the attention of this one, which is all that an index decides."""
        kinds = self.config.layer_types
        return {"layer_index": kinds.index(kinds[layer.layer_index])}

    def embed(self, input_ids: jax.Array | None, inputs_embeds: jax.Array | None) -> jax.Array:
        """[B, T, D] in the compute dtype, from whichever of the two is given."""
        if input_ids is not None and inputs_embeds is None:
            x = self.embed_tokens(input_ids)
        elif inputs_embeds is not None and input_ids is None:
            x = inputs_embeds
        else:
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        return x.astype(self.dtype or self.embed_tokens.weight.dtype)


class Qwen2ForCausalLM(nn.Module):
    """The decoder with a language-model head, tied to the embedding when the config says so. Fields as Qwen2Model."""

    config: Qwen2Config
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    sharding: Sharding | None = None
    attention: Attention = Attention()

    def setup(self) -> None:
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        self.model = Qwen2Model(config, *dtypes, self.sharding, self.attention)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.vocab_size, False, config.initializer_range, *dtypes, self.sharding)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: jax.Array | None = None,
        labels: jax.Array | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: jax.Array | None = None,
        logits_to_keep: int | jax.Array = 0,
        num_logits_to_keep: int | None = None,
        segment_ids: jax.Array | None = None,
        shift_labels: jax.Array | None = None,
        num_items_in_batch: ArrayLike | None = None,
        deterministic: bool = True,
    ) -> CausalLMOutputWithPast | tuple:
        """Run the decoder and its head. Arguments as Qwen2Model's, and:

        Args:
          labels: [B, T] int; moved by one here, -100 is ignored. All ignored gives NaN, as in Transformers.
          logits_to_keep: n keeps the last n positions (0: all); [P] or [B, P] int keeps those positions.
          num_logits_to_keep: its older name.
          shift_labels: [B, T] int, already moved; used in place of labels, which then only ask for the loss.
          num_items_in_batch: divides the summed loss (gradient accumulation).

        Raises:
          ValueError: as Qwen2Model; a bool logits_to_keep, whose result would have no static shape.
        """
        keep = logits_to_keep if num_logits_to_keep is None else num_logits_to_keep
        output = self.model.forward(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_attentions,
            output_hidden_states, cache_position, segment_ids, deterministic, keep,
        )  # fmt: skip
        x = output.last_hidden_state
        logits = self.model.embed_tokens.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)
        loss = None
        if labels is not None or shift_labels is not None:
            loss = causal_lm_loss(logits, labels, shift_labels, num_items_in_batch)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result if _default(return_dict, self.config.return_dict) else result.to_tuple()


def positions_to_keep(keep: int | jax.Array, T: int) -> jax.Array | None:
    """[P] or [B, P] of T positions, as logits_to_keep of Qwen2ForCausalLM says; None: all."""
    if isinstance(keep, int):
        return jnp.arange(T)[-keep:] if keep else None
    if keep.dtype == bool:
        raise ValueError("logits_to_keep is bool: its result has no static shape; give the positions as integers")
    return keep


def keep_positions(x: jax.Array, at: jax.Array) -> jax.Array:
    """x [B, T, D] at positions [P] or [B, P]."""
    return x[:, at] if at.ndim == 1 else jnp.take_along_axis(x, at[..., None], axis=1)


def packed_segments(position_ids: jax.Array) -> jax.Array:
    """[B, T] int32: the segments of rows that are packed, a new one wherever a position does not follow the last.

    As find_packed_sequence_indices in transformers/masking_utils.py, for rows without a mask and without a cache.
    """
    begins = jnp.diff(position_ids, axis=1) != 1
    return jnp.pad(jnp.cumsum(begins, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def token_slots(cache: KVCache | None, T: int) -> jax.Array:
    """[B, T] int32 ([1, T] where rows do not differ): the cache slots that T new tokens take."""
    new = jnp.arange(T, dtype=jnp.int32)[None]
    return new if cache is None else cache.length[..., None] + new


def make_visibility(
    config: Qwen2Config,
    attention_mask: jax.Array | None,
    slots: jax.Array,
    cache: KVCache | None,
    segment_ids: jax.Array | None,
) -> Visibility:
    """Who sees whom, from the caller's mask [B, M] or [B, 1 or N, T, M] and the slots [B, T] of the new tokens."""
    T = slots.shape[1]
    readable, capacity = (T, T) if cache is None else (cache.readable, cache.capacity)
    if segment_ids is not None and cache is not None:
        raise ValueError("segment_ids is for whole packed rows; it cannot go with past_key_values")
    if attention_mask is None:
        return Visibility(slots, None, segment_ids, segment_ids)
    shape, columns = attention_mask.shape, attention_mask.shape[-1]
    if attention_mask.ndim not in (2, 4) or not T <= columns <= capacity:
        raise ValueError(
            f"attention_mask has shape {shape}; expected [batch, slots] or [batch, 1 or heads, {T}, slots] "
            f"with {T} to {capacity} slots (the tokens seen so far and the {T} new ones)"
        )
    missing = readable - columns  # slots past the mask are the future, which causality hides
    if attention_mask.ndim == 2:
        mask = attention_mask.astype(bool)[:, :readable]
        mask = jnp.pad(mask, ((0, 0), (0, max(missing, 0))), constant_values=True)
        return Visibility(slots, mask, segment_ids, segment_ids)
    if shape[1] not in (1, config.num_attention_heads) or shape[2] != T:
        raise ValueError(
            f"attention_mask has shape {shape}; expected [batch, 1 or {config.num_attention_heads}, {T}, slots]"
        )
    if attention_mask.dtype != bool and not jnp.issubdtype(attention_mask.dtype, jnp.floating):
        raise ValueError(f"a 4D attention_mask is bool (True: visible) or float (added), not {attention_mask.dtype}")
    hidden = False if attention_mask.dtype == bool else -jnp.inf
    full = jnp.pad(attention_mask[..., :readable], ((0, 0),) * 3 + ((0, max(missing, 0)),), constant_values=hidden)
    return Visibility(slots, full=full)


def _default(value: bool | None, default: bool) -> bool:
    return default if value is None else value
