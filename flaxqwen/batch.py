"""Batch jobs: a file of prompts to a file of texts, resumed exactly after a kill.

A job makes two passes over its input. The first checks every line and notes its place, length and programs, 40 bytes a
line; the second runs them, the longest first, so that neighbours need about the same, and reads a line again when its
turn comes. A text that has ended is appended to OUT.partial-N, N the process, by one write; when none is missing, they
are put in the order of the input into OUT, which appears whole. So a kill costs the rows that were at work and no more.

A line is a JSON object with
  prompt, messages or ids: a text, a chat (a list of {"role", "content"}) or token ids.
  id: anything; it is given back.
  options: of generate(), over those of the job. A temperature, top_p or top_k asks for sampling, a temperature of 0 for
    greedy decoding, where do_sample does not say it.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from flaxqwen.files import replacing
from flaxqwen.generation.batching import Counts, Request, make_request, run
from flaxqwen.generation.config import GenerationConfig
from flaxqwen.generation.inputs import CausalLM

PROMPTS = ("prompt", "messages", "ids")
KEYS = ("id", *PROMPTS, "options")
SAMPLING = ("temperature", "top_p", "top_k")
FLOATS = frozenset(f.name for f in fields(GenerationConfig) if f.type == "float | None")
RECORD = b'{"line": '  # how every record begins
POLL = 0.2  # seconds between looks at what other processes have done


@dataclass(frozen=True)
class Line:
    """A checked line: one of text, messages and ids is its prompt."""

    prompt: str | None
    messages: list[dict[str, str]] | None
    ids: list[int] | None
    options: dict[str, Any]
    id: Any = None
    has_id: bool = False


def parse_line(text: bytes) -> Line:
    """A line of the input.

    Raises:
      ValueError: what is not such a line.
    """
    try:
        values = json.loads(text.decode("utf-8"))
        # As the id will be written: Python reads more than JSON, such as NaN.
        json.dumps(values, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"holds {error.object[error.start]!a}, half of a character") from None
    except RecursionError:
        raise ValueError("brackets within brackets, too many to read") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, found {type(values).__name__}")
    if unknown := sorted(set(values) - set(KEYS)):
        hint = "; those of generate() go into options, what else is to be kept into id"
        raise ValueError(f"unknown {', '.join(unknown)}: expected {', '.join(KEYS)}{hint}")
    given = [name for name in PROMPTS if name in values]
    if len(given) != 1:
        raise ValueError(f"expected one of {', '.join(PROMPTS)}, found {' and '.join(given) or 'none'}")
    prompt, messages, ids = (values.get(name) for name in PROMPTS)
    if "prompt" in values and not (isinstance(prompt, str) and prompt):
        raise ValueError(f"prompt must be a text that is not empty, found {prompt!r}")
    if "messages" in values and not _is_chat(messages):
        raise ValueError('messages must be a list of {"role": "...", "content": "..."}')
    if "ids" in values and not (isinstance(ids, list) and ids and all(type(token) is int for token in ids)):
        raise ValueError("ids must be a list of integers that is not empty")
    options = values.get("options", {})
    if not isinstance(options, dict):
        raise ValueError(f"options must be an object, found {type(options).__name__}")
    return Line(prompt, messages, ids, _options(options), values.get("id"), "id" in values)


def _is_chat(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(message, dict) and set(message) == {"role", "content"} and all(map(_is_text, message.values()))
            for message in messages
        )
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of generate(): JSON has one kind of number, and sampling is asked for by its options."""
    options = {name: float(x) if type(x) is int and name in FLOATS else x for name, x in given.items()}
    if "do_sample" in options:
        return options
    if options.get("temperature") == 0:
        return {name: x for name, x in options.items() if name not in SAMPLING} | {"do_sample": False}
    return options | ({"do_sample": True} if any(options.get(name) is not None for name in SAMPLING) else {})


@dataclass(frozen=True)
class Job:
    """What a job does to each line.

    model, tokenizer: the tokenizer may be None, where all lines have ids.
    encode: the token ids of a line's prompt or messages. decode: the text of new tokens.
    defaults: options of generate() for a prompt of so many tokens, under those of the line.
    seed: a line without a seed of its own draws by this one and its number.
    name: what else decides the texts, in words; a job is resumed with the same.
    """

    model: CausalLM
    tokenizer: Any
    encode: Callable[[Line], list[int]]
    decode: Callable[[list[int]], str | None]
    defaults: Callable[[int], Mapping[str, Any]]
    seed: int = 0
    name: str = ""

    def request(self, text: bytes, number: int) -> tuple[Line, Request]:
        """A line of the input, checked; ValueError."""
        line = parse_line(text)
        seed = {"seed": int(np.random.SeedSequence((self.seed, number)).generate_state(1)[0])}
        try:
            tokens = self.encode(line) if line.ids is None else line.ids
            options = {**self.defaults(len(tokens)), **seed, **line.options}
            return line, make_request(self.model, np.asarray(tokens), options, self.tokenizer)
        except (TypeError, OverflowError) as error:  # a value of a wrong type
            raise ValueError(str(error)) from None

    def record(self, line: Line, number: int, request: Request, tokens: list[int]) -> bytes:
        """A line of the output."""
        named = {"id": line.id} if line.has_id else {}
        ends, most = request.options.eos_token_id, request.options.max_new_tokens
        reason = "eos" if tokens[-1] in ends else "length" if len(tokens) == most else "stop"
        values = {"text": self.decode(tokens), "new_tokens": tokens, "finish_reason": reason}
        return json.dumps({"line": number, **named, **values}, ensure_ascii=False).encode() + b"\n"


