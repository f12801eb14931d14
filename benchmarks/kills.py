"""Jobs that are killed at random moments, and gone on with: is every result the bytes of an undisturbed run?

    python -m benchmarks.kills batch [--kills 30] [--lines 600] [--dtype float32]
    python -m benchmarks.kills convert [--kills 30]
    python -m benchmarks.kills orbax [--kills 30]

batch: a random tiny model continues prompts of random lengths, every third one sampled. convert: a checkpoint of 0.4 GB
in bfloat16 becomes 81 shards in float32. orbax: it becomes a checkpoint of orbax. A job is killed (SIGKILL) at random
moments, from the start of the process on, and the same command is given until the job is done; then the next job
begins, until there have been so many kills. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flaxqwen import AutoModelForCausalLM, Qwen2Config

COMMAND = [sys.executable, "-c", "import sys; from flaxqwen.cli import main; sys.exit(main(sys.argv[1:]))"]
NEW = 48
CONVERT = {"convert": ["--dtype", "float32", "--max-shard-size", "10MB"], "orbax": ["--to", "orbax"]}


def write_batch(folder: Path, lines: int, dtype: str) -> list[str]:
    """The model, and in.jsonl; returns the command, but for its target."""
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
    return ["batch", str(folder / "model"), str(folder / "in.jsonl")]


def write_checkpoint(folder: Path) -> list[str]:
    """A checkpoint; returns the command, but for its options and its target."""
    config = Qwen2Config(
        vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=10, num_attention_heads=16,
        num_key_value_heads=2, dtype="bfloat16",
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype="bfloat16").save_pretrained(folder / "model", to="pytorch")
    return ["convert", str(folder / "model")]


def start(folder: Path, command: list[str], target: str) -> subprocess.Popen:
    """The command. Its programs are kept, so that it is at work soon."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen([*COMMAND, *command, str(folder / target)], env=environment, stdout=subprocess.DEVNULL)


def contents(path: Path) -> dict[str, bytes]:
    """The bytes of a file, or of all files of a folder, by name."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).digest() for file in files}


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def finished(folder: Path, target: str) -> int:
    """What a killed job has finished: lines, or files."""
    partial, journal = folder / f"{target}.partial-0", folder / target / ".journal.flaxqwen"
    if partial.exists():
        return max(partial.read_bytes().count(b"\n") - 1, 0)
    return len(json.loads(journal.read_bytes())["files"]) if journal.exists() else 0


def is_done(target: Path) -> bool:
    """Whether a killed job has left its whole result."""
    return target.is_file() or ((target / "checksums.json").exists() and not (target / ".journal.flaxqwen").exists())


def killed(folder: Path, command: list[str], target: str, seconds: float) -> bool:
    """Run the command, and kill it after at most so many seconds; False: it had ended before."""
    running = start(folder, command, target)
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
    parser.add_argument("job", choices=("batch", *CONVERT))
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--lines", type=int, default=600)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        batch = arguments.job == "batch"
        if batch:
            command = write_batch(folder, arguments.lines, arguments.dtype)
        else:
            command = [*write_checkpoint(folder), *CONVERT[arguments.job]]
        for _ in range(2):  # the second time without compiling
            remove(folder / "whole")
            begun = time.perf_counter()
            assert start(folder, command, "whole").wait() == 0
            seconds = time.perf_counter() - begun
        whole = contents(folder / "whole")
        kills, jobs, identical, within = 0, 0, 0, 0
        while kills < arguments.kills:
            jobs += 1
            target, done = f"out-{jobs}", False
            while kills < arguments.kills and not done:
                if done := not killed(folder, command, target, seconds):
                    break
                kills += 1
                if is_done(folder / target):  # killed between its last act and its end
                    done = True
                    print(f"kill {kills}: job {jobs} was done", flush=True)
                    break
                count = finished(folder, target)
                within += count > 0
                print(f"kill {kills}: job {jobs}, {count} {'lines' if batch else 'files'} finished", flush=True)
            if not done:
                assert start(folder, command, target).wait() == 0
            identical += contents(folder / target) == whole
            remove(folder / target)
    result = {"job": arguments.job, "kills": kills, "with_parts_finished": within, "jobs": jobs, "identical": identical}
    print(json.dumps(result | {"undisturbed_seconds": seconds}))
    return 0 if identical == jobs else 1


if __name__ == "__main__":
    sys.exit(main())
