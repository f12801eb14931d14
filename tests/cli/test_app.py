"""What all commands share: help, errors in one line, exit codes; and the two short ones, info and parity."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import flaxqwen
from flaxqwen.cache import init_cache
from flaxqwen.cli.entry import describe, main
from tests.cli.conftest import Run, assert_refused

ON_CPU = os.environ | {"JAX_PLATFORMS": "cpu"}


def python(code: str, **options: Any) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, **options)


def test_help_imports_nothing_slow():
    code = (
        "import sys; from flaxqwen.cli import main; assert main(['--help']) == 0;"
        "slow = {'jax', 'numpy', 'transformers', 'torch', 'flax'} & set(sys.modules); assert not slow, slow"
    )
    process = python(code, stdout=subprocess.PIPE)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "generate" in out


def test_a_closed_pipe_is_no_error():
    code = "import sys; from flaxqwen.cli import main; sys.exit(main(['--version']))"
    with python(code, stdout=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_closed_pipe_of_a_table_is_no_error():
    """Rich's console would end the process with 1."""
    code = "import sys; from flaxqwen.cli import main; sys.exit(main(['info', 'demo']))"
    with python(code, stdout=subprocess.PIPE, env=ON_CPU) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(closed: str):
    """They read and write nothing; exit codes are as ever."""
    code = "import sys; from flaxqwen.cli import main; sys.exit(main(sys.argv[1:]))"

    def call(*args: str) -> tuple[int, str, str]:
        shell = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", code, *args]
        done = subprocess.run(shell, capture_output=True, text=True, env=ON_CPU, stdin=subprocess.DEVNULL)
        return done.returncode, done.stdout, done.stderr

    has_out, has_error = " >&-" not in f" {closed}", "2>&-" not in closed
    assert call("--version") == (0, f"flaxqwen {flaxqwen.__version__}\n" * has_out, "")
    status, out, error = call("info")
    assert (status, out, bool(error)) == (2, "", has_error)
    assert call("generate", "demo", "-") == (2, "", "error: the prompt is empty\n" * has_error)


@pytest.mark.parametrize("command", ["convert", "generate", "chat", "info", "parity"])
def test_every_command_has_help_with_examples(run: Run, command: str):
    result = run(command, "-h")
    assert (result.code, result.err) == (0, "")
    assert f"  flaxqwen {command} " in result.out.partition("Examples:\n")[2]


def test_help_says_where_compiled_programs_are(run: Run):
    text = " ".join(run("--help").out.split())
    assert "kept in ~/.cache/flaxqwen/compiled" in text
    assert "JAX_ENABLE_COMPILATION_CACHE=0 keeps nothing" in text


def test_without_a_command_it_shows_help(run: Run):
    assert run().out == run("--help").out


def test_version(run: Run):
    assert run("--version").out == f"flaxqwen {flaxqwen.__version__}\n"


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["genrate"], "genrate"),
        (["generate"], "MODEL"),
        (["generate", "m", "hi", "--top-p", "1.5"], "--top-p"),
        (["generate", "m", "hi", "--temperature", "-1"], "--temperature"),
        (["generate", "m", "hi", "--temperature", "0", "--top-k", "5"], "--top-k"),
        (["generate", "m", "hi", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "m", "hi", "--seed", "-1"], "--seed"),
        (["generate", "m", "hi", "--dtype", "int8"], "int8"),
        (["generate", "m", "hi", "--verbose"], "--verbose"),
        (["generate", "m"], "--ids"),
        (["generate", "m", "hi", "--file", "prompt.txt"], "PROMPT and --file"),
        (["generate", "m", "hi", "--system", "x"], "--chat"),
        (["generate", "m", "--ids", "1 2", "--chat"], "--chat"),
        (["generate", "./absent", "hi"], "absent: no such folder"),
        (["info", "./absent"], "absent: no such folder"),
        (["info", "~nosuchuser/x"], "~nosuchuser/x: no such folder"),
        (["info", "demo", "--mesh", "tensor=99999999"], "99,999,999 devices; expected 65,536 at most"),
        (["info", "demo", "--mesh", "data=99999999999"], "99,999,999,999 devices"),
    ],
)
def test_wrong_usage_is_one_line(run: Run, args: list[str], word: str):
    assert_refused(run(*args), word)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (KeyError("no such name: x"), "no such name: x"),
        (OSError(errno.ENOSPC, "No space left on device at byte 8", "a/b"), "a/b: No space left on device at byte 8"),
        (FileNotFoundError("a/b: no weights"), "a/b: no weights"),
        (ModuleNotFoundError("parity needs torch"), "parity needs torch"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_errors_in_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str):
    assert describe(error) == line
    monkeypatch.setattr("flaxqwen.cli.info.show_info", raises(error))
    assert_refused(run("info", "m"), line)


def raises(error: BaseException) -> Any:
    def call(*args: Any, **options: Any) -> None:
        raise error

    return call


def test_full_accelerator_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes\nmore\nand more")
    monkeypatch.setattr("flaxqwen.cli.info.show_info", raises(error))
    assert_refused(run("info", "m"), "Out of memory allocating 5 bytes")


