"""Batch jobs that are killed at random moments, and gone on with: is every result the bytes of an undisturbed run?

    python -m benchmarks.kills [--kills 30] [--lines 600] [--dtype float32]

A random tiny model continues prompts of random lengths, every third one sampled. A job is killed (SIGKILL) at random
moments, from the start of the process on, and the same command is given until the job is done; then the next job
begins, until there have been so many kills. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flaxqwen import AutoModelForCausalLM, Qwen2Config

COMMAND = [sys.executable, "-c", "import sys; from flaxqwen.cli import main; sys.exit(main(sys.argv[1:]))", "batch"]
NEW = 48


def write_inputs(folder: Path, lines: int, dtype: str) -> None:
    """The model, and in.jsonl."""
    config = Qwen2Config(
        vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, eos_token_id=7, dtype=dtype,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, seed=1, dtype=dtype).save_pretrained(folder / "model")
    with (folder / "in.jsonl").open("w") as file:
        for i in range(lines):
            ids = [random.randrange(2048) for _ in range(random.randint(1, 120))]
            options = {"max_new_tokens": random.randint(1, NEW)} | ({"temperature": 1.1} if i % 3 == 0 else {})
            file.write(json.dumps({"id": f"line {i}", "ids": ids, "options": options}) + "\n")


def start(folder: Path, target: str) -> subprocess.Popen:
    """The command. Its programs are kept, so that it is at work soon."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [*COMMAND, str(folder / "model"), str(folder / "in.jsonl"), str(folder / target)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def killed(folder: Path, target: str, seconds: float) -> bool:
    """Run the command, and kill it after so many seconds; False: it had ended before."""
    running = start(folder, target)
    try:
        code = running.wait(timeout=random.uniform(0, seconds))
    except subprocess.TimeoutExpired:
        running.kill()
        running.wait()
        return True
    assert code == 0, code
    return False


def main() -> int:
    """Returns the exit code: 1 where a result differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--lines", type=int, default=600)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, arguments.lines, arguments.dtype)
        for _ in range(2):  # the second time without compiling
            (folder / "whole").unlink(missing_ok=True)
            begun = time.perf_counter()
            assert start(folder, "whole").wait() == 0
            seconds = time.perf_counter() - begun
        whole = (folder / "whole").read_bytes()
        kills, jobs, identical, within = 0, 0, 0, 0
        while kills < arguments.kills:
            jobs += 1
            target = f"out-{jobs}"
            while kills < arguments.kills and killed(folder, target, seconds):
                kills += 1
                partial = folder / f"{target}.partial-0"
                written = partial.read_bytes().count(b"\n") if partial.exists() else 0
                within += 1 < written <= arguments.lines
                print(f"kill {kills}: job {jobs}, {max(written - 1, 0)} lines done", flush=True)
            if not (folder / target).exists():
                assert start(folder, target).wait() == 0
            identical += (folder / target).read_bytes() == whole
    result = {"kills": kills, "with_lines_done": within, "jobs": jobs, "identical": identical, "lines": arguments.lines}
    print(json.dumps(result | {"dtype": arguments.dtype, "undisturbed_seconds": seconds}))
    return 0 if identical == jobs else 1


if __name__ == "__main__":
    sys.exit(main())
