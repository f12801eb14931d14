"""custom_generate: a decoding loop of the user's own, given what generate() has prepared.

Axes: B batch, P columns of the prompts.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from flaxqwen.config import Qwen2AudioConfig
from flaxqwen.distributed import agree
from flaxqwen.generation.audio import repeat_clips
from flaxqwen.generation.callables import parameters
from flaxqwen.generation.config import OPTIONS, ResolvedConfig
from flaxqwen.generation.decoding import Control, make_choice
from flaxqwen.generation.inputs import CausalLM, Inputs
from flaxqwen.generation.stopping import Stopping


def own_arguments(custom_generate: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Takes the arguments that only custom_generate knows out of generate()'s options.

    Raises:
      ValueError: custom_generate is not a callable.
    """
    if custom_generate is None:
        return {}
    if not callable(custom_generate):
        raise ValueError(
            f"custom_generate={custom_generate!r} is not supported: code of the hub is not run; give a callable"
        )
    names = {parameter.name for parameter in parameters(custom_generate)} - set(OPTIONS)
    return {name: options.pop(name) for name in names & set(options)}


def run_custom(
    custom_generate: Callable[..., Any],
    model: CausalLM,
    request: Inputs,
    options: ResolvedConfig,
    control: Control,
    **arguments: Any,
) -> Any:
    """What custom_generate(model, input_ids, ...) returns.

    Of these it gets, by name, those that it takes: input_ids and attention_mask [B x copies, P], copies of
    each row as many as the larger of num_beams and num_return_sequences;
    generation_config, where all is resolved; logits_processor and stopping_criteria, lists of callables
    (input_ids, scores) for all that the call asks for; position_ids and inputs_embeds, None where the call has none;
    past_key_values, streamer, tokenizer; of audio input_features and feature_attention_mask, not encoded yet; and its
    own arguments. As in Transformers, where it is the decoding method of `generate`.
    """
    if request.guided is not None:
        raise ValueError("guidance_scale cannot go with custom_generate: it is part of the compiled loop")
    if control.grammar is not None:
        raise ValueError("regex and json_schema cannot go with custom_generate: they are part of the compiled loop")
    copies = max(options.num_beams, options.num_return_sequences)
    expanded = request.repeat(copies)
    choice = make_choice(model, request, options, copies, control)
    if isinstance(model.config, Qwen2AudioConfig) and arguments["input_features"] is not None:
        clips = (arguments["input_features"], arguments["feature_attention_mask"])
        arguments |= repeat_clips(request.input_ids, model.config.audio_token_index, *clips, copies)
    arguments |= {
        "input_ids": expanded.input_ids,
        "attention_mask": expanded.attention_mask.astype(np.int32),
        "position_ids": expanded.positions,
        "inputs_embeds": expanded.embeds,
        "generation_config": options,
        "logits_processor": list(choice.processors),
        "stopping_criteria": [criterion_of(control.stopping, options.max_length)],
    }
    takes = parameters(custom_generate)
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in takes):
        names = {parameter.name for parameter in takes}
        arguments = {name: value for name, value in arguments.items() if name in names}
    return custom_generate(model, **arguments)


def criterion_of(stopping: Stopping, max_length: int) -> Callable[..., np.ndarray]:
    """All that ends rows as one criterion: (input_ids [B, n], scores) -> [B] bool."""
    begun = time.monotonic()

    def ended(input_ids: Any, scores: Any = None, **_: Any) -> np.ndarray:
        ids: Any = np.asarray(input_ids)
        late = stopping.seconds is not None and bool(agree(time.monotonic() - begun > stopping.seconds))
        result = np.isin(ids[:, -1], stopping.eos_token_id) | late | (ids.shape[1] >= max_length)
        for criterion in stopping.traced:
            result |= np.asarray(criterion(ids, scores, ids.shape[1]))
        for call in stopping.host:
            result |= call(ids, scores)
        return result

    return ended
