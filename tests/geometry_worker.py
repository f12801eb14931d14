"""Our side of test_real_geometry, compiled as users have it: python -m tests.geometry_worker SOURCE CONVERTED FOLDER.

Reads FOLDER/inputs.npz and writes FOLDER/results.npz.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxqwen import AutoModelForCausalLM

GREEDY: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}
NEW = 128
# Tokens that Transformers generates of the batch: half a second each.
FIRST = 16


def main(source: str, converted: str, folder: Path) -> None:
    """Greedy tokens of the padded batch and of each prompt alone, in float32; logits in float32 and bfloat16."""
    inputs = dict(np.load(folder / "inputs.npz"))
    model = AutoModelForCausalLM.from_pretrained(converted, dtype="float32")
    options = GREEDY | {"eos_token_id": None}
    tokens = model.generate(inputs["ids"], attention_mask=inputs["mask"], max_new_tokens=NEW, **options)
    alone = [
        model.generate(row[None, mask.argmax() :], max_new_tokens=NEW, **options)[0, -NEW:]
        for row, mask in zip(inputs["ids"], inputs["mask"], strict=True)
    ]
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(model(inputs["text_ids"]).logits)
    del model
    narrow = AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16")(inputs["text_ids"]).logits
    found = {"tokens": tokens, "alone": alone, "logits": logits}
    np.savez(folder / "results.npz", **found, bfloat16_logits=np.asarray(narrow, np.float32))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
