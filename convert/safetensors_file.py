"""The safetensors format: an 8-byte length, a JSON header, the values. https://github.com/huggingface/safetensors

Read by our own code, because the values of a tensor have to be found without reading them, in every dtype, and a
broken file has to end in one clear line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from flaxqwen.convert.dtypes import SAFETENSORS, SAFETENSORS_NAME
from flaxqwen.convert.errors import CheckpointError
from flaxqwen.convert.tensors import MappedFile, StoredTensor, Tensor
from flaxqwen.convert.writer import Writer

# As the format's own reader: a longer header is a broken length.
MAX_HEADER = 100_000_000


def read_safetensors(file: MappedFile) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file, in the order of their values, and its `__metadata__`.

    Raises:
      CheckpointError: the file is truncated or is not a valid safetensors file; the message says where.
    """
    start, header = _read_header(file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{file.path}: __metadata__ in the header is {type(metadata).__name__}, not an object")
    entries = {name: _check_entry(file, name, entry) for name, entry in header.items()}
    tensors: dict[str, StoredTensor] = {}
    at = 0
    for name, (begin, end) in sorted(((n, e["data_offsets"]) for n, e in entries.items()), key=lambda item: item[1]):
        if begin != at:
            what = "overlaps the tensor before it" if begin < at else "leaves a gap after the tensor before it"
            raise CheckpointError(f"{file.path}: tensor {name!r} {what}: it begins at byte {begin}, expected {at}")
        entry, at = entries[name], end
        tensors[name] = StoredTensor(
            file, ((start + begin, end - begin),), tuple(entry["shape"]), SAFETENSORS[entry["dtype"]]
        )
    if start + at != file.size:
        state = "truncated" if start + at > file.size else "longer than its header says"
        raise CheckpointError(f"{file.path}: the file is {state}: {file.size} bytes, expected {start + at}")
    return tensors, metadata


def _read_header(file: MappedFile) -> tuple[int, dict[str, Any]]:
    """The offset where the values begin, and the header."""
    if file.size < 8:
        raise CheckpointError(f"{file.path}: truncated: {file.size} bytes are too few for a safetensors file")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_HEADER or 8 + length > file.size:
        raise CheckpointError(
            f"{file.path}: truncated or not a safetensors file: it claims a header of {length} bytes, "
            f"the file has {file.size}"
        )
    try:
        header = json.loads(file.read(8, length), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # ValueError: JSON, UTF-8 and duplicates
        raise CheckpointError(f"{file.path}: the safetensors header is not valid: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.path}: the safetensors header is not an object of tensors")
    return 8 + length, header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the name {key!r} stands twice")
        found[key] = value
    return found


def _check_entry(file: MappedFile, name: str, entry: Any) -> dict[str, Any]:
    """One tensor's entry of the header, or CheckpointError."""

    def is_size(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise CheckpointError(f"{file.path}: tensor {name!r} has no proper dtype, shape and data_offsets: {entry!r}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SAFETENSORS:
        known = ", ".join(SAFETENSORS)
        raise CheckpointError(f"{file.path}: tensor {name!r} has dtype {dtype!r}, which is not one of {known}")
    if not isinstance(shape, list) or not all(map(is_size, shape)):
        raise CheckpointError(f"{file.path}: tensor {name!r} has shape {shape!r}, expected a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
        raise CheckpointError(f"{file.path}: tensor {name!r} has data_offsets {offsets!r}, expected two offsets")
    size = math.prod(shape) * SAFETENSORS[dtype].itemsize
    if offsets[1] - offsets[0] != size:
        raise CheckpointError(
            f"{file.path}: tensor {name!r} of dtype {dtype} and shape {shape} takes {size} bytes, "
            f"its data_offsets {offsets} span {offsets[1] - offsets[0]}"
        )
    return entry


def safetensors_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[Tensor]]:
    """What stands before the values, and the tensors in the order of their values.

    That is the order of the format's own writer, the widest dtype first and then by name: every value is aligned, and
    the same tensors give the same file.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, tensor in ordered:
        offsets = [at, at + tensor.nbytes]
        header[name] = {
            "dtype": SAFETENSORS_NAME[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        at = offsets[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [tensor for _, tensor in ordered]


def write_safetensors(out: Writer, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, tensor by tensor."""
    header, ordered = safetensors_header(tensors, metadata)
    out.write(header)
    for tensor in ordered:
        for chunk in tensor.chunks():
            out.write(chunk.view("u1").data)
