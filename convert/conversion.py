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
from flaxqwen.convert.names import Layout, is_ignored, to_name
from flaxqwen.convert.names import Path as ParameterPath
from flaxqwen.convert.progress import Report
from flaxqwen.convert.quantize import SCALE, Scheme, check_scheme, dequantized, quantized, to_config
from flaxqwen.convert.save import Format, Framework, check_options, counter, plan_weights, write_weights
from flaxqwen.convert.staging import Staging, is_occupied, read_journal
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
    dry_run: bool = False,
    expected: Mapping[ParameterPath, tuple[int, ...]] | None = None,
    progress: Report | None = None,
) -> dict[str, int]:
    """Write the checkpoint in `src` to the folder `dst`, with its config, tokenizer, processor and a checksums.json.

    Tensors keep their names, and without `dtype` their dtypes and bytes. They are read and written one after the
    other, a few MiB at a time (a whole tensor where its axes are to be reversed). If the process is killed, the same
    call goes on: it takes over the files that are finished, as long as those of the source are what they were, by
    size and time.

    Args:
      src: a folder with a checkpoint of any format, or a file of one.
      dst: a folder; it is made, or is empty, or with `force` has its files replaced and other weights removed.
      to, format, layout, max_shard_size: see `save_params`. For orbax the names are those of `expected`, if given.
      dtype: what floating tensors are cast to; config.json then says so. Quantized weights come back to this dtype.
      quantize: "int8" or "int4", for Flax's safetensors: the format is in quantize.py, and config.json names it.
      force: replace what is in `dst`.
      dry_run: check all that can be without reading values, and write nothing.
      expected: the shape of every parameter, by its path, if the checkpoint is to be checked against its model.
      progress: called with the bytes done and the bytes in all.

    Returns:
      The bytes of each file that is written, or would be (see `PlannedFile`).

    Raises:
      FileNotFoundError: there is no checkpoint.
      FileExistsError: the destination is not empty, or is the source.
      CheckpointError: the checkpoint is corrupt, does not fit `expected`, or holds what is not supported.
      OSError: a file cannot be read or written, and the destination is as it was before; or another process is
        writing it.
    """
    src, dst = Path(src), Path(dst)
    check_options(to, format, layout, max_shard_size)
    if quantize is not None and (to, layout) != ("flax", "checkpoint"):
        raise ValueError("quantized weights are in Flax's format, in the checkpoint's layout")
    if quantize is not None:
        check_scheme(quantize)
    wanted = None if dtype is None else weight_dtype(dtype)
    with open_checkpoint(src) as checkpoint:
        source = checkpoint.path.parent
        key = _key(checkpoint, [to, format, layout, str(wanted), max_shard_size, quantize])
        _check_destination(source, dst, key, force)
        found: Mapping[str, Tensor] = checkpoint.tensors
        if expected is not None:
            matched = match(checkpoint, expected)
            if to == "orbax":  # which restores the names of the model alone, and all that is there
                found = {to_name(path): tensor for path, tensor in matched.items()}
        tensors = _weights(checkpoint.path, found, wanted, quantize, stays=to == "flax" and layout == "checkpoint")
        companions = _read_companions(source, wanted, quantize)
        if dry_run:
            files = plan_weights(tensors, to, format, layout, max_shard_size)
            sizes = {name: len(data) for name, data in companions.items()}
            return sizes | {name: file.nbytes for name, file in files.items()}
        with Staging(dst, counter(tensors, progress), key) as staging:
            _check_destination(source, dst, key, force)  # again: another process may just have filled it
            for name, data in companions.items():
                staging.write_bytes(name, data)
            write_weights(staging, tensors, to, format, layout, max_shard_size)
            staging.write_checksums()
            staging.commit()
        return staging.sizes


def _key(checkpoint: Checkpoint, options: list[Any]) -> str:
    """Stands for the source and what is to be made of it: the files of one conversion are those of another with it."""
    files = {*checkpoint.files, checkpoint.path}
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    return json.dumps([stats, options])


def _check_destination(source: Path, dst: Path, key: str, force: bool) -> None:
    if dst.exists() and not dst.is_dir():
        raise FileExistsError(f"{dst}: the destination is a file, expected a folder")
    if dst.is_dir() and dst.resolve() == source.resolve():
        raise FileExistsError(f"{dst}: the destination is the source; choose another folder")
    if not force and is_occupied(dst, besides=read_journal(dst, key)):
        raise FileExistsError(f"{dst}: the destination is not empty; choose another folder, or --force to replace it")


def _weights(
    path: Path, found: Mapping[str, Tensor], dtype: np.dtype | None, quantize: Scheme | None, stays: bool
) -> dict[str, Tensor]:
    """The tensors to write of those found in `path`; `stays`: quantized ones may be written as they are.

    Raises:
      CheckpointError: tensors that are no weights (all are listed); weights that are quantized, where that cannot stay.
    """
    is_quantized = any(name.endswith(SCALE) for name in found)
    if is_quantized and quantize is not None:
        raise CheckpointError(f"{path}: the weights are quantized already; leave out quantize")
    if is_quantized and dtype is None and not stays:
        raise CheckpointError(f"{path}: the weights are quantized: give the dtype to bring them back to")
    tensors = dict(found)
    if dtype is not None:
        tensors = dequantized(tensors)
    wrong = [
        f"{name} is {tensor.dtype}"
        for name, tensor in tensors.items()
        if not is_weight_dtype(tensor.dtype) and not is_ignored(name) and not _has_scale(name, tensors)
    ]
    if wrong:
        few = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise CheckpointError(f"{path}: not supported: {few}; expected {weight_dtype_names()}")
    if quantize is not None:
        tensors = quantized(tensors, quantize)
    if dtype is None:
        return tensors
    return {name: tensor if name.endswith(SCALE) else cast(tensor, dtype) for name, tensor in tensors.items()}


def _has_scale(name: str, tensors: Mapping[str, Tensor]) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf == "weight" and f"{owner}.{SCALE}" in tensors


def _read_companions(source: Path, dtype: np.dtype | None, quantize: Scheme | None) -> dict[str, bytes]:
    """The small files that go with the weights, with a config that says what becomes of them."""
    found = {
        path.name: path.read_bytes()
        for path in sorted(source.iterdir())
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in COMPANIONS)
    }
    if quantize is not None and CONFIG not in found:
        raise FileNotFoundError(f"{source}: no {CONFIG}, which is where it stands that weights are quantized")
    if (dtype, quantize) != (None, None) and CONFIG in found:
        found[CONFIG] = _edit_config(source / CONFIG, found[CONFIG], dtype, quantize)
    return found


def _edit_config(path: Path, text: bytes, dtype: np.dtype | None, quantize: Scheme | None) -> bytes:
    """A config.json that says `dtype`, in the keys it has for it, and how weights are quantized."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
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
