"""generate(): from a user's arguments to decoding, and back to Transformers' outputs.

Everything here is host code on numpy arrays: no operation of jax outside the programs, each would be a compilation.

Axes: B batch (prompts), P columns of the prompts, T new prompt tokens, S cache capacity, n new tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import flax.struct
import numpy as np
from jax.typing import ArrayLike

from flaxqwen.cache import KVCache
from flaxqwen.generation import loop
from flaxqwen.generation.beam import GenerateBeamDecoderOnlyOutput, search
from flaxqwen.generation.config import GenerationConfig, resolve
from flaxqwen.generation.decoding import run
from flaxqwen.generation.inputs import CausalLM, Inputs, cached_length, check_attention_mask, check_input_ids
from flaxqwen.models.outputs import ModelOutput


class Streamer(Protocol):
    """What streams: Transformers' TextStreamer, TextIteratorStreamer and the like work as they are."""

    def put(self, value: np.ndarray) -> None:
        """First the prompts [B, P], then the tokens of each step [B]."""

    def end(self) -> None:
        """Generation is over."""


class GenerateDecoderOnlyOutput(ModelOutput, flax.struct.PyTreeNode):
    """Transformers' output of return_dict_in_generate.

    sequences: [B, P + n] int32, prompts included. scores, logits: n of [B, V] float32, processed and raw, if asked for.
    past_key_values: the cache of all tokens but the last, to be given to another generate().
    """

    sequences: np.ndarray
    scores: tuple[np.ndarray, ...] | None = None
    logits: tuple[np.ndarray, ...] | None = None
    past_key_values: KVCache | None = None


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
) -> np.ndarray | GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput:
    """Continue prompts, as `GenerationMixin.generate` in transformers/generation/utils.py.

    Args:
      inputs, input_ids: [B, P] int, one or the other. None: the bos token, if the config has one.
      generation_config: ours, a dict, or a Transformers GenerationConfig; default: the model's.
      attention_mask: [B, P] of 0 and 1; default: as Transformers infers it from the pad token, where it can.
      past_key_values: the cache of an earlier generate() or forward over a beginning of input_ids; only the rest is
        run. It is donated: use the one in the result from then on.
      streamer: gets the prompts, then the tokens of each step; not with beams.
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
    if streamer is not None and resolved.num_beams > 1:
        raise ValueError("streamer cannot be used with num_beams > 1: which tokens stand is known at the end only")
    mask = check_attention_mask(attention_mask, ids, resolved)
    request = Inputs(ids, mask, cached_length(past_key_values, ids))
    total = resolved.max_length
    if total > model.config.max_position_embeddings:
        warnings.warn(
            f"prompt and new tokens come to {total}, past the context of {model.config.max_position_embeddings} "
            "that the model was trained for",
            stacklevel=2,
        )
    if resolved.num_beams > 1:
        beams = search(model, request, resolved, past_key_values)
        return beams if resolved.return_dict_in_generate else beams.sequences
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
