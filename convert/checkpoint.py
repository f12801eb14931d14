"""A checkpoint on disk, whatever its format: tensors under their Hugging Face names, read when they are needed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, cast

import numpy as np

from flaxqwen.convert.errors import CheckpointError
from flaxqwen.convert.msgpack_file import read_msgpack
from flaxqwen.convert.names import Layout, from_linen, layout_of, to_name
from flaxqwen.convert.orbax_folder import open_orbax
from flaxqwen.convert.quantize import Scheme, quantized
from flaxqwen.convert.safetensors_file import read_safetensors
from flaxqwen.convert.staging import ORBAX
from flaxqwen.convert.tensors import MappedFile, StoredTensor
from flaxqwen.convert.torch_file import read_torch

# What holds a checkpoint, the first one found counts: orbax's folder, PyTorch's safetensors, PyTorch's pickles, Flax. A
# folder with several formats holds the same weights in each, and safetensors is the safe and the fast one.
WEIGHT_FILES = (
    ORBAX,
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "flax_model.safetensors",
    "flax_model.safetensors.index.json",
    "flax_model.msgpack",
)
SEPARATOR = "/"  # in the names of Flax's safetensors, as flax.traverse_util.flatten_dict(sep="/") joins paths


class Checkpoint:
    """An open checkpoint; close it, or use it in a `with`.

    path: the file or the index that was opened, or orbax's folder.
    tensors: every tensor by its Hugging Face name, in the checkpoint's order, in the checkpoint's layout ([out, in])
      whatever the layout on disk. Opening reads no values.
    format: "pytorch", "flax" or "orbax", whose names the files have.
    layout: "checkpoint" or "linen", as on disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.format = "pytorch"
        self.layout: Layout = "checkpoint"
        self._files: list[MappedFile] = []
        try:
            self.tensors: Mapping[str, StoredTensor] = MappingProxyType(self._read())
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> np.ndarray:
        """A tensor as a read-only array on the mapped file (a fresh one where its values lie in several pieces)."""
        return self.tensors[name].view()

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of a tensor's first axis; the others are not read."""
        return self.tensors[name].rows(start, stop)

    def release(self, name: str) -> None:
        """Give back the memory of the pages that `read` has touched; its arrays stay valid and read them again."""
        self.tensors[name].release()

    def quantized(self, scheme: Scheme) -> Checkpoint:
        """The same checkpoint, its weights quantized as they are loaded (`read` does not give them)."""
        view = copy.copy(self)
        view.tensors = MappingProxyType(cast(dict[str, StoredTensor], quantized(self.tensors, scheme)))
        return view

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def files(self) -> list[Path]:
        """The files that hold the values."""
        if self.format == "orbax":
            return [path for path in self.path.rglob("*") if path.is_file()]
        return [file.path for file in self._files]

    def close(self) -> None:
        """Close the files; arrays from `read` stay valid."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, path: Path) -> MappedFile:
        self._files.append(MappedFile(path))
        return self._files[-1]

    def _read(self) -> dict[str, StoredTensor]:
        """The tensors of the file or the shards, under their Hugging Face names."""
        name = self.path.name
        if self.path.is_dir():
            leaves = cast(dict[tuple[str, ...], StoredTensor], open_orbax(self.path))
            tensors = self._from_flax(leaves, layout_of(leaves))
            self.format = "orbax"
            return tensors
        if name.endswith(".msgpack"):
            leaves = read_msgpack(self._open(self.path))
            return self._from_flax(leaves, layout_of(leaves))
        if name.endswith((".bin", ".bin.index.json")):
            return self._read_files(lambda file: (read_torch(file), {}))[0]
        tensors, metadata = self._read_files(read_safetensors)
        if metadata.get("format") != "flax" and not name.startswith("flax_model"):
            return tensors
        leaves = {tuple(name.split(SEPARATOR)): tensor for name, tensor in tensors.items()}
        return self._from_flax(leaves, layout_of(leaves))

    def _read_files(
        self, read: Callable[[MappedFile], tuple[dict[str, StoredTensor], dict[str, str]]]
    ) -> tuple[dict[str, StoredTensor], dict[str, str]]:
        """All tensors of one file, or of the shards that an index names, and the metadata of the last."""
        if not self.path.name.endswith(".index.json"):
            return read(self._open(self.path))
        weight_map = _read_index(self.path)
        shards = {}
        metadata: dict[str, str] = {}
        for shard in dict.fromkeys(weight_map.values()):
            path = self.path.parent / shard
            if not path.is_file():
                raise CheckpointError(f"{self.path}: shard {shard!r}, which it names, is not there")
            shards[shard], metadata = read(self._open(path))
        for shard, tensors in shards.items():
            absent = [name for name, where in weight_map.items() if where == shard and name not in tensors]
            unlisted = [name for name in tensors if weight_map.get(name) != shard]
            if absent:
                raise CheckpointError(
                    f"{self.path.parent / shard}: tensors that the index puts here are not: {_few(absent)}"
                )
            if unlisted:
                raise CheckpointError(
                    f"{self.path.parent / shard}: holds tensors that the index does not put here: {_few(unlisted)}"
                )
        return {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}, metadata

    def _from_flax(self, leaves: dict[tuple[str, ...], StoredTensor], layout: Layout) -> dict[str, StoredTensor]:
        """Tensors in the checkpoint's layout from the leaves of a Flax tree."""
        self.format, self.layout = "flax", layout
        tensors: dict[str, StoredTensor] = {}
        for stored, tensor in leaves.items():
            path, is_transposed = from_linen(stored) if layout == "linen" else (stored, False)
            name = to_name(path)
            if name in tensors:
                raise CheckpointError(f"{self.path}: {name} stands twice, the second time as {'/'.join(stored)}")
            tensors[name] = tensor.T if is_transposed else tensor
        return tensors


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open the checkpoint in a folder, or the one in a file: weights, or the index of shards.

    In a folder the format is found by looking: orbax_model, model.safetensors, its shards, pytorch_model.bin, its
    shards, flax_model.safetensors, its shards, flax_model.msgpack; the first that is there.

    Raises:
      FileNotFoundError: there is no checkpoint.
      CheckpointError: a file is corrupt, or the index and the shards do not fit together.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        if not path.name.endswith((".safetensors", ".bin", ".msgpack", ".index.json")):
            raise CheckpointError(f"{path}: not a checkpoint: expected .safetensors, .bin, .msgpack or .index.json")
        return Checkpoint(path)
    for name in WEIGHT_FILES:
        if (path / name).is_dir() if name == ORBAX else (path / name).is_file():
            return Checkpoint(path / name)
    raise FileNotFoundError(f"{path}: no checkpoint in this folder: expected one of {', '.join(WEIGHT_FILES)}")


def _read_index(path: Path) -> dict[str, str]:
    """The map tensor name -> shard of an index, with every shard a file of this folder."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    weight_map: Any = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path}: has no weight_map of tensor names to files")
    for shard in set(weight_map.values()):
        # The name is judged, not where it leads: in a hub's cache every file is a link to ../../blobs.
        if shard in ("", ".", "..") or "/" in shard or "\\" in shard:
            raise CheckpointError(f"{path}: names {shard!r} as a shard, which is outside the folder: refused")
    return weight_map


def _few(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
