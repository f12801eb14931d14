"""Parity: one checkpoint run in PyTorch's Transformers and here, and compared number by number.

Axes: B batch (prompts), T tokens, n new tokens, P valid positions of all prompts, D model, V vocabulary, C clips of all
prompts, F mel frames.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import flax.linen as nn
import jax
import numpy as np

from flaxqwen.audio import audio_inputs, load_audio
from flaxqwen.auto import language_model_class
from flaxqwen.config import Qwen2AudioConfig, Qwen2Config, config_from_file
from flaxqwen.convert import open_checkpoint, to_path
from flaxqwen.convert.load import read_array
from flaxqwen.convert.memory import WeightMemory
from flaxqwen.convert.quantize import dequantized
from flaxqwen.generation.config import GenerationConfig
from flaxqwen.generation.inputs import check_input_ids
from flaxqwen.hub import resolve_folder
from flaxqwen.model import Params
from flaxqwen.models.qwen2_audio import audio_lengths
from flaxqwen.parity_report import (
    AUDIO_KINDS,
    PRECISION,
    Comparison,
    Dtype,
    GreedyDifference,
    ModuleError,
    Prompt,
    Report,
)

PROMPTS = (
    """The tide pools along the northern coast are richest in early spring, when cold water carries nutrients up from
the deep and the long evenings leave the rocks wet. A patient visitor can count""",
    """def binary_search(values: list[int], target: int) -> int:
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        if values[middle] < target:
""",
    "黄河发源于青藏高原，向东流经九个省区，最后注入渤海。古时候，沿岸的人们修筑堤坝",  # noqa: RUF001  # its own commas
    "3.14159265358979, 2.71828182845904; 17 * 23 = 391, 1024 / 16 = 64, 2026-01-31 =",
)
RANDOM_LENGTHS = (5, 19, 40, 64)  # of the prompts without a tokenizer
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
LOADED_BY = {"qwen2": "Qwen2ForCausalLM", "qwen2_audio": "Qwen2AudioForConditionalGeneration"}
# Of the last part of a module's name; that of a whole layer is its number.
KIND_OF = {
    "embed_tokens": "embedding", "self_attn": "attention", "mlp": "mlp", "norm": "final norm",
    "layer_norm": "audio norm", "multi_modal_projector": "projector",
}  # fmt: skip
KL_ROWS = 32  # positions at a time: at a vocabulary of 152,000 a row is 1.2 MB in float64


AUDIO_PROMPTS = ("What is said?", "Describe all that can be heard, and in which order.")  # each with all clips


@dataclass(frozen=True)
class Batch:
    """Prompts in one batch, padded on the left: ids, mask and positions are [B, T] int32.

    audio: input_features and feature_attention_mask, where the prompts have clips.
    """

    ids: np.ndarray
    mask: np.ndarray
    positions: np.ndarray
    audio: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def valid(self, values: Any, kind: str = "") -> np.ndarray:
        """values [B, T, ...] at the P positions that are not padding, [P, ...] float32; of audio [C, ...] likewise."""
        is_valid = self.mask.astype(bool)
        if kind in AUDIO_KINDS:
            lengths = audio_lengths(self.audio["feature_attention_mask"].sum(-1))[kind != "audio layer"]
            is_valid = np.arange(values.shape[1]) < lengths[:, None]
        return np.asarray(values, np.float32)[is_valid]


@dataclass(frozen=True)
class Trace:
    """What one implementation computes.

    modules: outputs [P, D] float32 by module name. logits: [P, V] float32.
    tokens: [B, n] greedy tokens. margins: [B, n], the gap of the two largest logits there (the reference alone).
    """

    modules: dict[str, np.ndarray]
    logits: np.ndarray
    tokens: np.ndarray
    margins: np.ndarray | None = None


def compare(
    model: str | os.PathLike[str],
    *,
    dtype: Dtype = "float32",
    prompts: Sequence[str | Sequence[int]] | None = None,
    audio: Sequence[str | os.PathLike[str]] = (),
    steps: int = 32,
) -> Report:
    """Load a checkpoint in PyTorch's Transformers and here, and compare them.

    Args:
      model: a folder in PyTorch's or Flax's format, or a hub id.
      dtype: "float32" or "bfloat16", of weights and arithmetic here; the reference is PyTorch float32.
      prompts: texts or token ids. Default: four texts where there is a tokenizer, and else random ids.
      audio: files, all of which each prompt is about; for Qwen2-Audio, which needs one at least.
      steps: greedy tokens per prompt, without end-of-sequence token and without repetition penalty.

    Raises:
      ModuleNotFoundError: torch is not installed.
      FileNotFoundError: no such folder or repository.
      ValueError: a dtype, prompts or a checkpoint that cannot be compared.
    """
    _import_torch()
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype {dtype!r} is not supported by parity; expected one of {', '.join(get_args(Dtype))}")
    if steps < 1:
        raise ValueError(f"steps={steps}; expected at least 1 greedy token")
    folder = resolve_folder(model)
    if isinstance(config_from_file(folder), Qwen2AudioConfig):
        chosen, features = make_audio_prompts(folder, prompts, audio)
    elif audio:
        raise ValueError(f"{folder}: audio is for Qwen2-Audio")
    else:
        chosen, features = make_prompts(folder, prompts, steps), {}
    batch = dataclasses.replace(make_batch(chosen), audio=features)
    # Ours first, whose errors about bad files are one clear line. One model is in memory at a time.
    trace = trace_flax(folder, dtype, batch, steps)
    reference = trace_torch(folder, "float32", batch, steps)
    ours, peer = compare_traces(reference, trace), None
    if dtype != "float32":
        peer = compare_traces(reference, trace_torch(folder, dtype, batch, steps))
    packages = ("flaxqwen", "jax", "flax", "torch", "transformers")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return Report(str(model), dtype, chosen, steps, jax.default_backend(), versions, ours, peer)


def make_prompts(folder: Path, prompts: Sequence[str | Sequence[int]] | None, steps: int) -> tuple[Prompt, ...]:
    """The caller's prompts as token ids, or the built-in ones; ValueError for those that the model cannot take."""
    config = config_from_file(folder)
    if not isinstance(config, Qwen2Config):
        raise ValueError(f"{folder}: parity has no {config.model_type!r}; it has 'qwen2'")
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    if prompts is None:
        prompts = PROMPTS if has_tokenizer else _random_prompts(config, steps)
    if len(prompts) == 0 or isinstance(prompts, str):
        raise ValueError(f"prompts={prompts!r}; expected a list of texts, or of lists of token ids")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if texts and not has_tokenizer:
        raise ValueError(f"{folder}: no tokenizer ({' or '.join(TOKENIZER_FILES)}) for text prompts; give token ids")
    tokenizer: Any = _load_tokenizer(folder) if texts else None
    chosen = []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        (row,) = check_input_ids(np.asarray([ids]), config)
        chosen.append(Prompt(tuple(row.tolist()), prompt if isinstance(prompt, str) else None))
    return tuple(chosen)


