"""PyTorch's .bin checkpoints: torch reads the index, which is a pickle, and never the values.

Only plain tensors are unpickled (weights_only): a pickle that wants to run code is refused.
"""

from __future__ import annotations

import io
import re
import zipfile
from typing import Any, NamedTuple

from flaxqwen.convert.dtypes import BY_NAME
from flaxqwen.convert.errors import CheckpointError
from flaxqwen.convert.tensors import MappedFile, StoredTensor

ZIP = b"PK\x03\x04"
LOCAL_HEADER = 30  # bytes of what stands before a record, without its name and what is extra


class Record(NamedTuple):
    """Where the bytes of a storage lie in a file."""

    name: str
    start: int
    size: int


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
    outline, records = _outline(file)
    state = _unpickle(file, outline)
    if not isinstance(state, dict):
        raise CheckpointError(f"{file.path}: holds a {type(state).__name__}, expected a dict of tensors")
    return {name: _stored_tensor(file, records, name, tensor) for name, tensor in state.items()}


def _outline(file: MappedFile) -> tuple[io.BytesIO, dict[int, Record]]:
    """The zip file with its storages empty, and the records of these by where they begin in it.

    torch tells a fake tensor's storage by its place in the zip file, and computes that as torch.save would have laid it
    out: wrong where something else has written the file. In the outline it looks, as the format's version is left out.
    """
    outline, records = io.BytesIO(), {}
    try:
        with zipfile.ZipFile(file.path) as source, zipfile.ZipFile(outline, "w") as target:
            infos = {info.filename.partition("/")[2]: info for info in source.infolist()}  # all are in one folder
            if len(infos) < len(source.infolist()):
                raise CheckpointError(f"{file.path}: a record of the zip file stands twice")
            for name, info in infos.items():
                if name == "byteorder" and (order := source.open(info).read(16)) != b"little":
                    raise CheckpointError(f"{file.path}: its byteorder is {order!r}, expected b'little'")
                if name in ("data.pkl", "version"):
                    target.writestr(f"archive/{name}", source.read(info))
                elif name.startswith("data/") and not info.is_dir():
                    target.writestr(f"archive/{name}", b"")
                    records[outline.tell()] = _record(file, name, info)
    except CheckpointError:
        raise
    except Exception as error:  # zipfile meets corrupt bytes with whatever its parts raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{file.path}: corrupt .bin checkpoint: {reason}") from None
    return outline, records


def _record(file: MappedFile, name: str, info: zipfile.ZipInfo) -> Record:
    """Where a storage begins, which only the header before it tells: what is extra there differs from the directory."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise CheckpointError(f"{file.path}: {name} is compressed or encrypted, which torch.save does not do: refused")
    header = file.read(info.header_offset, LOCAL_HEADER)
    lengths = sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    start = info.header_offset + LOCAL_HEADER + lengths
    if not header.startswith(ZIP) or start + info.file_size > file.size:
        raise CheckpointError(f"{file.path}: corrupt .bin checkpoint: {name} is not where its directory says")
    return Record(name, start, info.file_size)


def _unpickle(file: MappedFile, outline: io.BytesIO) -> Any:
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError:
        raise ImportError(
            f"{file.path}: reading a .bin checkpoint needs PyTorch: pip install 'flaxqwen[torch]'"
        ) from None
    try:
        # Fake tensors have no memory; their storages say at which byte of the outline their record begins.
        with FakeTensorMode():
            outline.seek(0)
            return torch.load(outline, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler meets corrupt bytes with whatever its parts raise
        # Of a message of many lines, which also tells how to run the code all the same, only the reason.
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden:
            message = f"refused: the pickle wants to run code, {forbidden[1]}; only plain tensors are read"
        else:
            reason = re.search(r"WeightsUnpickler error: (.+)", str(error)) or re.match(r"\s*(.+)", str(error))
            message = f"corrupt .bin checkpoint: {reason[1].strip() if reason else type(error).__name__}"
        raise CheckpointError(f"{file.path}: {message}") from None


def _stored_tensor(file: MappedFile, records: dict[int, Record], name: Any, tensor: Any) -> StoredTensor:
    """Where the values of a fake tensor lie."""
    dtype = BY_NAME.get(str(getattr(tensor, "dtype", "")).removeprefix("torch."))
    if not isinstance(name, str) or dtype is None:
        kind = getattr(tensor, "dtype", type(tensor).__name__)
        raise CheckpointError(f"{file.path}: {name!r} is {kind}, expected a tensor of a supported dtype")
    layout = getattr(tensor, "layout", type(tensor).__name__)
    if str(layout) != "torch.strided":
        raise CheckpointError(f"{file.path}: {name!r} is {layout}, expected a dense tensor")
    record = records.get(getattr(tensor.untyped_storage(), "_checkpoint_offset", None) or -1)
    if record is None:
        raise CheckpointError(f"{file.path}: {name!r} has no values in the file, as a tensor on the meta device")
    shape = tuple(tensor.shape)
    start = tensor.storage_offset() * dtype.itemsize
    strides = tuple(stride * dtype.itemsize for stride in tensor.stride())
    span = dtype.itemsize + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    size = span if all(shape) else 0
    if start + size > record.size:
        raise CheckpointError(
            f"{file.path}: truncated: tensor {name!r} ends at byte {start + size} of {record.name}, "
            f"which has {record.size}"
        )
    extents = ((record.start + start, size),)
    return StoredTensor(file, extents, shape, dtype, None if tensor.is_contiguous() else strides)
