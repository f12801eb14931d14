"""From one checkpoint to another: `flaxqwen convert`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from flaxqwen.convert.checkpoint import Checkpoint, open_checkpoint
from flaxqwen.convert.dtypes import is_weight_dtype, weight_dtype, weight_dtype_names
from flaxqwen.convert.errors import CheckpointError
from flaxqwen.convert.load import match
from flaxqwen.convert.names import Layout, is_ignored
from flaxqwen.convert.names import Path as ParameterPath
from flaxqwen.convert.progress import Report
from flaxqwen.convert.quantize import SCALE, Scheme, check_scheme, dequantized, quantized, to_config
from flaxqwen.convert.save import Format, Framework, check_options, counter, write_weights
from flaxqwen.convert.staging import Staging, is_occupied
from flaxqwen.convert.tensors import Tensor, cast

CONFIG = "config.json"

# What stands beside the weights and goes with them: configs, tokenizer, processor, licence.
COMPANIONS = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
)


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: Framework = "flax",
    format: Format = "safetensors",
    layout: Layout = "checkpoint",
    dtype: DTypeLike | None = None,
    max_shard_size: int | str | None = None,
    quantize: Scheme | None = None,
    force: bool = False,
    expected: Mapping[ParameterPath, tuple[int, ...]] | None = None,
    progress: Report | None = None,
) -> None:
    """Write the checkpoint in `src` to the folder `dst`, with its config, tokenizer and processor.

    Tensors keep their names, and without `dtype` their dtypes and bytes. They are read and written one after the
    other, a few MiB at a time (a whole tensor where its axes are to be reversed).

    Args:
      src: a folder with a checkpoint of any format, or a file of one.
      dst: a folder; it is made, or is empty, or with `force` has its files replaced and other weights removed.
      to, format, layout, max_shard_size: see `save_params`.
      dtype: what floating tensors are cast to; config.json then says so. Quantized weights come back to this dtype.
      quantize: "int8" or "int4", for Flax's safetensors: the format is in quantize.py, and config.json names it.
      expected: the shape of every parameter, by its path, if the checkpoint is to be checked against its model.
      progress: called with the bytes done and the bytes in all.

    Raises:
      FileNotFoundError: there is no checkpoint.
      FileExistsError: the destination is not empty, or is the source.
      CheckpointError: the checkpoint is corrupt, does not fit `expected`, or holds what is not supported.
      OSError: a file cannot be read or written. The destination is then as it was before.
    """
    src, dst = Path(src), Path(dst)
    check_options(to, format, layout, max_shard_size)
    if quantize is not None and (to, format, layout) != ("flax", "safetensors", "checkpoint"):
        raise ValueError("quantized weights are Flax's safetensors, in the checkpoint's layout")
    if quantize is not None:
        check_scheme(quantize)
    wanted = None if dtype is None else weight_dtype(dtype)
    with open_checkpoint(src) as checkpoint:
        source = checkpoint.path.parent
        _check_destination(source, dst, force)
        if expected is not None:
            match(checkpoint, expected)
        tensors = _weights(checkpoint, wanted, quantize, stays=to == "flax" and layout == "checkpoint")
        companions = {name: (source / name).read_bytes() for name in _companions(source)}
        if quantize is not None and CONFIG not in companions:
            raise FileNotFoundError(f"{source}: no {CONFIG}, which is where it stands that weights are quantized")
        if (wanted, quantize) != (None, None) and CONFIG in companions:
            companions[CONFIG] = _edit_config(source / CONFIG, companions[CONFIG], wanted, quantize)
        with Staging(dst, counter(tensors, progress)) as staging:
            for name, data in companions.items():
                staging.write_bytes(name, data)
            write_weights(staging, tensors, to, format, layout, max_shard_size)
            staging.commit()


def _check_destination(source: Path, dst: Path, force: bool) -> None:
    if dst.exists() and not dst.is_dir():
        raise FileExistsError(f"{dst}: the destination is a file, expected a folder")
    if dst.is_dir() and dst.resolve() == source.resolve():
        raise FileExistsError(f"{dst}: the destination is the source; choose another folder")
    if is_occupied(dst) and not force:
        raise FileExistsError(f"{dst}: the destination is not empty; choose another folder, or --force to replace it")


def _weights(checkpoint: Checkpoint, dtype: np.dtype | None, quantize: Scheme | None, stays: bool) -> dict[str, Tensor]:
    """The tensors to write; `stays`: quantized ones may be written as they are.

    Raises:
      CheckpointError: tensors that are no weights (all are listed); weights that are quantized, where that cannot stay.
    """
    is_quantized = any(name.endswith(SCALE) for name in checkpoint.tensors)
    if is_quantized and quantize is not None:
        raise CheckpointError(f"{checkpoint.path}: the weights are quantized already; leave out quantize")
    if is_quantized and dtype is None and not stays:
        raise CheckpointError(f"{checkpoint.path}: the weights are quantized: give the dtype to bring them back to")
    tensors: dict[str, Tensor] = dict(checkpoint.tensors)
    if dtype is not None:
        tensors = dequantized(tensors)
    wrong = [
        f"{name} is {tensor.dtype}"
        for name, tensor in tensors.items()
        if not is_weight_dtype(tensor.dtype) and not is_ignored(name) and not _has_scale(name, tensors)
    ]
    if wrong:
        few = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise CheckpointError(f"{checkpoint.path}: not supported: {few}; expected {weight_dtype_names()}")
    if quantize is not None:
        tensors = quantized(tensors, quantize)
    if dtype is None:
        return tensors
    return {name: tensor if name.endswith(SCALE) else cast(tensor, dtype) for name, tensor in tensors.items()}


def _has_scale(name: str, tensors: Mapping[str, Tensor]) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf == "weight" and f"{owner}.{SCALE}" in tensors


def _companions(source: Path) -> list[str]:
    return sorted(
        path.name
        for path in source.iterdir()
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in COMPANIONS)
    )


def _edit_config(path: Path, text: bytes, dtype: np.dtype | None, quantize: Scheme | None) -> bytes:
    """A config.json that says `dtype`, in the keys it has for it, and how weights are quantized."""
    try:
        config = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds {type(config).__name__}, expected an object")
    config.pop("quantization_config", None)
    if quantize is not None:
        config["quantization_config"] = to_config(quantize)
    if dtype is not None and not _set_dtype(config, dtype.name):
        config["dtype"] = dtype.name
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _set_dtype(config: dict[str, Any], name: str) -> bool:
    """Set the keys that give a dtype, in the parts of the config too; whether there were any."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config]  # "torch_dtype" before Transformers 4.56
    config.update(dict.fromkeys(keys, name))
    parts = [_set_dtype(part, name) for part in config.values() if isinstance(part, dict)]
    return bool(keys) or any(parts)
