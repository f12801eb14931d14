"""`flaxqwen chat`: a conversation in the terminal that keeps its KV cache from turn to turn."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from typing import Any

import jax
import numpy as np

from flaxqwen.audio import audio_inputs, load_audio
from flaxqwen.auto import language_model_class
from flaxqwen.cache import KVCache
from flaxqwen.cli.generate import finish_reason, print_now
from flaxqwen.cli.text import (
    TextStream,
    chat_ids,
    decoder,
    load_processor,
    load_tokenizer,
    make_messages,
    need_tokenizer,
    system_messages,
    user_message,
)
from flaxqwen.config import Qwen2AudioConfig, config_from_file
from flaxqwen.hub import resolve_folder
from flaxqwen.model import Model

DEFAULT_NEW_TOKENS = 1024
HELP = """\
/clear         forget the conversation
/audio FILE    a clip that the next message is about (Qwen2-Audio); may be given again
/system TEXT   the system message from now on; without TEXT, the template's own
/help          this
/exit          leave, as Ctrl-D does
Ctrl-C stops an answer; what there is of it stays in the conversation."""
CUT = {
    "length": "[stopped after {0.limit} tokens: --max-new-tokens N for more]",
    "message": "[the message takes more than the model's context of {0.context} tokens: shorten it]",
    "context": "[the model's context of {0.context} tokens is full: /clear begins a new conversation]",
}


class BadMessage(ValueError):
    """A message whose audio tokens are not as many as its clips; it is not added."""


class Conversation:
    """The messages so far, and the KV cache of the tokens that the model has seen.

    messages: without the system's, which is `system`.
    clips: the waveforms that the messages have. waiting: those of the next message.
    cached: the token ids that the cache holds.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        system: str | None,
        max_new_tokens: int | None,
        options: dict[str, Any],
        processor: Any = None,
    ) -> None:
        self.model, self.tokenizer, self.system, self.options = model, tokenizer, system, options
        self.processor = processor
        self.limit = max_new_tokens or model.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS
        self.context = model.module.config.get_text_config().context_length
        self.messages: list[dict[str, Any]] = []
        self.clips: list[np.ndarray] = []
        self.waiting: list[np.ndarray] = []
        self.cached: list[int] = []
        self.cache: KVCache | None = None

    def ask(self, message: str, stream: TextStream) -> str:
        """Add a user's message and the model's answer, which goes to the stream too.

        Only the tokens after those that the cache shares with the rendered conversation are run. An answer that an
        exception stops stays as far as it came; the cache, which was donated, is gone then.

        Returns:
          Why it ended: "eos"; "length", at the limit; "context", which is full; or "message", which does not fit even
          alone. What does not fit into the context is not added, and has no answer.

        Raises:
          BadMessage: a message with other audio tokens than those of its clips.
        """
        asked = [*self.messages, user_message(message, len(self.waiting))]
        inputs = self._inputs(asked, clips := self.clips + self.waiting)
        tokens = inputs["input_ids"][0].tolist()
        room = self.context - len(tokens)
        if room < 1:
            return "context" if self.messages else "message"
        # At least one token must run. Slots past the new length are out of sight, and overwritten.
        kept = min(common_prefix(self.cached, tokens), len(tokens) - 1)
        length = jax.device_put(np.full(1, kept, np.int32))
        cache = self.cache and dataclasses.replace(self.cache, length=length)
        self.cache, self.cached = None, []
        try:
            output = self.model.generate(
                **inputs,
                past_key_values=cache,
                streamer=stream,
                return_dict_in_generate=True,
                tokenizer=self.tokenizer,  # the model's own config may have stop_strings
                num_return_sequences=1,
                max_new_tokens=min(self.limit, room),
                **self.options,
            )
        finally:
            self.messages = [*asked, {"role": "assistant", "content": stream.text}]
            self.clips, self.waiting = clips, []
        self.cache, self.cached = output.past_key_values, (tokens + stream.tokens)[:-1]
        reason = finish_reason(self.model.generation_config, stream.tokens, min(self.limit, room))
        return "context" if reason == "length" and room <= self.limit else reason

    def clear(self) -> None:
        """Forget the messages, and the cache where it has heard audio: other clips have the same tokens."""
        if self.clips:
            self.cache, self.cached = None, []
        self.messages, self.clips, self.waiting = [], [], []

    def _inputs(self, messages: list[dict[str, Any]], clips: list[np.ndarray]) -> dict[str, np.ndarray]:
        """What generate() takes, of all messages."""
        first = system_messages(self.system)
        if self.processor is not None:
            try:
                return audio_inputs(self.processor, first + messages, clips)
            except ValueError as error:
                raise BadMessage(error) from None
        return {"input_ids": np.asarray([chat_ids(self.tokenizer, first + messages)])}


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading items are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def chat(
    name: str,
    *,
    system: str | None,
    max_new_tokens: int | None,
    options: dict[str, Any],
    dtype: str,
    adapter: str | None = None,
) -> None:
    """Read messages from stdin and print the answers, until its end or /exit."""
    folder = resolve_folder(name)
    config = config_from_file(folder)
    processor = load_processor(folder) if isinstance(config, Qwen2AudioConfig) else None
    tokenizer = need_tokenizer(load_tokenizer(folder), folder)
    messages = make_messages(system, "")  # what is not text, or has no template, is refused before weights are read
    if processor is None:
        chat_ids(tokenizer, messages)
    model = language_model_class(config).from_pretrained(folder, dtype=dtype)
    if adapter is not None:
        model = model.load_adapter(adapter)
    conversation = Conversation(model, tokenizer, system, max_new_tokens, options, processor)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives input() its editing and history; not on Windows)
        print(f"{name}: /help for commands, Ctrl-D to leave")
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
            if line.startswith("/"):
                obey(line, conversation)
            elif line:
                answer(line, conversation)
        except EOFError:
            return
        except UnicodeDecodeError:
            raise ValueError("stdin: not UTF-8 text") from None
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print()


def obey(line: str, conversation: Conversation) -> None:
    """Carry out a command; EOFError for /exit."""
    command, _, text = line.partition(" ")
    if command == "/exit":
        raise EOFError
    if command == "/clear":
        conversation.clear()
    elif command == "/audio":
        listen(text.strip(), conversation)
    elif command == "/system":
        conversation.system = text.strip() or None
    else:
        print(HELP if command == "/help" else f"unknown command {command}: /help lists them")


def listen(path: str, conversation: Conversation) -> None:
    """Put a file's audio before the next message; a line where that cannot be."""
    if conversation.processor is None:
        print("this model does not hear: /audio is for Qwen2-Audio")
        return
    try:
        conversation.waiting.append(load_audio(os.path.expanduser(path)))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}")


def answer(message: str, conversation: Conversation) -> None:
    """Print the answer to a message, and a line where it was cut or could not begin."""
    stream = TextStream(decoder(conversation.tokenizer), print_now)
    try:
        reason = conversation.ask(message, stream)
    except BadMessage as error:
        print(f"error: {error}", file=sys.stderr)
        return
    if stream.tokens:
        print()
    if reason in CUT:
        print(CUT[reason].format(conversation), file=sys.stderr)
