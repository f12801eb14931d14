"""Time from the start of a process to the first token, and its peak memory, beside Transformers, from a checkpoint.

    python -m benchmarks.start [--model 0.5b] [--dtypes f32,bf16] [--prompt 128] [--new 32] [--repeats 3] [--folder DIR]

Writes a checkpoint of a real geometry with random weights in each dtype, and loads it in new processes, ours and
Transformers' in turns: import, from_pretrained, and generate() to the first token that its streamer gets. The files are
in the page cache. Our first process has nothing compiled, and its time is told apart; the others find the programs in
the compilation cache of the first. Peaks are of the whole process, whose weights are in the checkpoint's dtype. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from benchmarks.geometries import config
from benchmarks.run import DTYPES
from benchmarks.setting import setting
from flaxqwen import AutoModelForCausalLM

# Arguments: the side, the folder, the prompt's tokens, new tokens.
PROCESS = """
import json, sys, time
import numpy as np
side, folder, length, new = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
with open("/proc/self/stat") as file:  # the process began so many seconds after the machine
    began = int(file.read().rpartition(")")[2].split()[19]) / 100
uptime = lambda: time.clock_gettime(time.CLOCK_BOOTTIME)
ids = np.random.default_rng(0).integers(1, 1000, (1, length))
class Clock:
    times = []
    put = lambda self, value: self.times.append(uptime() - began)
    end = lambda self: None
options = {"max_new_tokens": new, "do_sample": False, "streamer": Clock()}
if side == "flaxqwen":
    from flaxqwen import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generate(ids, eos_token_id=None, **options)
else:
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.from_numpy(ids)
    model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, eos_token_id=None, **options)
status = open("/proc/self/status").read().splitlines()
peak = int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) * 1024
print(json.dumps({"first_token_s": Clock.times[1], "end_s": uptime() - began, "peak_bytes": peak}))
"""


def start(side: str, folder: Path, arguments: argparse.Namespace, compiled: Path) -> dict[str, Any]:
    """What one process says. compiled: its compilation cache."""
    words = [side, str(folder), str(arguments.prompt), str(arguments.new)]
    settings = {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, *words],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(dtype: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Medians of both sides in one dtype, and how ours compare."""
    model = AutoModelForCausalLM.from_config(config(arguments.model), dtype=DTYPES[dtype])
    model.save_pretrained(folder / dtype, to="pytorch")
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    del model
    cold = start("flaxqwen", folder / dtype, arguments, folder / "compiled")
    found: dict[str, list[dict[str, Any]]] = {"flaxqwen": [], "transformers": []}
    start("transformers", folder / dtype, arguments, folder / "compiled")
    for _ in range(arguments.repeats):
        for side, runs in found.items():
            runs.append(start(side, folder / dtype, arguments, folder / "compiled"))
    medians = {
        side: {name: statistics.median(run[name] for run in runs) for name in cold} for side, runs in found.items()
    }
    ours, theirs = medians["flaxqwen"], medians["transformers"]
    return {
        "dtype": dtype,
        "weights_bytes": weights,
        "cold_first_token_s": cold["first_token_s"],
        **medians,
        "their_time_over_ours": theirs["first_token_s"] / ours["first_token_s"],
        "peak_over_goal": max(ours["peak_bytes"], cold["peak_bytes"]) / (1.15 * weights + 0.7e9),
        "cold_peak_bytes": cold["peak_bytes"],
    }


def main() -> None:
    """Run the benchmark and print its table and its line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="0.5b")
    parser.add_argument("--dtypes", default="f32,bf16")
    parser.add_argument("--prompt", default=128, type=int, help="tokens")
    parser.add_argument("--new", default=32, type=int, help="tokens")
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--folder", type=Path, help="on which disk; default: the system's temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        results = [measure(dtype, arguments, Path(name)) for dtype in arguments.dtypes.split(",")]
    for result in results:
        print(f"{result['dtype']}: weights of {result['weights_bytes'] / 1e9:.2f} GB")
        for side in ("flaxqwen", "transformers"):
            run = result[side]
            print(
                f"{side:>14}: first token after {run['first_token_s']:.2f} s, the last after {run['end_s']:.2f} s, "
                f"peak {run['peak_bytes'] / 1e9:.2f} GB"
            )
        print(
            f"their time over ours {result['their_time_over_ours']:.2f}; ours with nothing compiled "
            f"{result['cold_first_token_s']:.2f} s, {result['cold_peak_bytes'] / 1e9:.2f} GB; peak over "
            f"(1.15 x weights + 0.7 GB): {result['peak_over_goal']:.2f}"
        )
    print(json.dumps({"benchmark": "start", "model": arguments.model, **setting(), "results": results}))


if __name__ == "__main__":
    main()
