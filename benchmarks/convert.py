"""Throughput and memory of `convert`, beside `cp` of the same file on the same disk.

    python -m benchmarks.convert [--model 0.5b] [--repeats 5] [--folder DIR]

Makes a checkpoint of a real geometry in bfloat16, filled by repeating one random block, in a temporary folder; copies
it with cp and converts it in each direction, in turns, each conversion in a fresh process. Before each the output of
the last round is removed and the disk is idle: what others left to write is not ours to wait for. The source is in the
page cache for all. Both are timed until their bytes are on the disk: convert waits for them by itself, after cp comes
an fsync. `ratio_to_cp` is the median throughput (bytes read per second) over cp's so; `ratio_to_unsynced_cp` over that
of cp alone, which ends when its bytes are in the page cache. `peak_mb` is the peak resident memory over an interpreter
that has imported jax. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks.geometries import GEOMETRIES, config
from flaxqwen.auto import AutoModelForCausalLM, param_shapes
from flaxqwen.convert import save_params, to_name

# Direction -> (whose output is the source, options).
DIRECTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "flax": ("source", {}),
    "pytorch": ("flax", {"to": "pytorch"}),
    "msgpack": ("source", {"format": "msgpack"}),
    "linen": ("source", {"layout": "linen"}),
    "float32": ("source", {"dtype": "float32"}),
}

CONVERT = """
import json, os, shutil, sys, time
import jax, jax.numpy as jnp
jnp.zeros(1).block_until_ready()
from flaxqwen.convert import convert
# Not ru_maxrss: it begins with the peak of the process that forked this one.
peak = lambda: int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) * 1024
shutil.rmtree(sys.argv[2], ignore_errors=True)
os.sync()
for file in os.scandir(sys.argv[1]):  # convert leaves none of what it wrote in the page cache
    with open(file, "rb", buffering=0) as stream:
        while stream.readinto(bytearray(1 << 20)):
            pass
before, start = peak(), time.perf_counter()
convert(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak() - before}))
"""


def make_checkpoint(folder: Path, model: str) -> Path:
    """A checkpoint in one file; rows repeat one random block, so that it takes no memory to make."""
    block = (np.random.default_rng(0).standard_normal(1 << 20) * 0.02).astype(ml_dtypes.bfloat16)
    shapes = param_shapes(AutoModelForCausalLM.module_of(config(model)))
    tensors = {to_name(path): np.broadcast_to(block[: shape[-1]], shape) for path, shape in shapes.items()}
    save_params(tensors, folder, to="pytorch", max_shard_size="1TB")
    config(model).save_pretrained(folder)
    return folder


def time_cp(source: Path, folder: Path) -> tuple[float, float]:
    """Seconds of one cp into an empty folder: until it ends, and until its bytes are on the disk."""
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    folder.mkdir()
    start = time.perf_counter()
    subprocess.run(["cp", str(source), str(folder)], check=True)
    copied = time.perf_counter()
    fd = os.open(folder / source.name, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    return copied - start, time.perf_counter() - start


def time_convert(source: Path, folder: Path, options: dict[str, str]) -> dict[str, float]:
    """Seconds and peak bytes of one conversion into a new folder."""
    command = [sys.executable, "-c", CONVERT, str(source), str(folder), json.dumps(options)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    """Run the benchmark and print its table and its line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="0.5b", choices=GEOMETRIES)
    parser.add_argument("--repeats", default=5, type=int, help="rounds that count; one more comes first and does not")
    parser.add_argument("--folder", type=Path, help="on which disk; default: the system's temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        file = make_checkpoint(folder / "source", arguments.model) / "model.safetensors"
        size = file.stat().st_size
        seconds: dict[str, list[float]] = {"cp alone": [], "cp": [], **{direction: [] for direction in DIRECTIONS}}
        peaks = dict.fromkeys(DIRECTIONS, 0.0)
        for _ in range(arguments.repeats + 1):
            alone, synced = time_cp(file, folder / "cp")
            seconds["cp alone"].append(alone)
            seconds["cp"].append(synced)
            for direction, (source, options) in DIRECTIONS.items():
                result = time_convert(folder / source, folder / direction, options)
                seconds[direction].append(result["seconds"])
                peaks[direction] = max(peaks[direction], result["peak"])
    medians = {what: statistics.median(times[1:]) for what, times in seconds.items()}
    print(f"{size / 1e6:.0f} MB, median of {arguments.repeats}")
    for what in ("cp", "cp alone"):
        print(f"{what:10} {size / medians[what] / 1e6:6.0f} MB/s")
    report = {}
    for direction, peak in peaks.items():
        rate = size / medians[direction] / 1e6
        ratio, unsynced = (medians[what] / medians[direction] for what in ("cp", "cp alone"))
        print(
            f"{direction:10} {rate:6.0f} MB/s  {ratio:5.2f} x cp  {unsynced:5.2f} x cp alone  "
            f"peak {peak / 1e6:4.0f} MB over the interpreter"
        )
        report[direction] = {
            "mb_per_s": round(rate),
            "ratio_to_cp": round(ratio, 3),
            "ratio_to_unsynced_cp": round(unsynced, 3),
            "peak_mb": round(peak / 1e6, 1),
        }
    print(json.dumps({"benchmark": "convert", "model": arguments.model, "bytes": size, "directions": report}))


if __name__ == "__main__":
    main()
