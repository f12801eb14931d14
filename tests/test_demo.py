"""The model that ships with the package: its answers, Transformers' on the same files, and its way into a wheel."""

from __future__ import annotations

import json
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
from flaxqwen.demo.skills import questions
from flaxqwen.hub import BUILT_IN, resolve_folder

ROOT = Path(__file__).parents[1]
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
QUESTION, ANSWER = "What is 123 + 456?", "579"


def test_files_are_small():
    assert {path.name for path in BUILT_IN["demo"].iterdir()} >= FILES
    assert sum(path.stat().st_size for path in BUILT_IN["demo"].iterdir()) <= 6_000_000


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
    pytest.importorskip("orbax.checkpoint", reason="trains: pip install 'flaxqwen[train]'")
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
    assert {f"flaxqwen/demo/model/{name}" for name in FILES} <= set(zipfile.ZipFile(wheel).namelist())
