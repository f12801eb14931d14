"""From parameters to a checkpoint on disk, tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from numpy.typing import DTypeLike

from flaxqwen.convert.checkpoint import SEPARATOR
from flaxqwen.convert.dtypes import SAFETENSORS_NAME, weight_dtype
from flaxqwen.convert.errors import CheckpointError
from flaxqwen.convert.msgpack_file import write_msgpack
from flaxqwen.convert.names import Layout, to_linen, to_name, to_path
from flaxqwen.convert.orbax_folder import plan_orbax
from flaxqwen.convert.progress import Report
from flaxqwen.convert.safetensors_file import safetensors_header, write_safetensors
from flaxqwen.convert.staging import ORBAX, WEIGHTS, PlannedFile, Staging
from flaxqwen.convert.tensors import ArrayTensor, CheckedTensor, Tensor, cast

Framework = Literal["flax", "pytorch", "orbax"]
Format = Literal["safetensors", "msgpack"]
STEM = {"flax": "flax_model", "pytorch": "model"}
DEFAULT_SHARD_SIZE = "5GB"
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def save_params(
    params: Mapping[str, Any],
    folder: str | Path,
    *,
    to: Framework = "flax",
    format: Format = "safetensors",
    layout: Layout = "checkpoint",
    dtype: DTypeLike | None = None,
    max_shard_size: int | str | None = None,
    companions: Mapping[str, bytes] | None = None,
    progress: Report | None = None,
) -> None:
    """Write parameters into a folder, which may be there; its weights of the same framework are replaced.

    The files are model.safetensors (pytorch), flax_model.safetensors or flax_model.msgpack (flax), or shards with an
    index as Transformers names them; or the folder orbax_model, which orbax restores. They take their places when all
    are whole; an error leaves the folder as it was.

    Args:
      params: a nested dict of arrays by parameter path, or a dict of arrays by tensor name. jax arrays come to the
        host one at a time.
      folder: where to; made if need be.
      to: whose names and files: "pytorch" for what Transformers loads, "orbax" for a checkpoint that is restored onto
        any mesh.
      format: "safetensors", or "msgpack", flax.serialization's, for Flax alone and in one file.
      layout: "checkpoint", or "linen" for Flax's usual leaves with kernels [in, out].
      dtype: what floating tensors are cast to; default: their own.
      max_shard_size: bytes of a file, as int or like "200MB"; default 5GB. A larger tensor has a file of its own.
      companions: small files that go with the weights, by name: all of them take their places, or none.
      progress: called with the bytes done and the bytes in all.

    Raises:
      ValueError: options that do not fit each other; a dtype that cannot be stored.
      FileExistsError: the folder holds weights of the other framework, which would be stale.
      OSError: a file cannot be written, or another process is writing the folder.
    """
    folder = Path(folder)
    refuse_others(folder, to)
    tensors: dict[str, Tensor] = {to_name(path): ArrayTensor(array) for path, array in _leaves(params, ())}
    if dtype is not None:
        tensors = {name: cast(tensor, weight_dtype(dtype)) for name, tensor in tensors.items()}
    with Staging(folder, counter(tensors, progress)) as staging:
        refuse_others(folder, to)  # again: another process may just have written them
        for name, data in (companions or {}).items():
            staging.write_bytes(name, data)
        write_weights(staging, tensors, to, format, layout, max_shard_size)
        staging.commit()


def check_options(to: str, format: str, layout: str, max_shard_size: int | str | None) -> None:
    """Refuse options that are unknown or do not fit each other."""
    options = {"to": (to, Framework), "format": (format, Format), "layout": (layout, Layout)}
    for name, (value, kind) in options.items():
        known = get_args(kind)
        if value not in known:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")
    if to == "pytorch" and (format != "safetensors" or layout != "checkpoint"):
        raise ValueError(f"PyTorch checkpoints are safetensors in the checkpoint's layout, not {format} in {layout}")
    if to == "orbax" and (format != "safetensors" or layout != "checkpoint" or max_shard_size is not None):
        raise ValueError("an orbax checkpoint has a file for each tensor: format, layout and shard size do not apply")
    if format == "msgpack" and max_shard_size is not None:
        raise ValueError("max_shard_size does not apply to msgpack, which is one file")
    if max_shard_size is not None:
        parse_size(max_shard_size)


def write_weights(
    staging: Staging,
    tensors: Mapping[str, Tensor],
    to: Framework,
    format: Format,
    layout: Layout,
    max_shard_size: int | str | None,
) -> None:
    """Write the files of a checkpoint; `tensors` have Hugging Face names and the checkpoint's layout."""
    for name, file in plan_weights(tensors, to, format, layout, max_shard_size).items():
        if isinstance(file.content, bytes):
            staging.write_bytes(name, file.content)
        else:
            staging.write(name, file.content)


