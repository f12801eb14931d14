"""Qwen2 with a classification or question-answering head (transformers/modeling_layers.py, Generic*).

Axes: B batch, T tokens, D model.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flaxqwen.cache import KVCache
from flaxqwen.config import Qwen2Config
from flaxqwen.models.losses import cross_entropy, question_answering_loss, sequence_classification_loss
from flaxqwen.models.outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from flaxqwen.models.qwen2 import Qwen2Model
from flaxqwen.ops.dispatch import Attention
from flaxqwen.ops.linear import Linear
from flaxqwen.sharding import Sharding


class Qwen2ForSequenceClassification(nn.Module):
    """One label (or num_labels scores) per row, read at its last token that is not padding."""

    config: Qwen2Config
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    sharding: Sharding | None = None
    attention: Attention = Attention()

    def setup(self) -> None:
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        self.model = Qwen2Model(config, *dtypes, self.sharding, self.attention)
        self.score = Linear(config.num_labels, False, config.initializer_range, *dtypes, self.sharding)

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
        deterministic: bool = True,
    ) -> SequenceClassifierOutputWithPast | tuple:
        """As Qwen2Model; labels: [B] int, or [B, num_labels] float (see sequence_classification_loss).

        Padding is told by config.pad_token_id, not by the mask, as in Transformers; with inputs_embeds the last
        position is read.

        Raises:
          ValueError: several rows and no pad_token_id in the config.
        """
        output = self.model.forward(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_attentions,
            output_hidden_states, deterministic=deterministic,
        )  # fmt: skip
        last = self.last_positions(input_ids, output.last_hidden_state.shape)
        pooled = jnp.take_along_axis(output.last_hidden_state, last[:, None, None], axis=1)[:, 0]  # [B, D]
        logits = self.score(pooled)
        loss = None if labels is None else sequence_classification_loss(logits, labels, self.config.problem_type)
        result = SequenceClassifierOutputWithPast(
            loss, logits, output.past_key_values, output.hidden_states, output.attentions
        )
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()

    def last_positions(self, input_ids: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
        """[B] int32: each row's last position that holds no padding, right- or left-padded."""
        B, T = shape[:2]
        pad = self.config.pad_token_id
        if pad is None and B != 1:
            raise ValueError(
                f"a batch of {B} rows needs config.pad_token_id, to find each row's last token; it is None"
            )
        if pad is None or input_ids is None:
            return jnp.full((B,), T - 1, jnp.int32)
        return jnp.argmax(jnp.arange(T, dtype=jnp.int32) * (input_ids != pad), axis=-1)


class Qwen2ForTokenClassification(nn.Module):
    """num_labels scores per token."""

    config: Qwen2Config
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    sharding: Sharding | None = None
    attention: Attention = Attention()

    def setup(self) -> None:
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        self.model = Qwen2Model(config, *dtypes, self.sharding, self.attention)
        self.dropout = nn.Dropout(config.head_dropout)
        self.score = Linear(config.num_labels, True, config.initializer_range, *dtypes, self.sharding)

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
        deterministic: bool = True,
    ) -> TokenClassifierOutput | tuple:
        """As Qwen2Model; labels: [B, T] int, -100 is ignored. deterministic=False applies dropout before the head."""
        output = self.model.forward(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_attentions,
            output_hidden_states, deterministic=deterministic,
        )  # fmt: skip
        logits = self.score(self.dropout(output.last_hidden_state, deterministic=deterministic))
        loss = None if labels is None else cross_entropy(logits, labels)
        result = TokenClassifierOutput(loss, logits, output.hidden_states, output.attentions)
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()


class Qwen2ForQuestionAnswering(nn.Module):
    """Where in the row the answer starts and ends. The decoder is called `transformer` here, as in Transformers."""

    config: Qwen2Config
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    sharding: Sharding | None = None
    attention: Attention = Attention()

    def setup(self) -> None:
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        self.transformer = Qwen2Model(config, *dtypes, self.sharding, self.attention)
        self.qa_outputs = Linear(2, True, config.initializer_range, *dtypes, self.sharding)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: jax.Array | None = None,
        start_positions: jax.Array | None = None,
        end_positions: jax.Array | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        deterministic: bool = True,
    ) -> QuestionAnsweringModelOutput | tuple:
        """As Qwen2Model; start_positions, end_positions: [B] int, both or no loss."""
        output = self.transformer.forward(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, False, output_attentions,
            output_hidden_states, deterministic=deterministic,
        )  # fmt: skip
        logits = self.qa_outputs(output.last_hidden_state)  # [B, T, 2]
        start, end = logits[..., 0], logits[..., 1]
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = question_answering_loss(start, end, start_positions, end_positions)
        result = QuestionAnsweringModelOutput(loss, start, end, output.hidden_states, output.attentions)
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()
