"""What generate() returns.

Axes: B batch, P columns of the prompts, n new tokens, V vocabulary,
N query heads, T tokens of a step, S slots that they see, D model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import flax.struct
import numpy as np
from jax.typing import ArrayLike

from flaxqwen.cache import KVCache
from flaxqwen.generation.inputs import Inputs
from flaxqwen.models.outputs import ModelOutput


class GenerateDecoderOnlyOutput(ModelOutput, flax.struct.PyTreeNode):
    """Transformers' output of return_dict_in_generate.

    sequences: [B, P + n] int32, prompts included. scores, logits: n of [B, V] float32, processed and raw, if asked for.
    attentions: n tuples of a [B, N, T, S] for each layer, hidden_states: n tuples of layers + 1 of [B, T, D]: T is the
    prompt, then 1 (with use_cache=False too, where Transformers runs all of the text again and gives all of it); S the
    tokens so far. Rows of padding hold no meaning.
    past_key_values: the cache of all tokens but the last, to be given to another generate(); None with use_cache=False.
    Ours alone: logprobs: [B, n] float32, log-probabilities of the new tokens by the model alone, before processors;
    top_logprobs, top_tokens: [B, n, top_logprobs] float32 and int32, of the likeliest. 0 after a row's end.
    """

    sequences: np.ndarray
    scores: tuple[np.ndarray, ...] | None = None
    logits: tuple[np.ndarray, ...] | None = None
    attentions: tuple[tuple[np.ndarray, ...], ...] | None = None
    hidden_states: tuple[tuple[np.ndarray, ...], ...] | None = None
    past_key_values: KVCache | None = None
    logprobs: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    top_tokens: np.ndarray | None = None


def token_logprobs(outputs: Sequence[Any], count: int) -> dict[str, np.ndarray]:
    """The three fields above, from the StepOutputs of a call that asked for `count` of the likeliest."""
    finished = np.concatenate([output.finished for output in outputs])
    ended = np.pad(finished[:-1], ((1, 0), (0, 0))).T  # [B, n], rows that had ended before the step

    def join(name: str) -> np.ndarray:
        values = np.moveaxis(np.concatenate([getattr(output.logprobs, name) for output in outputs]), 0, 1)
        values = values[..., :count] if values.ndim == 3 else values
        return np.where(ended.reshape(ended.shape + (1,) * (values.ndim - 2)), 0, values).astype(values.dtype)

    fields = {"logprobs": join("chosen")}
    return fields | ({"top_logprobs": join("top"), "top_tokens": join("tokens")} if count else {})


def compute_transition_scores(
    sequences: ArrayLike,
    scores: Sequence[ArrayLike],
    beam_indices: ArrayLike | None = None,
    normalize_logits: bool = False,
) -> np.ndarray:
    """The score of each token that was chosen, as `compute_transition_scores` in transformers/generation/utils.py.

    Args:
      sequences: [B, P + n] int32, as generate() gives them.
      scores: n of [B, V] ([B x beams, V]), its `scores` or `logits`.
      beam_indices: [B, n] int32, of a beam search; below 0 past a sequence's end.
      normalize_logits: give log-probabilities.

    Returns:
      [B, n] float32 (with beam_indices, as far as the longest sequence goes); 0 past a sequence's end.
    """
    if not len(scores):
        raise ValueError("scores is empty: call generate() with return_dict_in_generate=True, output_scores=True")
    tokens, steps = np.asarray(sequences), len(scores)
    beams = np.tile(np.arange(len(tokens))[:, None], steps) if beam_indices is None else np.asarray(beam_indices)
    if beams.shape[0] != len(tokens):
        raise ValueError(f"beam_indices has {beams.shape[0]} rows, sequences {len(tokens)}: they must be of one call")
    longest = int((beams >= 0).sum(axis=1).max())
    beams, tokens = beams[:, :longest], tokens[:, tokens.shape[1] - longest :]
    chosen = np.zeros(beams.shape, np.float32)
    for step in range(longest):
        rows = np.asarray(scores[step], np.float32)[np.maximum(beams[:, step], 0)]
        chosen[:, step] = np.take_along_axis(rows, tokens[:, step, None], axis=1)[:, 0]
        if normalize_logits:
            chosen[:, step] -= np.logaddexp.reduce(rows, axis=1)
    return np.where(beams < 0, np.float32(0), chosen)


def layer_states(outputs: list[tuple[int, Any]], name: str, request: Inputs) -> Iterator[tuple[np.ndarray, ...]]:
    """The attentions or hidden states of each step, for each layer, without what padding and later slots hold.

    outputs: of each program its number of steps and, for each layer, what it gave of them, [steps, ...].
    """
    skip = 0 if request.guided is None else request.length - request.input_ids.shape[1]
    tokens, slots = slice(skip, request.length - request.cached), request.length
    for count, given in outputs:
        for step in range(count):
            layers = (layer[step] for layer in given)
            seen = (..., tokens, slice(skip, slots)) if name == "attentions" else (slice(None), tokens)
            yield tuple(np.asarray(layer[seen]) for layer in layers)
            tokens, slots = slice(1), slots + 1
