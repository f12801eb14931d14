"""Parts of tensors, as the devices of a mesh need them: the values, and no more bytes of the file than these."""

from __future__ import annotations

import errno
import importlib.util
import mmap
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from flaxqwen.convert import open_checkpoint, save_params
from flaxqwen.convert.shards import Counter, read_box

SHAPES = {"model.a_proj.weight": (37, 50), "model.conv.weight": (9, 8, 3), "model.norm.weight": (31,)}


@pytest.fixture
def tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for name, shape in SHAPES.items()}


def boxes(shape: tuple[int, ...], rng: np.random.Generator) -> list[Any]:
    """Random ones, and the whole."""
    random = [tuple(tuple(map(int, np.sort(rng.integers(0, n + 1, 2)))) for n in shape) for _ in range(20)]
    return [*random, tuple((0, n) for n in shape)]


@pytest.mark.parametrize("save", [{}, {"layout": "linen"}, {"format": "msgpack", "layout": "linen"}], ids=str)
def test_a_box_is_read_and_nothing_else(tmp_path: Path, rng, tensors, monkeypatch: pytest.MonkeyPatch, save: dict):
    save_params(tensors, tmp_path, **save)
    preadv, read = os.preadv, []
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: read.append(preadv(fd, to, at)) or read[-1])
    monkeypatch.setattr(mmap, "mmap", None)  # a mapping ends the process where a disk is broken
    with open_checkpoint(tmp_path) as checkpoint:
        for name, tensor in tensors.items():
            for box in boxes(tensor.shape, rng):
                wanted, counter = tensor[tuple(slice(*ends) for ends in box)], Counter()
                read.clear()
                found = read_box(checkpoint.tensors[name], box, counter)
                assert (found.shape, found.tobytes()) == (wanted.shape, wanted.tobytes())
                assert found.flags.c_contiguous
                assert counter.nbytes == sum(read) == wanted.nbytes


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="writes a .bin checkpoint")
def test_a_box_of_a_pickle_in_another_order(tmp_path: Path, rng):
    import torch

    array = rng.standard_normal((12, 10), np.float32)
    torch.save({"model.a.weight": torch.from_numpy(array).T}, tmp_path / "pytorch_model.bin")
    with open_checkpoint(tmp_path) as checkpoint:
        for box in boxes((10, 12), rng):
            found = read_box(checkpoint.tensors["model.a.weight"], box)
            assert np.array_equal(found, array.T[tuple(slice(*ends) for ends in box)])


@pytest.mark.parametrize("layout", ["checkpoint", "linen"])
def test_a_broken_disk_is_an_error(tmp_path: Path, tensors, monkeypatch: pytest.MonkeyPatch, layout: Any):
    save_params(tensors, tmp_path, layout=layout)

    def fail(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_checkpoint(tmp_path) as checkpoint:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(OSError, match=r"at offset \d+.*flax_model\.safetensors"):
            read_box(checkpoint.tensors["model.a_proj.weight"], ((3, 9), (5, 20)))
