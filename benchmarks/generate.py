"""Prefill and decode beside Transformers, in one run.

    python -m benchmarks.generate [--model 0.5b] [--dtypes float32,bfloat16] [--batches 1,8] [--prompt 128] [--new 32]
                                  [--repeats 5]

Both sides have random weights of a real geometry and generate greedily with no end of sequence. They take turns;
medians are given, and the ratio (Transformers' time over ours) of each turn's pair. Prefill is generate() of one token;
a decode step is what each further token adds. Transformers runs eagerly with sdpa, as it does by default. First calls,
which compile, come before and do not count. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.geometries import GEOMETRIES, config
from flaxqwen import AutoModelForCausalLM

Generate = Callable[[np.ndarray, int], Any]


def ours(model: str, dtype: str) -> Generate:
    """flaxqwen's generate(ids, new tokens)."""
    built = AutoModelForCausalLM.from_config(config(model), dtype=dtype)

    def generate(ids: np.ndarray, new: int) -> Any:
        return jax.block_until_ready(built.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None))

    return generate


def theirs(model: str, dtype: str) -> Generate:
    """Transformers' generate(ids, new tokens)."""
    import torch
    import transformers

    settings = transformers.Qwen2Config.from_dict(config(model).to_dict())
    built = transformers.AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, dtype)).eval()

    def generate(ids: np.ndarray, new: int) -> Any:
        tokens = torch.tensor(ids, dtype=torch.long)
        mask = torch.ones_like(tokens)
        return built.generate(tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)

    return generate


def seconds(generate: Generate, ids: np.ndarray, new: int) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    generate(ids, new)
    return time.perf_counter() - start


def measure(sides: dict[str, Generate], ids: np.ndarray, new: int, repeats: int) -> dict[str, Any]:
    """Medians of prefill and of a decode step, in milliseconds, and the ratios of the pairs."""
    turns: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in sides}
    for turn in range(repeats + 1):
        for name, generate in sides.items():
            first = seconds(generate, ids, 1)
            step = (seconds(generate, ids, new) - first) / (new - 1)
            if turn:
                turns[name]["prefill"].append(first * 1e3)
                turns[name]["decode"].append(step * 1e3)
    result: dict[str, Any] = {}
    for phase in ("prefill", "decode"):
        for name in sides:
            result[f"{phase}_ms_{name}"] = round(statistics.median(turns[name][phase]), 1)
        pairs = zip(turns["transformers"][phase], turns["flaxqwen"][phase], strict=True)
        result[f"{phase}_ratio"] = round(statistics.median(a / b for a, b in pairs), 2)
    return result


def main() -> None:
    """Run the benchmark and print its table and its line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="0.5b", choices=GEOMETRIES)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--prompt", default=128, type=int, help="tokens")
    parser.add_argument("--new", default=32, type=int, help="tokens")
    parser.add_argument("--repeats", default=5, type=int, help="turns that count; one more comes first and does not")
    arguments = parser.parse_args()
    rng, results = np.random.default_rng(0), []
    for dtype in arguments.dtypes.split(","):
        sides = {"flaxqwen": ours(arguments.model, dtype), "transformers": theirs(arguments.model, dtype)}
        for batch in map(int, arguments.batches.split(",")):
            ids = rng.integers(0, config(arguments.model).vocab_size, (batch, arguments.prompt))
            found = measure(sides, ids, arguments.new, arguments.repeats)
            results.append({"dtype": dtype, "batch": batch, **found})
            print(f"{dtype} batch {batch}: " + ", ".join(f"{k} {v}" for k, v in found.items()), file=sys.stderr)
    print(
        f"{'dtype':9} {'batch':>5} | {'prefill ms':>10} {'theirs':>8} {'ratio':>6} "
        f"| {'decode ms':>9} {'theirs':>8} ratio"
    )
    for r in results:
        print(
            f"{r['dtype']:9} {r['batch']:5} | {r['prefill_ms_flaxqwen']:10} {r['prefill_ms_transformers']:8} "
            f"{r['prefill_ratio']:6} | {r['decode_ms_flaxqwen']:9} {r['decode_ms_transformers']:8} {r['decode_ratio']}"
        )
    setting = {"model": arguments.model, "prompt": arguments.prompt, "new": arguments.new, "repeats": arguments.repeats}
    print(json.dumps({"benchmark": "generate", "device": jax.devices()[0].device_kind, **setting, "results": results}))


if __name__ == "__main__":
    main()
