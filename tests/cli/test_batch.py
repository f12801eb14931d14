"""`flaxqwen batch`: order, ids, errors, options of lines, and a job that goes on after a kill."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest

from flaxqwen import AutoModelForCausalLM, batch
from flaxqwen.batch import Job, Journal, Line, errors_file, parse_line, partial_files, run_job
from flaxqwen.cli.text import decoder, load_tokenizer
from tests.cli.conftest import CHATML, END_OF_TURN, Run, assert_refused, encode
from tests.cli.test_app import raises
from tests.cli.test_generate import transformers_tokens

NEW = 8


def write(path: Path, lines: list[Any]) -> Path:
    """A JSONL file; text is written as it is."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_texts_in_the_order_of_the_input(run: Run, random_model: Path, tmp_path: Path, rng: np.random.Generator):
    """Prompts, chats and ids, with ids and options of their own, and malformed lines between them."""
    chat = [{"role": "system", "content": "Sé brief."}, {"role": "user", "content": "Why?"}]
    words = ["".join(map(chr, rng.integers(97, 123, n))) for n in rng.integers(1, 28, 6)]
    lines: list[Any] = [{"prompt": word, "options": {"max_new_tokens": 1 + i}} for i, word in enumerate(words)]
    lines[2]["id"] = {"kept": [1, "ü"]}
    lines[3]["id"] = None
    lines += [{"messages": chat}, {"ids": [5, 6, 7], "options": {"temperature": 0}}, "", '{"prompt": 1']
    lines += [{"prompt": "a", "label": 3}, {"prompt": "b", "options": {"num_beams": 3}}, {"ids": [264]}]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "made" / "out.jsonl"
    options = ("--temperature", "0", "--batch-size", "3", "--max-new-tokens", str(NEW), "--json")
    result = run("batch", random_model, source, target, *options)
    assert (result.code, result.err) == (0, "")
    records = read(target)
    assert [record["line"] for record in records] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [record.get("id", "none") for record in records] == ["none"] * 2 + [{"kept": [1, "ü"]}, None] + ["none"] * 4
    text = "<|im_start|>system\nSé brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert "im_start" in CHATML
    ids = [encode(random_model, word) for word in words] + [encode(random_model, text), [5, 6, 7]]
    for i, (record, prompt) in enumerate(zip(records, ids, strict=True)):
        expected = transformers_tokens(random_model, prompt, max_new_tokens=1 + i if i < 6 else NEW)
        assert record["new_tokens"] == expected
        assert record["text"] == load_tokenizer(random_model).decode(expected, skip_special_tokens=True)
        assert record["finish_reason"] == ("eos" if expected[-1] == END_OF_TURN else "length")
    errors = read(errors_file(target))
    assert [error["line"] for error in errors] == [10, 11, 12, 13]
    for error, part in zip(errors, ("not JSON", "unknown label", "num_beams=3", "token id 264"), strict=True):
        assert part in error["error"]
    summary = json.loads(result.out)
    assert (summary["lines"], summary["errors"], summary["resumed"]) == (8, 4, 0)
    assert summary["new_tokens"] == sum(len(record["new_tokens"]) for record in records)
    assert summary["prompt_tokens"] == sum(map(len, ids))
    assert partial_files(target) == []
    assert_refused(run("batch", random_model, source, target), "out.jsonl: exists")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\xff", "not UTF-8"),
        (b"[1]", "expected a JSON object, found list"),
        (b"{}", "expected one of prompt, messages, ids, found none"),
        (b'{"prompt": "a", "ids": [1]}', "found prompt and ids"),
        (b'{"prompt": ""}', "prompt must be a text"),
        (b'{"ids": [1, true]}', "ids must be a list of integers"),
        (b'{"messages": []}', "messages must be a list"),
        (b'{"messages": [{"role": "user"}]}', "messages must be a list"),
        (b'{"messages": [{"role": "user", "content": 3}]}', "messages must be a list"),
        (b'{"prompt": "a", "options": [1]}', "options must be an object, found list"),
        (b'{"prompt": "\\ud800"}', r"holds '\\ud800', half of a character"),
        (b'{"messages": [{"role": "user", "content": "\\udfff"}]}', "half of a character"),
        (b'{"prompt": "a", "id": "\\ud800"}', "half of a character"),
        (b'{"prompt": "a", "\\ud800": 1}', "half of a character"),
        (b'{"prompt": "a", "id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "brackets within brackets"),
        (b'{"prompt": "a", "id": NaN}', "not JSON"),
        (b'{"prompt": "a", "id": [-Infinity]}', "not JSON"),
        (b'{"prompt": "a", "id": 1e999}', "not JSON"),
        (b'{"prompt": "a", "temperature": 1}', "unknown temperature: expected id, .* those of generate"),
    ],
)
def test_malformed_lines(text: bytes, words: str):
    with pytest.raises(ValueError, match=words):
        parse_line(text)


