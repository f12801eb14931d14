"""What forward returns: pytrees with Transformers' names (transformers/modeling_outputs.py).

Axes: B batch, T new tokens, D model, N query heads, S cache slots, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.struct
import jax

from flaxqwen.cache import KVCache


class ModelOutput:
    """Fields by name, by key or by position; those that are None do not count, as in Transformers."""

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(self[name] for name in self)

    def keys(self) -> tuple[str, ...]:
        """Names of the fields that are not None."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # of the PyTreeNode that each subclass is
        return tuple(field.name for field in fields if getattr(self, field.name) is not None)

    def __getitem__(self, key: int | slice | str) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(f"{type(self).__name__} has no {key!r}; it has {', '.join(self.keys())}")
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


class BaseModelOutput(ModelOutput, flax.struct.PyTreeNode):
    """last_hidden_state: [clips, positions, width] of an encoder; hidden_states: what each layer is given, and that;
    attentions: [clips, heads, positions, positions] per layer."""

    last_hidden_state: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


class BaseModelOutputWithPast(ModelOutput, flax.struct.PyTreeNode):
    """last_hidden_state [B, T, D]; hidden_states: layers + 1 of [B, T, D], the last one normed; attentions: a
    [B, N, T, S] per layer; past_key_values: the cache with the new tokens in it."""

    last_hidden_state: jax.Array
    past_key_values: KVCache | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


class CausalLMOutputWithPast(ModelOutput, flax.struct.PyTreeNode):
    """loss: float32 scalar; logits [B, T, V], or of the positions kept."""

    loss: jax.Array | None = None
    logits: jax.Array | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


class SequenceClassifierOutputWithPast(ModelOutput, flax.struct.PyTreeNode):
    """loss: scalar; logits [B, num_labels], of each row's last token that is not padding."""

    loss: jax.Array | None = None
    logits: jax.Array | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


class TokenClassifierOutput(ModelOutput, flax.struct.PyTreeNode):
    """loss: scalar; logits [B, T, num_labels]."""

    loss: jax.Array | None = None
    logits: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


class QuestionAnsweringModelOutput(ModelOutput, flax.struct.PyTreeNode):
    """loss: scalar; start_logits and end_logits [B, T]."""

    loss: jax.Array | None = None
    start_logits: jax.Array | None = None
    end_logits: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


class Qwen2AudioModelOutputWithPast(ModelOutput, flax.struct.PyTreeNode):
    """As BaseModelOutputWithPast, with the attention_mask that was used."""

    last_hidden_state: jax.Array
    past_key_values: KVCache | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    attention_mask: jax.Array | None = None


class Qwen2AudioCausalLMOutputWithPast(CausalLMOutputWithPast):
    """As CausalLMOutputWithPast, with the attention_mask that was used."""

    attention_mask: jax.Array | None = None
