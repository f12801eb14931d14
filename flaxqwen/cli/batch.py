"""`flaxqwen batch`."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jax

from flaxqwen.auto import AutoModelForCausalLM
from flaxqwen.batch import Job, Line, Progress, errors_file, run_job
from flaxqwen.cli.common import Console
from flaxqwen.cli.generate import length_options
from flaxqwen.cli.text import chat_ids, decoder, load_tokenizer, need_tokenizer
from flaxqwen.config import Qwen2AudioConfig, config_from_file
from flaxqwen.distributed import agree, is_main
from flaxqwen.generation.inputs import CausalLM
from flaxqwen.hub import resolve_folder
from flaxqwen.sharding import mesh_of

REPORT_EVERY = 10  # seconds, where there is no terminal


def run_batch(
    name: str,
    source: Path,
    target: Path,
    *,
    rows: int,
    max_new_tokens: int | None,
    options: dict[str, Any],
    seed: int,
    adapter: str | None,
    dtype: str,
    mesh: str | None,
    distributed: bool,
    as_json: bool,
) -> None:
    """Continue every line of a file, and write the texts into another; see flaxqwen.batch.

    Args:
      rows: of the batch. options, max_new_tokens: of generate(), for lines that do not say otherwise. seed: of draws.
      mesh: sizes such as "tensor=4", of this process's devices. distributed: one of several processes.

    Raises:
      ValueError: an unfinished job of another input or other options.
      OSError: a file that is missing, or there already, or cannot be written.
    """
    folder = resolve_folder(name)
    if not source.is_file():
        raise FileNotFoundError(2, "no such file", str(source))
    if target.is_dir():
        raise IsADirectoryError(21, "a folder; expected a file for the results", str(target))
    if isinstance(config_from_file(folder), Qwen2AudioConfig):
        raise ValueError(f"{name} is a Qwen2-Audio, which this command does not run: `flaxqwen generate --audio` does")
    tokenizer = load_tokenizer(folder)
    several = mesh is not None or (distributed and jax.local_device_count() > 1)
    devices = mesh_of(mesh, jax.local_devices()) if several else None
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, mesh=devices)
    if adapter is not None:
        loaded = loaded.load_adapter(adapter)
    model = cast(CausalLM, loaded)
    decode = decoder(tokenizer)
    what = {"model": name, "adapter": adapter, "dtype": dtype, "max_new_tokens": max_new_tokens, **options}

    def encode(line: Line) -> list[int]:
        import jinja2

        known = need_tokenizer(tokenizer, folder)
        if line.messages is None:
            return known(line.prompt)["input_ids"]
        try:
            return chat_ids(known, line.messages)
        except jinja2.TemplateError as error:  # a template may refuse a chat
            raise ValueError(f"messages: {error}") from None

    def defaults(length: int) -> Mapping[str, Any]:
        room = model.config.get_text_config().context_length - length
        return options | length_options(model.generation_config, max_new_tokens, room)

    job = Job(
        model=model,
        tokenizer=tokenizer,
        encode=encode,
        decode=decode if tokenizer is not None else lambda tokens: None,
        defaults=defaults,
        seed=seed,
        name=json.dumps(what, sort_keys=True),
    )
    started = time.perf_counter()
    with _progress() as report:
        place = {"process": jax.process_index(), "processes": jax.process_count()}
        progress = run_job(job, source, target, rows=rows, report=report, meet=lambda: agree(0), **place)
    if is_main():
        _summarise(progress, target, time.perf_counter() - started, as_json)


def _summarise(progress: Progress, target: Path, seconds: float, as_json: bool) -> None:
    """What was done, in one line or as JSON; of several processes, by the first."""
    counts, errors = progress.counts, str(errors_file(target)) if progress.errors else None
    if as_json:
        result = {
            "output": str(target),
            "lines": progress.lines,
            "resumed": progress.resumed,
            "errors": progress.errors,
            "errors_file": errors,
            "prompt_tokens": counts.prompt_tokens,
            "new_tokens": counts.new_tokens,
            "seconds": seconds,
            "tokens_per_second": counts.new_tokens / seconds,
            "padding": 1 - counts.prompt_tokens / counts.padded_tokens if counts.padded_tokens else None,
            "occupancy": counts.new_tokens / counts.row_steps if counts.row_steps else None,
        }
        print(json.dumps(result))
        return
    if errors is not None:
        print(f"{errors}: {progress.errors:,} malformed lines", file=sys.stderr)
    print(target)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """Shows how far the job is: in a bar on a terminal, in a line now and then elsewhere."""
    started = time.perf_counter()

    def describe(progress: Progress) -> str:
        rate = progress.counts.new_tokens / (time.perf_counter() - started)
        return f"{progress.done:,}/{progress.lines:,} lines, {rate:,.0f} tokens/s"

    if not sys.stderr.isatty() or not is_main():
        last = [started]

        def write(progress: Progress) -> None:
            now = time.perf_counter()
            if is_main() and now - last[0] >= REPORT_EVERY:
                last[0] = now
                print(describe(progress), file=sys.stderr, flush=True)

        yield write
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda progress: bar.update(
            task, completed=progress.work, total=progress.all_work, description=describe(progress)
        )