def test_sampling_is_asked_for_by_its_options():
    def options(**given: Any) -> dict[str, Any]:
        return parse_line(json.dumps({"prompt": "a", "options": given}).encode()).options

    found = options(temperature=1)
    assert found == {"temperature": 1.0, "do_sample": True}
    assert isinstance(found["temperature"], float)
    assert options(temperature=0, top_p=0.9, max_new_tokens=3) == {"do_sample": False, "max_new_tokens": 3}
    assert options(do_sample=False, top_p=1) == {"do_sample": False, "top_p": 1.0}
    assert options(max_new_tokens=3) == {"max_new_tokens": 3}


@pytest.fixture(scope="module")
def job(random_model: Path) -> Job:
    tokenizer = load_tokenizer(random_model)
    return Job(
        model=AutoModelForCausalLM.from_pretrained(random_model),
        tokenizer=tokenizer,
        encode=lambda line: tokenizer(line.prompt)["input_ids"],
        decode=decoder(tokenizer),
        defaults=lambda length: {"max_new_tokens": NEW, "do_sample": False},
        seed=3,
        name="test",
    )


def test_stop_strings_and_grammars_by_line(job: Job, tmp_path: Path):
    """Each line's own, in one batch where their tables are of one size; as generate() alone."""
    pytest.importorskip("outlines_core", reason="regex and json_schema need it: pip install flaxqwen[grammar]")
    wanted = [{"regex": "[0-9]{3}"}, {"regex": "Yes|No"}, {"json_schema": {"enum": ["a", "bc"]}}]
    lines = [{"prompt": f"{i}", "options": options} for i, options in enumerate(wanted)]
    free = job.model.generate([encode_one(job, "x")], max_new_tokens=NEW, do_sample=False)[0, 1:]
    stop = job.tokenizer.decode(free[2:4], skip_special_tokens=True)
    lines.append({"prompt": "x", "options": {"stop_strings": [stop]}})
    target = tmp_path / "out.jsonl"
    run_job(job, write(tmp_path / "in.jsonl", lines), target, rows=2)
    records = read(target)
    for i, (options, record) in enumerate(zip(wanted, records, strict=False)):
        settings = options | {"max_new_tokens": NEW, "do_sample": False, "tokenizer": job.tokenizer}
        expected = job.model.generate([encode_one(job, f"{i}")], **settings)[0, 1:]
        assert record["new_tokens"] == expected.tolist()
        assert record["finish_reason"] == "eos"
    if "\ufffd" not in stop:
        assert records[3]["finish_reason"] == "stop"
        assert stop in records[3]["text"]


def encode_one(job: Job, text: str) -> list[int]:
    return job.tokenizer(text)["input_ids"]


