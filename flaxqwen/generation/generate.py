"""generate(): from a user's arguments to decoding, and back to Transformers' outputs.

Everything here is host code on numpy arrays: no operation of jax outside the programs, each would be a compilation.

Axes: B batch (prompts), P columns of the prompts, T new prompt tokens, S cache capacity, n new tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from flaxqwen.cache import KVCache
from flaxqwen.generation import assisted, loop
from flaxqwen.generation.assisted import Drafter, make_drafter
from flaxqwen.generation.audio import with_audio
from flaxqwen.generation.callables import HostCall, check_scores, wrap
from flaxqwen.generation.config import GenerationConfig, ResolvedConfig, resolve
from flaxqwen.generation.custom import own_arguments, run_custom
from flaxqwen.generation.decoding import Control, run
from flaxqwen.generation.grammar import make_grammar
from flaxqwen.generation.healing import heal
from flaxqwen.generation.host import AllowedTokens
from flaxqwen.generation.inputs import (
    CausalLM,
    Inputs,
    cached_length,
    check_attention_mask,
    check_embeds,
    check_input_ids,
    check_positions,
    prompt_cache,
    with_negative,
)
from flaxqwen.generation.outputs import GenerateDecoderOnlyOutput, layer_states, token_logprobs
from flaxqwen.generation.search import GenerateBeamDecoderOnlyOutput, check_beams, search
from flaxqwen.generation.stopping import make_stopping
from flaxqwen.generation.streamers import Stream, Streamer, text_pieces

# generate()'s own arguments, to recognise a misspelt one.
ARGUMENTS = (
    "inputs", "input_ids", "attention_mask", "position_ids", "past_key_values", "generation_config",
    "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus", "streamer", "tokenizer",
    "inputs_embeds", "custom_generate", "assistant_model", "negative_prompt_ids", "negative_prompt_attention_mask",
    "assistant_tokenizer", "regex", "json_schema", "input_features", "feature_attention_mask",
)  # fmt: skip


def generate(
    model: CausalLM,
    inputs: ArrayLike | None = None,
    generation_config: GenerationConfig | Mapping[str, Any] | Any | None = None,
    logits_processor: Sequence[Callable[..., Any]] | None = None,
    stopping_criteria: Sequence[Callable[..., Any]] | None = None,
    prefix_allowed_tokens_fn: Callable[[int, np.ndarray], Sequence[int]] | None = None,
    synced_gpus: bool | None = None,
    assistant_model: CausalLM | None = None,
    streamer: Streamer | None = None,
    negative_prompt_ids: ArrayLike | None = None,
    negative_prompt_attention_mask: ArrayLike | None = None,
    *,
    input_ids: ArrayLike | None = None,
    attention_mask: ArrayLike | None = None,
    position_ids: ArrayLike | None = None,
    past_key_values: KVCache | None = None,
    inputs_embeds: ArrayLike | None = None,
    input_features: ArrayLike | None = None,
    feature_attention_mask: ArrayLike | None = None,
    tokenizer: Any = None,
    custom_generate: Callable[..., Any] | None = None,
    regex: str | Sequence[str] | None = None,
    json_schema: Any = None,
    **options: Any,
) -> np.ndarray | GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput:
    """Continue prompts, as `GenerationMixin.generate` in transformers/generation/utils.py.

    A processor or criterion of the user's is compiled into the loop if it is written in jnp and takes `cur_len`, as
    (input_ids, scores, cur_len): input_ids [B, S] int32, of which the first cur_len columns count, and scores [B, V]
    float32, the newest. A processor that takes (input_ids, scores) is, too, if it looks at scores alone and computes
    the same at each call. All others are called on the host at every step, as Transformers calls them, with numpy
    arrays or torch tensors; a warning says so.

    Args:
      inputs, input_ids: [B, P] int, one or the other. None: the bos token, if the config has one.
      generation_config: ours, a dict, or a Transformers GenerationConfig; default: the model's.
      logits_processor: callables -> scores [B, V], in order, before temperature and the other warpers.
      stopping_criteria: callables -> bool, or [B] of them; each ends the rows for which it holds, besides all else.
      prefix_allowed_tokens_fn: (row, its tokens so far) -> the ids that may follow; called on the host at every step.
      synced_gpus: without effect: all devices run one program.
      assistant_model: a smaller model with the same tokenizer that drafts tokens; see assisted.run.
      negative_prompt_ids, negative_prompt_attention_mask: [B, Q], what guidance_scale leads away from; default: the
        prompt's last token.
      attention_mask: [B, P] of 0 and 1; default: as Transformers infers it from the pad token, where it can.
      position_ids: [B, P] of the prompts, whose last one the new tokens count on from; default: counted over the mask.
      past_key_values: the cache of an earlier generate() or forward over a beginning of input_ids; only the rest is
        run. It is donated: use the one in the result from then on.
      inputs_embeds: [B, P, D], the prompts as embeddings; without input_ids only new tokens are returned.
      input_features, feature_attention_mask: [C, W, F] log-mel of all clips, of rows with any number of them, and
        [C, F], which frames are audio. Prompts have an audio token for each vector of audio or, as older ones, for each
        clip; they are returned as they are given. Clips that past_key_values has heard are not encoded again.
      streamer: gets the prompts, then the tokens of each step; not with beams.
      tokenizer: of the model, for stop_strings, token_healing, regex and json_schema.
      custom_generate: a decoding loop of the user's; see custom.run_custom.
      regex, json_schema: what all new text must match, enforced in the compiled loop; see grammar.make_grammar. A text
        that max_new_tokens cuts off is the beginning of one that matches.
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
    own = own_arguments(custom_generate, options)
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise ValueError(f"streamer must have put() and end(), found {type(streamer).__name__}")
    call = prepare(
        model, inputs, generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, synced_gpus,
        assistant_model, negative_prompt_ids=negative_prompt_ids,
        negative_prompt_attention_mask=negative_prompt_attention_mask, input_ids=input_ids,
        attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
        inputs_embeds=inputs_embeds, input_features=input_features, feature_attention_mask=feature_attention_mask,
        tokenizer=tokenizer, regex=regex, json_schema=json_schema, encode=custom_generate is None, **options,
    )  # fmt: skip
    if custom_generate is not None:
        return run_custom(
            custom_generate, model, call.request, call.options, call.control, past_key_values=past_key_values,
            streamer=streamer, tokenizer=tokenizer, input_features=input_features,
            feature_attention_mask=feature_attention_mask, **own,
        )  # fmt: skip
    resolved, prompts = call.options, call.prompts
    if resolved.num_beams > 1:
        check_beams(resolved, streamer is not None)
        beams = search(model, call.request, resolved, call.control, past_key_values)
        new = beams.sequences[:, call.request.input_ids.shape[1] :]
        beams = beams.replace(sequences=np.concatenate([prompts, new], axis=1))
        return beams if resolved.return_dict_in_generate else beams.sequences
    if streamer is not None:
        streamer.put(prompts)
    steps: list[loop.StepOutput] = []
    cache: KVCache | None = None
    for output, kept_cache in call.run():
        steps.append(output)
        cache = kept_cache
        if streamer is not None:
            for tokens in output.tokens:
                streamer.put(tokens)
    if streamer is not None:
        streamer.end()
    new = np.concatenate([output.tokens for output in steps]).T
    sequences = np.concatenate([prompts, new], axis=1)
    if not resolved.return_dict_in_generate:
        return sequences
    extras: dict[str, Any] = {
        name: tuple(layer_states([(len(o.tokens), getattr(o, name)) for o in steps], name, call.request))
        for name in loop.STATES
        if getattr(steps[0], name)
    }
    if resolved.output_logprobs:
        extras |= token_logprobs(steps, resolved.top_logprobs)
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=tuple(s for o in steps if o.scores is not None for s in o.scores) if resolved.output_scores else None,
        logits=tuple(s for o in steps if o.logits is not None for s in o.logits) if resolved.output_logits else None,
        **extras,
        past_key_values=prompt_cache(cache, call.request) if cache is not None and resolved.use_cache else None,
    )


