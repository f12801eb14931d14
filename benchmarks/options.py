"""What each option of generate() costs over plain greedy decoding, beside Transformers, in one run.

    python -m benchmarks.options [--model 0.5b] [--repeats 5] [--only NAME,...] [--no-peer]

An option's work is on scores and tokens, and does not depend on the number of layers: it is timed on one layer of the
geometry with its whole vocabulary, where it is not lost in the noise of 24, and given in milliseconds and as a share of
a plain step of the whole model. Beam search moves the caches of all layers and is timed on the whole model, against
plain decoding of as many rows. Assisted decoding has a vocabulary of 16,384 and a draft model of one layer, a tenth of
the model's size, which always agrees: the model's other layers add nothing to the residual stream. Both sides take
turns; medians are given. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.geometries import GEOMETRIES, config
from flaxqwen import AutoModelForCausalLM
from flaxqwen.model import Model

PROMPT, NEW = 128, 33
SAMPLE = {"do_sample": True, "top_k": 0}
OPTIONS: dict[str, dict[str, Any]] = {
    "sampling": SAMPLE,
    "temperature": SAMPLE | {"temperature": 0.7},
    "top_k": SAMPLE | {"top_k": 20},
    "top_p": SAMPLE | {"top_p": 0.8},
    "top_k and top_p": SAMPLE | {"top_k": 20, "top_p": 0.8},
    "min_p": SAMPLE | {"min_p": 0.05},
    "typical_p": SAMPLE | {"typical_p": 0.9},
    "epsilon_cutoff": SAMPLE | {"epsilon_cutoff": 3e-4},
    "eta_cutoff": SAMPLE | {"eta_cutoff": 3e-4},
    "top_h": SAMPLE | {"top_h": 0.4},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.1},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 3},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 3},
    "bad_words_ids": {"bad_words_ids": [[5], [6, 7], [8, 9, 10]]},
    "sequence_bias": {"sequence_bias": [[[5], 1.0], [[6, 7], -2.0]]},
    "min_new_tokens": {"min_new_tokens": 20, "eos_token_id": 3},
    "suppress_tokens": {"suppress_tokens": [1, 2, 3]},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (5, 1.01), "eos_token_id": 3},
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {"renormalize_logits": True},
    "watermark by left hash": {"watermarking_config": {"seeding_scheme": "lefthash"}},
    "watermark by self hash": {"watermarking_config": {"seeding_scheme": "selfhash", "context_width": 4}},
    "SynthID of 30 keys": {"watermarking_config": {"ngram_len": 5, "keys": list(range(1, 31))}},
}
PLAIN = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
Run = Callable[[int], Any]


def step_ms(runs: dict[str, Run], repeats: int, new: int = NEW) -> dict[str, list[float]]:
    """Milliseconds of each token after the first, turn by turn; the first turn, which compiles, does not count."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            times = []
            for count in (1, new):
                start = time.perf_counter()
                run(count)
                times.append(time.perf_counter() - start)
            if turn:
                found[name].append((times[1] - times[0]) * 1e3 / (new - 1))
    return found


def ours(model: Model, ids: np.ndarray, options: dict[str, Any]) -> Run:
    """generate() of so many tokens."""
    given = PLAIN | {"seed": 0} | options
    return lambda new: model.generate(ids, attention_mask=np.ones_like(ids), max_new_tokens=new, **given)


def theirs(settings: dict[str, Any]) -> Any:
    """Transformers' model of the same geometry."""
    import torch
    import transformers

    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config.from_dict(settings)).eval()


def their_run(model: Any, ids: np.ndarray, options: dict[str, Any]) -> Run:
    """The same of Transformers."""
    import torch
    import transformers

    given = PLAIN | options
    if (watermark := options.get("watermarking_config")) is not None:
        kind = "SynthIDTextWatermarkingConfig" if "ngram_len" in watermark else "WatermarkingConfig"
        given = given | {"watermarking_config": getattr(transformers, kind)(**watermark)}
    tokens = torch.tensor(ids, dtype=torch.long)
    return lambda new: model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, **given)


def of_options(name: str, only: list[str], repeats: int, peer: bool, full_ms: dict[str, float]) -> list[dict[str, Any]]:
    """Each option's cost in milliseconds a token, and as a share of a step of the whole model."""
    small = replace(config(name), num_hidden_layers=1, layer_types=("full_attention",))
    ids = np.random.default_rng(0).integers(0, small.vocab_size, (1, PROMPT))
    wanted = {key: value for key, value in OPTIONS.items() if not only or key in only}
    model = AutoModelForCausalLM.from_config(small, dtype="float32")
    sides = {"flaxqwen": {key: ours(model, ids, value) for key, value in ({"plain": {}} | wanted).items()}}
    if peer:
        other = theirs(small.to_dict())
        sides["transformers"] = {key: their_run(other, ids, value) for key, value in ({"plain": {}} | wanted).items()}
    rows: dict[str, dict[str, Any]] = {key: {"option": key} for key in wanted}
    for side, runs in sides.items():
        found = step_ms(runs, repeats)
        for key in wanted:
            pairs = zip(found[key], found["plain"], strict=True)
            cost = statistics.median(option - plain for option, plain in pairs)
            rows[key] |= {f"{side}_ms": round(cost, 2), f"{side}_share": round(cost / full_ms[side], 4)}
            print(f"{side} {key}: {cost:.2f} ms, {100 * cost / full_ms[side]:.1f}%", file=sys.stderr)
    return list(rows.values())


