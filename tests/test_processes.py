"""Several processes on this machine, with gloo's collectives: tokens as of one, bytes read, and how they end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flaxqwen import AutoModelForCausalLM
from flaxqwen.cli import main
from tests.process_worker import NEW, PROMPT
from tests.reference import close
from tests.test_sharding import CONFIG, ROOT, torch_model

DEADLINE = 60  # seconds after which a process that is left counts as hanging


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    torch_model("Qwen2ForCausalLM", CONFIG).save_pretrained(folder)
    return folder


def start(folder: Path, number: int, mode: str) -> list[subprocess.Popen]:
    """The processes of tests.process_worker."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address}
    common |= {"JAX_NUM_PROCESSES": str(number)}
    command = [sys.executable, "-m", "tests.process_worker", str(folder), mode]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(command, cwd=ROOT, env={**common, "JAX_PROCESS_ID": str(i)}, **pipes) for i in range(number)
    ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; a process that hangs is killed, and fails the test."""
    try:
        texts = [process.communicate(timeout=DEADLINE) for process in processes]
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
    assert main(["generate", str(folder), "--ids", "1", "--distributed"]) == 2
    assert "set JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES" in capsys.readouterr().err
