"""`python -m flaxqwen.demo.evaluate MODEL`: how many held-out questions a model answers exactly, by greedy decoding.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from flaxqwen.auto import AutoModelForCausalLM
from flaxqwen.cli.text import load_tokenizer
from flaxqwen.convert.quantize import Scheme
from flaxqwen.demo.skills import Question, questions
from flaxqwen.hub import resolve_folder
from flaxqwen.model import Model

BATCH = 250


def answers(model: Model, tokenizer: Any, asked: Sequence[Question], **options: Any) -> list[str]:
    """The model's answer to each question, in chat format; options are of generate()."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question.prompt}], tokenize=False, add_generation_prompt=True
        )
        for question in asked
    ]
    found: list[str] = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(texts[start : start + BATCH], padding=True, padding_side="left", return_tensors="np")
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False, **options)
        found += tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def exact(asked: Sequence[Question], found: Sequence[str]) -> dict[str, float]:
    """The share of exact answers: "all", and of each skill."""
    total: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for question, answer in zip(asked, found, strict=True):
        for name in ("all", question.skill):
            total[name] += 1
            right[name] += answer == question.answer
    return {name: right[name] / total[name] for name in total}


def main() -> None:
    """Print the shares, by dtype or quantisation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1, help="1: the held-out questions of the training run")
    parser.add_argument("--show", action="store_true", help="print the wrong answers")
    arguments = parser.parse_args()
    asked = questions(arguments.seed, arguments.questions, held_out=True)
    folder = resolve_folder(arguments.model)
    tokenizer = load_tokenizer(folder)
    results = {}
    kinds: dict[str, tuple[str, Scheme | None]] = {
        "float32": ("float32", None), "bfloat16": ("bfloat16", None), "int8": ("bfloat16", "int8"),
    }  # fmt: skip
    for name, (dtype, quantize) in kinds.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantize=quantize)
        found = answers(model, tokenizer, asked)
        results[name] = exact(asked, found)
        print(f"{name:>9}: " + ", ".join(f"{skill} {share:.1%}" for skill, share in sorted(results[name].items())))
        for question, answer in zip(asked, found, strict=True) if arguments.show else ():
            if answer != question.answer:
                print(f"    {question.prompt}  {answer}  (right: {question.answer})")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