def some_lines(rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Lines of which every third one samples, without a seed of its own."""
    return [
        {"prompt": "ab" * int(rng.integers(1, 16)), "options": {"max_new_tokens": int(rng.integers(1, NEW))}}
        | ({"options": {"temperature": 1.3, "max_new_tokens": NEW}} if i % 3 == 0 else {})
        for i in range(count)
    ]


class Killed(Exception):
    """In place of a SIGKILL."""


def test_a_job_goes_on_after_kills(job: Job, tmp_path: Path, rng: np.random.Generator, monkeypatch):
    """Killed within a record, so that batches are made up anew: the bytes of a run that nobody disturbs."""
    source, whole, target = write(tmp_path / "in.jsonl", some_lines(rng, 14)), tmp_path / "whole", tmp_path / "out"
    assert run_job(job, source, whole, rows=3).resumed == 0
    append, left = Journal.append, [0]

    def until_killed(journal: Journal, record: bytes) -> None:
        if not record.startswith(b'{"job"'):
            left[0] -= 1
            if left[0] < 0:
                append(journal, record[: int(rng.integers(len(record)))])
                raise Killed
        append(journal, record)

    monkeypatch.setattr(Journal, "append", until_killed)
    for done in (4, 3, 5):
        left[0] = done
        with pytest.raises(Killed):
            run_job(job, source, target, rows=3)
        assert not target.exists()
    left[0] = 100
    assert run_job(job, source, target, rows=3).resumed == 12
    assert target.read_bytes() == whole.read_bytes()
    # Killed after the last rename.
    partial = target.with_name(f"{target.name}.partial-0")
    partial.write_text("{}\n")
    run_job(job, source, target, rows=3)
    assert partial_files(target) == []
    assert target.read_bytes() == whole.read_bytes()


def test_processes_take_their_parts(job: Job, tmp_path: Path, rng: np.random.Generator):
    source, whole, target = write(tmp_path / "in.jsonl", some_lines(rng, 9)), tmp_path / "whole", tmp_path / "out"
    run_job(job, source, whole, rows=3)
    with ThreadPoolExecutor(2) as pool:
        together = {"rows": 3, "processes": 2, "meet": Barrier(2, timeout=60).wait}
        both = [pool.submit(run_job, job, source, target, process=i, **together) for i in range(2)]
        parts = [part.result() for part in both]
    assert sorted(part.lines for part in parts) == [4, 5]
    assert target.read_bytes() == whole.read_bytes()


def test_another_job_is_refused(job: Job, tmp_path: Path):
    """An unfinished job is not mixed with one of another input, seed or options; nor with one that still runs."""
    source, target = write(tmp_path / "in.jsonl", [{"prompt": "a"}]), tmp_path / "out"
    head = {"job": "test", "seed": 3, "input": batch.make_plan(job, source).digest}
    with Journal(target, 0, head), pytest.raises(ValueError, match="another process is writing it"):
        run_job(job, source, target, rows=2)
    for other, name in (({"seed": 4}, "seed"), ({"name": "other"}, "job")):
        with pytest.raises(ValueError, match=f"of a job with another {name}: finish that one"):
            run_job(dataclasses.replace(job, **other), source, target, rows=2)
    write(source, [{"prompt": "b"}])
    with pytest.raises(ValueError, match="of a job with another input"):
        run_job(job, source, target, rows=2)


def test_a_full_disk_leaves_no_part_of_a_record(job: Job, tmp_path: Path, monkeypatch):
    target = tmp_path / "out"
    with Journal(target, 0, {"job": "test"}) as journal:
        journal.append(b'{"line": 1, "text": "a"}\n')
        before = journal.path.read_bytes()
        write = os.write
        monkeypatch.setattr(os, "write", lambda file, record: write(file, record[:5]))
        with pytest.raises(OSError, match="no space left"):
            journal.append(b'{"line": 2, "text": "b"}\n')
        assert journal.path.read_bytes() == before


@pytest.mark.parametrize("name", ["out.errors", "out.partial-0", "out.partial-12"])
@pytest.mark.parametrize("is_done", [False, True])
def test_a_file_of_the_job_is_no_input(job: Job, tmp_path: Path, name: str, is_done: bool):
    """The job would remove what it reads; by whatever name."""
    source, target = write(tmp_path / name, [{"prompt": "a"}]), tmp_path / "out"
    (tmp_path / "link").symlink_to(source)
    if is_done:
        target.touch()
    before = source.read_bytes()
    for path in (source, tmp_path / "link"):
        with pytest.raises(ValueError, match="writes that file itself; rename the input"):
            run_job(job, path, target, rows=2)
    assert source.read_bytes() == before


def test_files_of_other_names_stay(job: Job, tmp_path: Path):
    source, target = write(tmp_path / "in.jsonl", [{"prompt": "a"}]), tmp_path / "out"
    others = [tmp_path / f"out.partial-{end}" for end in ("notes", "1.bak", "1-notes", "")]
    for path in others:
        path.write_text("mine")
    assert run_job(job, source, target, rows=2).done == 1
    assert [path.read_text() for path in others] == ["mine"] * 4


def test_a_line_that_cannot_be_encoded_is_one_error(job: Job, tmp_path: Path):
    """Whatever a tokenizer or a template says of it."""

    def encode(line: Line) -> list[int]:
        if line.prompt == "bad":
            raise TypeError("TextInputSequence must be str")
        return encode_one(job, str(line.prompt))

    source = write(tmp_path / "in.jsonl", [{"prompt": "bad"}, {"prompt": "a"}])
    target = tmp_path / "out"
    run_job(dataclasses.replace(job, encode=encode), source, target, rows=2)
    assert [record["line"] for record in read(target)] == [2]
    assert read(errors_file(target)) == [{"line": 1, "error": "TextInputSequence must be str"}]


def test_errors_of_any_text_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    empty = np.zeros(0, np.int64)
    plan = batch.Plan(empty, empty, empty, empty, empty, [(1, "found '\ud800'"), (2, "é")], "")
    batch.write_errors(plan, tmp_path / "out")
    assert [error["error"] for error in read(tmp_path / "out.errors")] == ["found '\ud800'", "é"]
    before = (tmp_path / "out.errors").read_bytes()
    monkeypatch.setattr(Path, "write_text", raises(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left on device") as caught:
        batch.write_errors(plan, tmp_path / "out")
    assert caught.value.filename == str(tmp_path / "out.errors")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"out.errors": before}


def test_a_full_disk_is_an_error_with_the_name(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the records, and of the output in order."""
    source, target = write(tmp_path / "in.jsonl", [{"prompt": "a"}]), tmp_path / "out"
    write_bytes, full = os.write, raises(OSError(28, "No space left on device"))

    def write_head(file: int, record: bytes) -> int:
        return full() if record.startswith(batch.RECORD) else write_bytes(file, record)

    for name, call, file in (("write", write_head, "out.partial-0"), ("fsync", full, "out")):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, call)
            with pytest.raises(OSError, match="No space left on device") as caught:
                run_job(job, source, target, rows=2)
        assert caught.value.filename == str(tmp_path / file)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.partial-0"]
    assert run_job(job, source, target, rows=2).resumed == 1


