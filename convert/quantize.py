"""Weight-only quantization: the format, and tensors that are quantized, or no longer so, as they are read.

A quantized module has an integer `weight` and, beside it, a `weight_scale`, float32:

- int8: `weight` [out, in] int8, `weight_scale` [out, 1], one for each output channel.
- int4: `weight` [out, in / 2] uint8, `weight_scale` [out, groups], one for each group of GROUP input channels (fewer
  where `in` is no multiple). A byte holds two neighbours of a row, the first in its low half, each with 8 added.

A weight is its integer times its scale; the scale is the largest magnitude of the channel or group over 127 or 7, so
that no weight is off by more than half a scale. int4 keeps embedding and head in int8, as the errors of both go to the
logits unmixed. config.json says so: {"quantization_config": {"quant_method": "flaxqwen", "weights": "int4"}}.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import numpy as np

from flaxqwen.convert.names import Path, to_name, to_path
from flaxqwen.convert.tensors import Tensor, array_chunks

Scheme = Literal["int8", "int4"]
METHOD = "flaxqwen"
GROUP = 128
SCALE = "weight_scale"
LARGEST = {"int8": 127, "int4": 7}

# The modules whose weights are quantized, and those that are never narrower than int8.
QUANTIZED = ("*_proj", "embed_tokens", "lm_head")
SENSITIVE = ("embed_tokens", "lm_head")


def check_scheme(scheme: Any) -> Scheme:
    """The scheme; ValueError for an unknown one."""
    if scheme not in get_args(Scheme):
        raise ValueError(f"quantize={scheme!r} is not supported; expected one of {', '.join(get_args(Scheme))}")
    return scheme


def scheme_of(config: Mapping[str, Any] | None) -> Scheme | None:
    """The scheme that a quantization_config names; None where there is none.

    Raises:
      ValueError: weights quantized by another method.
    """
    if config is None:
        return None
    method = config.get("quant_method", "unknown")
    if method != METHOD:
        raise ValueError(f"weights quantized by {method!r} are not supported; use the unquantized model")
    return check_scheme(config.get("weights"))


def to_config(scheme: Scheme) -> dict[str, Any]:
    """The quantization_config of a scheme."""
    return {"quant_method": METHOD, "weights": scheme}


def scheme_for(path: Path, shape: tuple[int, ...], scheme: Scheme) -> Scheme | None:
    """How one parameter is stored; None: as it is.

    Raises:
      ValueError: an odd number of input channels for int4.
    """
    owner, leaf = path[-2:]
    if leaf != "weight" or len(shape) != 2 or not any(fnmatchcase(owner, pattern) for pattern in QUANTIZED):
        return None
    if owner in SENSITIVE:
        return "int8"
    if scheme == "int4" and shape[1] % 2:
        raise ValueError(f"{to_name(path)} has {shape[1]} input channels: int4 needs an even number")
    return scheme


def quantized_shapes(shapes: Mapping[Path, tuple[int, ...]], scheme: Scheme) -> dict[Path, tuple[int, ...]]:
    """The shapes of a quantized model's parameters from those of the plain one."""
    found: dict[Path, tuple[int, ...]] = {}
    for path, shape in shapes.items():
        own = scheme_for(path, shape, scheme)
        if own is None:
            found[path] = shape
        else:
            found[path], found[(*path[:-1], SCALE)] = _shapes(shape, own)
    return found


