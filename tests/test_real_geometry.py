"""The main job on real input: Qwen2.5-0.5B's geometry, written by Transformers, with the real tokenizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.geometry_worker import FIRST, GREEDY, NEW

torch = pytest.importorskip("torch", reason="compares with PyTorch: pip install flaxqwen[test]")

# Four prompts of different lengths, in one left-padded batch.
TEXTS = [
    "The capital of France is",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n",
    "请用一句话介绍长江。",
    "Water boils at 100 degrees Celsius at sea level. On a mountain, where the air is thinner, it boils at",
]
# The tests' own compiler flags are for tiny programs: these have 24 layers, and hundreds of steps.
ENVIRONMENT = {**os.environ, "XLA_FLAGS": ""}
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def checkpoint(shared, tmp_path_factory) -> Path:
    """988 MB of seeded random bfloat16 weights, as Transformers saves them."""
    folder = tmp_path_factory.mktemp("reference")
    data = shared / "data"
    command = [sys.executable, shared / "tools/make_reference.py", "--out", folder]
    command += ["--config", data / "configs/Qwen2.5-0.5B-Instruct", "--tokenizer", data / "tokenizer/qwen2.5-instruct"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def converted(checkpoint, tmp_path_factory) -> Path:
    """The same through `flaxqwen convert`."""
    folder = tmp_path_factory.mktemp("flax") / "model"
    flaxqwen("convert", checkpoint, folder)
    return folder


def flaxqwen(*arguments: object) -> str:
    """Standard output of the installed command."""
    command = [str(Path(sys.executable).parent / "flaxqwen"), *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, text=True).stdout


def theirs_of(folder: Path, dtype: str):
    from transformers import AutoModelForCausalLM as Theirs

    return Theirs.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def reference(checkpoint):
    """What Transformers does in float32: greedy tokens of the batch and of a chat, logits of the texts."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    model = theirs_of(checkpoint, "float32")
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    tokens = model.generate(**batch, max_new_tokens=FIRST, eos_token_id=None, pad_token_id=151643, **GREEDY)
    messages = [{"role": "user", "content": TEXTS[0]}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**chat, max_new_tokens=24, **GREEDY)[0, chat["input_ids"].shape[1] :].tolist()
    ids = tokenizer("\n".join(TEXTS), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits.numpy()
    narrow = theirs_of(checkpoint, "bfloat16")
    with torch.no_grad():
        narrow_logits = narrow(ids).logits.float().numpy()
    return {
        "model": model,
        "ids": batch["input_ids"].numpy(),
        "mask": batch["attention_mask"].numpy(),
        "tokens": tokens.numpy(),
        "answer": answer,
        "text_ids": ids.numpy(),
        "logits": logits,
        "bfloat16_logits": narrow_logits,
    }


@pytest.fixture(scope="module")
def ours(checkpoint, converted, reference, tmp_path_factory) -> dict[str, np.ndarray]:
    """The results of geometry_worker."""
    folder = tmp_path_factory.mktemp("ours")
    np.savez(folder / "inputs.npz", **{name: reference[name] for name in ("ids", "mask", "text_ids")})
    command = [sys.executable, "-m", "tests.geometry_worker", str(checkpoint), str(converted), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(np.load(folder / "results.npz"))


def test_128_greedy_tokens_of_a_padded_batch(ours, reference):
    """Identical to Transformers', and to those of each prompt alone; logits within 2e-5."""
    tokens, prompt = ours["tokens"], reference["ids"].shape[1]
    assert tokens.shape == (len(TEXTS), prompt + NEW)
    np.testing.assert_array_equal(tokens[:, : prompt + FIRST], reference["tokens"])
    # Each of all 128 is the likeliest after those before it: theirs goes on with the same, in 5 s instead of 60.
    np.testing.assert_array_equal(tokens[:, prompt:], likeliest(reference["model"], tokens, reference["mask"]))
    np.testing.assert_array_equal(ours["alone"], tokens[:, prompt:])
    assert np.abs(ours["logits"] - reference["logits"]).max() <= 2e-5 * np.abs(reference["logits"]).max()


def likeliest(theirs, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[B, NEW]: the token that Transformers' model puts first after each beginning of left-padded rows."""
    seen = torch.from_numpy(np.pad(mask, ((0, 0), (0, NEW)), constant_values=1))
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = theirs(
            torch.from_numpy(tokens).long(), attention_mask=seen, position_ids=positions, logits_to_keep=NEW + 1
        )
    return found.logits[:, :-1].argmax(-1).numpy()


def test_converted_checkpoint_generates_the_same_text(converted, reference):
    """The command line, on what it converted: token for token what Transformers generates greedily in float32."""
    arguments = ["--chat", "--temperature", "0", "--repetition-penalty", "1.0", "--max-new-tokens", "24", "--json"]
    result = json.loads(flaxqwen("generate", converted, TEXTS[0], "--dtype", "float32", *arguments))
    assert result["new_tokens"] == reference["answer"]


def test_bfloat16_is_as_near_to_float32_as_theirs(ours, reference):
    """KL(PyTorch float32 || ours in bfloat16) <= 1.2 x KL(PyTorch float32 || PyTorch bfloat16), in nats."""
    want = log_softmax(reference["logits"])

    def divergence(logits: np.ndarray) -> float:
        return float(np.mean(np.sum(np.exp(want) * (want - log_softmax(logits)), axis=-1)))

    mine, theirs = divergence(ours["bfloat16_logits"]), divergence(reference["bfloat16_logits"])
    print(f"KL ours {mine:.3g}, theirs {theirs:.3g}, ratio {mine / theirs:.3f}")
    assert mine <= 1.2 * theirs


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64."""
    logits = logits.astype(np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
