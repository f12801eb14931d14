"""From a checkpoint to the tree of parameters."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from flaxqwen.convert.checkpoint import Checkpoint
from flaxqwen.convert.dtypes import is_weight_dtype, weight_dtype, weight_dtype_names
from flaxqwen.convert.errors import CheckpointError
from flaxqwen.convert.memory import WeightMemory
from flaxqwen.convert.names import (
    EMBEDDING,
    HEAD,
    Path,
    base_prefix,
    is_classifier,
    is_ignored,
    to_name,
    with_audio_prefix,
    with_prefix,
)
from flaxqwen.convert.progress import Report
from flaxqwen.convert.quantize import SCALE
from flaxqwen.convert.tensors import CheckedTensor, Tensor, cast

# Tensors read at once. Most of the time is the kernel's, for new pages: on two cores 1 GB takes 0.27 s, by two 0.18 s;
# on a virtual machine whose host has to find the pages 1.9 s, by two 0.4 to 1.2 s.
READERS = min(4, os.cpu_count() or 1)


def load_params(
    checkpoint: Checkpoint,
    expected: Mapping[Path, tuple[int, ...]],
    dtype: DTypeLike | None = None,
    put: Callable[[np.ndarray], Any] = lambda array: array,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Read a model's parameters from a checkpoint, a few tensors at a time.

    Names with and without the base model's prefix fit each other both ways. Buffers of old checkpoints, and heads
    that the model has no use for, are left out (see `match`).

    Args:
      checkpoint: an open checkpoint of any format.
      expected: the shape of every parameter of the model, by its path.
      dtype: what the parameters are cast to; default: as they are stored.
      put: what becomes of each array, which is fresh, aligned to 64 bytes and nobody else's. `jax.device_put` takes
        such an array as it is on a CPU (`jnp.asarray` copies it). Default: it stays. Called by several threads.
      progress: called with the bytes done and the bytes in all.

    Returns:
      A nested dict of what `put` returned.

    Raises:
      CheckpointError: tensors are missing, unexpected, wrongly shaped or of an unsupported dtype: all are listed.
    """
    tensors = match(checkpoint, expected)
    if dtype is not None:
        wanted = weight_dtype(dtype)
        tensors = {path: tensor if path[-1] == SCALE else cast(tensor, wanted) for path, tensor in tensors.items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    params: dict[str, Any] = {}
    read, done = partial(_read_and_put, put, WeightMemory()), 0
    with ThreadPoolExecutor(READERS) as pool:  # after an error, its map cancels what is not begun
        for path, array in zip(tensors, pool.map(read, tensors.items()), strict=True):
            node = params
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = array
            done += tensors[path].nbytes
            if progress:
                progress(done, total)
    return params


def _read_and_put(put: Callable[[np.ndarray], Any], memory: WeightMemory, item: tuple[Path, Tensor]) -> Any:
    path, tensor = item
    return put(read_array(to_name(path), tensor, memory))


def match(checkpoint: Checkpoint, expected: Mapping[Path, tuple[int, ...]]) -> dict[Path, Tensor]:
    """The checkpoint's tensors by the paths of the model's parameters, in the checkpoint's order.

    A classifier's head that the model does not have is left out; so is a `lm_head.weight` where the model is a bare
    one or has another head, and where it repeats the embedding of a tied model. One that differs from the embedding is
    refused: Transformers 5 does not tie such a checkpoint, whatever its config says (see `has_own_head`).

    Raises:
      CheckpointError: tensors are missing, unexpected, wrongly shaped or of an unsupported dtype: all are listed.
    """
    wanted = {to_name(path): path for path in expected}
    found_prefix, wanted_prefix = base_prefix(checkpoint.tensors), base_prefix(wanted)
    matched: dict[Path, Tensor] = {}
    problems: list[str] = []
    for name, tensor in checkpoint.tensors.items():
        renamed = with_prefix(name, found_prefix, wanted_prefix)
        if renamed not in wanted:
            renamed = with_audio_prefix(name, wanted)
        if renamed not in wanted:
            is_unused = is_ignored(name) or is_classifier(renamed)
            if renamed in (HEAD, f"lm_head.{SCALE}"):
                is_unused = not _is_needed_head(checkpoint, wanted, wanted_prefix)
            if not is_unused:
                problems.append(f"unexpected {name} {list(tensor.shape)}")
            continue
        path = wanted[renamed]
        matched[path] = tensor
        if tensor.shape != tuple(expected[path]):
            problems.append(f"{name} has shape {list(tensor.shape)}, expected {list(expected[path])}")
        is_quantized = path[-1] == "weight" and (*path[:-1], SCALE) in expected
        if is_quantized and tensor.dtype not in (np.int8, np.uint8):
            problems.append(f"{name} has dtype {tensor.dtype}, expected a quantized weight")
        elif not is_quantized and not is_weight_dtype(tensor.dtype):
            problems.append(f"{name} has dtype {tensor.dtype}, supported are {weight_dtype_names()}")
    problems += [f"missing {name} {list(expected[path])}" for name, path in wanted.items() if path not in matched]
    if problems:
        raise CheckpointError(f"{checkpoint.path} does not fit the model: {'; '.join(problems)}")
    return matched


def has_own_head(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has a `lm_head.weight` other than its embedding: such a model is not tied.

    Transformers 5 decides so from the values, and goes over a config that says `tie_word_embeddings`
    (`tie_weights` in transformers/modeling_utils.py); a caller that wants the same model does too.
    """
    prefix = base_prefix(checkpoint.tensors)
    head = checkpoint.tensors.get(HEAD)
    if head is None or prefix is None:
        return head is not None
    embedding = checkpoint.tensors[prefix + EMBEDDING]
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return True
    pairs = zip(head.chunks(), embedding.chunks(), strict=True)
    return not all(np.array_equal(left.view("u1"), right.view("u1")) for left, right in pairs)


def _is_needed_head(checkpoint: Checkpoint, wanted: Mapping[str, Path], prefix: str | None) -> bool:
    """Whether a model that has no lm_head would lose something with the checkpoint's."""
    is_tied_model = prefix == "model." and all(name.startswith(prefix) for name in wanted)
    return is_tied_model and has_own_head(checkpoint)


def read_array(name: str, tensor: Tensor, memory: WeightMemory) -> np.ndarray:
    """A tensor as a fresh aligned array; warns where it holds NaN or inf."""
    flat = memory.take(tensor.nbytes).view(tensor.dtype)
    for _ in CheckedTensor(tensor, name).chunks(flat):
        pass
    return flat.reshape(tensor.shape)
