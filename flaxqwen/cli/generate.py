"""`flaxqwen generate`, and what `flaxqwen chat` shares with it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from flaxqwen.audio import audio_inputs, load_audio
from flaxqwen.auto import AutoModelForCausalLM, language_model_class
from flaxqwen.cli.text import (
    TextStream,
    chat_ids,
    decoder,
    load_processor,
    load_tokenizer,
    make_messages,
    need_tokenizer,
    parse_ids,
    read_prompt,
    read_text,
)
from flaxqwen.config import PretrainedConfig, Qwen2AudioConfig, config_from_file
from flaxqwen.distributed import is_main
from flaxqwen.generation.config import GenerationConfig
from flaxqwen.generation.inputs import check_input_ids
from flaxqwen.hub import BUILT_IN, resolve_folder
from flaxqwen.sharding import mesh_of

# Transformers' default, 20, cuts nearly every answer in the middle of a sentence.
DEFAULT_NEW_TOKENS = 256


def generate_text(
    name: str,
    prompt: str | None,
    *,
    file: Path | None,
    ids: str | None,
    chat: bool | None,
    system: str | None,
    max_new_tokens: int | None,
    options: dict[str, Any],
    regex: str | None = None,
    json_schema: Path | None = None,
    assistant: str | None = None,
    adapter: str | None = None,
    audio: list[Path] | None = None,
    dtype: str,
    stream: bool,
    as_json: bool,
    mesh: str | None = None,
    distributed: bool = False,
) -> None:
    """Continue one prompt and print the new text: as it comes (stream), or complete, or in a JSON object.

    Args:
      prompt, file, ids: where the prompt comes from, one of them.
      chat, system: apply the chat template, with a system message. None: to text for `demo`, which knows nothing else.
      options: of sampling, for generate().
      regex, json_schema: what the text is to match; the schema in a file. assistant: a draft model.
      adapter: a folder of peft's, or a hub id. audio: files that the prompt is about, for Qwen2-Audio.
      mesh: sizes such as "tensor=4", of all devices. distributed: this is one of several processes, which all have the
        same arguments; the first one prints.

    Raises:
      ValueError: a prompt that is empty, out of the vocabulary, longer than the context, or given in several ways.
    """
    chat = name in BUILT_IN and ids is None if chat is None else chat
    check_sources(prompt, file, ids, chat, system, audio)
    folder = resolve_folder(name)
    auto = language_model_class(whole := config_from_file(folder))
    config = auto.module_of(whole).config.get_text_config()
    tokenizer = load_tokenizer(folder)
    text = [] if ids is not None else [read_prompt(prompt, file)]
    inputs = make_inputs(folder, whole, tokenizer, *text, chat=chat, system=system, audio=audio or [], ids=ids)
    inputs["input_ids"] = check_input_ids(inputs["input_ids"], config)  # before the weights are read
    tokens = inputs["input_ids"][0].tolist()
    if regex is not None or json_schema is not None:
        need_tokenizer(tokenizer, folder)
        options = options | constraint(regex, json_schema)
    # The model's own config may have stop_strings, which need the tokenizer, and ask for several texts.
    options = options | {"tokenizer": tokenizer, "num_return_sequences": 1}
    with CompileClock() as clock:
        times = [clock.now()]
        devices = mesh_of(mesh) if mesh or distributed else None
        model = auto.from_pretrained(folder, dtype=dtype, mesh=devices)
        if adapter is not None:
            model = model.load_adapter(adapter)
        if assistant is not None:
            draft = AutoModelForCausalLM.from_pretrained(assistant, dtype=dtype, mesh=devices)
            options = options | {"assistant_model": draft}
        jax.block_until_ready(model.params)
        times.append(clock.now())
        output = TextStream(decoder(tokenizer), print_now if stream and not as_json and is_main() else None, clock.now)
        own = model.generation_config
        length = length_options(own, max_new_tokens, room=config.context_length - len(tokens))
        if (own.num_beams or 1) > 1:  # which tokens stand is known at the end only
            for token in model.generate(**inputs, **length, **options)[:, len(tokens) :].T:
                output.put(token)
            output.end()
        else:
            model.generate(**inputs, streamer=output, **length, **options)
        times += [output.first_at, clock.now()]
    limit = length.get("max_new_tokens") or own.max_new_tokens or (own.max_length or 0) - len(tokens)
    finish = finish_reason(own, output.tokens, limit)
    if not is_main():
        return
    if as_json:
        result = {
            "model": name,
            "prompt_tokens": tokens,
            "new_tokens": output.tokens,
            "text": output.text if tokenizer else None,
            "finish_reason": finish,
            "timings": timings(times, len(output.tokens), clock.compiling),
        }
        print(json.dumps(result, ensure_ascii=False))
        return
    print("" if stream else output.text)
    if finish == "length" and sys.stderr.isatty():
        print(f"[stopped after {len(output.tokens)} tokens: --max-new-tokens N for more]", file=sys.stderr)


def make_inputs(
    folder: Path,
    config: PretrainedConfig,
    tokenizer: Any,
    text: str = "",
    *,
    chat: bool,
    system: str | None,
    audio: list[Path],
    ids: str | None,
) -> dict[str, np.ndarray]:
    """The prompt as what generate() takes: from ids, or from text, in the chat template or not, and files of audio.

    Raises:
      ValueError: audio for a model that has no ears, or what is missing in the folder; as load_audio, process_audio.
    """
    if ids is not None:
        return {"input_ids": np.asarray([parse_ids(ids)])}
    hears = isinstance(config, Qwen2AudioConfig)
    if audio and not hears:
        raise ValueError(f"--audio is for Qwen2-Audio; {folder} is of model_type {config.model_type!r}")
    if audio or (chat and hears):
        clips = [load_audio(path) for path in audio]
        prompt = make_messages(system, text, len(clips)) if chat else text
        return audio_inputs(load_processor(folder), prompt, clips)
    tokenizer = need_tokenizer(tokenizer, folder)
    tokens = chat_ids(tokenizer, make_messages(system, text)) if chat else tokenizer(text)["input_ids"]
    return {"input_ids": np.asarray([tokens])}


def check_sources(
    prompt: str | None,
    file: Path | None,
    ids: str | None,
    chat: bool,
    system: str | None,
    audio: list[Path] | None = None,
) -> None:
    """ValueError for a prompt given in no way or in several, and for options that do not fit it."""
    given = [name for name, value in (("PROMPT", prompt), ("--file", file), ("--ids", ids)) if value is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise ValueError(f"expected one prompt: PROMPT, - (for stdin), --file or --ids; found {found}")
    if chat and ids is not None:
        raise ValueError("--chat applies to text; --ids gives the tokens as they are")
    if audio and ids is not None:
        raise ValueError("--audio goes with a text; --ids gives the tokens as they are")
    if system is not None and not chat:
        raise ValueError("--system needs --chat")


def constraint(regex: str | None, json_schema: Path | None) -> dict[str, Any]:
    """Options of generate() for what the text is to match.

    Raises:
      ValueError: both; a file that is not UTF-8.
      OSError: a file that cannot be read.
    """
    if regex is not None and json_schema is not None:
        raise ValueError("--regex and --json-schema both say what the text must match: give one of them")
    return {"regex": regex} if json_schema is None else {"json_schema": read_text(json_schema)}


def sampling_options(
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    repetition_penalty: float | None,
    seed: int | None,
) -> dict[str, Any]:
    """Options of generate() for what was asked for; any of the first three decides whether to sample.

    Raises:
      ValueError: options of sampling together with a temperature of 0, which is greedy decoding.
    """
    options: dict[str, Any] = {"repetition_penalty": repetition_penalty, "seed": seed}
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if temperature == 0:
        if len(sampling) > 1:
            raise ValueError("--temperature 0 is greedy decoding, where --top-p and --top-k have no effect: drop them")
        options["do_sample"] = False
    elif sampling:
        options |= {"do_sample": True, **sampling}
    return {name: value for name, value in options.items() if value is not None}


def length_options(own: GenerationConfig, max_new_tokens: int | None, room: int) -> dict[str, Any]:
    """The limit that was asked for; else the model's own; else DEFAULT_NEW_TOKENS within what the context leaves."""
    if max_new_tokens is None and own.max_new_tokens is None and own.max_length is None:
        max_new_tokens = min(DEFAULT_NEW_TOKENS, max(room, 1))
    return {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}


