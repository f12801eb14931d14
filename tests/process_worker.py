"""One of several processes: python -m tests.process_worker FOLDER command|batch|train|death, with JAX's variables set.

`command` runs `flaxqwen generate --distributed`, `batch` that; `train` trains all parameters, then an adapter; `death`
generates, and then the last process is killed while the others go on. What a process has read and made goes to
FOLDER/PROCESSES-PROCESS.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxqwen import AutoModelForCausalLM, loading, make_mesh
from flaxqwen.cli import main
from flaxqwen.cli.train import train_model
from flaxqwen.distributed import agree, joined

NEW = 6
BATCH = ["--batch-size", "3", "--max-new-tokens", str(NEW), "--dtype", "float32"]
LORA = "r=4,lora_alpha=16,target_modules=all-linear"
OPTIONS = {"steps": 3, "batch_size": 4, "learning_rate": 1e-3, "dtype": "float32", "log_every": 1}
TRAIN: dict[str, Any] = {
    "evaluate": None, "length": 32, "resume": False, "plot": False, "lora": None, "distributed": True,
}  # fmt: skip
PROMPT = [3, 1, 4, 1, 5]
read = 0


def counted(tensor: Any, box: Any, counter: Any = None) -> np.ndarray:
    """loading.read_box, with its bytes counted."""
    global read
    values = read_box(tensor, box, counter)
    read += values.nbytes
    return values


read_box, loading.read_box = loading.read_box, counted


def save(folder: Path, **values: Any) -> None:
    """Write what this process has to say."""
    name = f"{os.environ['JAX_NUM_PROCESSES']}-{os.environ['JAX_PROCESS_ID']}.json"
    (folder / name).write_text(json.dumps({"read": read, **values}))


def command(folder: Path) -> int:
    """Sample by the command line; prints, in the first process."""
    options = ["--temperature", "0.8", "--seed", "5", "--max-new-tokens", str(NEW), "--json"]
    code = main(["generate", str(folder), "--ids", " ".join(map(str, PROMPT)), "--distributed", *options])
    save(folder)
    return code


def batch(folder: Path) -> int:
    """A batch job by the command line."""
    code = main(["batch", str(folder), str(folder / "in.jsonl"), str(folder / "two.jsonl"), *BATCH, "--distributed"])
    save(folder)
    return code


def train(folder: Path) -> int:
    """Train all parameters where heads are padded and repeated, and an adapter where rows are cut."""
    name, data = str(folder), folder / "data.jsonl"
    with joined(True):
        train_model(name, data, folder / "whole", **TRAIN, options=dict(OPTIONS), mesh="tensor=4")
        save(folder)
        adapter = {**TRAIN, "lora": LORA, "mesh": "fsdp=2,tensor=2"}
        train_model(name, data, folder / "adapter", **adapter, options=dict(OPTIONS))
    return 0


def death(folder: Path) -> int:
    """Generate, then go on until another process is gone."""
    with joined(True):
        model = AutoModelForCausalLM.from_pretrained(folder, mesh=make_mesh(data=2))
        prompts = np.asarray([PROMPT, PROMPT[::-1]])
        settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        output = model.generate(prompts, max_new_tokens=NEW, **settings)
        agreed = int(agree(10 + jax.process_index()))
        save(folder, tokens=output.sequences.tolist(), logits=np.stack(output.logits).tolist(), agreed=agreed)
        if jax.process_index() == jax.process_count() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(10_000):
            model.generate(prompts, max_new_tokens=NEW, **settings)
    return 0


if __name__ == "__main__":
    sys.exit({"command": command, "batch": batch, "train": train, "death": death}[sys.argv[2]](Path(sys.argv[1])))
