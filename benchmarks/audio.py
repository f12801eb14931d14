"""Qwen2-Audio's encoder at its real geometry beside Transformers, in one run: the same numbers, and the time of a clip.

    python -m benchmarks.audio [--repeats 5] [--layers 32]

The audio tower has 32 layers of width 1280, with random weights; the decoder is small. Errors are of clips from 0.1 s
to 30 s in four rows, one of them without a clip, padded on either side, in float32: largest error over largest value.
Those of the encoder, the projector and the merged embeddings are of all positions, and once more, "cut", of as many as
generate() computes for each clip alone. A clip of 30 s is timed by turns, Transformers with both of its kinds of
attention, and one of 11 s, which generate() takes as 15 s and Transformers as 30 s; so are the features of a waveform.
Medians are given. The last line is JSON.
6 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxqwen import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, log_mel
from flaxqwen.convert import to_path
from flaxqwen.generation.audio import positions_for
from flaxqwen.models.audio_inputs import expand_audio_tokens, tokens_of
from flaxqwen.models.qwen2_audio import audio_positions

SECONDS = (0.1, 30.0, 1.0, 7.3)
CLIPS = (2, 0, 1, 1)  # of each row
AUDIO, VOCAB, LENGTH = 1000, 1024, 480000
TEXT = {
    "model_type": "qwen2", "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
}  # fmt: skip


def make_models(layers: int) -> tuple[Any, Any, dict[str, Any]]:
    """(transformers model, our module, its parameters), of the same random weights."""
    import torch
    import transformers

    settings = {"audio_config": {"encoder_layers": layers}, "text_config": TEXT, "audio_token_index": AUDIO}
    torch.manual_seed(0)
    with torch.no_grad():
        theirs = transformers.Qwen2AudioForConditionalGeneration(transformers.Qwen2AudioConfig(**settings)).eval()
    params: dict[str, Any] = {}
    for name, tensor in theirs.state_dict().items():
        *modules, leaf = to_path(name)
        node = params
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = jnp.asarray(tensor.numpy())
    config = Qwen2AudioConfig.from_dict({"model_type": "qwen2_audio", **settings})
    return theirs, Qwen2AudioForConditionalGeneration(config), params


def make_waveforms(rng: np.random.Generator) -> np.ndarray:
    """Noise that comes and goes, of each length, then zeros: [clips, 480,000]."""
    waveforms = np.zeros((len(SECONDS), LENGTH), np.float32)
    for waveform, seconds in zip(waveforms, SECONDS, strict=True):
        samples = int(seconds * 16000)
        envelope = np.square(np.sin(np.arange(samples) * rng.uniform(2, 8) / 16000))
        waveform[:samples] = 0.2 * envelope * rng.standard_normal(samples)
    return waveforms


def make_inputs(rng: np.random.Generator, features: np.ndarray, side: str) -> dict[str, np.ndarray]:
    """Rows with their clips, padded on a side."""
    frames = (np.arange(features.shape[-1]) < np.array([[100 * s] for s in SECONDS])).astype(np.int32)
    ids = rng.integers(0, AUDIO, (len(CLIPS), 12))
    mask = np.ones_like(ids)
    for row, count in enumerate(CLIPS):
        padding = slice(0, 2 * row) if side == "left" else slice(12 - 2 * row, 12)
        mask[row, padding] = 0
        start = 2 * row if side == "left" else 0
        ids[row, start + 1 + 2 * np.arange(count)] = AUDIO
    prompt = expand_audio_tokens(ids, frames, AUDIO, mask)
    names = ("input_ids", "attention_mask")
    return {name: getattr(prompt, name) for name in names} | {
        "input_features": features, "feature_attention_mask": frames,
    }  # fmt: skip


def error(ours: Any, theirs: Any, where: np.ndarray) -> float:
    """Largest difference over the largest value, at valid places."""
    ours, theirs = (np.asarray(a, np.float64)[where] for a in (ours, theirs))
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@partial(jax.jit, static_argnames=("module", "positions"))
def encode(
    module: Any, params: Any, features: Any, frames: Any, *, positions: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """(what the encoder gives, what the projector makes of it), over so many positions (None: all)."""

    def run(model: Any) -> tuple[jax.Array, jax.Array]:
        inner, count = model.model, positions or model.config.audio_config.max_source_positions
        encoded = inner.audio_tower.forward(features, audio_positions(frames, count), True, positions=positions)
        return encoded.last_hidden_state, inner.encode(features, frames, positions=positions)

    return module.apply({"params": params}, method=run)


def captured(theirs: Any, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """What Transformers' modules give for inputs."""
    import torch

    found: dict[str, Any] = {}
    inner = theirs.model
    hooks = [
        inner.audio_tower.register_forward_hook(lambda m, i, out: found.update(encoder=out.last_hidden_state)),
        inner.multi_modal_projector.register_forward_hook(lambda m, i, out: found.update(projector=out)),
        inner.language_model.register_forward_pre_hook(
            lambda m, i, named: found.update(merged=named["inputs_embeds"]), with_kwargs=True
        ),
    ]
    given = {name: torch.from_numpy(np.array(a, np.float32 if a.ndim == 3 else np.int64)) for name, a in inputs.items()}
    with torch.no_grad():
        found["logits"] = theirs(**given).logits
    for hook in hooks:
        hook.remove()
    return found


