"""Which models reach which TPUs: decoding compiled by the real TPU compiler for every pair, nothing run.

    python -m benchmarks.reach [--models 0.5b,7b,32b,72b] [--chips v5e,v5p,v6e] [--batch 8] [--context 8192]
    python -m benchmarks.reach --training

Needs libtpu (pip install 'flaxqwen[tpu]'). Each line is a whole model in bfloat16, tensor parallel over all chips, with
a full KV cache: what a chip holds, whether it fits, what it sends, and the roofline of a step. With --training: a step
of AdamW over 8 rows of 2,048 tokens, of all parameters or of an adapter, layers recomputed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from typing import Any

import jax

from benchmarks.geometries import GEOMETRIES, config
from flaxqwen import aot
from flaxqwen.aot_training import compile_training
from flaxqwen.cli.common import format_bytes, heads_text
from flaxqwen.cli.compile import collectives_text
from flaxqwen.lora import LoraConfig

# (model, topology, chips that are used of it): the fewest that may hold the weights, and more.
PAIRS = (
    ("0.5b", "v5e:2x2", 1), ("0.5b", "v6e:2x2", 1), ("0.5b", "v5p:2x2x1", 1), ("0.5b", "v5e:2x2", 4),
    ("7b", "v5e:2x2", 1), ("7b", "v5e:2x2", 2), ("7b", "v5e:2x2", 4), ("7b", "v5e:2x4", 8), ("7b", "v6e:2x2", 1),
    ("7b", "v6e:2x2", 4), ("7b", "v6e:2x4", 8), ("7b", "v5p:2x2x1", 1), ("7b", "v5p:2x2x1", 4),
    ("32b", "v5e:2x4", 8), ("32b", "v5e:4x4", 16), ("32b", "v6e:2x2", 4), ("32b", "v6e:2x4", 8),
    ("32b", "v5p:2x2x1", 1), ("32b", "v5p:2x2x1", 4),
    ("72b", "v5e:4x4", 16), ("72b", "v6e:2x4", 8), ("72b", "v6e:4x4", 16), ("72b", "v5p:2x2x1", 4),
    ("72b", "v5p:2x2x2", 8), ("72b", "v5p:2x2x4", 16),
)  # fmt: skip
# (model, topology, chips, r of an adapter on all linear layers or None): cut by fsdp.
TRAINING = (
    ("7b", "v5p:2x2x1", 4, None), ("7b", "v6e:2x4", 8, None), ("7b", "v5p:2x2x1", 1, 16), ("7b", "v6e:2x2", 1, 16),
    ("7b", "v6e:2x2", 4, 16),
)  # fmt: skip
ROWS, TOKENS = 8, 2048


def compiled_training(model: str, topology: str, chips: int, rank: int | None) -> dict[str, Any]:
    """One line of the table of training."""
    jax.config.update("jax_platforms", "cpu")
    chip, mesh = aot.topology_mesh(topology, fsdp=chips, tensor=1)
    adapter = None if rank is None else LoraConfig(r=rank, target_modules="all-linear")
    found = compile_training(dataclasses.replace(config(model), dtype="bfloat16"), chip, mesh, ROWS, TOKENS, adapter)
    return {"model": model, "topology": topology, "chips": chips, "rank": rank, **dataclasses.asdict(found)}


def training_line(found: dict[str, Any]) -> str:
    """A line for people."""
    what = "all parameters" if found["rank"] is None else f"LoRA, r = {found['rank']}"
    sizes = ", ".join(f"{name} {format_bytes(found[name])}" for name in ("frozen", "trainable", "optimizer"))
    fits = f"temporaries {format_bytes(found['temporaries'])} | fits" if found["fits"] else "does not fit"
    return (
        f"{found['model']} {what}, {found['chips']} x {found['topology'].partition(':')[0]} | {sizes}, {fits} | "
        f"{found['step_seconds'] * 1e3:,.0f} ms at least, {found['tokens_per_second']:,.0f} tokens/s | "
        f"compiled in {found['seconds']:.0f} s"
    )


def compiled(model: str, topology: str, chips: int, batch: int, context: int) -> dict[str, Any]:
    """One line of the table."""
    jax.config.update("jax_platforms", "cpu")
    chip, mesh = aot.topology_mesh(topology, tensor=chips)
    settings = dataclasses.replace(config(model), dtype="bfloat16")
    made = aot.plan(settings, chip, mesh, batch, context)
    heads = made.sharding.heads
    found = aot.compile_decode(made)
    return {
        "model": model,
        "topology": topology,
        "chips": chips,
        "heads": heads_text(
            [settings.num_attention_heads, len(heads.queries)], [settings.num_key_value_heads, len(heads.keys)]
        ),
        "layers": settings.num_hidden_layers,
        **aot.held(made),
        **{k: None if v == math.inf else v for k, v in dataclasses.asdict(found).items()},
    }


def line(found: dict[str, Any]) -> str:
    """A line for people."""
    where = f"{found['model']:5} {found['chips']:2} x {found['topology'].partition(':')[0]:4}"
    held = f"weights {format_bytes(found['weight_bytes']):>8}, cache {format_bytes(found['cache_bytes']):>8}"
    if not found["fits"]:
        return f"{where} | {held} | does not fit ({found['seconds']:.0f} s)"
    return (
        f"{where} | {held}, temporaries {format_bytes(found['temporaries']):>8} | fits | "
        f"{collectives_text(found['collectives'], found['layers'])} | {found['step_seconds'] * 1e3:6.2f} ms, "
        f"{found['bound']}, {found['tokens_per_second']:7,.0f} tokens/s | compiled in {found['seconds']:.0f} s"
    )


def main() -> None:
    """Compile every pair and print the table and the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="0.5b,7b,32b,72b", help=f"of {', '.join(GEOMETRIES)}")
    parser.add_argument("--chips", default="v5e,v5p,v6e")
    parser.add_argument("--batch", default=8, type=int, help="rows")
    parser.add_argument("--context", default=8192, type=int, help="tokens of each row in the cache")
    parser.add_argument("--training", action="store_true", help="a step of training in place of decoding")
    arguments = parser.parse_args()
    rows, tokens = (ROWS, TOKENS) if arguments.training else (arguments.batch, arguments.context)
    results: list[dict[str, Any]] = []
    # A process each: the compiler keeps its memory, which came to 6 GB after 20 models.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for model, topology, *rest in TRAINING if arguments.training else PAIRS:
            kind = topology.partition(":")[0]
            if model not in arguments.models.split(",") or kind not in arguments.chips.split(","):
                continue
            if arguments.training:
                results.append(pool.submit(compiled_training, model, topology, *rest).result())
                print(training_line(results[-1]), flush=True)
            else:
                results.append(pool.submit(compiled, model, topology, *rest, rows, tokens).result())
                print(line(results[-1]), flush=True)
    setting = {"training": arguments.training, "batch": rows, "context": tokens, "dtype": "bfloat16"}
    versions = {"jax": jax.__version__, "libtpu": version("libtpu")}
    print(json.dumps({"benchmark": "reach", **setting, **versions, "results": results}))


if __name__ == "__main__":
    main()