def quantize_rows(rows: Any, scheme: Scheme, xp: Any = np) -> tuple[Any, Any]:
    """Rows [n, in] of a weight, float32 -> (integers as they are stored, scales [n, groups] float32).

    xp: numpy or jax.numpy, of which the rows are; both give the same bits. Hence reciprocals, and no division by them:
    XLA would multiply by the reciprocal all the same, and one of 800,000 integers would differ.
    """
    n, width = rows.shape
    groups = group_count(width) if scheme == "int4" else 1
    grouped = rows.reshape(n, groups, -1)
    scale = xp.abs(grouped).max(axis=-1) * np.float32(1 / LARGEST[scheme])
    # Of zeros, and of what is so small that XLA, which takes subnormal numbers for zero, would differ.
    scale = xp.where(scale < 4 * np.finfo(np.float32).tiny, np.float32(1), scale)
    with np.errstate(invalid="ignore"):  # NaN and inf, of which the converter warns by name
        values = xp.rint(grouped * (np.float32(1) / scale)[..., None]).reshape(n, width).astype(np.int8)
    if scheme == "int4":
        nibbles = (values + 8).astype(np.uint8)
        pairs = nibbles.reshape(n, width // 2, 2)
        values = pairs[..., 0] | (pairs[..., 1] << 4)
    return values, scale


def dequantize_rows(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The inverse: rows as stored, and their scales -> [n, in] float32."""
    if values.dtype == np.uint8:
        nibbles = np.stack([values & 15, values >> 4], axis=-1).reshape(len(values), -1)
        values = nibbles.astype(np.int8) - np.int8(8)
    grouped = values.reshape(*scale.shape, -1) * scale[..., None]
    return grouped.astype(np.float32).reshape(len(values), -1)


@dataclass(frozen=True)
class QuantizedTensor:
    """The integers of a weight, or its scales, computed from it row by row."""

    source: Tensor
    scheme: Scheme
    is_scale: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return _shapes(self.source.shape, self.scheme)[self.is_scale]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32 if self.is_scale else {"int8": np.int8, "int4": np.uint8}[self.scheme])

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def T(self) -> Tensor:
        raise ValueError("quantized weights have no layout but the checkpoint's")

    def chunks(self, into: np.ndarray | None = None) -> Iterator[np.ndarray]:
        pieces = (quantize_rows(rows, self.scheme)[self.is_scale] for rows in row_blocks(self.source))
        yield from _place(pieces, into)


@dataclass(frozen=True)
class DequantizedTensor:
    """A weight, float32, computed from its integers and scales row by row."""

    values: Tensor
    scale: Tensor

    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        out, width = self.values.shape
        return out, width * (2 if self.values.dtype == np.uint8 else 1)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def T(self) -> Tensor:
        raise ValueError("quantized weights have no layout but the checkpoint's")

    def chunks(self, into: np.ndarray | None = None) -> Iterator[np.ndarray]:
        scale = np.concatenate([chunk.copy() for chunk in self.scale.chunks()]).reshape(self.scale.shape)
        yield from _place(self._rows(scale), into)

    def _rows(self, scale: np.ndarray) -> Iterator[np.ndarray]:
        start = 0
        for rows in row_blocks(self.values):
            yield dequantize_rows(rows, scale[start : start + len(rows)])
            start += len(rows)


def quantized(tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, quantized as they are read; a weight is read twice."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path = to_path(name)
        own = scheme_for(path, tensor.shape, scheme)
        if own is None:
            found[name] = tensor
        else:
            found[name] = QuantizedTensor(tensor, own, is_scale=False)
            found[to_name((*path[:-1], SCALE))] = QuantizedTensor(tensor, own, is_scale=True)
    return found


def dequantized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a quantized checkpoint by name, with weights in float32; those of a plain one as they are."""
    found = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        scale = tensors.get(f"{owner}.{SCALE}")
        if leaf == SCALE:
            continue
        found[name] = tensor if leaf != "weight" or scale is None else DequantizedTensor(tensor, scale)
    return found


def row_blocks(tensor: Tensor) -> Iterator[np.ndarray]:
    """A tensor [out, in] in blocks of whole rows; floating values as float32."""
    width = tensor.shape[1]
    dtype = np.float32 if tensor.dtype not in (np.int8, np.uint8) else tensor.dtype
    rest = np.empty(0, dtype)
    for chunk in tensor.chunks():
        values = np.concatenate([rest, chunk.astype(dtype)])
        whole = values.size - values.size % width
        if whole:
            yield values[:whole].reshape(-1, width)
        rest = values[whole:]


def group_count(width: int) -> int:
    """How many groups of int4 `width` input channels are."""
    return width // math.gcd(width, GROUP)


def _shapes(shape: tuple[int, ...], scheme: Scheme) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of the integers and of the scales of a weight [out, in]."""
    out, width = shape
    if scheme == "int8":
        return (out, width), (out, 1)
    return (out, width // 2), (out, group_count(width))


def _place(pieces: Iterator[np.ndarray], into: np.ndarray | None) -> Iterator[np.ndarray]:
    """Arrays as chunks of a tensor."""
    done = 0
    for piece in pieces:
        yield from array_chunks(piece, None if into is None else into[done : done + piece.size])
        done += piece.size
