"""Speed and memory of generation beside its peers and the machine's roofs, in one run.

    python -m benchmarks.run --device cpu|gpu [--models 0.5b,1.5b,7b] [--dtypes f32,bf16,int8] [--prompts 128,1024]
                             [--batches 1,8] [--contexts 128] [--peers transformers,transformers-compile]
                             [--new 32] [--repeats 3] [--out DIR]

Models of the official geometries with random weights; greedy decoding with no end of sequence; each model and side in a
process of its own. Prefill is generate() of one token, a decode step what each further token adds, the first call
generate() of 32 tokens from 128 before anything was compiled or run; peak memory is the process's, or on a GPU the
device's, up to the last prompt, before more rows are decoded, and in the end; load is drawing the weights (from a
checkpoint: benchmarks.start). Medians of the repeats are given. The roofs are measured in the same run: bandwidth by
reading 1 GB, on a GPU by copying it, the matrix rate by a large product. A step at the roof reads every weight and the
filled cache once; a prefill is at the roof where it multiplies at that rate. On a CPU that others share the bandwidth
moves within seconds (41 and 73 GB/s on a Zen 5): it is read again, from 256 MB, after each repeat of our decoding, and
a share is the median of those of the repeats. int8 is weight-only, computed in bfloat16. The last line is JSON; with
--out it is written there too, and a roofline plot.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.geometries import GEOMETRIES, config
from benchmarks.setting import setting

DTYPES = {"f32": "float32", "bf16": "bfloat16", "int8": "bfloat16"}
ITEM = {"f32": 4, "bf16": 2, "int8": 1}
DEFAULTS = {
    "cpu": {"models": "0.5b", "dtypes": "f32,bf16,int8", "prompts": "128,1024", "batches": "1,8", "contexts": "128"},
    "gpu": {
        "models": "0.5b,1.5b,7b",
        "dtypes": "bf16,int8",
        "prompts": "128,1024,4096",
        "batches": "1,8,64",
        "contexts": "128,4096",
    },
}
Generate = Callable[[np.ndarray, int], Any]


def ours(model: str, dtype: str) -> Generate:
    """flaxqwen's generate(ids, new tokens)."""
    import jax

    from flaxqwen import AutoModelForCausalLM

    quantize: Any = "int8" if dtype == "int8" else None
    built = AutoModelForCausalLM.from_config(config(model), dtype=DTYPES[dtype], quantize=quantize)
    jax.block_until_ready(built.params)
    return lambda ids, new: built.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None)


def theirs(model: str, dtype: str, device: str, compiled: bool) -> Generate:
    """Transformers' generate(ids, new tokens), eager with sdpa, or with a static cache and torch.compile."""
    import torch
    import transformers

    settings = transformers.Qwen2Config.from_dict(config(model).to_dict())
    place = "cuda" if device == "gpu" else "cpu"
    with torch.device(place):
        built = transformers.AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, DTYPES[dtype])).eval()
    options: dict[str, Any] = {"cache_implementation": "static"} if compiled else {}
    if compiled and device == "cpu":  # where generate() compiles for tests of its own alone
        options["compile_config"] = transformers.CompileConfig()
        options["compile_config"]._compile_all_devices = True

    def generate(ids: np.ndarray, new: int) -> Any:
        tokens = torch.tensor(ids, dtype=torch.long, device=place)
        mask = torch.ones_like(tokens)
        out = built.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            **options,
        )
        return out.cpu()

    return generate


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_bytes(side: str, device: str) -> int:
    """Peak memory of this process, or of its device."""
    if device == "cpu":
        # Not ru_maxrss: it begins with the peak of the process that forked this one.
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024
    if side == "flaxqwen":
        import jax

        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    import torch

    return torch.cuda.max_memory_allocated()


def case_ms(
    generate: Generate, ids: np.ndarray, new: int, repeats: int, roof: Callable[[], float] | None = None
) -> tuple[float, float | None]:
    """Milliseconds of prefill (new = 1), or of each further token; and the GB/s of `roof`, read after each.

    The median of the repeats, after one more; the GB/s are such that their product with it is the median of products.
    """
    times, products = [], []
    for _ in range(repeats + 1):
        first = seconds(lambda: generate(ids, 1))
        times.append(first if new == 1 else (seconds(lambda: generate(ids, new)) - first) / (new - 1))
        products += [times[-1] * roof()] if roof else []
    median = statistics.median(times[1:])
    return median * 1e3, statistics.median(products[1:]) / median if products else None


