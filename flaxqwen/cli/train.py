"""`flaxqwen train`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flaxqwen.auto import AutoModelForCausalLM, parse_dtype
from flaxqwen.cli.common import Console
from flaxqwen.cli.text import load_tokenizer, need_tokenizer
from flaxqwen.config import Qwen2AudioConfig, config_from_file
from flaxqwen.convert.save import refuse_others
from flaxqwen.dataset import pack, read_examples
from flaxqwen.distributed import is_main
from flaxqwen.hub import resolve_folder
from flaxqwen.lora import LoraConfig
from flaxqwen.lora.config import CONFIG_FILE
from flaxqwen.sharding import mesh_of
from flaxqwen.trainer import SETTINGS, Record, Rows, TrainingOptions, refuse_quantized, train

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
DEFAULT_LENGTH = 1024


def train_model(
    name: str, data: Path, out: Path, *, evaluate: Path | None, length: int | None, resume: bool, plot: bool,
    lora: str | None, mesh: str | None, distributed: bool, options: dict[str, Any],
) -> None:  # fmt: skip
    """Train on a file of chats or texts, and write the model and its tokenizer, or the adapter, into `out`.

    Several processes write the model as an orbax checkpoint, each its part.

    Args:
      evaluate: a file of the same form, for the loss on held-out data.
      length: tokens of a packed row; default: DEFAULT_LENGTH, or the model's context where that is shorter.
      plot: write out/loss.png.
      lora: fields of the adapter's config, as parse_lora takes them; None: all parameters are trained.
      mesh: sizes such as "fsdp=4", of all devices. distributed: this is one of several processes, which all have the
        same arguments and see the same files.
      options: of TrainingOptions; a dtype of "auto" is that of the model's config.

    Raises:
      ImportError: matplotlib is not installed, and plot is asked for.
      ValueError: data that is no chat or text; a model without tokenizer; one that is quantized, or is in `out`,
        where all parameters are trained.
      FileExistsError: `out` holds a run, and resume is False; a model that is of no run.
    """
    if plot:
        import_figure()  # what is missing is said before a run of hours
    folder = resolve_folder(name)
    if isinstance(given := config_from_file(folder), Qwen2AudioConfig):
        raise ValueError(f"{name} is a Qwen2-Audio, which this command does not train: use flaxqwen.training in Python")
    config = AutoModelForCausalLM.module_of(given).config
    to: Any = "pytorch" if jax.process_count() == 1 else "orbax"
    if lora is None:
        refuse_quantized(config)
        refuse_others(out, to)
    _check_out(folder, out)
    tokenizer = need_tokenizer(load_tokenizer(folder), folder)
    own_dtype = parse_dtype(config.dtype) or jnp.float32
    dtype = jnp.dtype(parse_dtype(options.pop("dtype")) or own_dtype).name
    length = min(length or DEFAULT_LENGTH, config.context_length)
    adapter = None if lora is None else parse_lora(lora, name)
    chosen = TrainingOptions(dtype=dtype, lora=adapter, **options)
    rows = _rows(data, tokenizer, length)
    held_out = None if evaluate is None else _rows(evaluate, tokenizer, length)
    devices = mesh_of(mesh) if mesh or distributed else None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32" if adapter is None else dtype, mesh=devices)
    with _progress() as report:
        trained, taken = train(model, rows, out, chosen, held_out=held_out, resume=resume, report=report)
    steps = chosen.steps_for(len(rows["input_ids"]))
    if taken < steps:
        if is_main():
            if plot:
                plot_loss(out)
            print(f"{out}: stopped after {taken} of {steps} steps; --resume goes on", file=sys.stderr)
        return
    if adapter is not None:
        trained.save_adapter(out)
    else:
        params = jax.tree.map(lambda leaf: leaf.astype(own_dtype), trained.params)
        dataclasses.replace(trained, params=params).save_pretrained(out, to=to)
    if not is_main():
        return
    for file in TOKENIZER_FILES if adapter is None else ():
        if (folder / file).is_file():
            shutil.copyfile(folder / file, out / file)
    if plot:
        plot_loss(out)
    print(out)


def _check_out(folder: Path, out: Path) -> None:
    """Refuse a folder that holds a model, or an adapter, which this run has not made: it would be lost at the end."""
    if out.resolve() == folder.resolve():
        raise ValueError(f"--out {out} is the folder of the model itself; give another one")
    if not (out / SETTINGS).is_file():
        for name in ("config.json", CONFIG_FILE):
            if (out / name).is_file():
                raise FileExistsError(f"--out {out} has a {name} already, which would be lost; give another folder")


def parse_lora(text: str, base: str) -> LoraConfig:
    """The config of "r=16,lora_alpha=32,target_modules=q_proj,v_proj,use_dora=true", for a base model's name.

    Raises:
      ValueError: a field that is none of LORA_FIELDS, or a value that is not its.
    """
    fields: dict[str, list[str]] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals:  # one more of the values before
            if not fields:
                raise ValueError(f"--lora: found {text!r}; expected fields such as r=16,lora_alpha=32")
            fields[next(reversed(fields))].append(name)
        elif name in fields:
            raise ValueError(f"--lora: {name} is there twice")
        elif name not in LORA_FIELDS:
            raise ValueError(f"--lora: {name!r} is none of {', '.join(LORA_FIELDS)}; LoraConfig in Python has more")
        else:
            fields[name] = [value]
    values: dict[str, Any] = {}
    for name, found in fields.items():
        try:
            values[name] = LORA_FIELDS[name](found)
        except (ValueError, KeyError):
            raise ValueError(f"--lora: {name}={','.join(found)!r} is not a value of that field") from None
    return LoraConfig(**values, notes={"base_model_name_or_path": base, "task_type": "CAUSAL_LM"})


def _modules(found: list[str]) -> tuple[str, ...] | str:
    """Names; or "all-linear", or a regular expression, which is no name."""
    return tuple(found) if all(re.fullmatch(r"[\w.]+", name) for name in found) else ",".join(found)


def _flag(found: list[str]) -> bool:
    return {"true": True, "false": False}[",".join(found).lower()]


# What --lora takes, by the names of peft.LoraConfig, from the values between commas.
LORA_FIELDS: dict[str, Callable[[list[str]], Any]] = {
    "r": lambda found: int(",".join(found)),
    "lora_alpha": lambda found: float(",".join(found)),
    "target_modules": _modules,
    "modules_to_save": tuple,
    "use_rslora": _flag,
    "use_dora": _flag,
}


def _rows(path: Path, tokenizer: Any, length: int) -> Rows:
    """The packed rows of a file, and a line about them on stderr; until then a bar, on a terminal."""
    from rich import progress

    started = time.perf_counter()
    shown: dict[str, Any] = {"console": Console(stderr=True), "transient": True, "disable": not sys.stderr.isatty()}
    with progress.open(path, encoding="utf-8", description=f"reading {path.name}", **shown) as lines:
        try:
            examples = list(read_examples(lines, tokenizer))
        except ValueError as error:
            raise ValueError(f"{path}, {error}") from None
    if not examples:
        raise ValueError(f"{path}: no examples")
    rows = pack(examples, length)
    if not is_main():
        return rows
    tokens, learned = (rows["segment_ids"] > 0).sum(), (rows["labels"] >= 0).sum()
    print(
        f"{path}: {len(examples):,} examples, {tokens:,} tokens ({learned:,} with a loss) in "
        f"{len(rows['labels']):,} rows of {length}, in {time.perf_counter() - started:.0f} s",
        file=sys.stderr,
    )
    return rows


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Record, int], None]]:
    """Shows each record: in a bar on a terminal, in a line elsewhere."""
    if not is_main():
        yield lambda record, steps: None
        return
    if not sys.stderr.isatty():
        yield lambda record, steps: print(_describe(record, steps), file=sys.stderr, flush=True)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("compiling", total=None)
        yield lambda record, steps: bar.update(
            task, completed=record["step"], total=steps, description=_describe(record, steps)
        )


def _describe(record: Record, steps: int) -> str:
    held_out = f", held out {record['eval_loss']:.4f}" if "eval_loss" in record else ""
    rate = f"{record['tokens_per_second']:,.0f} tokens/s"
    return f"step {record['step']:,}/{steps:,}: loss {record['loss']:.4f}{held_out}, {rate}"


def import_figure() -> Any:
    """matplotlib's Figure; ImportError that says how to get it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'flaxqwen[plot]'") from error
    return Figure


def plot_loss(out: Path) -> None:
    """The losses of a run by step, where it has logged any, as out/loss.png."""
    metrics = out / "metrics.jsonl"
    if not metrics.is_file():
        return
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure = import_figure()(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)", yscale="log")
    for key, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1)
    axes.legend()
    figure.savefig(out / "loss.png", dpi=150)
