"""generate(): from a user's arguments to the compiled programs of loop.py, and back to Transformers' outputs.

Everything here is host code on numpy arrays: no operation of jax outside the programs, each would be a compilation.

Axes: B batch (prompts), P columns of the prompts, T new prompt tokens, S cache capacity, n new tokens.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import flax.linen as nn
import flax.struct
import jax
import numpy as np
from jax.typing import ArrayLike

from flaxqwen.cache import KVCache, grow_cache, repeat_cache
from flaxqwen.config import Qwen2Config
from flaxqwen.generation import loop
from flaxqwen.generation.config import GenerationConfig, ResolvedConfig, resolve
from flaxqwen.generation.processors import (
    LogitsProcessor,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    pad_ids,
)
from flaxqwen.generation.sampling import TokenChoice
from flaxqwen.models.outputs import ModelOutput

# Prompts are padded to these lengths and caches sized by them, so that few programs exist.
SMALLEST_PROMPT, SMALLEST_CACHE, LARGEST_STEP = 32, 512, 2048

# (steps per program, programs dispatched before the first is read). On a CPU the host is the device: nothing is won by
# running ahead, and up to a program's steps are lost at the end of a sequence.
CHUNK = {"cpu": (4, 0)}
DEFAULT_CHUNK = (32, 1)


class Streamer(Protocol):
    """What streams: Transformers' TextStreamer, TextIteratorStreamer and the like work as they are."""

    def put(self, value: np.ndarray) -> None:
        """First the prompts [B, P], then the tokens of each step [B]."""

    def end(self) -> None:
        """Generation is over."""


class CausalLM(Protocol):
    """What generate() needs of a model."""

    @property
    def module(self) -> nn.Module: ...
    @property
    def params(self) -> dict[str, Any]: ...
    @property
    def config(self) -> Qwen2Config: ...
    @property
    def generation_config(self) -> GenerationConfig: ...


class GenerateDecoderOnlyOutput(ModelOutput, flax.struct.PyTreeNode):
    """Transformers' output of return_dict_in_generate.

    sequences: [B, P + n] int32, prompts included. scores, logits: n of [B, V] float32, processed and raw, if asked for.
    past_key_values: the cache of all tokens but the last, to be given to another generate().
    """

    sequences: np.ndarray
    scores: tuple[np.ndarray, ...] | None = None
    logits: tuple[np.ndarray, ...] | None = None
    past_key_values: KVCache | None = None