def finish_reason(own: GenerationConfig, tokens: list[int], limit: int) -> str:
    """ "eos" where the new tokens end in an end-of-sequence token, "length" at the limit, else "stop"."""
    eos = own.eos_token_id
    if tokens[-1] in ((eos,) if isinstance(eos, int) else eos or ()):
        return "eos"
    return "length" if len(tokens) >= limit else "stop"


def timings(times: list[float], tokens: int, compiling: float) -> dict[str, float | None]:
    """The JSON object of times [start, loaded, first token, end] that leave out compilation, which is apart."""
    started, loaded, first, ended = times
    return {
        "load_seconds": loaded - started,
        "compile_seconds": compiling,
        "first_token_seconds": first - loaded,
        "decode_tokens_per_second": (tokens - 1) / (ended - first) if tokens > 1 else None,
    }


def print_now(piece: str) -> None:
    """Print a piece of text at once."""
    print(piece, end="", flush=True)


class CompileClock:
    """A clock that stands still while jax traces and compiles: a first call is as fast as the next ones will be."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []  # apart from each other

    @property
    def compiling(self) -> float:
        """Seconds that it stood still, since it was entered."""
        return sum(end - start for start, end in self.spans)

    def now(self) -> float:
        """Seconds from some moment."""
        return time.perf_counter() - self.compiling

    def __enter__(self) -> CompileClock:
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        """Jax reports a span when it ends, and so one inside another, as of a function traced in another, first."""
        if event.startswith("/jax/core/compile/"):
            end = time.perf_counter()
            start = end - duration_secs
            self.spans = [span for span in self.spans if span[0] < start]
            if self.spans:
                start = max(start, self.spans[-1][1])
            self.spans.append((start, end))
