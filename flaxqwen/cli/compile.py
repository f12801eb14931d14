"""`flaxqwen compile`: a model and a TPU topology, on paper."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import jax
from rich.table import Table

from flaxqwen import aot
from flaxqwen.aot_training import compile_training
from flaxqwen.cli.common import Console, format_bytes, heads_text
from flaxqwen.cli.train import parse_lora
from flaxqwen.config import Qwen2Config, config_from_file
from flaxqwen.hub import resolve_folder
from flaxqwen.sharding import parse_mesh


def show_compiled(name: str, *, topology: str, mesh: str | None, batch: int, context: int, as_json: bool) -> None:
    """Compile a model's generation for a topology and print what the compiler says.

    Raises:
      ImportError, ValueError: as aot.report and parse_mesh.
    """
    config = config_from_file(resolve_folder(name, weights=False))
    sizes = parse_mesh(mesh)
    jax.config.update("jax_platforms", "cpu")  # nothing runs: a device that is here is left alone
    if sys.stderr.isatty():
        print("compiling; a minute or so for large models", file=sys.stderr)
    found = aot.report(config, topology, sizes, batch, context)
    if as_json:
        print(json.dumps({"model": name, **found}))
    else:
        print_report(name, found)


def show_training(
    name: str, *, topology: str, mesh: str | None, batch: int, context: int, lora: str | None, as_json: bool
) -> None:
    """Compile a step of training and print what the compiler says; arguments as of show_compiled and `train`.

    Raises:
      ImportError, ValueError: as aot.topology_mesh, parse_mesh, parse_lora and compile_training.
    """
    config = config_from_file(resolve_folder(name, weights=False))
    if not isinstance(config, Qwen2Config):
        raise ValueError(f"training is for Qwen2; found model_type {config.model_type!r}")
    adapter = None if lora is None else parse_lora(lora, name)
    jax.config.update("jax_platforms", "cpu")
    chip, devices = aot.topology_mesh(topology, **({"fsdp": -1, "tensor": 1} if mesh is None else parse_mesh(mesh)))
    found = asdict(compile_training(config, chip, devices, batch, context, adapter))
    sizes = dict(devices.shape)
    if as_json:
        print(
            json.dumps({"model": name, "topology": topology, "mesh": sizes, "batch": batch, "context": context} | found)
        )
        return
    table = Table("per chip", "", box=None, pad_edge=False, show_header=False)
    for label, value in training_rows(found).items():
        table.add_row(label, value)
    used = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one chip"
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{name}[/bold], {batch} rows of {context:,} tokens, on {topology}: {used}\n")
    console.print(table)


def training_rows(found: dict[str, Any]) -> dict[str, str]:
    """The lines of a step of training, by their labels; sizes are per chip."""
    return {
        "frozen weights": format_bytes(found["frozen"]),
        "trained weights": format_bytes(found["trainable"]),
        "optimizer": format_bytes(found["optimizer"]),
        "temporaries": format_bytes(found["temporaries"]) if found["temporaries"] else "not shown",
        "fits": "yes" if found["fits"] else "NO",
        "roofline": f"{found['step_seconds'] * 1e3:.1f} ms, {found['tokens_per_second']:,.0f} tokens/s of all chips",
        "compiled in": f"{found['seconds']:.0f} s",
    }


def print_report(name: str, found: dict[str, Any]) -> None:
    """The text of `compile`."""
    console = Console(highlight=False, soft_wrap=True)
    mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1) or "one chip"
    rows = {
        "model": f"{name}, {found['dtype']}",
        "chips": f"{found['chips']} of {found['topology']}, {format_bytes(found['hbm_bytes'])} each: {mesh}",
        "batch": f"{found['batch']} rows of {found['context']:,} tokens",
        "weights": f"{format_bytes(found['weight_bytes'])} a chip",
        "KV cache": f"{format_bytes(found['cache_bytes'])} a chip",
        "heads": heads_text(found["query_heads"], found["key_value_heads"]),
    }
    for label, text in rows.items():
        console.print(f"[bold]{label:<10}[/bold] {text}")
    table = Table("per chip", "prefill", "decode", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    programs = [found["prefill"], found["decode"]]
    for label, line in table_rows(programs, found["layers"]).items():
        table.add_row(label, *line)
    console.print()
    console.print(table)
    if (encoder := found.get("encoder")) is not None:
        fits = "fits" if encoder["fits"] else "does NOT fit"
        console.print(
            f"\nThe encoder, over {encoder['clips']} clips of 30 s, {fits} beside it all: "
            f"{format_bytes(encoder['temporaries'])} of temporaries, {encoder['step_seconds'] * 1e3:.2f} ms at least."
        )
    chunk = f"{found['prefill_tokens']:,} tokens a row (generate's prefill_chunk_size)"
    console.print(f"\nPrefill is a chunk of {chunk}, decode one step of every row.")


def table_rows(programs: list[dict[str, Any]], layers: int) -> dict[str, list[str]]:
    """The lines of the table, by their labels."""
    return {
        "arguments": [format_bytes(p["arguments"]) for p in programs],
        "  updated in place": [format_bytes(p["aliased"]) for p in programs],
        "temporaries": [format_bytes(p["temporaries"]) for p in programs],
        "fits": ["yes" if p["fits"] else "NO" for p in programs],
        "collectives": [collectives_text(p["collectives"], layers) for p in programs],
        "large copies": ["not shown" if p["copies"] is None else str(count(p["copies"])) for p in programs],
        "roofline": ["-" if (s := p["step_seconds"]) is None else f"{s * 1e3:.2f} ms, {p['bound']}" for p in programs],
        "tokens/s": [f"{p['tokens_per_second']:,.0f}" for p in programs],
        "compiled in": [f"{p['seconds']:.0f} s" for p in programs],
    }


def collectives_text(found: dict[str, list[int]] | None, layers: int) -> str:
    """Collectives as a number per layer, where they are: "2 all-reduce a layer + 1"."""
    if found is None:
        return "not shown"
    parts = []
    for name, (number, _) in found.items():
        each, rest = divmod(number, layers)
        parts.append(f"{each} {name} a layer + {rest}" if each else f"{rest} {name}")
    return "; ".join(parts) or "none"


def count(operations: dict[str, list[int]]) -> int:
    """How many there are of all kinds."""
    return sum(number for number, _ in operations.values())