@dataclass(frozen=True)
class Plan:
    """The lines of an input that can be run, in the order in which they are: by programs, then the longest first.

    number, offset, size: [n] int64, of each: its number, from 1 on, and where its bytes are.
    group: [n] int64, lines of one group share programs. capacity: [n] int64, slots of the cache.
    errors: what is wrong with the others. digest: of the input.
    """

    number: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    group: np.ndarray
    capacity: np.ndarray
    errors: list[tuple[int, str]]
    digest: str


def make_plan(job: Job, source: Path) -> Plan:
    """Check every line of a file; empty ones are none."""
    groups: dict[Any, int] = {}
    rows = array("q")
    errors: list[tuple[int, str]] = []
    digest = hashlib.sha256()
    offset = 0
    with source.open("rb") as file:
        for number, text in enumerate(file, start=1):
            digest.update(text)
            if text.strip():
                try:
                    _, request = job.request(text, number)
                except ValueError as error:
                    errors.append((number, " ".join(str(error).split())))
                else:
                    programs = groups.setdefault(request.signature, len(groups))
                    rows.extend((number, offset, len(text), programs, request.capacity))
            offset += len(text)
    columns = np.asarray(rows).reshape(-1, 5).T
    number, place, size, group, capacity = columns[:, np.lexsort((columns[0], -columns[4], columns[3]))]
    return Plan(number, place, size, group, capacity, errors, digest.hexdigest())


@dataclass
class Progress:
    """How far a job is, or, of several processes, this one's part.

    lines: to be run; resumed: of them, by an earlier run; done: so far. errors: malformed lines. work, all_work: cache
    slots of the lines that are done, and of all. counts: of this run.
    """

    lines: int
    errors: int
    resumed: int = 0
    done: int = 0
    work: int = 0
    all_work: int = 0
    counts: Counts = field(default_factory=Counts)


def run_job(
    job: Job,
    source: Path,
    target: Path,
    *,
    rows: int,
    report: Callable[[Progress], None] = lambda progress: None,
    process: int = 0,
    processes: int = 1,
    meet: Callable[[], object] = lambda: None,
) -> Progress:
    """Run the lines of `source` that no earlier run has done, and write `target` when none is missing.

    Malformed lines go to errors_file(target).

    Args:
      rows: of the batch. The texts do not depend on it.
      report: called when rows have ended.
      process, processes: each takes its part, and the first one writes; all see the same files.
      meet: returns when all processes have called it.

    Raises:
      ValueError: the earlier run was another job's; or `source` is a file that the job writes and removes.
      FileExistsError: the target is there already.
    """
    if source.resolve() in [path.resolve() for path in (errors_file(target), *partial_files(target))]:
        raise ValueError(f"{source}: the job into {target} writes that file itself; rename the input")
    plan = make_plan(job, source)
    share = np.arange(process, len(plan.number), processes)
    progress = Progress(len(share), len(plan.errors), all_work=int(plan.capacity[share].sum()))
    if target.exists():  # it comes last: all that a kill can have left to do is this
        if process == 0 and not partial_files(target):
            raise FileExistsError(17, "exists; remove it to run the job again", str(target))
        if process == 0:
            _remove(partial_files(target))
        progress.resumed = progress.done = progress.lines
        return progress
    if process == 0:
        write_errors(plan, target)
    head = {"job": job.name, "seed": job.seed, "input": plan.digest}
    with Journal(target, process, head) as journal:
        records = Records(target, head, plan)
        meet()  # the first process may find that nothing is missing, write the target and remove what others read
        todo = share[records.file[share] < 0]
        progress.resumed = progress.done = len(share) - len(todo)
        progress.work = progress.all_work - int(plan.capacity[todo].sum())
        report(progress)
        for i, record in _run_lines(job, plan, source, todo, rows, progress.counts):
            journal.append(record)
            progress.done += 1
            progress.work += int(plan.capacity[i])
            report(progress)
        while process == 0 and not records.complete():
            time.sleep(POLL)
    if process == 0:
        records.write_in_order(plan, target)
    while not target.exists():
        time.sleep(POLL)
    return progress