def measure(side: str, model: str, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of one side; one that fails, such as for want of memory, gives its error in their place."""
    rng, device = np.random.default_rng(0), arguments.device
    start = time.perf_counter()
    generate = ours(model, dtype) if side == "flaxqwen" else theirs(model, dtype, device, side.endswith("compile"))
    found: dict[str, Any] = {"load_s": round(time.perf_counter() - start, 2)}

    def prompt(batch: int, length: int) -> np.ndarray:
        return rng.integers(0, config(model).vocab_size, (batch, length))

    ids = prompt(1, 128)
    found["first_call_s"] = round(seconds(lambda: generate(ids, 32)), 2)
    cases = [("prefill", 1, length) for length in map(int, arguments.prompts.split(","))]
    lengths, batches = map(int, arguments.contexts.split(",")), list(map(int, arguments.batches.split(",")))
    cases += [("decode", batch, length) for length in lengths for batch in batches]
    for phase, batch, length in cases:
        decodes, case = phase == "decode", f"{batch}x{length}"
        new = arguments.new if decodes else 1
        is_shared = decodes and (side, device) == ("flaxqwen", "cpu")
        try:
            with bandwidth() if is_shared else nullcontext() as roof:
                ms, rate = case_ms(generate, prompt(batch, length), new, arguments.repeats, roof)
            found[f"{phase}_ms_{case}"] = round(ms, 2)
            if rate:
                found[f"gb_per_s_{case}"] = round(rate, 1)
        except (RuntimeError, MemoryError) as error:  # for want of memory, by any name of XLA's and torch's: a finding
            found[f"{phase}_ms_{case}"] = f"{type(error).__name__}: {error}"[:200]
        if not decodes:
            found["prefill_peak_mb"] = round(peak_bytes(side, device) / 1e6)
    return found | {"peak_mb": round(peak_bytes(side, device) / 1e6)}


BOTH_MINOR = (((1,), (1,)), ((), ()))  # contraction of two matrices over the last axis of each


def timer(call: Callable[..., Any], *inputs: Any) -> Callable[[], float]:
    """A function that gives the best time of 7 runs of `call`, which is compiled here."""
    import jax

    program = jax.jit(call)
    jax.block_until_ready(program(*inputs))
    return lambda: min(seconds(lambda: jax.block_until_ready(program(*inputs))) for _ in range(7))


def reader(rows: int) -> Callable[[], float]:
    """A function that reads `rows` of 4 KB, on a CPU in huge pages, in the faster of two ways, and gives the GB/s."""
    import jax
    import jax.numpy as jnp

    from flaxqwen.convert.memory import WeightMemory
    from flaxqwen.memory import in_huge_pages

    table, row = jnp.ones((rows, 1024), jnp.float32), jnp.ones((1, 1024), jnp.float32)
    table = in_huge_pages(table, WeightMemory())
    ways = [timer(jnp.sum, table), timer(lambda t, r: jax.lax.dot_general(r, t, BOTH_MINOR), table, row)]
    return lambda: table.nbytes / min(way() for way in ways) / 1e9


def copier(rows: int) -> Callable[[], float]:
    """A function that copies `rows` of 4 KB on a GPU, and gives the GB/s, those that are read and those written."""
    import jax.numpy as jnp

    table = jnp.ones((rows, 1024), jnp.float32)
    copy = timer(lambda table: table + 1, table)  # XLA gives a mere copy back as it came
    return lambda: 2 * table.nbytes / copy() / 1e9


def roofs(device: str) -> dict[str, Any]:
    """What the machine can do: bytes read per second, and FLOP/s of a matrix product in each dtype."""
    import jax
    import jax.numpy as jnp

    found: dict[str, Any] = {"gb_per_s": round(copier(2**18)() if device == "gpu" else reader(2**18)(), 1)}
    n = 8192 if device == "gpu" else 2048
    for name in ("f32", "bf16"):
        x = jnp.ones((n, n), DTYPES[name])
        wide = timer(lambda a, b: jax.lax.dot_general(a, b, BOTH_MINOR, preferred_element_type=jnp.float32), x, x)()
        found[f"tflops_{name}"] = round(2 * n**3 / wide / 1e12, 3)
    return found | {"device": jax.devices()[0].device_kind, "jax": jax.__version__}


def weights_of(model: str) -> tuple[int, int]:
    """How many weights the layers of a model multiply with, and its head."""
    hidden, wide, layers, heads, kv_heads, vocabulary, _ = GEOMETRIES[model]
    kv = kv_heads * hidden // heads
    return layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * wide), vocabulary * hidden


def step_bytes(model: str, dtype: str, batch: int, context: int) -> int:
    """Bytes that a decode step must read: weights, and the filled cache in the dtype of the arithmetic."""
    hidden, _, layers, heads, kv_heads, *_ = GEOMETRIES[model]
    cache = 2 * layers * kv_heads * hidden // heads * batch * context
    return sum(weights_of(model)) * ITEM[dtype] + cache * max(ITEM[dtype], 2)


def needed_flops(model: str, phase: str, batch: int, length: int) -> int:
    """FLOPs of the products of a prefill, of whose tokens the last alone has logits, or of a decode step.

    Attention is of each token with those before it and itself.
    """
    hidden, _, layers, *_ = GEOMETRIES[model]
    tokens, seen = (length, length * (length + 1) // 2) if phase == "prefill" else (1, length)
    in_layers, in_head = weights_of(model)
    return batch * (2 * tokens * in_layers + 2 * in_head + 4 * layers * hidden * seen)


@contextmanager
def bandwidth() -> Iterator[Callable[[], float]]:
    """A function that reads 256 MB in a process of its own, whose memory is not ours, and gives the GB/s."""
    command = [sys.executable, "-m", "benchmarks.run", "--worker", "reader"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        asked, answers = process.stdin, process.stdout

        def read() -> float:
            print(file=asked, flush=True)
            return float(answers.readline())

        yield read


def in_process(*words: str) -> dict[str, Any]:
    """What this file prints in its last line, run anew."""
    command = [sys.executable, "-m", "benchmarks.run", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return (
        json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": f"exit code {done.returncode}"}
    )


def table(results: list[dict[str, Any]], roof: dict[str, Any]) -> list[str]:
    """A line for each figure: that of every side, each peer's over ours, and the share of the roof."""
    lines = []
    for result in results:
        mine, *peers = (result["sides"][side] for side in result["sides"])
        for name, value in mine.items():
            line = f"{result['model']:5} {result['dtype']:5} {name:20} {value!s:>10}"
            for peer in peers:
                other = peer.get(name)
                line += f" {other!s:>10}"
                if isinstance(value, int | float) and isinstance(other, int | float):
                    line += f" {other / value:5.2f} x"
            if name.startswith("decode") and isinstance(value, float):
                case = name.rsplit("_", 1)[1]
                size = step_bytes(result["model"], result["dtype"], *map(int, case.split("x")))
                share = size / (value / 1e3) / 1e9 / mine.get(f"gb_per_s_{case}", roof["gb_per_s"])
                line += f"  {share:4.0%} of the bandwidth"
            if name.startswith("prefill_ms") and isinstance(value, float):
                flops = needed_flops(result["model"], "prefill", *map(int, name.rsplit("_", 1)[1].split("x")))
                rate = roof[f"tflops_{'f32' if result['dtype'] == 'f32' else 'bf16'}"]
                line += f"  {flops / (value / 1e3) / 1e12 / rate:4.0%} of the matrix rate"
            lines.append(line)
    return lines


def plot(results: list[dict[str, Any]], roof: dict[str, Any], path: Path) -> None:
    """A roofline plot: FLOP/s over FLOPs per byte of each decode and prefill, under the measured roofs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    intensity = np.logspace(-1, 4, 200)
    for name in ("f32", "bf16"):
        peak = roof[f"tflops_{name}"] * 1e12
        axes.loglog(intensity, np.minimum(intensity * roof["gb_per_s"] * 1e9, peak), label=f"roof, {name}")
    for result in results:
        for side, found in result["sides"].items():
            points = []
            for name, value in found.items():
                if "_ms_" not in name or not isinstance(value, float):
                    continue
                batch, length = map(int, name.rsplit("_", 1)[1].split("x"))
                size = step_bytes(result["model"], result["dtype"], batch, length)
                flops = needed_flops(result["model"], name.partition("_")[0], batch, length)
                points.append((flops / size, flops / (value / 1e3)))
            if points:
                axes.loglog(*zip(*points, strict=True), "o", label=f"{result['model']} {result['dtype']} {side}")
    axes.set(xlabel="FLOPs per byte read", ylabel="FLOP/s", title=f"{roof['device']}: prefill and decode")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    """The command line; what it leaves out depends on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    for name in DEFAULTS["cpu"]:
        parser.add_argument(f"--{name}")
    parser.add_argument("--peers", default="", help="of transformers, transformers-compile")
    parser.add_argument("--new", default=32, type=int, help="tokens")
    parser.add_argument("--repeats", default=3, type=int, help="that count; one more comes first and does not")
    parser.add_argument("--out", type=Path, help="folder for the JSON and the plot")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name, value in DEFAULTS[arguments.device].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def main() -> None:
    """Run the benchmark and print its table and its line."""
    arguments = parse()
    if arguments.worker == "roofs":
        print(json.dumps(roofs(arguments.device)))
        return
    if arguments.worker == "reader":
        read = reader(2**16)
        for _ in sys.stdin:
            print(read(), flush=True)
        return
    if arguments.worker:
        side, model, dtype = arguments.worker.split("/")
        print(json.dumps(measure(side, model, dtype, arguments)))
        return
    words = ["--device", arguments.device, "--new", str(arguments.new), "--repeats", str(arguments.repeats)]
    for name in ("prompts", "batches", "contexts"):
        words += [f"--{name}", getattr(arguments, name)]
    roof, results = in_process("--worker", "roofs", *words), []
    for model in arguments.models.split(","):
        for dtype in arguments.dtypes.split(","):
            peers = [] if dtype == "int8" else [peer for peer in arguments.peers.split(",") if peer]
            sides = {side: in_process("--worker", f"{side}/{model}/{dtype}", *words) for side in ("flaxqwen", *peers)}
            results.append({"model": model, "dtype": dtype, "sides": sides})
            print(json.dumps(results[-1]), file=sys.stderr)
    print(f"roofs: {roof}", *table(results, roof), sep="\n")
    report = {"benchmark": "run", "device": arguments.device, **setting(), "roofs": roof, "results": results}
    print(json.dumps(report), flush=True)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        stem = f"{arguments.device}-{arguments.dtypes.replace(',', '-')}"
        (arguments.out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
        plot(results, roof, arguments.out / f"{stem}.png")


if __name__ == "__main__":
    main()