def test_bugs_show_their_traceback(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flaxqwen.cli.info.show_info", raises(AttributeError("a bug")))
    with pytest.raises(AttributeError, match="a bug"):
        main(["info", "m"])


def test_interrupt_exits_130(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flaxqwen.cli.info.show_info", raises(KeyboardInterrupt()))
    result = run("info", "m")
    assert (result.code, result.out, result.err.strip()) == (130, "", "")


def test_info_counts_what_the_model_has(run: Run, random_model: Path):
    values = json.loads(run("info", random_model, "--json").out)
    model = flaxqwen.AutoModelForCausalLM.from_pretrained(random_model)
    leaves = jax.tree.leaves(model.params)
    assert values["architecture"] == "Qwen2ForCausalLM"
    assert values["parameters"] == sum(leaf.size for leaf in leaves)
    assert values["weight_bytes"] == sum(leaf.nbytes for leaf in leaves)
    (row,) = values["memory"]
    cache = init_cache(model.config, 1, 256, np.float32)
    assert row["context"] == 256
    assert row["kv_cache_bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers))
    assert row["total_bytes"] == values["weight_bytes"] + row["kv_cache_bytes"]
    assert values["kv_cache_bytes_per_token"] * 256 == row["kv_cache_bytes"]


@pytest.mark.parametrize(
    ("name", "parameters", "contexts"),
    [
        ("Qwen2.5-0.5B-Instruct", 494_032_768, [2048, 8192, 32768]),  # numbers of the models' cards and of the hub
        ("Qwen2.5-7B-Instruct", 7_615_616_512, [2048, 8192, 32768]),
        ("Qwen2-7B", 7_615_616_512, [2048, 8192, 32768, 131072]),
        ("Qwen2-Audio-7B", 8_397_094_912, [2048, 8192]),
    ],
)
def test_info_of_real_models(run: Run, shared: Path, name: str, parameters: int, contexts: list[int]):
    folder = shared / "data" / "configs" / name
    values = json.loads(run("info", folder, "--json").out)
    assert (values["parameters"], values["weight_bytes"]) == (parameters, 2 * parameters)
    assert [row["context"] for row in values["memory"]] == contexts
    assert f"{parameters:,}" in run("info", folder).out


def test_info_follows_architectures(run: Run, copied: Path):
    change_config(copied, architectures=["Qwen2ForTokenClassification"], num_labels=3)
    values = json.loads(run("info", copied, "--json").out)
    assert values["architecture"] == "Qwen2ForTokenClassification"


def test_info_says_what_is_quantized(run: Run, copied: Path):
    change_config(copied, quantization_config={"quant_method": "awq", "bits": 4})
    assert json.loads(run("info", copied, "--json").out)["quantization"] == "awq"
    assert "awq, not supported" in run("info", copied).out
    for odd in (True, {"quant_method": {"name": "awq"}}):
        change_config(copied, quantization_config=odd)
        assert_refused(run("info", copied), "quantization_config is")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@dataclass
class StubReport:
    passed: bool

    def to_dict(self) -> dict[str, bool]:
        return {"passed": self.passed}

    def table(self) -> str:
        return "the table"

    def save(self, folder: Path) -> None:
        folder.joinpath("report.json").write_text("{}")


@pytest.mark.parametrize("passed", [True, False])
def test_parity_exits_by_its_tolerance(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, passed: bool):
    calls = []

    def compare(model: str, **options: Any) -> StubReport:
        calls.append((model, options))
        return StubReport(passed)

    monkeypatch.setattr("flaxqwen.cli.parity.compare", compare)
    result = run("parity", "m", "--dtype", "bfloat16", "--prompt", "a", "--prompt", "b", "--steps", "5", "--json")
    assert (result.code, json.loads(result.out)) == (0 if passed else 1, {"passed": passed})
    assert calls == [("m", {"dtype": "bfloat16", "prompts": ["a", "b"], "audio": [], "steps": 5})]
    assert run("parity", "m", "--report", tmp_path).out == "the table\n"
    assert calls[1] == ("m", {"dtype": "float32", "prompts": None, "audio": [], "steps": 32})
    assert (tmp_path / "report.json").is_file()


def test_parity_saves_what_cannot_be_printed(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """As on a stream that is not UTF-8: the run of minutes is not lost."""
    monkeypatch.setattr("flaxqwen.cli.parity.compare", lambda model, **options: StubReport(True))
    monkeypatch.setattr(StubReport, "table", raises(UnicodeEncodeError("ascii", "请", 0, 1, "ordinal not in range")))
    assert_refused(run("parity", "m", "--report", tmp_path), "can't encode")
    assert (tmp_path / "report.json").is_file()


def test_parity_refuses_a_report_it_cannot_write(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Before the comparison, not after it."""
    monkeypatch.setattr("flaxqwen.cli.parity.compare", raises(AssertionError("it ran")))
    file = tmp_path / "file"
    file.write_text("mine")
    assert_refused(run("parity", "m", "--report", file), f"{file}: a file; expected a folder")
    assert_refused(run("parity", "m", "--report", file / "report"), str(file / "report"))
    assert file.read_text() == "mine"


def test_parity_of_a_real_run(run: Run, random_model: Path):
    pytest.importorskip("torch", reason="parity compares with PyTorch")
    result = run("parity", random_model, "--prompt", "Hello", "--steps", "4", "--json")
    assert (result.code, result.err) == (0, "")  # no progress bars in a pipe
    assert json.loads(result.out)["passed"] is True
