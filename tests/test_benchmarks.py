"""The benchmark that others are read by runs to its last line, and counts what it says it counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.geometries import GEOMETRIES, config
from benchmarks.run import needed_flops, step_bytes, table

torch = pytest.importorskip("torch", reason="compares with PyTorch: pip install flaxqwen[test]")
ROOT = Path(__file__).parents[1]


def test_run(tmp_path: Path):
    """Every figure of both sides, as a table with shares of the roofs, in the last line, in a file, and drawn."""
    words = "--models tiny --dtypes f32 --peers transformers --prompts 40 --batches 2 --contexts 8 --new 9"
    command = [sys.executable, "-m", "benchmarks.run", *words.split(), "--repeats", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    report = json.loads(last)
    assert json.loads((tmp_path / "cpu-f32.json").read_text()) == report
    assert (tmp_path / "cpu-f32.png").read_bytes().startswith(b"\x89PNG")
    (result,) = report["results"]
    figures = {"load_s", "first_call_s", "prefill_ms_1x40", "prefill_peak_mb", "decode_ms_2x8", "peak_mb"}
    assert set(result["sides"]["transformers"]) == figures
    assert set(result["sides"]["flaxqwen"]) == figures | {"gb_per_s_2x8"}
    assert all(isinstance(value, int | float) for side in result["sides"].values() for value in side.values())
    assert ["decode_ms_2x8" in line for line in lines if "of the bandwidth" in line] == [True]
    assert ["prefill_ms_1x40" in line for line in lines if "of the matrix rate" in line] == [True]
    assert report["versions"]["torch"] == torch.__version__
    assert report["date"]
    assert report["processor"]


def test_flops_are_pytorchs():
    """Those that PyTorch counts in Transformers' forward, whose attention is of every pair of tokens."""
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    hidden, _, layers, *_ = GEOMETRIES["tiny"]
    settings = transformers.Qwen2Config.from_dict(config("tiny").to_dict())
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager").eval()
    for batch, length in ((1, 1), (1, 33), (3, 20)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.ones((batch, length), dtype=torch.long), logits_to_keep=1)
        unseen = 4 * layers * hidden * batch * length * (length - 1) // 2
        assert needed_flops("tiny", "prefill", batch, length) == counter.get_total_flops() - unseen
    assert needed_flops("tiny", "decode", 3, 1) == needed_flops("tiny", "prefill", 3, 1)


def test_shares_of_the_roofs():
    """A step that takes as long as its bytes do, and a prefill that takes as long as its products do: 100%."""
    roof = {"gb_per_s": 50.0, "tflops_f32": 0.5, "tflops_bf16": 2.0}
    for dtype, rate in (("f32", 0.5), ("bf16", 2.0), ("int8", 2.0)):
        step = step_bytes("0.5b", dtype, 8, 128) / 50e9 * 1e3
        prefill = needed_flops("0.5b", "prefill", 1, 1024) / (rate * 1e12) * 1e3
        sides = {"flaxqwen": {"decode_ms_8x128": step, "prefill_ms_1x1024": prefill}}
        lines = table([{"model": "0.5b", "dtype": dtype, "sides": sides}], roof)
        assert lines[0].endswith(" 100% of the bandwidth")
        assert lines[1].endswith(" 100% of the matrix rate")