def stream(model: CausalLM, *inputs: Any, tokenizer: Any = None, **arguments: Any) -> Stream[Any]:
    """Continue prompts, and read the new tokens while they come: `for piece in stream(...)`, or `async for`.

    Args:
      tokenizer: of the model, to get text. Also for stop_strings.
      inputs, arguments: as of generate(), but for streamer and custom_generate.

    Returns:
      An iterator over steps, of tokens [B] int32, finished rows filled with the pad token. With a tokenizer it gives
      the new text in whole characters, without special tokens: a string, or a list of one for each of several rows.
      Leaving it ends the generation and frees its memory.

    Raises:
      ValueError: as generate(), at once.
    """
    for name in ("streamer", "custom_generate"):
        if arguments.pop(name, None) is not None:
            raise ValueError(f"stream() takes no {name}: give it to generate()")
    call = prepare(model, *inputs, tokenizer=tokenizer, **arguments)
    if call.options.num_beams > 1:
        check_beams(call.options, streams=True)
    return Stream(token_pieces(call) if tokenizer is None else text_pieces(call.steps(), tokenizer))


def token_pieces(call: Call) -> Generator[np.ndarray, None, None]:
    """The tokens [B] of each step."""
    for tokens, _ in call.steps():
        yield tokens


@dataclass(frozen=True)
class Call:
    """A call of generate() with its arguments checked; nothing has been compiled or run."""

    model: CausalLM
    request: Inputs
    options: ResolvedConfig
    control: Control
    cache: KVCache | None
    given: np.ndarray  # [B, P], before older prompts with audio are expanded
    drafter: Drafter | None = None

    @property
    def prompts(self) -> np.ndarray:
        """[B x num_return_sequences, P] int32, as they are given."""
        return np.repeat(self.given, self.options.num_return_sequences, axis=0)

    def run(self) -> Iterator[tuple[loop.StepOutput, KVCache]]:
        """See decoding.run, and assisted.run."""
        call = (self.model, self.request, self.options, self.control)
        return run(*call, self.cache) if self.drafter is None else assisted.run(*call, self.drafter, self.cache)

    def steps(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The tokens [B] of each step, and which rows [B] had ended before it."""
        ended = np.zeros(len(self.prompts), bool)
        for output, _ in self.run():
            for tokens, after in zip(output.tokens, output.finished, strict=True):
                yield tokens, ended
                ended = after


def prepare(
    model: CausalLM,
    inputs: ArrayLike | None = None,
    generation_config: Any = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    prefix_allowed_tokens_fn: Any = None,
    synced_gpus: bool | None = None,  # all devices run one program
    assistant_model: CausalLM | None = None,
    *,
    negative_prompt_ids: ArrayLike | None = None,
    negative_prompt_attention_mask: ArrayLike | None = None,
    input_ids: ArrayLike | None = None,
    attention_mask: ArrayLike | None = None,
    position_ids: ArrayLike | None = None,
    past_key_values: KVCache | None = None,
    inputs_embeds: ArrayLike | None = None,
    input_features: ArrayLike | None = None,
    feature_attention_mask: ArrayLike | None = None,
    tokenizer: Any = None,
    regex: Any = None,
    json_schema: Any = None,
    encode: bool = True,
    **options: Any,
) -> Call:
    """Check the arguments of generate(), and bring them into the loop's form. Raises ValueError.

    encode: whether audio is encoded.
    """
    if options.pop("assistant_tokenizer", None) is not None:
        raise ValueError(
            "assistant_tokenizer is not supported: the assistant_model must have the model's own tokenizer"
        )
    config = model.config.get_text_config()
    ids = _one_of(inputs, input_ids)
    if ids is None and inputs_embeds is None:
        ids = _bos_prompt(model, generation_config, options)
    ids = None if ids is None else check_input_ids(ids, config)
    embeds = None if inputs_embeds is None else check_embeds(inputs_embeds, ids, config)
    given: Any = ids if embeds is None else embeds
    shape = given.shape[:2]
    settle = partial(
        resolve,
        model.generation_config,
        generation_config,
        options,
        max_position_embeddings=config.max_position_embeddings,
        arguments=ARGUMENTS,
    )
    # Where prompts are embeddings alone, the default length counts new tokens, and so does its bound.
    context = config.max_position_embeddings + (shape[1] if ids is None else 0)
    resolved = settle(input_length=shape[1], max_position_embeddings=context)
    if resolved.token_healing:
        ids, attention_mask = _healed(model, ids, embeds, attention_mask, resolved, tokenizer)
        shape = ids.shape
        resolved = settle(input_length=shape[1])
    if ids is None:
        ids, resolved = np.zeros((shape[0], 0), np.int32), _without_ids(resolved)
    if embeds is not None:
        resolved = _without_prompt(resolved)
    mask = check_attention_mask(attention_mask, ids, resolved, shape)
    if embeds is not None and past_key_values is not None:
        raise ValueError("inputs_embeds cannot go with past_key_values: the cache is matched by token ids")
    positions = check_positions(position_ids, shape)
    request = Inputs(ids, mask, cached_length(past_key_values, ids), embeds, positions=positions)
    request, resolved = with_audio(model, request, resolved, input_features, feature_attention_mask, encode)
    negative = (negative_prompt_ids, negative_prompt_attention_mask)
    if resolved.guidance_scale not in (None, 1.0):
        request = with_negative(request, *negative, config)
    elif any(given is not None for given in negative):
        warnings.warn("negative_prompt_ids have no effect without a guidance_scale other than 1", stacklevel=3)
    rows, vocab_size = len(ids) * resolved.num_return_sequences, config.vocab_size
    processors = wrap("logits_processor", logits_processor, rows, vocab_size, check_scores)
    stopping, resolved = make_stopping(resolved, stopping_criteria, tokenizer, rows, vocab_size)
    if prefix_allowed_tokens_fn is not None and not callable(prefix_allowed_tokens_fn):
        raise ValueError(f"prefix_allowed_tokens_fn must be callable, found {prefix_allowed_tokens_fn!r}")
    allowed = None if prefix_allowed_tokens_fn is None else AllowedTokens(prefix_allowed_tokens_fn, resolved.num_beams)
    copies = resolved.num_beams if resolved.num_beams > 1 else resolved.num_return_sequences
    constraint = (regex, json_schema, tokenizer, len(ids), copies, vocab_size, resolved.eos_token_id)
    control = Control(stopping, processors, allowed, make_grammar(*constraint))
    _warn(resolved.max_length, config.context_length, control)
    drafter = make_drafter(model, assistant_model, resolved, options, request, control)
    return Call(model, request, resolved, control, past_key_values, ids, drafter)


def _healed(
    model: CausalLM, ids: Any, embeds: Any, mask: ArrayLike | None, options: ResolvedConfig, tokenizer: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The prompts with their last tokens healed, by one more token of the model as its own config has it, and masks."""
    if ids is None or embeds is not None:
        raise ValueError("token_healing cannot go with inputs_embeds: give input_ids")
    mask = check_attention_mask(mask, ids, options, ids.shape)

    def regrow(prompt: np.ndarray, biases: dict) -> int:
        settings: Any = {"sequence_bias": biases, "seed": options.seed, "token_healing": False}
        found: Any = generate(model, prompt, max_new_tokens=1, **settings)
        return int(found[0, -1])

    return heal(ids, mask, tokenizer, options.pad_token_id or 0, regrow)


def _without_ids(options: ResolvedConfig) -> ResolvedConfig:
    """The options where prompts are embeddings alone: what is returned, counted and looked at are the new tokens."""
    return replace(options, max_length=options.max_new_tokens, min_length=options.min_new_tokens)


def _without_prompt(options: ResolvedConfig) -> ResolvedConfig:
    """The options where the prompts are embeddings, whose tokens, if there are any, the encoder_ options do not see."""
    if options.encoder_repetition_penalty != 1.0 or options.encoder_no_repeat_ngram_size > 0:
        warnings.warn(
            "the encoder_ options look at prompts of input_ids: beside inputs_embeds they do nothing", stacklevel=5
        )
    return replace(options, encoder_repetition_penalty=1.0, encoder_no_repeat_ngram_size=0)


def _warn(total: int, context: int, control: Control) -> None:
    """Say what is likely not meant: a text past the context, and callables that slow each step down."""
    if total > context:
        warnings.warn(
            f"prompt and new tokens come to {total}, past the context of {context} that the model was trained for",
            stacklevel=4,
        )
    called = (control.allowed, *control.processors, *control.stopping.host)
    slow = dict.fromkeys(call.name for call in called if isinstance(call, HostCall))
    if slow:
        warnings.warn(
            f"{', '.join(slow)}: called on the host at every step, so each token waits for a round trip to the device; "
            "what is written in jnp and takes (input_ids, scores, cur_len) is compiled into the loop instead",
            stacklevel=4,
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
