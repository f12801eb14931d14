"""What the tokens of a Transformers tokenizer stand for, in bytes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any


@lru_cache(maxsize=2)
def bytes_of_tokens(tokenizer: Any, size: int) -> tuple[tuple[int, bytes], ...]:
    """(id, bytes) of every token. `size` is there for the cache: tokens can be added to a tokenizer."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    spelling = _byte_spelling() if "ByteLevel" in repr(decoder) else {}
    # A decoder may treat the first token apart: one is put before, and taken away again.
    before = "abcdef"
    first = tokenizer.convert_ids_to_tokens(tokenizer(before, add_special_tokens=False)["input_ids"])
    found = []
    for token, index in tokenizer.get_vocab().items():
        if spelling and all(character in spelling for character in token):
            text = bytes(spelling[character] for character in token)
        else:
            whole = tokenizer.convert_tokens_to_string([*first, token])
            text = whole[whole.index(before) + len(before) :].encode()
        found.append((index, text))
    return tuple(found)


def _byte_spelling() -> dict[str, int]:
    """Character -> byte in byte-level BPE, which spells bytes that do not print as characters from 256 on.

    Source: `bytes_to_unicode` in openai/gpt-2's encoder.py.
    """
    printing = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(others)}