def make_audio_prompts(
    folder: Path, prompts: Sequence[str | Sequence[int]] | None, audio: Sequence[str | os.PathLike[str]]
) -> tuple[tuple[Prompt, ...], dict[str, np.ndarray]]:
    """The caller's texts or the built-in ones, with all clips before each; and the clips' features, for each prompt.

    Raises:
      ValueError: no audio, or prompts that are no texts; as load_audio and process_audio.
    """
    import transformers

    if not audio:
        raise ValueError(f"{folder}: parity of Qwen2-Audio needs audio: --audio FILE")
    texts = [text for text in prompts or AUDIO_PROMPTS if isinstance(text, str)]
    if prompts is not None and len(texts) < max(len(prompts), 1):
        raise ValueError(f"prompts={prompts!r}; expected a list of texts")
    processor, clips = transformers.AutoProcessor.from_pretrained(folder), [load_audio(path) for path in audio]
    inputs = [audio_inputs(processor, text, clips) for text in texts]
    config: Any = config_from_file(folder)
    ids = [check_input_ids(made["input_ids"], config.get_text_config())[0].tolist() for made in inputs]
    names = ("input_features", "feature_attention_mask")
    features = {name: np.concatenate([made[name] for made in inputs]) for name in names}
    return tuple(map(Prompt, map(tuple, ids), texts)), features


def make_batch(prompts: Sequence[Prompt]) -> Batch:
    """All prompts in one batch, so that masks are compared too and one program is compiled."""
    width = max(len(prompt.ids) for prompt in prompts)
    ids, mask = np.zeros((2, len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.ids) :] = prompt.ids
        mask[row, width - len(prompt.ids) :] = 1
    return Batch(ids, mask, np.where(mask, np.cumsum(mask, axis=1) - 1, 0).astype(np.int32))