def _run_lines(
    job: Job, plan: Plan, source: Path, lines: np.ndarray, rows: int, counts: Counts
) -> Iterator[tuple[int, bytes]]:
    """The places in the plan, of `lines`, and their records, as they end."""
    with source.open("rb") as file:

        def requests(places: np.ndarray) -> Iterator[tuple[tuple[int, Line, Request], Request]]:
            for i in places.tolist():
                file.seek(plan.offset[i])
                line, request = job.request(file.read(plan.size[i]), int(plan.number[i]))
                yield (i, line, request), request

        capacity = int(plan.capacity.max(initial=0))  # one for all groups: they share the programs of prompts
        for group in np.unique(plan.group[lines]):
            members = lines[plan.group[lines] == group]
            texts = run(job.model, requests(members), rows=rows, capacity=capacity, counts=counts)
            for (i, line, request), tokens in texts:
                yield i, job.record(line, int(plan.number[i]), request, tokens)


class Journal:
    """The file of records that one process appends to, locked while it does."""

    def __init__(self, target: Path, process: int, head: Mapping[str, Any]) -> None:
        import fcntl  # which Windows lacks

        self.path = target.with_name(f"{target.name}.partial-{process}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise ValueError(f"{self.path}: another process is writing it") from None
        text = self.path.read_bytes()
        os.ftruncate(self._file, text.rfind(b"\n") + 1)  # a record that was cut off by a kill
        if b"\n" not in text:
            self.append(json.dumps(head).encode() + b"\n")

    def append(self, record: bytes) -> None:
        """Add a record, whole or not at all."""
        start = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, record)
            if written < len(record):
                raise OSError(28, "no space left", str(self.path))
        except OSError as error:
            os.ftruncate(self._file, start)
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._file)


class Records:
    """Where the records of a job are that its processes have written so far.

    file: [n] int64, which file has the record of each of the plan's lines; -1: none yet. offset, size: [n] int64.

    Raises:
      ValueError: the files are of another job.
    """

    def __init__(self, target: Path, head: Mapping[str, Any], plan: Plan) -> None:
        self._target, self._head = target, head
        self._place = np.zeros(int(plan.number.max(initial=0)) + 1, np.int64)  # of a line's number in the plan
        self._place[plan.number] = np.arange(len(plan.number))
        self.file, self.offset, self.size = np.full((3, len(plan.number)), -1)
        self._read: dict[Path, int] = {}  # bytes
        self.update()

    def update(self) -> None:
        """Take note of records that are new."""
        for path in partial_files(self._target):
            offset = self._read.setdefault(path, 0)
            number = list(self._read).index(path)
            with path.open("rb") as file:
                file.seek(offset)
                for text in file:
                    if not text.endswith(b"\n"):
                        break
                    if offset == 0:
                        self._check(path, json.loads(text))
                    else:
                        place = self._place[int(text[len(RECORD) : text.index(b",")])]
                        self.file[place], self.offset[place], self.size[place] = number, offset, len(text)
                    offset += len(text)
            self._read[path] = offset

    def _check(self, path: Path, head: Mapping[str, Any]) -> None:
        if different := [name for name in self._head if head.get(name) != self._head[name]]:
            what = " and ".join(different)
            raise ValueError(f"{path}: of a job with another {what}: finish that one, or remove the file")

    def complete(self) -> bool:
        """Whether no record is missing."""
        self.update()
        return bool((self.file >= 0).all())

    def write_in_order(self, plan: Plan, target: Path) -> None:
        """The target, whole, with the records in the order of the input; then the files that they were in go."""
        files = [path.open("rb") for path in self._read]
        try:
            with replacing(target) as unfinished, unfinished.open("wb") as output:
                for place in np.argsort(plan.number).tolist():
                    file = files[self.file[place]]
                    file.seek(self.offset[place])
                    output.write(file.read(self.size[place]))
                output.flush()
                os.fsync(output.fileno())
        finally:
            for file in files:
                file.close()
        _remove(partial_files(target))


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def partial_files(target: Path) -> list[Path]:
    """The files of records of an unfinished job: OUT.partial-N."""
    start = f"{target.name}.partial-"
    found = target.parent.glob(f"{glob.escape(start)}[0-9]*")
    return sorted(path for path in found if path.name.removeprefix(start).isdecimal())


def errors_file(target: Path) -> Path:
    """Where malformed lines are named: a JSON object with line and error for each."""
    return target.with_name(f"{target.name}.errors")


def write_errors(plan: Plan, target: Path) -> None:
    """The file of malformed lines; none where there are none."""
    path = errors_file(target)
    if not plan.errors:
        path.unlink(missing_ok=True)
        return
    records = (json.dumps({"line": number, "error": error}, ensure_ascii=False) for number, error in plan.errors)
    text = "".join(f"{record}\n" for record in records)
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")