@dataclass(frozen=True)
class Inputs:
    """Checked prompts: input_ids [B, P] int32, attention_mask [B, P] bool, and how many columns the cache holds."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    cached: int = 0

    @property
    def padded(self) -> bool:
        """Whether any column is padding."""
        return not self.attention_mask.all()

    def repeat(self, copies: int) -> Inputs:
        """Each row `copies` times, next to itself."""
        ids, mask = (np.repeat(a, copies, axis=0) for a in (self.input_ids, self.attention_mask))
        return Inputs(ids, mask, self.cached)


def bucket(n: int, smallest: int) -> int:
    """The length that n is padded to: a power of two, from 2,048 on a multiple of 2,048."""
    if n > LARGEST_STEP:
        return -(-n // LARGEST_STEP) * LARGEST_STEP
    return max(smallest, 1 << (n - 1).bit_length())


def generate(
    model: CausalLM,
    inputs: ArrayLike | None = None,
    generation_config: GenerationConfig | Mapping[str, Any] | Any | None = None,
    *,
    input_ids: ArrayLike | None = None,
    attention_mask: ArrayLike | None = None,
    past_key_values: KVCache | None = None,
    streamer: Streamer | None = None,
    **options: Any,
) -> np.ndarray | GenerateDecoderOnlyOutput:
    """Continue prompts, as `GenerationMixin.generate` in transformers/generation/utils.py.

    Args:
      inputs, input_ids: [B, P] int, one or the other. None: the bos token, if the config has one.
      generation_config: ours, a dict, or a Transformers GenerationConfig; default: the model's.
      attention_mask: [B, P] of 0 and 1; default: as Transformers infers it from the pad token, where it can.
      past_key_values: the cache of an earlier generate() or forward over a beginning of input_ids; only the rest is
        run. It is donated: use the one in the result from then on.
      streamer: gets the prompts, then the tokens of each step.
      options: any field of GenerationConfig, over generation_config. `seed` seeds the draws (default: drawn from
        numpy's global generator, which transformers.set_seed seeds). The draws are not torch's; the distribution is.

    Returns:
      [B x num_return_sequences, P + n] int32 token ids, prompts included, finished rows filled with the pad token; a
      numpy array, because Transformers' tokenizers decode those. With return_dict_in_generate a
      GenerateDecoderOnlyOutput.

    Raises:
      ValueError: what Transformers refuses (config.resolve), and prompts that are empty, out of the vocabulary or
        longer than the context, before anything compiles.
    """
    ids = _one_of(inputs, input_ids)
    if ids is None:
        ids = _bos_prompt(model, generation_config, options)
    ids = check_input_ids(ids, model.config)
    resolved = resolve(
        model.generation_config,
        generation_config,
        options,
        input_length=ids.shape[1],
        max_position_embeddings=model.config.max_position_embeddings,
        arguments=("inputs", "input_ids", "attention_mask", "past_key_values", "generation_config"),
    )
    mask = check_attention_mask(attention_mask, ids, resolved)
    request = Inputs(ids, mask, _cached_length(past_key_values, ids))
    total = resolved.max_length
    if total > model.config.max_position_embeddings:
        warnings.warn(
            f"prompt and new tokens come to {total}, past the context of {model.config.max_position_embeddings} "
            "that the model was trained for",
            stacklevel=2,
        )
    copies = resolved.num_return_sequences
    prompts = np.repeat(ids, copies, axis=0)
    if streamer is not None:
        streamer.put(prompts)
    steps: list[loop.StepOutput] = []
    cache: KVCache | None = None
    for output, cache in run(model, request, resolved, past_key_values):  # noqa: B007 (the last cache is the result's)
        steps.append(output)
        if streamer is not None:
            for tokens in output.tokens:
                streamer.put(tokens)
    if streamer is not None:
        streamer.end()
    new = np.concatenate([output.tokens for output in steps]).T
    sequences = np.concatenate([prompts, new], axis=1)
    if not resolved.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=tuple(s for o in steps if o.scores is not None for s in o.scores) if resolved.output_scores else None,
        logits=tuple(s for o in steps if o.logits is not None for s in o.logits) if resolved.output_logits else None,
        past_key_values=cache if resolved.use_cache else None,
    )


def run(
    model: CausalLM, request: Inputs, options: ResolvedConfig, cache: KVCache | None = None
) -> Iterator[tuple[loop.StepOutput, KVCache]]:
    """The host's part of the loop: dispatch programs, read their results one program late, stop in time.

    Yields:
      StepOutput of numpy arrays, [steps, B, ...], cut at the step that ends the last row, and the cache, which is valid
      only with the last yield.
    """
    steps, ahead = CHUNK.get(_platform(model.params), DEFAULT_CHUNK)
    copies = options.num_return_sequences
    if cache is not None and copies > 1:  # the rows must part before the shared prompt is run: the cache is donated
        request, cache, copies = request.repeat(copies), repeat_cache(cache, copies=copies), 1
    choice = make_choice(request, options, copies)
    keep = {"keep_scores": options.output_scores, "keep_logits": options.output_logits}
    state, output = start(model, request, choice, cache, copies, options.max_new_tokens + steps, keep)
    length, capacity = request.input_ids.shape[1], state.cache.capacity
    queue = deque([output])
    dispatched, done = 1, 0
    finished = np.zeros(len(request.input_ids) * copies, bool)
    while done < options.max_new_tokens and not finished.all():
        while dispatched < options.max_new_tokens and len(queue) <= ahead:
            bound = min(bucket(length + dispatched + steps, SMALLEST_CACHE), capacity)
            state = state.replace(cache=state.cache.replace(bound=bound))
            state, output = loop.decode(model.module, model.params, state, choice, steps=steps, **keep)
            queue.append(output)
            dispatched += steps
        output = jax.device_get(queue.popleft())
        count, finished = count_steps(output.tokens[: options.max_new_tokens - done], finished, options.eos_token_id)
        done += count
        lengths = np.full(finished.shape, length + done - 1, np.int32)
        yield (
            jax.tree.map(partial(_first, count), output),
            state.cache.replace(length=lengths, bound=None),
        )


def start(
    model: CausalLM,
    request: Inputs,
    choice: TokenChoice,
    cache: KVCache | None,
    copies: int,
    room: int,
    keep: dict[str, bool],
) -> tuple[loop.DecodeState, loop.StepOutput]:
    """Prefill what the cache does not hold yet, in a cache with room for `room` tokens more."""
    tokens = bucket(request.input_ids.shape[1] - request.cached, SMALLEST_PROMPT)
    # The padding of a bucket is written too.
    capacity = bucket(request.cached + tokens + room, SMALLEST_CACHE)
    if cache is not None:
        capacity = max(capacity, cache.capacity)
        cache = cache if cache.capacity == capacity else grow_cache(cache, capacity=capacity)
        cache = cache.replace(bound=min(bucket(request.cached + tokens, SMALLEST_CACHE), capacity))
    return loop.prefill(
        model.module,
        model.params,
        make_prompt(request, tokens, capacity),
        choice,
        cache,
        capacity=capacity,
        cache_dtype=cache_dtype(model),
        copies=copies,
        **keep,
    )


def _first(count: int, array: np.ndarray) -> np.ndarray:
    return array[:count]


def count_steps(tokens: np.ndarray, finished: np.ndarray, eos_ids: tuple[int, ...]) -> tuple[int, np.ndarray]:
    """How many of the steps [steps, B] are needed to end every row, and which rows [B] have ended after them."""
    for step, row_tokens in enumerate(tokens):
        finished = finished | np.isin(row_tokens, eos_ids)
        if finished.all():
            return step + 1, finished
    return len(tokens), finished


def make_choice(request: Inputs, options: ResolvedConfig, copies: int) -> TokenChoice:
    """The processors that the options ask for, in Transformers' order (`_get_logits_processor`), and the draw."""
    processors: list[LogitsProcessor] = []
    if options.repetition_penalty != 1.0:
        padding = np.repeat(request.attention_mask.argmax(axis=1), copies).astype(np.int32) if request.padded else None
        processors.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty, padding))
    if options.min_length > 0 and options.eos_token_id:
        processors.append(MinLengthLogitsProcessor(options.min_length, options.eos_token_id))
    if options.do_sample:
        processors.append(TemperatureLogitsWarper(options.temperature))
        if options.top_k != 0:
            processors.append(TopKLogitsWarper(options.top_k))
        if options.top_p < 1.0:
            processors.append(TopPLogitsWarper(options.top_p))
    seed = np.random.randint(2**32, dtype=np.uint32) if options.seed is None else np.uint32(options.seed)
    pad = 0 if options.pad_token_id is None else options.pad_token_id
    return TokenChoice(tuple(processors), pad_ids(options.eos_token_id), np.int32(pad), seed, options.do_sample)


