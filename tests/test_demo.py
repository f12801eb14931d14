"""The model that ships with the package: its answers, Transformers' on the same files, and its way into a wheel."""

from __future__ import annotations

import json
import operator
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flaxqwen import AutoModelForCausalLM, AutoTokenizer
from flaxqwen.cli import main
from flaxqwen.demo.evaluate import answers, exact
from flaxqwen.demo.skills import Question, questions
from flaxqwen.hub import BUILT_IN, resolve_folder

ROOT = Path(__file__).parents[1]
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, ">": operator.gt, "<": operator.lt}
QUESTION, ANSWER = "What is 123 + 456?", "579"


def test_files_are_small():
    for folder in BUILT_IN.values():
        assert {path.name for path in folder.iterdir()} == FILES
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 6_000_000


def test_held_out_answers_are_transformers(rng: np.random.Generator):
    """Greedy, in float32: the same texts, and right ones: of 1,000 the README has the share, of 40 it varies."""
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    transformers = pytest.importorskip("transformers")
    tokenizer = AutoTokenizer.from_pretrained(BUILT_IN["demo"])
    asked = questions(int(rng.integers(1 << 30)), 40, held_out=True)
    found = answers(AutoModelForCausalLM.from_pretrained("demo", dtype="float32"), tokenizer, asked)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(BUILT_IN["demo"], dtype=torch.float32)
    chats: Any = [[{"role": "user", "content": question.prompt}] for question in asked]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt",
        tokenizer_kwargs={"padding_side": "left"},
    )  # fmt: skip
    tokens = theirs.generate(**inputs, max_new_tokens=16, do_sample=False)
    width = inputs["input_ids"].shape[1]
    assert found == tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
    assert exact(asked, found)["all"] >= 0.8


def test_the_draft_changes_nothing(rng: np.random.Generator):
    """Greedy answers with the draft model, which proposes some of their tokens, are the model's own."""
    model, draft = (AutoModelForCausalLM.from_pretrained(name, dtype="float32") for name in BUILT_IN)
    tokenizer = AutoTokenizer.from_pretrained(BUILT_IN["demo"])
    asked = questions(int(rng.integers(1 << 30)), 80, held_out=True)
    alone = answers(model, tokenizer, asked)
    assert answers(model, tokenizer, asked, assistant_model=draft) == alone
    # Of 400 the draft shared 110: of 80 it has 4 or fewer once in a million draws.
    assert sum(a == b for a, b in zip(alone, answers(draft, tokenizer, asked), strict=True)) > 4


def test_questions_are_right_and_apart(rng: np.random.Generator):
    """The answers by another way of working them out; no operands and no words of a held-out question in training."""
    seed = int(rng.integers(2**31))
    training, held_out = (questions(seed, 3000, kind) for kind in (False, True))
    for question in training + held_out:
        assert question.answer == right_answer(question), question
    subjects = {question.subject for question in held_out}
    assert len(subjects) > 1000
    assert not subjects & {question.subject for question in training}


def right_answer(question: Question) -> str | None:
    """From the prompt alone."""
    text = question.prompt.rstrip(".?")
    if found := re.search(r"(\d+) ([-+*<>]) (\d+)", text):
        value = SIGNS[found[2]](int(found[1]), int(found[3]))
    elif found := re.search(r"(\d+) times (\d+)|Multiply (\d+) by (\d+)", text):
        value = int(np.prod([int(number) for number in found.groups() if number]))
    elif found := re.search(r"Add (\d+) and (\d+)", text):
        value = int(found[1]) + int(found[2])
    elif found := re.search(r"Subtract (\d+) from (\d+)", text):
        value = int(found[2]) - int(found[1])
    elif found := re.search(r"Is (\d+) (greater|more|less|smaller) than (\d+)", text):
        sign = ">" if found[2] in ("greater", "more") else "<"
        value = SIGNS[sign](int(found[1]), int(found[3]))
    else:
        return right_text(question.skill, text)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def right_text(skill: str, text: str) -> str:
    """Of the skills with words."""
    words = text.split()
    if skill == "count":
        if found := re.search(r"How many letters (?:are in|does) (\w+)", text):
            return str(len(found[1]))
        found = re.search(r"How many (\w) are in (\w+)|How often is (\w) in (\w+)|letter (\w) in (\w+)", text)
        assert found is not None
        letter, word = (part for part in found.groups() if part)
        return str(sum(character == letter for character in word))
    if skill == "nth":
        found = re.search(r"(first|second|third|fourth|fifth|last) (?:word of|in) (.+)", text)
        assert found is not None
        listed = found[2].split()
        return listed[-1 if found[1] == "last" else ("first", "second", "third", "fourth", "fifth").index(found[1])]
    if skill == "upper":
        return "".join(chr(ord(letter) - 32) for letter in (words[-1] if words[0] == "Upper" else words[1]))
    if skill == "reverse":
        return "".join(reversed(words[1] if words[0] == "Spell" else words[-1]))
    return "".join(letter * words[-1].count(letter) for letter in "abcdefghijklmnopqrstuvwxyz")


