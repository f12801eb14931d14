"""A step of training beside PyTorch, in one run: forward, backward, clipping and AdamW on a geometry of Qwen2.5.

    python -m benchmarks.train [--model 0.5b] [--rows 4] [--tokens 256] [--dtype float32] [--steps 3] [--turns 2]

Weights are random and in float32 on both sides, and so are AdamW's moments; --dtype bfloat16 is the arithmetic alone,
torch's by autocast. PyTorch runs Transformers' model with sdpa and its fused AdamW. Each takes turns in a process of
its own, whose first step, which compiles, does not count; peaks are of the process's resident memory. The last line is
JSON. 0.5b needs 14 GB.

Ours keeps the memory that it frees, as `flaxqwen train` does (flaxqwen/allocator.py). Both sides
inherit GLIBC_TUNABLES=glibc.malloc.hugetlb=1 from the environment, which asks the kernel for large pages.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from benchmarks.setting import setting
from flaxqwen.allocator import keep_freed_memory

# numpy, jax and torch are imported by the functions: the allocator is to be set before.


def draw(arguments: argparse.Namespace, vocab_size: int) -> Any:
    """Token ids [rows, tokens]."""
    import numpy as np

    return np.random.default_rng(0).integers(0, vocab_size, (arguments.rows, arguments.tokens))


def flaxqwen_steps(arguments: argparse.Namespace) -> Callable[[], Any]:
    """A function that takes a step and waits for it."""
    keep_freed_memory()
    import jax
    import jax.numpy as jnp

    from benchmarks.geometries import config
    from flaxqwen import AutoModelForCausalLM
    from flaxqwen.training import TrainState, make_optimizer, make_train_step

    settings = config(arguments.model)
    model = AutoModelForCausalLM.from_config(settings, dtype="float32", seed=0)
    ids = jnp.asarray(draw(arguments, settings.vocab_size), jnp.int32)
    optimizer = make_optimizer(1e-5)
    step = jax.jit(make_train_step(model.module.clone(dtype=jnp.dtype(arguments.dtype)), optimizer), donate_argnums=0)
    state = [TrainState.create({"params": model.params}, optimizer)]
    del model

    def take() -> float:
        state[0], metrics = step(state[0], {"input_ids": ids, "labels": ids})
        return float(jax.block_until_ready(metrics["loss"]))

    return take


def transformers_steps(arguments: argparse.Namespace) -> Callable[[], Any]:
    """The same of Transformers' model."""
    import torch
    import transformers

    from benchmarks.geometries import config

    settings = config(arguments.model)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings.to_dict())).train()
    ids = torch.from_numpy(draw(arguments, settings.vocab_size))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, weight_decay=0.0, fused=True)

    def take() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.dtype == "bfloat16"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return take


def turn(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Seconds of each step that counts, and the peak, in bytes."""
    take = {"flaxqwen": flaxqwen_steps, "transformers": transformers_steps}[name](arguments)
    seconds, losses = [], []
    for _ in range(arguments.steps + 1):
        start = time.perf_counter()
        losses.append(take())
        seconds.append(time.perf_counter() - start)
    assert all(map(math.isfinite, losses))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"first_seconds": seconds[0], "seconds": seconds[1:], "peak_bytes": peak}


def main() -> None:
    """Take turns, and print the table and the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="0.5b")
    parser.add_argument("--rows", default=4, type=int)
    parser.add_argument("--tokens", default=256, type=int)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", default=3, type=int, help="of a turn, that count")
    parser.add_argument("--turns", default=2, type=int)
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {"flaxqwen": [], "transformers": []}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for _ in range(arguments.turns):
            for name, turns in found.items():
                turns.append(pool.submit(turn, arguments, name).result())
                print(f"{name:>12}: {', '.join(f'{s:.2f}' for s in turns[-1]['seconds'])} s", flush=True)
    tokens = arguments.rows * arguments.tokens
    medians = {name: statistics.median(s for t in turns for s in t["seconds"]) for name, turns in found.items()}
    for name, seconds in medians.items():
        peak = max(t["peak_bytes"] for t in found[name]) / 1e9
        first = found[name][0]["first_seconds"]
        rate = f"{seconds:.2f} s a step, {tokens / seconds:,.0f} tokens/s"
        print(f"{name:>12}: {rate}, peak {peak:.1f} GB, first step {first:.1f} s")
    ratio = medians["transformers"] / medians["flaxqwen"]
    print(f"their time over ours: {ratio:.2f}")
    conditions = setting() | {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "")}
    print(json.dumps({"benchmark": "train", **vars(arguments), **conditions, "ratio": ratio, "results": found}))


if __name__ == "__main__":
    main()