def module_names(config: Any) -> list[str]:
    """The modules whose outputs are compared."""
    names, decoder = [], "model"
    if isinstance(config, Qwen2AudioConfig):
        decoder = "model.language_model"
        names = [f"model.audio_tower.layers.{i}" for i in range(config.audio_config.encoder_layers)]
        names += ["model.audio_tower.layer_norm", "model.multi_modal_projector"]
    names += [f"{decoder}.embed_tokens", f"{decoder}.norm"]
    for i in range(config.get_text_config().num_hidden_layers):
        names += [f"{decoder}.layers.{i}{part}" for part in (".self_attn", ".mlp", "")]
    return names


def kind_of(name: str) -> tuple[str, int | None]:
    """The kind of a module, and its layer."""
    *_, owner, last = name.split(".")
    if last.isdecimal():
        return ("audio layer" if "audio_tower" in name else "residual"), int(last)
    return KIND_OF[last], int(owner) if owner.isdecimal() else None


def trace_torch(folder: Path, dtype: Dtype, batch: Batch, steps: int) -> Trace:
    """Run Transformers' model on the CPU, with hooks on its modules; the model is gone when this returns."""
    torch = _import_torch()
    model = load_torch(folder, dtype)
    modules: dict[str, np.ndarray] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(_keep_output(modules, name, batch))
        for name in module_names(config_from_file(folder))
    ]
    ids, mask, positions = (torch.from_numpy(a).long() for a in (batch.ids, batch.mask, batch.positions))
    audio = {name: torch.from_numpy(a) for name, a in batch.audio.items()}
    with torch.inference_mode():
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False, **audio).logits
        logits = batch.valid(logits.float().numpy())
        for hook in hooks:
            hook.remove()
        model.generation_config = _greedy_config(steps)
        new = model.generate(ids, attention_mask=mask, **audio)
    best = torch.stack(new.logits, dim=1).float().topk(2).values  # [B, n, 2]
    margins = (best[..., 0] - best[..., 1]).numpy()
    return Trace(modules, logits, new.sequences[:, ids.shape[1] :].numpy(), margins)


def load_torch(folder: Path, dtype: Dtype) -> Any:
    """Transformers' model with eager attention: of its own files by itself, of Flax's files by our reading of them."""
    import transformers

    torch = _import_torch()
    # Transformers' own generate cannot run where a config says return_dict=False.
    config = transformers.AutoConfig.from_pretrained(folder, return_dict=True)
    kind = getattr(transformers, LOADED_BY[config.model_type])
    config.__dict__.pop("quantization_config", None)  # ours; weights of other methods are refused before
    options = {"config": config, "dtype": getattr(torch, dtype), "attn_implementation": "eager"}
    with open_checkpoint(folder) as checkpoint:
        if checkpoint.format == "pytorch":
            return kind.from_pretrained(folder, **options)
        tensors = dequantized(checkpoint.tensors)
        memory = WeightMemory()
        state = {
            name: torch.from_numpy(read_array(name, tensor, memory).astype(np.float32))
            for name, tensor in tensors.items()
        }
    return kind.from_pretrained(None, state_dict=state, **options)


def trace_flax(folder: Path, dtype: Dtype, batch: Batch, steps: int) -> Trace:
    """Run our model; the outputs of its modules come by Flax's capture_intermediates."""
    model = language_model_class(config_from_file(folder)).from_pretrained(folder, dtype=dtype)
    with jax.default_matmul_precision(PRECISION):
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions} | batch.audio
        modules, logits = _forward(model.module, model.variables, inputs)
        modules = {name: batch.valid(array, kind_of(name)[0]) for name, array in modules.items()}
        logits = batch.valid(logits)
        plain = dataclasses.replace(model, generation_config=GenerationConfig())
        tokens = plain.generate(
            batch.ids,
            attention_mask=batch.mask,
            do_sample=False,
            max_new_tokens=steps,
            eos_token_id=None,
            **batch.audio,
        )
    return Trace(modules, logits, np.asarray(tokens)[:, batch.ids.shape[1] :])


