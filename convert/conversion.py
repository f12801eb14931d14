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
      dtype: what floating tensors are cast to; config.json then says so.
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
    wanted = None if dtype is None else weight_dtype(dtype)
    with open_checkpoint(src) as checkpoint:
        source = checkpoint.path.parent
        _check_destination(source, dst, force)
        if expected is not None:
            match(checkpoint, expected)
        tensors = _weights(checkpoint)
        if wanted is not None:
            tensors = {name: cast(tensor, wanted) for name, tensor in tensors.items()}
        companions = {name: (source / name).read_bytes() for name in _companions(source)}
        if wanted is not None and CONFIG in companions:
            companions[CONFIG] = _with_dtype(source / CONFIG, companions[CONFIG], wanted)
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


def _weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors, or an error that lists those that are no weights."""
    wrong = [
        f"{name} is {tensor.dtype}"
        for name, tensor in checkpoint.tensors.items()
        if not is_weight_dtype(tensor.dtype) and not is_ignored(name)
    ]
    if wrong:
        few = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise CheckpointError(f"{checkpoint.path}: not supported: {few}; expected {weight_dtype_names()}")
    return dict(checkpoint.tensors)


def _companions(source: Path) -> list[str]:
    return sorted(
        path.name
        for path in source.iterdir()
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in COMPANIONS)
    )


def _with_dtype(path: Path, text: bytes, dtype: np.dtype) -> bytes:
    """A config.json that says `dtype`, in the keys it has for it."""
    try:
        config = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds {type(config).__name__}, expected an object")
    if not _set_dtype(config, dtype.name):
        config["dtype"] = dtype.name
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _set_dtype(config: dict[str, Any], name: str) -> bool:
    """Set the keys that give a dtype, in the parts of the config too; whether there were any."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config]  # "torch_dtype" before Transformers 4.56
    config.update(dict.fromkeys(keys, name))
    parts = [_set_dtype(part, name) for part in config.values() if isinstance(part, dict)]
    return bool(keys) or any(parts)
