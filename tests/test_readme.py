"""The README's examples run when pasted: its Python and its commands, on a tiny model with the real tokenizer."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from flaxqwen import AutoModelForCausalLM, GenerationConfig, Qwen2Config
from flaxqwen.cli import main
from tests.cli.conftest import save_audio_model

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
HUB_ID, AUDIO_HUB_ID = "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2-Audio-7B-Instruct"


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def tiny_audio(shared, tmp_path, tmp_path_factory) -> Path:
    """A tiny random Qwen2-Audio; and speech.wav in the working folder."""
    pytest.importorskip("soundfile", reason="reads audio: pip install 'flaxqwen[audio]'")
    shutil.copyfile(shared / "data/audio/jfk.wav", tmp_path / "speech.wav")
    return save_audio_model(tmp_path_factory.mktemp("audio") / "model", shared)


@pytest.fixture(scope="module")
def tiny(shared, tmp_path_factory) -> Path:
    """A tiny random Qwen2 in PyTorch's format, with the real tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    config = Qwen2Config(
        vocab_size=151936, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype="bfloat16")
    model.save_pretrained(folder, to="pytorch")
    GenerationConfig(max_new_tokens=8, eos_token_id=151645, pad_token_id=151643).save_pretrained(folder)
    for file in (shared / "data/tokenizer/qwen2.5-instruct").glob("*.json"):
        shutil.copy(file, folder)
    return folder


def test_python(tiny, tiny_audio, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("python"):
        block = block.replace(HUB_ID, str(tiny)).replace(AUDIO_HUB_ID, str(tiny_audio))
        exec(compile(block, "README.md", "exec"), names)
    assert names["tokens"].shape[1] > names["inputs"]["input_ids"].shape[1]  # type: ignore[attr-defined]
    assert np.isfinite(names["value"])  # type: ignore[call-overload]
    assert (tmp_path / "qwen-pt/model.safetensors").is_file()


def test_commands(tiny, tiny_audio, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("questions.jsonl").write_text('{"messages": [{"role": "user", "content": "Hello"}]}\n')
    commands = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    commands = [command[1:] for command in commands if command[:1] == ["flaxqwen"]]
    assert {command[0] for command in commands} >= {"convert", "generate", "chat", "info", "parity"}
    local = {HUB_ID: tiny, AUDIO_HUB_ID: tiny_audio}
    chat = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"}]
    Path("chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    for command in commands:
        if command[0] == "parity":
            pytest.importorskip("torch", reason="parity compares with PyTorch")
        if command[0] == "train":
            pytest.importorskip("grain", reason="trains: pip install 'flaxqwen[train]'")
        if command[0] == "chat":
            monkeypatch.setattr("sys.stdin", iter(()))
            continue  # reads a terminal; tests/cli/test_chat.py has it
        assert main([str(local.get(word, word)) for word in command]) == 0, command
    written = (tmp_path / "qwen-pt/model.safetensors").read_bytes()
    assert written[-1000:] == (tiny / "model.safetensors").read_bytes()[-1000:]
