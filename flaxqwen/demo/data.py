"""`python -m flaxqwen.demo.data FOLDER`: the demo model's training and held-out questions, tokenizer and config.

FOLDER/train.jsonl and FOLDER/held_out.jsonl hold chats; FOLDER/start is a checkpoint with random weights, with which
`flaxqwen train` begins.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from flaxqwen.demo.skills import Question, questions

# Qwen2's pre-tokenisation and special tokens. The vocabulary is the 256 bytes and the words of the questions, each
# taken whole or not at all (ignore_merges, and no merges): elsewhere a letter or a digit is a token.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# With the space before them where they stand within a sentence.
WORDS = (
    "user assistant system What Which How Is Add Subtract Multiply Reverse Spell Sort Write Upper Count".split()
    + " in of is to the and from by are does have times word letter letters backwards many often upper case greater"
    " less more smaller than first second third fourth fifth last + - * = < >".replace(" ", " \u0120").split()
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in a byte-level vocabulary, as GPT-2's bytes_to_unicode."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def tokenizer_files() -> dict[str, dict]:
    """tokenizer.json and tokenizer_config.json."""
    vocab = {token: i for i, token in enumerate([*byte_letters(), *WORDS])}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    special = [{"id": len(vocab) + i, "content": token, **flags} for i, token in enumerate(SPECIAL_TOKENS)]
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": True, "vocab": vocab, "merges": [],
    }  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level, "decoder": byte_level, "model": model,
    }  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "add_prefix_space": False, "bos_token": None,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "errors": "replace",
        "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
