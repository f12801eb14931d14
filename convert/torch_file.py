"""PyTorch's .bin checkpoints: torch reads the index, which is a pickle, and never the values.

Only plain tensors are unpickled (weights_only): a pickle that wants to run code is refused.
"""

from __future__ import annotations

import re
from typing import Any

from flaxqwen.convert.dtypes import BY_NAME
from flaxqwen.convert.errors import CheckpointError
from flaxqwen.convert.tensors import MappedFile, StoredTensor

ZIP = b"PK\x03\x04"


def read_torch(file: MappedFile) -> dict[str, StoredTensor]:
    """The tensors of a file written by torch.save, in its order; their values stay in the file until they are read.

    Raises:
      CheckpointError: the file is not one of torch.save, holds anything but tensors, or wants to run code.
      ImportError: torch is not installed.
    """
    if file.size < len(ZIP) or file.read(0, len(ZIP)) != ZIP:
        raise CheckpointError(
            f"{file.path}: not a zip file, as torch.save has written since 1.6; save it as safetensors"
        )
    state = _unpickle(file)
    if not isinstance(state, dict):
        raise CheckpointError(f"{file.path}: holds a {type(state).__name__}, expected a dict of tensors")
    return {name: _stored_tensor(file, name, tensor) for name, tensor in state.items()}


def _unpickle(file: MappedFile) -> Any:
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError:
        raise ImportError(
            f"{file.path}: reading a .bin checkpoint needs PyTorch: pip install 'flaxqwen[torch]'"
        ) from None
    try:
        # Fake tensors have no memory; their storages say at which byte of the file the values begin.
        with FakeTensorMode():
            return torch.load(file.path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler meets corrupt bytes with whatever its parts raise
        # Of a message of many lines, which also tells how to run the code all the same, only the reason.
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden:
            message = f"refused: the pickle wants to run code, {forbidden[1]}; only plain tensors are read"
        else:
            reason = re.search(r"WeightsUnpickler error: (.+)", str(error)) or re.match(r"\s*(.+)", str(error))
            message = f"corrupt .bin checkpoint: {reason[1].strip() if reason else type(error).__name__}"
        raise CheckpointError(f"{file.path}: {message}") from None


def _stored_tensor(file: MappedFile, name: Any, tensor: Any) -> StoredTensor:
    """Where the values of a fake tensor lie."""
    dtype = BY_NAME.get(str(getattr(tensor, "dtype", "")).removeprefix("torch."))
    if not isinstance(name, str) or dtype is None:
        kind = getattr(tensor, "dtype", type(tensor).__name__)
        raise CheckpointError(f"{file.path}: {name!r} is {kind}, expected a tensor of a supported dtype")
    shape = tuple(tensor.shape)
    offset = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * dtype.itemsize
    strides = tuple(stride * dtype.itemsize for stride in tensor.stride())
    span = dtype.itemsize + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    size = span if all(shape) else 0
    if offset + size > file.size:
        raise CheckpointError(f"{file.path}: truncated: tensor {name!r} ends at byte {offset + size} of {file.size}")
    return StoredTensor(file, ((offset, size),), shape, dtype, None if tensor.is_contiguous() else strides)
