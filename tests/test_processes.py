"""Several processes on this machine, with gloo's collectives: tokens as of one, bytes read, and how they end."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from flaxqwen import AutoModelForCausalLM
from flaxqwen.cli import main
from flaxqwen.cli.train import train_model
from flaxqwen.hub import BUILT_IN
from tests.process_worker import BATCH, LORA, NEW, OPTIONS, PROMPT, TRAIN
from tests.reference import close
from tests.test_sharding import CONFIG, ROOT, torch_model

DEADLINE = 60  # seconds after which a process that is left counts as hanging
WORK = 300  # likewise, of one that compiles and trains


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of 14 query and 2 key/value heads, with a tokenizer."""
    folder = tmp_path_factory.mktemp("processes")
    torch_model("Qwen2ForCausalLM", CONFIG).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BUILT_IN["demo"] / name, folder / name)
    return folder


def start(folder: Path, number: int, mode: str, devices: int = 1) -> list[subprocess.Popen]:
    """The processes of tests.process_worker, each with some devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address}
    common |= {"JAX_NUM_PROCESSES": str(number), "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-m", "tests.process_worker", str(folder), mode]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(command, cwd=ROOT, env={**common, "JAX_PROCESS_ID": str(i)}, **pipes) for i in range(number)
    ]


def finish(processes: list[subprocess.Popen], seconds: int = DEADLINE) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; a process that hangs is killed, and fails the test."""
    try:
        texts = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def results(folder: Path, number: int) -> list[dict]:
    return [json.loads((folder / f"{number}-{i}.json").read_text()) for i in range(number)]


def test_two_processes_by_the_command_line(folder):
    """The tokens of one device, printed by the first process alone; each reads its half of the checkpoint."""
    ended = finish(start(folder, 2, "command"))
    assert [code for code, _, _ in ended] == [0, 0], ended
    model = AutoModelForCausalLM.from_pretrained(folder)
    options = {"do_sample": True, "temperature": 0.8, "seed": 5, "max_new_tokens": NEW}
    expected = model.generate([PROMPT], **options)[0, len(PROMPT) :]
    assert json.loads(ended[0][1])["new_tokens"] == expected.tolist()
    assert "new_tokens" not in ended[1][1]
    for process in results(folder, 2):
        assert process["read"] == pytest.approx(model.num_parameters() * 4 / 2, rel=0.1)


def test_a_batch_job_of_two_processes(folder, rng):
    """Texts, ids and order of one process; each runs about half of the lines, with the whole model."""
    words = ["".join(map(chr, rng.integers(97, 123, n))) for n in rng.integers(1, 28, 7)]
    lines = [{"prompt": word, "id": i, "options": {"max_new_tokens": 1 + i}} for i, word in enumerate(words)]
    lines += [{"prompt": "draws", "options": {"temperature": 0.9}}, {"prompt": 3}]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = finish(start(folder, 2, "batch"), WORK)
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert ended[0][1].strip() == str(folder / "two.jsonl")
    assert not ended[1][1]
    assert main(["batch", str(folder), str(folder / "in.jsonl"), str(folder / "one.jsonl"), *BATCH]) == 0
    assert (folder / "two.jsonl").read_bytes() == (folder / "one.jsonl").read_bytes()
    assert len((folder / "one.jsonl").read_text().splitlines()) == 8
    errors = json.loads((folder / "two.jsonl.errors").read_text())
    assert errors["line"] == 9
    assert [path.name for path in folder.glob("*.partial-*")] == []


def test_training_of_two_processes(folder, rng):
    """Losses of one process within 1e-5, of all parameters and of an adapter; what is saved is what was trained."""
    words = ["".join(map(chr, rng.integers(97, 123, 20))) for _ in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": word}) + "\n" for word in words))
    ended = finish(start(folder, 2, "train", devices=2), WORK)
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert ended[0][1].split() == [str(folder / "whole"), str(folder / "adapter")]
    assert not ended[1][1]
    assert "step" not in ended[1][2]
    alone = {**TRAIN, "mesh": None, "distributed": False}
    for name, lora in (("whole", None), ("adapter", LORA)):
        own = folder / f"{name}-one"
        train_model(str(folder), folder / "data.jsonl", own, **{**alone, "lora": lora}, options=dict(OPTIONS))
        losses, want = (
            [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]
            for path in (folder / name, own)
        )
        assert len(want) == OPTIONS["steps"]
        np.testing.assert_allclose(losses, want, rtol=1e-5)
        model, other = (AutoModelForCausalLM.from_pretrained(path) for path in (folder / name, own))
        close(model([PROMPT]).logits, other([PROMPT]).logits, relative=1e-4)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(other.params))
    for process in results(folder, 2):
        assert process["read"] == pytest.approx(parameters * 4 / 2, rel=0.1)


def test_four_processes_and_a_death(folder):
    """data=2, tensor=2: logits and tokens of one device; a killed process ends the others."""
    processes = start(folder, 4, "death")
    processes[-1].wait(timeout=120)
    killed = time.monotonic()
    ended = finish(processes)
    assert time.monotonic() - killed < DEADLINE
    assert ended[-1][0] == -9
    for code, _, errors in ended[:-1]:
        assert code == 3, errors
        assert "of 4 lost another one: " in errors.strip().splitlines()[-1]
    model = AutoModelForCausalLM.from_pretrained(folder)
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": NEW}
    expected = model.generate([PROMPT, PROMPT[::-1]], **settings)
    for process in results(folder, 4):
        assert process["tokens"] == expected.sequences.tolist()
        close(process["logits"], np.stack(expected.logits), relative=1e-5)
        assert process["agreed"] == 10  # the first process's, as the seed that nobody gave
        assert process["read"] == pytest.approx(model.num_parameters() * 4 / 2, rel=0.1)


def test_nobody_says_where_the_others_are(folder, capsys, monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)  # by the tests before
    training = ["train", str(folder), "data.jsonl", "--out", str(folder / "nowhere")]
    for command in (["generate", str(folder), "--ids", "1"], training):
        assert main([*command, "--distributed"]) == 2
        assert "set JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES" in capsys.readouterr().err