@partial(jax.jit, static_argnames="module")
def _forward(module: nn.Module, variables: Params, inputs: dict[str, Any]) -> tuple[dict[str, jax.Array], jax.Array]:
    """The outputs of the modules [B, T, D], by name, and the logits [B, T, V]; the others are not kept."""
    output, state = module.apply(variables, **inputs, use_cache=False, return_dict=True, capture_intermediates=True)
    modules = {}
    for name in module_names(module.config):
        node = state["intermediates"]
        for key in to_path(name):
            node = node[key]
        (captured,) = node["__call__"]
        modules[name] = captured[0] if isinstance(captured, tuple) else captured
    return modules, output.logits


def compare_traces(reference: Trace, trace: Trace) -> Comparison:
    """Every number of the report, of one implementation against the reference, whose modules are as they were run."""
    errors = [
        module_error(name, *kind_of(name), values, trace.modules[name]) for name, values in reference.modules.items()
    ]
    errors.append(module_error("logits", "logits", None, reference.logits, trace.logits))
    agreement = np.mean(reference.logits.argmax(-1) == trace.logits.argmax(-1))
    kl = kl_divergence(reference.logits, trace.logits)
    differences = tuple(greedy_differences(reference, trace))
    return Comparison(tuple(errors), tuple(kl.tolist()), float(agreement), differences)


def module_error(name: str, kind: str, layer: int | None, reference: np.ndarray, values: np.ndarray) -> ModuleError:
    """Error of values against reference, [P, D] float32 each."""
    error = values - reference
    max_abs, scale = float(np.abs(error).max()), float(np.abs(reference).max())
    rms_abs, rms_scale = (float(np.sqrt(np.mean(np.square(a), dtype=np.float64))) for a in (error, reference))
    return ModuleError(name, kind, layer, max_abs, rms_abs, _ratio(max_abs, scale), _ratio(rms_abs, rms_scale))


def kl_divergence(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL(softmax(reference) || softmax(logits)) of each row, in nats: [P, V] float32 twice -> [P] float64.

    In float64: between two float32 runs it is some 1e-12, below what float32 sums resolve.
    """
    rows = []
    for start in range(0, len(reference), KL_ROWS):
        log_p, log_q = (log_softmax(a[start : start + KL_ROWS].astype(np.float64)) for a in (reference, logits))
        rows.append(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1))
    return np.maximum(np.concatenate(rows), 0)  # rounding leaves -1e-16 where they are equal


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Of each row of x [P, V]."""
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def greedy_differences(reference: Trace, trace: Trace) -> Iterator[GreedyDifference]:
    """The first token that differs, of each prompt that has one: what follows it answers another prefix."""
    assert reference.margins is not None
    for prompt, differs in enumerate(reference.tokens != trace.tokens):
        if differs.any():
            step = int(differs.argmax())
            wanted, token = (int(t.tokens[prompt, step]) for t in (reference, trace))
            yield GreedyDifference(prompt, step, wanted, token, float(reference.margins[prompt, step]))


def _random_prompts(config: Qwen2Config, steps: int) -> list[list[int]]:
    """Token ids for a model without a tokenizer; the same at every run."""
    rng = np.random.default_rng(0)
    room = max(config.context_length - steps, 1)
    return [rng.integers(config.vocab_size, size=min(length, room)).tolist() for length in RANDOM_LENGTHS]


def _load_tokenizer(folder: Path) -> Any:
    import transformers  # 2 s, and prompts of token ids do without

    return transformers.AutoTokenizer.from_pretrained(folder)


def _ratio(error: float, scale: float) -> float:
    if scale == 0:
        return 0.0 if error == 0 else float("inf")
    return error / scale


def _keep_output(modules: dict[str, np.ndarray], name: str, batch: Batch) -> Callable[..., None]:
    """A forward hook of torch that puts the module's output, [P, D] float32, into `modules`."""

    def keep(module: Any, inputs: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        modules[name] = batch.valid(output.float().numpy(), kind_of(name)[0])

    return keep


def _greedy_config(steps: int) -> Any:
    """Transformers' plain greedy search: what generation_config.json says (a repetition penalty) does not count."""
    import transformers

    return transformers.GenerationConfig(
        do_sample=False, max_new_tokens=steps, output_logits=True, return_dict_in_generate=True
    )


def _import_torch() -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('parity compares with PyTorch: pip install "flaxqwen[torch]"') from error
    return torch
