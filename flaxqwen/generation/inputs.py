"""Prompts on their way into the programs: checked, padded to few lengths, counted against the cache.

Host code on numpy arrays: no operation of jax outside the programs, each would be a compilation.

Axes: B batch (prompts), P columns of the prompts, T new prompt tokens, S cache capacity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import flax.linen as nn
import jax
import numpy as np
from jax.typing import ArrayLike

from flaxqwen.cache import KVCache, cut_cache
from flaxqwen.config import Qwen2AudioConfig, Qwen2Config
from flaxqwen.generation import loop
from flaxqwen.generation.config import GenerationConfig, ResolvedConfig
from flaxqwen.generation.programs import Programs

# Prompts are padded to these lengths and caches sized by them, so that few programs exist.
SMALLEST_PROMPT, SMALLEST_CACHE, LARGEST_STEP = 32, 512, 2048


class CausalLM(Protocol):
    """What generate() needs of a model."""

    @property
    def module(self) -> nn.Module: ...
    @property
    def params(self) -> dict[str, Any]: ...
    @property
    def variables(self) -> dict[str, Any]: ...
    @property
    def config(self) -> Qwen2Config | Qwen2AudioConfig: ...
    @property
    def generation_config(self) -> GenerationConfig: ...
    @property
    def programs(self) -> Programs: ...


@dataclass(frozen=True)
class Inputs:
    """Checked prompts.

    input_ids: [B, P] int32; [B, 0] where the prompts are embeddings alone.
    attention_mask: [B, P] bool. cached: how many columns the cache holds. embeds: [B, P, D] float32, or None.
    guided: [2B, P'] int32, the prompts and then the negative ones of guidance, or None; attention_mask is then of it.
    audio: that of all columns, or None.
    positions: [B, P] int32, of the user, or [2B, P'] of `guided`; None: counted over attention_mask.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    cached: int = 0
    embeds: np.ndarray | None = None
    guided: np.ndarray | None = None
    audio: loop.Audio | None = None
    positions: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Tokens of each prompt, padding included, as the model runs them."""
        return self.attention_mask.shape[1]

    @property
    def prompt_mask(self) -> np.ndarray:
        """[B, P] bool, of input_ids."""
        return self.attention_mask[: len(self.input_ids), self.length - self.input_ids.shape[1] :]

    @property
    def padded(self) -> bool:
        """Whether any column is padding."""
        return not self.attention_mask.all()

    @property
    def position_ids(self) -> np.ndarray:
        """[B, P] int32. Source: `_prepare_position_ids_for_generation` in transformers/generation/utils.py."""
        if self.positions is not None:
            return self.positions
        return np.where(self.attention_mask, np.cumsum(self.attention_mask, axis=1) - 1, 0).astype(np.int32)

    def repeat(self, copies: int) -> Inputs:
        """Each row `copies` times, next to itself."""
        own = {name: getattr(self, name) for name in ("input_ids", "attention_mask", "embeds", "guided", "positions")}
        index = self.audio and self.audio.index
        own, index = jax.tree.map(lambda a: np.repeat(a, copies, axis=0), (own, index))
        return replace(self, **own, audio=self.audio and self.audio.replace(index=index))

    def guide(self, negative_ids: np.ndarray, negative_mask: np.ndarray) -> Inputs:
        """With negative prompts [B, Q] for guidance, both padded on the left to one length."""
        width = max(self.length, negative_ids.shape[1])

        def stack(*parts: np.ndarray, value: int = 0) -> np.ndarray:
            padded = [np.pad(part, ((0, 0), (width - part.shape[1], 0)), constant_values=value) for part in parts]
            return np.concatenate(padded)

        # Those of the negative prompts are their columns: Transformers' processor runs them without position_ids.
        columns = np.broadcast_to(np.arange(negative_ids.shape[1], dtype=np.int32), negative_ids.shape)
        positions = stack(self.position_ids, columns)
        mask, audio = stack(self.attention_mask, negative_mask), self.audio
        if audio is not None:  # the negative prompts have none
            audio = audio.replace(index=stack(np.asarray(audio.index), np.full_like(negative_ids, -1), value=-1))
        guided = stack(self.input_ids, negative_ids)
        return replace(self, attention_mask=mask, guided=guided, audio=audio, positions=positions)


def bucket(n: int, smallest: int) -> int:
    """The length that n is padded to: a power of two, from 2,048 on a multiple of 2,048."""
    if n > LARGEST_STEP:
        return -(-n // LARGEST_STEP) * LARGEST_STEP
    return max(smallest, 1 << (n - 1).bit_length())


def make_prompt(request: Inputs, tokens: int, capacity: int, stop: int | None = None) -> loop.Prompt:
    """The columns that the cache does not hold yet, padded on the right to `tokens`; buffers of `capacity` columns.

    stop: the column to end before, where the rest is run later.
    """
    ids, mask, audio = request.input_ids, request.attention_mask, request.audio
    length = request.length if stop is None else stop
    new = slice(request.cached, length)

    def fill(values: np.ndarray, width: int, value: int = 0) -> np.ndarray:
        padding = ((0, 0), (0, width - values.shape[1]), (0, 0))
        return np.pad(values, padding[: values.ndim], constant_values=value)

    return loop.Prompt(
        tokens=fill(next(a for a in (request.embeds, request.guided, ids) if a is not None)[:, new], tokens),
        position_ids=fill(request.position_ids[:, new], tokens),
        slot_mask=fill(mask, capacity, True) if request.padded else None,
        input_ids=fill(ids, capacity),
        cur_len=np.int32(ids.shape[1]),
        last=np.int32(length - request.cached - 1),
        audio=audio and audio.replace(index=fill(np.asarray(audio.index)[:, new], tokens, -1)),
    )


def to_array(name: str, value: Any) -> Any:
    """An array of numpy or jax; jit itself takes 64-bit numbers for the 32-bit ones that jax computes in."""
    if isinstance(value, jax.Array):
        return value
    if hasattr(value, "detach"):  # torch's, maybe on its own device or in a graph
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value  # numpy has no such dtype
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} is no array: {error}") from None


def check_input_ids(ids: ArrayLike, config: Qwen2Config) -> np.ndarray:
    """Prompts as [B, P] int32; ValueError for what the model cannot continue."""
    array = np.asarray(ids)
    if array.ndim != 2:
        raise ValueError(f"input_ids has shape {array.shape}; expected [batch, tokens]")
    if array.size == 0:
        raise ValueError(f"the prompt is empty: input_ids has shape {array.shape}; give at least one token")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"input_ids is {array.dtype}; expected integers")
    check_token_ids(array, config)
    if array.shape[1] > config.context_length:
        raise ValueError(
            f"the prompt has {array.shape[1]} tokens, the model's context is {config.context_length}: shorten it"
        )
    return array.astype(np.int32)


def check_embeds(embeds: ArrayLike, ids: np.ndarray | None, config: Qwen2Config) -> np.ndarray:
    """Prompts as embeddings [B, P, D] float32; ValueError for a shape that fits neither the model nor ids [B, P]."""
    array = np.asarray(to_array("inputs_embeds", embeds)).astype(np.float32)
    if array.ndim != 3 or 0 in array.shape or array.shape[2] != config.hidden_size:
        raise ValueError(f"inputs_embeds has shape {array.shape}; expected [batch, tokens, {config.hidden_size}]")
    if ids is not None and ids.shape != array.shape[:2]:
        raise ValueError(f"inputs_embeds is of {array.shape[:2]} tokens, input_ids of {ids.shape}: they are the same")
    if array.shape[1] > config.context_length:
        raise ValueError(f"the prompt has {array.shape[1]} tokens, the model's context is {config.context_length}")
    return array


def check_token_ids(ids: ArrayLike, config: Qwen2Config) -> None:
    """ValueError for a token id that the embedding has no row for: XLA would clamp it in silence."""
    array = np.asarray(ids)
    outside = array[(array < 0) | (array >= config.vocab_size)]
    if outside.size:
        raise ValueError(f"token id {outside[0]} is out of the vocabulary: expected 0 to {config.vocab_size - 1}")


def check_attention_mask(
    mask: ArrayLike | None, ids: np.ndarray, options: ResolvedConfig, shape: tuple[int, ...]
) -> np.ndarray:
    """The mask as [B, P] bool. None: padding is where the pad token is, if that is no end-of-sequence token too.

    shape: (B, P), that of ids, unless the prompts are embeddings alone.

    Source: `_prepare_attention_mask_for_generation` in transformers/generation/utils.py.
    """
    if mask is None:
        pad = options.pad_token_id
        inferred = pad is not None and pad not in options.eos_token_id and (ids == pad).any()
        return ids != pad if inferred else np.ones(shape, bool)
    return check_mask(mask, shape)


def check_positions(positions: ArrayLike | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """Position ids of the prompts as [B, P] int32; a first axis of 1 is for every row, as in forward."""
    if positions is None:
        return None
    array = np.asarray(to_array("position_ids", positions))
    if array.shape not in (shape, (1, *shape[1:])) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"position_ids is {array.dtype} {array.shape}; expected integers {shape}, as the prompts")
    if (array < 0).any():
        raise ValueError(f"position_ids has {array.min()}; positions are not negative")
    return np.broadcast_to(array, shape).astype(np.int32)


def check_mask(mask: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    """A mask of 0 and 1 as bool; ValueError where it is not, or not of the shape (B, P)."""
    array = np.asarray(to_array("attention_mask", mask))
    if array.shape != shape:
        raise ValueError(f"attention_mask has shape {array.shape}; expected {shape}, as the prompts")
    if not np.isin(array, (0, 1)).all():
        raise ValueError("attention_mask has values other than 0 and 1")
    return array.astype(bool)


def cached_length(cache: KVCache | None, ids: np.ndarray) -> int:
    """How many leading columns of ids the cache holds."""
    if cache is None:
        return 0
    if not isinstance(cache, KVCache):
        raise ValueError(f"past_key_values must be a KVCache, of forward or generate(), found {type(cache).__name__}")
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(cache)):
        raise ValueError(
            "past_key_values was given to an earlier call, which has gone on in its memory: take the cache of that "
            "call's result, or give each call a copy, jax.tree.map(jnp.copy, past_key_values)"
        )
    lengths = np.unique(jax.device_get(cache.length))
    if len(jax.device_get(cache.length)) != len(ids) or len(lengths) != 1:
        raise ValueError(
            f"past_key_values has rows of lengths {jax.device_get(cache.length).tolist()}; "
            f"expected {len(ids)} rows, all of one length"
        )
    if lengths[0] >= ids.shape[1]:
        raise ValueError(
            f"past_key_values holds {lengths[0]} tokens and input_ids has {ids.shape[1]}: "
            "input_ids is the whole sequence, with at least one token more than the cache"
        )
    return int(lengths[0])


def with_negative(
    request: Inputs, negative_ids: ArrayLike | None, negative_mask: ArrayLike | None, config: Qwen2Config
) -> Inputs:
    """The prompts with negative ones [B, Q] beside them for guidance; default: the last token of each prompt.

    Raises:
      ValueError: negative prompts that do not fit; prompts that guidance cannot go with.
    """
    if request.embeds is not None or request.cached or request.positions is not None:
        given = "inputs_embeds, past_key_values or position_ids"
        raise ValueError(f"guidance_scale cannot go with {given}: give the whole input_ids alone")
    if negative_ids is None:
        if negative_mask is not None:
            raise ValueError("negative_prompt_attention_mask needs negative_prompt_ids")
        return request.guide(request.input_ids[:, -1:], np.ones((len(request.input_ids), 1), bool))
    ids = check_input_ids(negative_ids, config)
    if len(ids) != len(request.input_ids):
        raise ValueError(f"negative_prompt_ids has {len(ids)} rows, expected {len(request.input_ids)}, as the prompts")
    mask = np.ones(ids.shape, bool) if negative_mask is None else check_mask(negative_mask, ids.shape)
    return request.guide(ids, mask)


def prompt_cache(cache: KVCache, request: Inputs) -> KVCache:
    """The cache of the prompts' rows alone, without the padding and the negative prompts of guidance."""
    if request.guided is None:
        return cache
    rows, skip = cache.layers[0].key.shape[0] // 2, request.length - request.input_ids.shape[1]
    return cut_cache(cache.replace(length=np.asarray(cache.length) - skip), rows=rows, skip=skip)


def cache_dtype(model: CausalLM, options: ResolvedConfig | None = None) -> np.dtype:
    """The compute dtype, but float32 for bfloat16 on a CPU, where XLA updates a bfloat16 array by converting all of it.

    The values are the same; a token of Qwen2.5-0.5B takes 24 KB in place of 12. int8 where the options say so.
    """
    if options is not None and (options.cache_dtype == "int8" or options.cache_implementation == "quantized"):
        return np.dtype(np.int8)
    dtype = np.dtype(model.module.dtype or jax.tree.leaves(model.params)[0].dtype)
    return np.dtype(np.float32) if platform(model.params) == "cpu" else dtype


def platform(params: Any) -> str:
    return next(iter(jax.tree.leaves(params)[0].devices())).platform
