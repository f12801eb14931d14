"""Throughput and memory of `convert`, beside `cp` of the same files on the same disk.

    python -m benchmarks.convert [--model 0.5b] [--source FOLDER] [--repeats 5] [--folder DIR]

Makes a checkpoint of a real geometry in bfloat16, filled by repeating one random block, in a temporary folder; copies
it with cp and converts it in each direction, in turns, each conversion in a fresh process. Before each the disk is idle
(what others left to write is not ours to wait for), and the source is in the page cache; or, where it is larger than a
third of the memory, none of it is. Outputs are compared with their checksums and, where they have the source's
dtype, tensor by tensor with the source; they are removed once they are no longer needed.

Both are timed until their bytes are on the disk: convert waits for them by itself, after cp comes an fsync.
`ratio_to_cp` is the median throughput (bytes read per second) over cp's so; `ratio_to_unsynced_cp` over that of cp
alone, which ends when its bytes are in the page cache. `peak_mb` is the peak resident memory over an interpreter that
has imported jax. The last line is JSON.
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
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks.geometries import GEOMETRIES, config
from flaxqwen.auto import AutoModelForCausalLM, param_shapes
from flaxqwen.convert import check, open_checkpoint, save_params, to_name

# Direction -> (whose output is the source, options).
DIRECTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "flax": ("source", {}),
    "pytorch": ("flax", {"to": "pytorch"}),
    "msgpack": ("source", {"format": "msgpack"}),
    "linen": ("source", {"layout": "linen"}),
    "float32": ("source", {"dtype": "float32"}),
    "int8": ("source", {"quantize": "int8"}),
    "orbax": ("source", {"to": "orbax"}),
    "from orbax": ("orbax", {"to": "pytorch"}),
}

CONVERT = """
import json, sys, time
import jax, jax.numpy as jnp
jnp.zeros(1).block_until_ready()
from flaxqwen.convert import convert
# Not ru_maxrss: it begins with the peak of the process that forked this one.
peak = lambda: int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) * 1024
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


def files_of(folder: Path) -> list[Path]:
    """All files in a folder and its folders."""
    return [path for path in folder.rglob("*") if path.is_file()]


def prepare(source: Path, target: Path, is_cached: bool) -> None:
    """Remove the target, let the disk finish, and bring the source into the page cache, or out of it."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    for path in files_of(source):
        with path.open("rb", buffering=0) as file:
            if not is_cached:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while is_cached and file.readinto(bytearray(1 << 20)):
                pass


def time_cp(source: Path, folder: Path) -> tuple[float, float]:
    """Seconds of one cp into a new folder: until it ends, and until its bytes are on the disk."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(folder)], check=True)
    copied = time.perf_counter()
    for path in files_of(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return copied - start, time.perf_counter() - start


def time_convert(source: Path, folder: Path, options: dict[str, str]) -> dict[str, float]:
    """Seconds and peak bytes of one conversion into a new folder."""
    command = [sys.executable, "-c", CONVERT, str(source), str(folder), json.dumps(options)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def sums(folder: Path) -> dict[str, int]:
    """The CRC-32 of each tensor of a checkpoint, whatever its format."""
    found = {}
    with open_checkpoint(folder) as checkpoint:
        for name, tensor in checkpoint.tensors.items():
            found[name] = 0
            for chunk in tensor.chunks():
                found[name] = zlib.crc32(chunk.view("u1"), found[name])
    return found


def measure(original: Path, folder: Path, is_cached: bool) -> tuple[dict[str, float], dict[str, float]]:
    """One round: seconds of cp and of each direction, and the peak bytes of the latter."""
    expected = sums(original)
    prepare(original, folder / "cp", is_cached)
    seconds = dict(zip(("cp alone", "cp"), time_cp(original, folder / "cp"), strict=True))
    shutil.rmtree(folder / "cp")
    peaks = {}
    for i, (direction, (given, options)) in enumerate(DIRECTIONS.items()):
        source, target = original if given == "source" else folder / given, folder / direction
        prepare(source, target, is_cached)
        result = time_convert(source, target, options)
        seconds[direction], peaks[direction] = result["seconds"], result["peak"]
        print(f"{direction}: {result['seconds']:.1f} s, peak {result['peak'] / 1e6:.0f} MB", flush=True)
        check(target)
        if not {"dtype", "quantize"} & set(options):
            assert sums(target) == expected
        wanted = {later for later, _ in list(DIRECTIONS.values())[i + 1 :]}
        for done in {direction, given} - wanted - {"source"}:
            shutil.rmtree(folder / done)
    return seconds, peaks


def main() -> None:
    """Run the benchmark and print its table and its line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="0.5b", choices=GEOMETRIES)
    parser.add_argument("--source", type=Path, help="a checkpoint to take, in place of one that is made")
    parser.add_argument("--repeats", default=5, type=int, help="rounds that count; if cached, one more comes first")
    parser.add_argument("--folder", type=Path, help="on which disk; default: the system's temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        original = arguments.source or make_checkpoint(Path(name) / "source", arguments.model)
        size = sum(path.stat().st_size for path in files_of(original))
        is_cached = size < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 3
        rounds = [measure(original, Path(name), is_cached) for _ in range(arguments.repeats + is_cached)][is_cached:]
    medians = {what: statistics.median(seconds[what] for seconds, _ in rounds) for what in rounds[0][0]}
    print(f"{size / 1e6:.0f} MB, {'' if is_cached else 'not '}cached, median of {arguments.repeats}")
    for what in ("cp", "cp alone"):
        print(f"{what:10} {size / medians[what] / 1e6:6.0f} MB/s")
    report = {}
    for direction in DIRECTIONS:
        peak = max(peaks[direction] for _, peaks in rounds)
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
    line = {"benchmark": "convert", "model": arguments.model, "bytes": size, "cached": is_cached, "directions": report}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