def plan_weights(
    tensors: Mapping[str, Tensor], to: Framework, format: Format, layout: Layout, max_shard_size: int | str | None
) -> dict[str, PlannedFile]:
    """The files of a checkpoint by name, in the order that they are written in; no value is read."""
    check_options(to, format, layout, max_shard_size)
    for name, tensor in tensors.items():
        if tensor.dtype not in SAFETENSORS_NAME:
            raise CheckpointError(f"{name} has dtype {tensor.dtype}, which no checkpoint can hold")
    tensors = {name: CheckedTensor(tensor, name) for name, tensor in tensors.items()}
    if to == "orbax":
        return plan_orbax({to_path(name): tensor for name, tensor in tensors.items()})
    if to == "pytorch":
        return plan_shards(STEM[to], tensors, {"format": "pt"}, max_shard_size)
    leaves = dict(_flax_leaf(name, tensor, layout) for name, tensor in tensors.items())
    if format == "msgpack":
        nbytes = sum(tensor.nbytes for tensor in leaves.values())
        return {STEM[to] + ".msgpack": PlannedFile(nbytes, lambda writer: write_msgpack(writer, leaves))}
    joined = {SEPARATOR.join(path): tensor for path, tensor in leaves.items()}
    return plan_shards(STEM[to], joined, {"format": "flax", "layout": layout}, max_shard_size)


def plan_shards(
    stem: str, tensors: Mapping[str, Tensor], metadata: dict[str, str], limit: int | str | None
) -> dict[str, PlannedFile]:
    """One safetensors file, or several and their index, as Transformers names them."""
    shards = split(tensors, parse_size(DEFAULT_SHARD_SIZE if limit is None else limit))
    if len(shards) == 1:
        return {f"{stem}.safetensors": _plan_safetensors(shards[0], metadata)}
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = {name: _plan_safetensors(shard, metadata) for name, shard in zip(names, shards, strict=True)}
    totals = {
        "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
        "total_size": sum(tensor.nbytes for tensor in tensors.values()),
    }
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = (json.dumps({"metadata": totals, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n").encode()
    return files | {f"{stem}.safetensors.index.json": PlannedFile(len(index), index)}


def _plan_safetensors(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> PlannedFile:
    header, _ = safetensors_header(tensors, metadata)
    nbytes = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    return PlannedFile(nbytes, lambda writer: write_safetensors(writer, tensors, metadata))


def split(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Tensors in shards of at most `limit` bytes, in order; a larger tensor is alone in its shard."""
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > limit:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    return shards


def parse_size(size: int | str) -> int:
    """Bytes of a size such as 5000, "5GB" or "200MB"; units are powers of 1000, as in Transformers.

    Raises:
      ValueError: not a size, or not a positive one.
    """
    number, unit = (size[:-2], UNITS.get(size[-2:].upper())) if isinstance(size, str) else (str(size), 1)
    try:
        count = int(float(number) * unit) if unit else 0
    except (ValueError, OverflowError):
        count = 0
    if count <= 0:
        expected = f"with {', '.join(UNITS)}, such as '5GB'" if isinstance(size, str) else "of bytes"
        raise ValueError(f"{size!r} is not a size: expected a positive number {expected}")
    return count


def counter(tensors: Mapping[str, Tensor], progress: Report | None) -> Callable[[int], None]:
    """A function that takes the bytes of each write and reports the sum of them."""
    if progress is None:
        return lambda count: None
    total = sum(tensor.nbytes for tensor in tensors.values())
    done = 0

    def count_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress(min(done, total), total)  # headers are a little more than the tensors

    return count_bytes


def refuse_others(folder: Path, to: Framework) -> None:
    """FileExistsError where a folder holds weights of another framework than those that are to be written."""
    starts = {"flax": "flax_", "orbax": ORBAX}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        found = next((framework for framework, start in starts.items() if path.name.startswith(start)), "pytorch")
        if WEIGHTS.fullmatch(path.name) and found != to:
            raise FileExistsError(
                f"{folder}: holds {path.name}, which would no longer be the same model; save elsewhere"
            )


def _flax_leaf(name: str, tensor: Tensor, layout: Layout) -> tuple[tuple[str, ...], Tensor]:
    """The path in Flax's tree of a checkpoint's tensor, and the tensor as it is there."""
    path = to_path(name)
    if layout == "checkpoint":
        return path, tensor
    path, is_transposed = to_linen(path)
    return path, tensor.T if is_transposed else tensor


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, node in tree.items():
        if isinstance(node, Mapping):
            yield from _leaves(node, (*path, key))
        else:
            yield (*path, key), node