def of_beams(model: Model, ids: np.ndarray, repeats: int) -> dict[str, float]:
    """A step of 4 beams over a plain step of 4 rows."""
    runs = {
        "plain": ours(model, np.repeat(ids, 4, axis=0), {}),
        "beams": ours(model, ids, {"num_beams": 4, "early_stopping": False}),
    }
    found = step_ms(runs, repeats)
    pairs = zip(found["beams"], found["plain"], strict=True)
    return {
        "plain_ms": round(statistics.median(found["plain"]), 1),
        "beams_ms": round(statistics.median(found["beams"]), 1),
        "ratio": round(statistics.median(beams / plain for beams, plain in pairs), 3),
    }


def of_drafts(name: str, repeats: int) -> dict[str, float]:
    """Plain decoding's time over that with 5 drafts a round."""
    target = replace(config(name), vocab_size=16384)
    draft = replace(target, num_hidden_layers=1, layer_types=("full_attention",))
    model = AutoModelForCausalLM.from_config(target, dtype="float32")
    layers = dict(model.params["model"])
    for index in range(1, target.num_hidden_layers):
        layer = layers[f"layers_{index}"]
        silent = {path: {"weight": jnp.zeros_like(layer[path[0]][path[1]]["weight"])} for path in SILENT}
        layers[f"layers_{index}"] = layer | {
            outer: layer[outer] | {inner: silent[outer, inner]} for outer, inner in SILENT
        }
    model = replace(model, params={"model": layers})
    small = AutoModelForCausalLM.from_config(draft, dtype="float32")
    small = replace(small, params={"model": {key: layers[key] for key in small.params["model"]}})
    ids = np.random.default_rng(0).integers(0, target.vocab_size, (1, PROMPT))
    how = {"assistant_model": small, "num_assistant_tokens": 5, "assistant_confidence_threshold": 0.0}
    runs = {"plain": ours(model, ids, {}), "assisted": ours(model, ids, how)}
    np.testing.assert_array_equal(runs["plain"](NEW), runs["assisted"](NEW))
    found = step_ms(runs, repeats, new=61)
    pairs = zip(found["plain"], found["assisted"], strict=True)
    return {
        "size_of_draft": round(small.num_parameters() / model.num_parameters(), 3),
        "plain_ms": round(statistics.median(found["plain"]), 1),
        "assisted_ms": round(statistics.median(found["assisted"]), 1),
        "speedup": round(statistics.median(plain / assisted for plain, assisted in pairs), 2),
    }


SILENT = (("self_attn", "o_proj"), ("mlp", "down_proj"))  # what a layer adds goes through these


def main() -> None:
    """Run the benchmark and print its table and its line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="0.5b", choices=GEOMETRIES)
    parser.add_argument("--repeats", default=5, type=int, help="turns that count; one more comes first and does not")
    parser.add_argument("--only", default="", help="names of options, beams or assisted, by commas; default: all")
    parser.add_argument("--no-peer", action="store_true", help="without Transformers")
    arguments = parser.parse_args()
    only = [name for name in arguments.only.split(",") if name]
    ids = np.random.default_rng(0).integers(0, config(arguments.model).vocab_size, (1, PROMPT))
    report: dict[str, Any] = {}
    if not only or "beams" in only or set(only) & set(OPTIONS):
        model = AutoModelForCausalLM.from_config(config(arguments.model), dtype="float32")
        full = {"flaxqwen": statistics.median(step_ms({"plain": ours(model, ids, {})}, 3)["plain"])}
        if not only or "beams" in only:
            report["beams"] = of_beams(model, ids, arguments.repeats)
            print(f"beams: {report['beams']}", file=sys.stderr)
        del model
    if not only or set(only) & set(OPTIONS):
        if not arguments.no_peer:
            other = theirs(config(arguments.model).to_dict())
            full["transformers"] = statistics.median(step_ms({"plain": their_run(other, ids, {})}, 3)["plain"])
            del other
        report["step_ms"] = {side: round(ms, 1) for side, ms in full.items()}
        report["options"] = of_options(arguments.model, only, arguments.repeats, not arguments.no_peer, full)
    if not only or "assisted" in only:
        report["assisted"] = of_drafts(arguments.model, arguments.repeats)
        print(f"assisted: {report['assisted']}", file=sys.stderr)
    for row in report.get("options", []):
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    setting = {"model": arguments.model, "prompt": PROMPT, "new": NEW, "repeats": arguments.repeats}
    print(json.dumps({"benchmark": "options", "device": jax.devices()[0].device_kind, **setting, **report}))


if __name__ == "__main__":
    main()