def test_generate_answers_in_the_chat_format(capsys, monkeypatch, tmp_path):
    """Without --chat and without network; a folder of that name is ./demo."""
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", None)  # what would call it fails
    assert main(["generate", "demo", QUESTION]) == 0
    assert capsys.readouterr().out == f"{ANSWER}\n"
    ids = " ".join(map(str, AutoTokenizer.from_pretrained(BUILT_IN["demo"])(QUESTION)["input_ids"]))
    given = {}
    for name, prompt in (("text", [QUESTION, "--no-chat"]), ("ids", ["--ids", ids])):
        assert main(["generate", "demo", *prompt, "--json", "--max-new-tokens", "2"]) == 0
        given[name] = json.loads(capsys.readouterr().out)["prompt_tokens"]
    assert given["text"] == given["ids"] == [int(token) for token in ids.split()]
    assert resolve_folder("./demo") == Path("demo")


def test_commands(capsys, monkeypatch, tmp_path):
    """chat, batch, info, and convert there and back."""
    monkeypatch.chdir(tmp_path)
    lines = iter([QUESTION, "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", "demo"]) == 0
    assert capsys.readouterr().out == f"{ANSWER}\n"
    Path("in.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": QUESTION}]}) + "\n")
    assert main(["batch", "demo", "in.jsonl", "out.jsonl"]) == 0
    assert json.loads(Path("out.jsonl").read_text())["text"] == ANSWER
    capsys.readouterr()
    assert main(["info", "demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] <= 3_000_000
    assert main(["convert", "demo", "flax"]) == 0
    assert main(["convert", "flax", "back", "--to", "pytorch"]) == 0
    assert Path("back/model.safetensors").read_bytes() == (BUILT_IN["demo"] / "model.safetensors").read_bytes()


def test_an_adapter_is_trained_and_used(capsys, monkeypatch, tmp_path):
    """One chat, learned by heart in a few steps; the base's answers stay without it."""
    pytest.importorskip("grain", reason="trains: pip install 'flaxqwen[train]'")
    monkeypatch.chdir(tmp_path)
    chat = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "blue"}]
    Path("chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    lora = "r=4,lora_alpha=16,target_modules=all-linear"
    options = ["--steps", "15", "--batch-size", "1", "--length", "32", "--learning-rate", "1e-2"]
    assert main(["train", "demo", "chats.jsonl", "--out", "adapter", "--lora", lora, *options]) == 0
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in Path("adapter").iterdir()}
    capsys.readouterr()
    assert main(["generate", "demo", QUESTION, "--adapter", "adapter"]) == 0
    assert capsys.readouterr().out == "blue\n"


def test_training_says_at_once_that_it_could_not_save(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text("")
    assert main(["convert", "demo", "flax"]) == 0
    assert main(["convert", "demo", "int8", "--quantize", "int8"]) == 0
    assert main(["convert", "flax", "back", "--to", "pytorch"]) == 0
    for model, out, message in (
        ("back", "./back", "is the folder of the model itself"),
        ("back", "flax", "holds flax_model.safetensors"),
        ("int8", "tuned", "integer weights are not trained"),
        ("demo", "back", "has a config.json already, which would be lost"),
    ):
        capsys.readouterr()
        assert main(["train", model, "chats.jsonl", "--out", out, "--steps", "1"]) == 2
        assert message in capsys.readouterr().err


def test_wheel_has_the_model(tmp_path):
    """Built from a copy of the source, without network."""
    pytest.importorskip("setuptools")
    for name in ("flaxqwen", "convert", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, tmp_path / name)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    built = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    wanted = {f"flaxqwen/demo/{folder}/{name}" for folder in ("model", "draft") for name in FILES}
    assert wanted <= set(zipfile.ZipFile(wheel).namelist())
