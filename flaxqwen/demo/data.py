"""`python -m flaxqwen.demo.data FOLDER`: the demo model's training and held-out questions, tokenizer and config.

FOLDER/train.jsonl and held_out.jsonl hold chats; FOLDER/start and FOLDER/start-draft are checkpoints with
random weights, with which `flaxqwen train` begins: see train.sh.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flaxqwen.auto import AutoModelForCausalLM
from flaxqwen.config import Qwen2Config
from flaxqwen.demo.skills import Question, questions
from flaxqwen.generation.config import GenerationConfig
from flaxqwen.rope_config import RopeParameters

# Qwen2's pre-tokenisation and special tokens. The vocabulary is the 256 bytes, without merges, so that a letter or a
# digit is a token, and the words of the questions: added tokens, which stand for whole words alone.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = (
    "user", "assistant", "system", "What", "Which", "How", "Is", "Add", "Subtract", "Multiply", "Reverse", "Spell",
    "Sort", "Write", "Upper", "Count", "in", "of", "is", "to", "the", "and", "from", "by", "are", "does", "have",
    "times", "word", "letter", "letters", "backwards", "many", "often", "upper", "case", "greater", "less", "more",
    "smaller", "than", "first", "second", "third", "fourth", "fifth", "last",
)  # fmt: skip
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
    vocab = {letter: byte for byte, letter in enumerate(byte_letters())}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    added = [
        {
            "id": 256 + i, "content": token, "single_word": token in WORDS, "lstrip": False, "rstrip": False,
            "normalized": False, "special": token in SPECIAL_TOKENS,
        }
        for i, token in enumerate((*WORDS, *SPECIAL_TOKENS))
    ]  # fmt: skip
    model: dict[str, Any] = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": [],
    }  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level, "decoder": byte_level, "model": model,
    }  # fmt: skip
    config = {
        "tokenizer_class": "Qwen2Tokenizer", "model_max_length": 512, "add_prefix_space": False, "bos_token": None,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "errors": "replace",
        "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
        "added_tokens_decoder": {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added},
    }  # fmt: skip
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def start_config(layers: int, hidden: int, feed_forward: int) -> Qwen2Config:
    """The geometry of a demo model."""
    return Qwen2Config(
        vocab_size=256 + len(WORDS) + len(SPECIAL_TOKENS),
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters=RopeParameters(rope_theta=10000.0),
        tie_word_embeddings=True,
        initializer_range=0.04,
        dtype="bfloat16",
    )


def write_start(folder: Path, config: Qwen2Config) -> None:
    """A checkpoint with random weights, with the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_config(config, seed=0)
    model.save_pretrained(folder, to="pytorch")
    end, pad = config.vocab_size - 1, config.vocab_size - len(SPECIAL_TOKENS)
    GenerationConfig(eos_token_id=end, pad_token_id=pad, max_new_tokens=32).save_pretrained(folder)
    for name, content in tokenizer_files().items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_chats(path: Path, drawn: Sequence[Question], rng: random.Random) -> None:
    """Chats of one to three questions with their answers, one chat a line, as `flaxqwen train` reads them."""
    with path.open("w", encoding="utf-8") as file:
        start = 0
        while start < len(drawn):
            asked = drawn[start : start + rng.choice((1, 1, 1, 1, 2, 3))]
            start += len(asked)
            turns = [(("user", question.prompt), ("assistant", question.answer)) for question in asked]
            messages = [{"role": role, "content": content} for turn in turns for role, content in turn]
            file.write(json.dumps({"messages": messages}) + "\n")


def main(folder: Path, total: int = 850_000) -> None:
    """Write all of it: 850,000 questions to train on, and 1,000 that are held out."""
    write_start(folder / "start", start_config(layers=4, hidden=192, feed_forward=576))
    write_start(folder / "start-draft", start_config(layers=1, hidden=64, feed_forward=192))
    write_chats(folder / "train.jsonl", questions(seed=0, total=total, held_out=False), random.Random(0))
    write_chats(folder / "held_out.jsonl", questions(seed=1, total=1000, held_out=True), random.Random(1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
