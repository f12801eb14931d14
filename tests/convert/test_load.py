"""Checkpoints of every kind become the parameters that a model expects, or one error that lists what is wrong."""

from __future__ import annotations

import threading
import time
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from flaxqwen.convert import CheckpointError, has_own_head, load_params, open_checkpoint, to_path
from tests.convert.samples import assert_same, expected_of, flatten, random_tensors

BF16 = ml_dtypes.bfloat16


def write(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def load(folder: Path, expected: dict, **options) -> dict:
    with open_checkpoint(folder) as checkpoint:
        return flatten(load_params(checkpoint, expected, **options))


def test_every_parameter_is_the_checkpoints_own(tmp_path: Path):
    tensors = random_tensors()
    reported: list[tuple[int, int]] = []
    params = load(write(tmp_path, tensors), expected_of(tensors), progress=lambda *done: reported.append(done))
    assert_same(params, {to_path(name): tensor for name, tensor in tensors.items()})
    for array in params.values():
        assert array.ctypes.data % 64 == 0
        assert array.flags.c_contiguous
        assert array.flags.writeable
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert reported[-1] == (total, total)
    assert [done for done, _ in reported] == sorted(done for done, _ in reported)


@pytest.mark.parametrize(
    ("stored", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")]
)
def test_cast_rounds_as_torch(tmp_path: Path, rng: np.random.Generator, stored: str, wanted: str):
    torch = pytest.importorskip("torch", reason="the oracle of rounding is torch")
    weight = rng.standard_normal((3000, 1000), np.float32).astype(np.dtype(stored))  # several chunks
    params = load(write(tmp_path, {"a.weight": weight}), {("a", "weight"): weight.shape}, dtype=wanted)
    source = torch.from_numpy(weight.view(f"i{weight.itemsize}")).view(getattr(torch, stored))
    oracle = source.to(getattr(torch, wanted))
    bits = params["a", "weight"].view(f"i{oracle.itemsize}")
    assert np.array_equal(bits, oracle.view(getattr(torch, f"int{8 * oracle.itemsize}")).numpy())


def test_arrays_are_put_one_by_one(tmp_path: Path):
    tensors = random_tensors()
    import jax

    params = load(write(tmp_path, tensors), expected_of(tensors), put=jax.device_put)
    assert all(isinstance(array, jax.Array) for array in params.values())
    assert_same(
        {path: np.asarray(array) for path, array in params.items()}, {to_path(k): v for k, v in tensors.items()}
    )


def test_several_are_read_at_once_and_none_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flaxqwen.convert.load.READERS", 2)
    tensors = {f"layers.{i}.weight": np.full((2, 3), i, np.float32) for i in range(40)}
    both = threading.Barrier(2, timeout=60)  # broken, with an error, where one alone comes
    load(write(tmp_path, tensors), expected_of(tensors), put=lambda array: (both.wait(), array)[1])

    seen: list[np.ndarray] = []

    def fail(*_: Any) -> None:
        raise MemoryError("full")

    def put(array: np.ndarray) -> np.ndarray:
        seen.append(array)
        time.sleep(0.05)
        return array

    for failing in ({"put": lambda array: fail(put(array))}, {"put": put, "progress": fail}):
        seen.clear()
        with pytest.raises(MemoryError, match="full"):
            load(tmp_path, expected_of(tensors), **failing)
        assert len(seen) < 20


@pytest.mark.parametrize(("stored", "wanted"), [("", "model."), ("model.", ""), ("transformer.", "model.")])
def test_base_model_prefix_fits_both_ways(tmp_path: Path, stored: str, wanted: str):
    base = {k.removeprefix("model."): v for k, v in random_tensors().items() if k.startswith("model.")}
    write(tmp_path, {stored + name: tensor for name, tensor in base.items()})
    model = {wanted + name: tensor for name, tensor in base.items()}
    assert_same(load(tmp_path, expected_of(model)), {to_path(name): tensor for name, tensor in model.items()})


def test_a_checkpoint_loads_into_the_base_model_and_into_another_head(tmp_path: Path):
    tensors = random_tensors() | {"score.weight": np.ones((3, 8), BF16), "score.bias": np.ones(3, BF16)}
    write(tmp_path, tensors)
    base = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    assert_same(load(tmp_path, expected_of(base)), {to_path(k): v for k, v in base.items()})
    causal = {k: v for k, v in tensors.items() if not k.startswith("score.")}
    assert_same(load(tmp_path, expected_of(causal)), {to_path(k): v for k, v in causal.items()})
    classifier = {k: v for k, v in tensors.items() if k != "lm_head.weight"}
    assert_same(load(tmp_path, expected_of(classifier)), {to_path(k): v for k, v in classifier.items()})


def test_tied_model_takes_a_head_that_repeats_the_embedding(tmp_path: Path):
    tensors = random_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    expected = expected_of({k: v for k, v in tensors.items() if k != "lm_head.weight"})
    params = load(write(tmp_path, tensors), expected)
    assert ("lm_head", "weight") not in params
    with open_checkpoint(tmp_path) as checkpoint:
        assert not has_own_head(checkpoint)


def test_tied_model_refuses_a_head_of_its_own(tmp_path: Path):
    tensors = random_tensors()
    expected = expected_of({k: v for k, v in tensors.items() if k != "lm_head.weight"})
    with pytest.raises(CheckpointError, match=r"unexpected lm_head.weight \[24, 8\]"):
        load(write(tmp_path, tensors), expected)
    with open_checkpoint(tmp_path) as checkpoint:
        assert has_own_head(checkpoint)


def test_transformers_does_not_tie_a_head_of_its_own_either(tmp_path: Path):
    torch = pytest.importorskip("torch", reason="the oracle of tied heads is Transformers")
    transformers = pytest.importorskip("transformers", reason="the oracle of tied heads is Transformers")
    from tests.convert.samples import save_model

    save_model(tmp_path, tied=True, dtype="float32")
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    for shift in (0, 1):
        head = tensors["model.embed_tokens.weight"] + np.float32(shift)
        safetensors.numpy.save_file(
            tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"}
        )
        model = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path)
        with open_checkpoint(tmp_path) as checkpoint:
            assert (
                has_own_head(checkpoint) == (model.lm_head.weight is not model.model.embed_tokens.weight) == bool(shift)
            )
        assert torch.equal(model.lm_head.weight, torch.from_numpy(head))


def test_buffers_of_old_checkpoints_are_left_out(tmp_path: Path):
    tensors = random_tensors()
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    assert_same(load(write(tmp_path, tensors | old), expected_of(tensors)), {to_path(k): v for k, v in tensors.items()})


def test_all_that_does_not_fit_is_listed(tmp_path: Path):
    tensors = random_tensors()
    expected = expected_of(tensors)
    tensors["model.layers.9.extra.weight"] = np.zeros(3, BF16)
    tensors["model.norm.weight"] = np.zeros(9, BF16)
    tensors["model.layers.1.self_attn.q_proj.weight"] = np.zeros((12, 8), np.int32)
    del tensors["model.layers.0.self_attn.q_proj.bias"], tensors["lm_head.weight"]
    with pytest.raises(CheckpointError) as caught:
        load(write(tmp_path, tensors), expected)
    message = str(caught.value)
    assert "\n" not in message
    for problem in (
        "unexpected model.layers.9.extra.weight [3]",
        "model.norm.weight has shape [9], expected [8]",
        "model.layers.1.self_attn.q_proj.weight has dtype int32, supported are float64, float32, float16, bfloat16",
        "missing model.layers.0.self_attn.q_proj.bias [12]",
        "missing lm_head.weight [24, 8]",
    ):
        assert problem in message


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "float31", np.int32])
def test_a_dtype_that_is_not_supported_is_refused(tmp_path: Path, dtype):
    tensors = random_tensors()
    with pytest.raises(CheckpointError, match="is not supported for weights"):
        load(write(tmp_path, tensors), expected_of(tensors), dtype=dtype)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, BF16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_warned_of_by_name(tmp_path: Path, dtype, value: float):
    tensors = random_tensors(dtype)
    tensors["lm_head.weight"][-1, -1] = value
    with pytest.warns(UserWarning, match=r"^lm_head\.weight holds NaN or inf$") as caught:
        load(write(tmp_path, tensors), expected_of(tensors))
    assert len(caught) == 1


def test_finite_extremes_are_not_warned_of(tmp_path: Path):
    tensors = {}
    for dtype in (np.float64, np.float32, np.float16, BF16):
        limit = ml_dtypes.finfo(dtype)
        tensors[f"a.{np.dtype(dtype).name}"] = np.array([limit.max, limit.min, limit.smallest_subnormal, 0], dtype)
    load(write(tmp_path, tensors), {to_path(k): v.shape for k, v in tensors.items()})


def test_a_cast_that_overflows_is_warned_of(tmp_path: Path):
    tensors = {"a.weight": np.array([1e6], np.float32)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(write(tmp_path, tensors), {("a", "weight"): (1,)}, dtype="float16")
    assert [str(w.message) for w in caught] == ["a.weight holds NaN or inf"]