def parity(theirs: Any, module: Any, params: Any, features: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    """The largest errors of encoder, projector, merged embeddings and logits, over both sides of padding."""
    whole = module.config.audio_config.max_source_positions
    forward = jax.jit(lambda params, inputs: module.apply({"params": params}, **inputs).logits)
    merge = jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs, method=merged))
    errors: dict[str, float] = {}

    def note(name: str, ours: Any, wanted: Any, where: np.ndarray) -> None:
        errors[name] = max(errors.get(name, 0.0), error(ours, wanted, where))

    for side in ("left", "right"):
        inputs = make_inputs(rng, features, side)
        wanted, frames = captured(theirs, inputs), inputs["feature_attention_mask"]
        valid = np.arange(whole // 2) < tokens_of(frames)[:, None]
        visible = inputs["attention_mask"].astype(bool)
        note("logits", forward(params, inputs), wanted["logits"], visible)
        if side == "right":
            continue  # the encoder does not see it
        cut = [np.zeros(wanted[name].shape, np.float32) for name in ("encoder", "projector")]
        for clip in range(len(frames)):
            part = slice(clip, clip + 1)
            count = positions_for(int(frames[clip].sum()), whole)
            for array, own in zip(
                cut, encode(module, params, features[part], frames[part], positions=count), strict=True
            ):
                array[clip, : count // 2] = own[0]
        for kind, arrays in (("", encode(module, params, features, frames)), (", cut", cut)):
            for name, array in zip(("encoder", "projector"), arrays, strict=True):
                note(name + kind, array, wanted[name], valid)
            note("merged" + kind, merge(params, inputs["input_ids"], arrays[1], frames), wanted["merged"], visible)
    return errors


def merged(module: Any, ids: jax.Array, audio: jax.Array, frames: jax.Array) -> jax.Array:
    """As Qwen2AudioModel.merge."""
    return module.model.merge(ids, audio, frames)


def by_turns(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each; the first turn, which compiles, does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: round(statistics.median(values), 1) for name, values in times.items()}


def speed(theirs: Any, module: Any, params: Any, waveform: np.ndarray, repeats: int) -> dict[str, float]:
    """Milliseconds of the tower and the projector, and of the features, for a clip of 30 s."""
    import torch
    import transformers

    extractor = transformers.WhisperFeatureExtractor(feature_size=128)
    mel = jax.jit(log_mel)
    features = np.asarray(mel(waveform[None]))
    frames, tensor = np.ones((1, features.shape[-1]), np.int32), torch.from_numpy(features.copy())
    encode = jax.jit(partial(module.apply, method="encode"))

    def their_encoder(attention: str) -> None:
        theirs.model.audio_tower.config._attn_implementation = attention
        with torch.no_grad():
            theirs.model.multi_modal_projector(theirs.model.audio_tower(tensor).last_hidden_state)

    short = jax.jit(partial(module.apply, positions=750, method="encode"))
    runs: dict[str, Callable[[], Any]] = {
        "flaxqwen, 11 s": lambda: jax.block_until_ready(short({"params": params}, features, frames)),
        "flaxqwen": lambda: jax.block_until_ready(encode({"params": params}, features, frames)),
        "transformers sdpa": lambda: their_encoder("sdpa"),
        "transformers eager": lambda: their_encoder("eager"),
        "features flaxqwen": lambda: jax.block_until_ready(mel(waveform)),
        "features transformers": lambda: extractor(waveform, sampling_rate=16000),
    }
    return by_turns(runs, repeats)


def main() -> None:
    """Run the benchmark and print its line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", default=5, type=int, help="turns that count; one more comes first and does not")
    parser.add_argument("--layers", default=32, type=int, help="of the encoder")
    parser.add_argument("--only", default="", choices=("", "parity", "speed"))
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    theirs, module, params = make_models(arguments.layers)
    waveforms = make_waveforms(rng)
    report: dict[str, Any] = {"layers": arguments.layers}
    if arguments.only != "speed":
        with jax.default_matmul_precision("highest"):
            report["errors"] = parity(theirs, module, params, np.asarray(jax.jit(log_mel)(waveforms)), rng)
        print(f"errors: {report['errors']}", file=sys.stderr)
    if arguments.only != "parity":
        found = report["ms"] = speed(theirs, module, params, waveforms[1], arguments.repeats)
        theirs_ms = min(found["transformers sdpa"], found["transformers eager"])
        for name in ("flaxqwen", "flaxqwen, 11 s"):
            report[f"speedup of {name}"] = round(theirs_ms / found[name], 3)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