def make_prompt(request: Inputs, tokens: int, capacity: int) -> loop.Prompt:
    """The columns that the cache does not hold yet, padded on the right to `tokens`; buffers of `capacity` columns."""
    ids, mask = request.input_ids, request.attention_mask
    length = ids.shape[1]
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, 0)
    new = slice(request.cached, length)

    def fill(values: np.ndarray, width: int, value: int = 0) -> np.ndarray:
        padding = ((0, 0), (0, width - values.shape[1]))
        return np.pad(values, padding, constant_values=value)

    return loop.Prompt(
        tokens=fill(ids[:, new], tokens),
        position_ids=fill(positions[:, new].astype(np.int32), tokens),
        slot_mask=fill(mask, capacity, True) if request.padded else None,
        input_ids=fill(ids, capacity),
        cur_len=np.int32(length),
        last=np.int32(length - request.cached - 1),
    )


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


def check_token_ids(ids: ArrayLike, config: Qwen2Config) -> None:
    """ValueError for a token id that the embedding has no row for: XLA would clamp it in silence."""
    array = np.asarray(ids)
    outside = array[(array < 0) | (array >= config.vocab_size)]
    if outside.size:
        raise ValueError(f"token id {outside[0]} is out of the vocabulary: expected 0 to {config.vocab_size - 1}")


def check_attention_mask(mask: ArrayLike | None, ids: np.ndarray, options: ResolvedConfig) -> np.ndarray:
    """The mask as [B, P] bool. None: padding is where the pad token is, if that is no end-of-sequence token too.

    Source: `_prepare_attention_mask_for_generation` in transformers/generation/utils.py.
    """
    if mask is None:
        pad = options.pad_token_id
        inferred = pad is not None and pad not in options.eos_token_id and (ids == pad).any()
        return ids != pad if inferred else np.ones(ids.shape, bool)
    array = np.asarray(mask)
    if array.shape != ids.shape:
        raise ValueError(f"attention_mask has shape {array.shape}; expected {ids.shape}, as input_ids")
    if not np.isin(array, (0, 1)).all():
        raise ValueError("attention_mask has values other than 0 and 1")
    return array.astype(bool)


def _one_of(inputs: ArrayLike | None, input_ids: ArrayLike | None) -> ArrayLike | None:
    if inputs is not None and input_ids is not None:
        raise ValueError("`inputs` and `input_ids` are the same argument: give one of them")
    return input_ids if inputs is None else inputs


def _bos_prompt(model: CausalLM, generation_config: Any, options: Mapping[str, Any]) -> np.ndarray:
    """The prompt of a call without one: a row of the bos token."""
    given = GenerationConfig.coerce(generation_config).bos_token_id
    bos = options.get("bos_token_id", model.generation_config.bos_token_id if given is None else given)
    if bos is None:
        raise ValueError("there is no prompt: give `inputs` or `input_ids`, or a bos_token_id to start from")
    return np.asarray([[bos]], np.int32)


def _cached_length(cache: KVCache | None, ids: np.ndarray) -> int:
    """How many leading columns of ids the cache holds."""
    if cache is None:
        return 0
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


def cache_dtype(model: CausalLM) -> np.dtype:
    """The compute dtype, but float32 for bfloat16 on a CPU, where XLA updates a bfloat16 array by converting all of it.

    The values are the same; a token of Qwen2.5-0.5B takes 24 KB in place of 12.
    """
    dtype = np.dtype(model.module.dtype or jax.tree.leaves(model.params)[0].dtype)
    return np.dtype(np.float32) if _platform(model.params) == "cpu" else dtype


def _platform(params: Any) -> str:
    return next(iter(jax.tree.leaves(params)[0].devices())).platform
