"""`python -m flaxqwen.demo.lora FOLDER`: a skill that `demo` lacks, learned by an adapter with r = 8.

The skill: each letter of a word twice ("Double cat." is ccaatt). Its held-out words are in no training question.
FOLDER gets the chats and the run of `flaxqwen train --lora`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import time
from pathlib import Path

import numpy as np

from flaxqwen.auto import AutoModelForCausalLM
from flaxqwen.cli import main as flaxqwen
from flaxqwen.cli.text import load_tokenizer
from flaxqwen.demo.evaluate import answers, exact
from flaxqwen.demo.skills import Question, questions
from flaxqwen.hub import resolve_folder

LORA = "r=8,lora_alpha=16,target_modules=all-linear"
HELD_OUT, TRAINED = 500, 20_000


def double(words: int, seed: int) -> list[Question]:
    """Questions about different words of 3 to 6 letters."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < words:
        found["".join(rng.choices(string.ascii_lowercase, k=rng.randrange(3, 7)))] = None
    return [Question("double", f"Double {w}.", "".join(c * 2 for c in w), w) for w in found]


def main() -> None:
    """Train the adapter; print the shares of exact answers before and after, and whether the base is what it was."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    asked = double(HELD_OUT + TRAINED, seed=0)
    held_out, trained = asked[:HELD_OUT], asked[HELD_OUT:]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    data, out = arguments.folder / "double.jsonl", arguments.folder / "adapter"
    with data.open("w", encoding="utf-8") as file:
        for q in trained:
            chat = [{"role": "user", "content": q.prompt}, {"role": "assistant", "content": q.answer}]
            file.write(json.dumps({"messages": chat}) + "\n")
    base = AutoModelForCausalLM.from_pretrained("demo")
    tokenizer = load_tokenizer(resolve_folder("demo"))
    before = exact(held_out, answers(base, tokenizer, held_out))["all"]
    started = time.perf_counter()
    code = flaxqwen([
        "train", "demo", str(data), "--out", str(out), "--lora", LORA, "--steps", str(arguments.steps),
        "--batch-size", "16", "--length", "128", "--learning-rate", "5e-3", "--warmup-steps", "20",
        "--log-every", "50",
    ])  # fmt: skip
    if code:
        raise SystemExit(code)
    seconds = time.perf_counter() - started
    adapted = base.load_adapter(out)
    others = questions(seed=1, total=200, held_out=True)
    ids = np.asarray(tokenizer([" ".join(q.prompt for q in others[:20])])["input_ids"])
    off = adapted.disable_adapters()
    same = np.array_equal(np.asarray(off(ids).logits), np.asarray(base(ids).logits))
    result = {
        "before": before,
        "after": exact(held_out, answers(adapted, tokenizer, held_out))["all"],
        "training_seconds": round(seconds),
        "others_off_bit_identical": bool(same and answers(off, tokenizer, others) == answers(base, tokenizer, others)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