def test_nothing_to_do(run: Run, random_model: Path, tmp_path: Path):
    source, target = write(tmp_path / "in.jsonl", ["", "{}"]), tmp_path / "out.jsonl"
    assert run("batch", random_model, source, target).out == f"{target}\n"
    assert target.read_bytes() == b""
    assert_refused(run("batch", random_model, tmp_path / "no.jsonl", target), "no.jsonl: no such file")
    assert_refused(run("batch", random_model, source, tmp_path), f"{tmp_path}: a folder; expected a file")


def test_sigkill(run: Run, random_model: Path, tmp_path: Path, rng: np.random.Generator):
    """The command, killed at a random moment of its work, and gone on with; benchmarks/kills.py does it 30 times."""
    model = shutil.copytree(random_model, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))  # none: fast
    lines = [line | {"ids": list(line.pop("prompt").encode())} for line in some_lines(rng, 150)]
    source, whole, target = write(tmp_path / "in.jsonl", lines), tmp_path / "whole", tmp_path / "out"
    run("batch", model, source, whole)
    code = "import sys; from flaxqwen.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "batch", model, source, target]
    running = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.DEVNULL)
    partial, stop = target.with_name(f"{target.name}.partial-0"), int(rng.integers(1, whole.stat().st_size // 2))
    while not partial.exists() or partial.stat().st_size < stop or partial.read_bytes().count(b"\n") < 2:
        assert running.poll() is None
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not target.exists()
    summary = json.loads(run("batch", model, source, target, "--json").out)
    assert 0 < summary["resumed"] < summary["lines"] == 150
    assert target.read_bytes() == whole.read_bytes()
    assert [record["line"] for record in read(target)] == list(range(1, 151))
