"""Weight-only quantization: the format against its description, models against PyTorch with the dequantized weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from flaxqwen import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen2Config
from flaxqwen.auto import param_shapes
from flaxqwen.cli import main
from flaxqwen.convert import CheckpointError, convert, open_checkpoint, to_path
from flaxqwen.convert.load import read_array
from flaxqwen.convert.memory import WeightMemory
from flaxqwen.convert.quantize import dequantized, quantize_rows, quantized
from flaxqwen.generation import loop
from flaxqwen.generation.inputs import Inputs, make_prompt
from flaxqwen.generation.sampling import TokenChoice
from flaxqwen.ops import quantized as ops
from flaxqwen.quantization import quantize_weight
from tests.reference import close, random_ids, th, tiny, torch, torch_model

SCHEMES = ("int8", "int4")
LARGEST = {"int8": 127, "int4": 7}


def oracle(weight: np.ndarray, scheme: str) -> tuple[np.ndarray, np.ndarray]:
    """Each weight as it is stored, and half the scale it is stored with: value by value, in float64."""
    rounded, bound = np.zeros(weight.shape), np.zeros(weight.shape)
    width = weight.shape[1]
    group = width if scheme == "int8" else next(g for g in (128, 64, 32, 16, 8, 4, 2) if width % g == 0)
    for row in range(len(weight)):
        for start in range(0, width, group):
            place = (row, slice(start, start + group))
            values = weight[place].astype(np.float64)
            scale = np.abs(values).max() / LARGEST[scheme] or 1.0
            rounded[place], bound[place] = np.round(values / scale) * scale, scale / 2
    return rounded, bound


def kind_of(name: str, scheme: str) -> str | None:
    """How a tensor of a checkpoint is stored, by its name."""
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return "int8"
    return scheme if name.endswith("_proj.weight") else None


def decode(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """A weight of a quantized file, by the format's description."""
    stored, scale = tensors[name], tensors[name + "_scale"]
    values = integers = stored.astype(np.int64)
    if stored.dtype == np.uint8:
        values = np.empty((len(stored), 2 * stored.shape[1]), np.int64)
        for column in range(stored.shape[1]):
            values[:, 2 * column] = integers[:, column] % 16 - 8
            values[:, 2 * column + 1] = integers[:, column] // 16 - 8
    return values * np.repeat(scale.astype(np.float64), values.shape[1] // scale.shape[1], axis=1)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("xp", [np, jnp])
def test_no_weight_is_off_by_more_than_half_a_scale(rng: np.random.Generator, scheme: str, xp: Any):
    weight = (rng.standard_normal((5, 384)) * np.exp(rng.standard_normal((5, 1)))).astype(np.float32)
    weight[2] = 0
    values, scale = map(np.asarray, quantize_rows(xp.asarray(weight), scheme, xp))
    got = decode({"w": values, "w_scale": scale}, "w")
    want, bound = oracle(weight, scheme)
    assert (np.abs(got - weight) <= bound * (1 + 1e-5)).all()
    # A weight half-way between two integers may go to either: the scale is float32, the oracle's float64.
    assert (np.abs(got - want) <= 1e-6 * np.abs(weight).max()).mean() > 0.995


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_device_rounds_as_the_converter(rng: np.random.Generator, scheme: str):
    """Bit for bit, of weights that lie half-way between two integers, or next to it; of the tiniest too."""
    largest, steps = {"int8": 127, "int4": 7}[scheme], rng.uniform(0.01, 0.02, (64, 1))
    weight = (rng.integers(-largest, largest, (64, 1024)) + 0.5) * steps
    weight[:, ::64] = largest * steps  # the largest of each row, or group
    weight = np.nextafter(weight.astype(np.float32), rng.choice(np.float32([-9, 9]), weight.shape))
    weight[:16] = rng.standard_normal((16, 1024)) * 10.0 ** rng.uniform(-44, -30, (16, 1))
    for ours, theirs in zip(quantize_weight(jnp.asarray(weight), scheme), quantize_rows(weight, scheme), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("rows", "amx"), [(1, True), (1, False), (3, True)])
def test_contractions(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, scheme: str, dtype: Any, rows: int, amx: bool
):
    """Within float32 rounding of the dequantized product (bfloat16: of the result's), past the fused length too.

    A sum in sequence, as XLA's loops without optimisation take it, is off by half a rounding of |x| |w| and in 1 of
    1,500 by 1.5: a bound on the result itself failed once in some 50 runs.
    """
    monkeypatch.setattr(ops, "HAS_AMX", amx)
    width = 4864 if rows == 1 else 256
    weight = rng.standard_normal((24, width)).astype(np.float32)
    x = jnp.asarray(rng.standard_normal((rows, 1, width)), dtype)
    values, scale = quantize_rows(weight, scheme)
    got = np.asarray(jax.jit(lambda *inputs: ops.contract_quantized(*inputs))(x, values, scale), np.float64)
    exact_x, exact_weight = np.asarray(x, np.float64), decode({"w": values, "w_scale": scale}, "w").T
    want = exact_x @ exact_weight
    wide = dtype == jnp.bfloat16 and scheme == "int4" and rows > 1  # the weight itself is rounded to bfloat16
    if dtype == jnp.float32:
        assert (np.abs(got - want) <= 4 * 2**-24 * (np.abs(exact_x) @ np.abs(exact_weight))).all()
    else:
        assert np.abs(got - want).max() <= (2**-7 if wide else 2**-8 * 1.01) * np.abs(want).max()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint of Transformers with a tied head."""
    folder = tmp_path_factory.mktemp("plain")
    torch_model("Qwen2ForCausalLM", tiny(tie_word_embeddings=True)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=SCHEMES)
def stored(request: pytest.FixtureRequest, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(scheme, the checkpoint through `flaxqwen convert --quantize`)."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    assert main(["convert", str(plain), str(folder), "--quantize", request.param]) == 0
    return request.param, folder


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_prefill_widens_one_weight_at_a_time(scheme: str):
    """On a CPU a product of many rows is of a wide copy of the weight: not even a layer's are there at once."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12, "vocab_size": 500}
    config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config, dtype="bfloat16", quantize=scheme)
    prompt = make_prompt(Inputs(np.ones((1, 64), np.int32), np.ones((1, 64), bool)), 64, 128)
    choice = TokenChoice((), np.zeros(1, np.int32), np.int32(0), np.uint32(0))
    call = {"capacity": 128, "cache_dtype": np.dtype("float32"), "copies": 1, "keep_scores": False}
    lowered = loop.prefill.lower(model.module, model.variables, prompt, choice, None, **call, keep_logits=False)
    shapes = param_shapes(model.module).items()
    wide = sum(2 * np.prod(shape) for path, shape in shapes if path[-1] == "weight" and path[-2].endswith("_proj"))
    assert lowered.compile().memory_analysis().temp_size_in_bytes < wide / 12  # a layer's


def test_a_quantized_checkpoint_is_what_the_format_says(plain: Path, stored: tuple[str, Path]):
    scheme, folder = stored
    source = safetensors.numpy.load_file(plain / "model.safetensors")
    found = {
        name.replace("/", ".").replace("layers_", "layers."): array
        for name, array in safetensors.numpy.load_file(folder / "flax_model.safetensors").items()
    }
    kinds = {name: kind_of(name, scheme) for name in source}
    assert set(found) == set(source) | {name + "_scale" for name, kind in kinds.items() if kind}
    for name, kind in kinds.items():
        if kind is None:
            np.testing.assert_array_equal(found[name], source[name])
            continue
        assert found[name].nbytes == source[name].size // (2 if kind == "int4" else 1)
        assert (np.abs(decode(found, name) - source[name]) <= oracle(source[name], kind)[1] * (1 + 1e-5)).all()
    assert json.loads((folder / "config.json").read_text())["quantization_config"] == {
        "quant_method": "flaxqwen",
        "weights": scheme,
    }


def test_models_compute_with_the_dequantized_weights(plain: Path, stored: tuple[str, Path], rng: np.random.Generator):
    """Quantized on load or before: the same parameters, and PyTorch's logits of those weights."""
    import transformers

    scheme, folder = stored
    ours = AutoModelForCausalLM.from_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(plain, quantize=scheme)
    assert loaded.config.quantization_config == ours.config.quantization_config
    jax.tree.map(np.testing.assert_array_equal, ours.params, loaded.params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(plain, attn_implementation="eager")
    assert ours.num_parameters() == theirs.num_parameters()
    assert (ours.dtype, loaded.dtype) == (np.dtype(np.float32),) * 2
    flat = {
        ".".join(path): np.asarray(leaf)
        for path, leaf in (
            (tuple(key.key for key in path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(ours.params)
        )
    }
    state = theirs.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            path = ".".join(to_path(name))
            if path + "_scale" in flat:
                tensor.copy_(torch.from_numpy(decode(flat, path)))
    ids = random_ids(rng, (2, 9), theirs.config.vocab_size)
    close(ours(ids).logits, theirs(th(ids)).logits)
    for rows in (2, 1):  # one row takes the fused form
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        got = ours.generate(ids[:rows], return_dict_in_generate=True, output_logits=True, **options)
        close(np.stack(got.logits, axis=1), theirs(th(got.sequences)).logits[:, 8:-1])


def test_saving_keeps_every_byte(stored: tuple[str, Path], tmp_path: Path):
    _, folder = stored
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")
    same = (tmp_path / "saved" / "flax_model.safetensors").read_bytes()
    assert same == (folder / "flax_model.safetensors").read_bytes()
    assert main(["convert", str(folder), str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "flax_model.safetensors").read_bytes() == same
    with pytest.raises(ValueError, match="does not read our quantized weights"):
        model.save_pretrained(tmp_path / "torch", to="pytorch")
    with pytest.raises(ValueError, match="orbax checkpoints are of plain weights"):
        model.save_pretrained(tmp_path / "orbax", to="orbax")
    with pytest.raises(ValueError, match="quantized already, to int"):
        AutoModelForCausalLM.from_pretrained(folder, quantize="int8")


def test_back_to_pytorch(plain: Path, stored: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Only with a dtype to go to; the weights are then the dequantized ones, and Transformers loads them."""
    import transformers

    scheme, folder = stored
    assert main(["convert", str(folder), str(tmp_path / "a"), "--to", "pytorch"]) == 2
    assert "give the dtype to bring them back to" in capsys.readouterr().err
    assert main(["convert", str(folder), str(tmp_path / "a"), "--quantize", scheme]) == 2
    assert "quantized already" in capsys.readouterr().err
    assert main(["convert", str(folder), str(tmp_path / "b"), "--to", "pytorch", "--dtype", "float32"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    source = safetensors.numpy.load_file(plain / "model.safetensors")
    for name, tensor in model.state_dict().items():
        kind = kind_of(name, scheme)
        weight = source.get(name, source["model.embed_tokens.weight"])
        bound = oracle(weight, kind)[1] * (1 + 1e-5) if kind else 0
        assert (np.abs(tensor.numpy() - weight) <= bound).all(), name


def test_parity_and_info(stored: tuple[str, Path], capsys: pytest.CaptureFixture[str]):
    scheme, folder = stored
    assert main(["info", str(folder), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    tensors = safetensors.numpy.load_file(folder / "flax_model.safetensors")
    assert info["weight_bytes"] == sum(array.nbytes for array in tensors.values())
    assert info["quantized_to"] == scheme
    assert main(["parity", str(folder), "--steps", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]


def test_a_new_head_is_not_quantized(plain: Path):
    with pytest.warns(UserWarning, match="newly initialised"):
        model = AutoModelForSequenceClassification.from_pretrained(plain, quantize="int8", dtype="bfloat16")
    assert model.params["score"]["weight"].dtype == jnp.bfloat16
    assert model.params["model"]["layers_0"]["mlp"]["up_proj"]["weight"].dtype == jnp.int8
    assert model.params["model"]["layers_0"]["mlp"]["up_proj"]["weight_scale"].dtype == jnp.float32
    assert model.dtype == model(np.ones((1, 3), int)).logits.dtype == jnp.bfloat16


def test_weights_in_pieces_and_back(tmp_path: Path, rng: np.random.Generator):
    """Rows that straddle the chunks in which files are read: 2.6 MB of bfloat16 in rows of 1,280 values."""
    weight, memory = rng.standard_normal((1024, 1280)).astype(ml_dtypes.bfloat16), WeightMemory()
    safetensors.numpy.save_file({"a_proj.weight": weight}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        for scheme in SCHEMES:
            tensors = quantized(checkpoint.tensors, scheme)
            arrays = {name: read_array(name, tensor, memory) for name, tensor in tensors.items()}
            values, scale = quantize_rows(weight.astype(np.float32), scheme)
            np.testing.assert_array_equal(arrays["a_proj.weight"], values)
            np.testing.assert_array_equal(arrays["a_proj.weight_scale"], scale)
            (back,) = dequantized(tensors).values()
            want = decode(arrays, "a_proj.weight").astype(np.float32)
            np.testing.assert_allclose(read_array("a_proj.weight", back, memory), want, rtol=1e-6)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_msgpack(plain: Path, tmp_path: Path, scheme: str):
    convert(plain, tmp_path / "msgpack", quantize=scheme, format="msgpack")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "msgpack")
    made = AutoModelForCausalLM.from_pretrained(plain, quantize=scheme)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded.params, made.params))


def test_what_cannot_be_quantized_is_refused(plain: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"quantize='int2' is not supported; expected one of int8, int4"):
        AutoModelForCausalLM.from_pretrained(plain, quantize="int2")
    for options in ({"to": "pytorch"}, {"layout": "linen"}):
        with pytest.raises(ValueError, match="quantized weights are in Flax's format"):
            convert(plain, tmp_path / "a", quantize="int8", **options)
    safetensors.numpy.save_file({"a_proj.weight": np.ones((2, 3), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        convert(tmp_path, tmp_path / "a", quantize="int8")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a_proj\.weight has 3 input channels: int4 needs an even number"):
        convert(tmp_path, tmp_path / "a", quantize="int4")
    safetensors.numpy.save_file({"a_proj.weight": np.ones((2, 3), np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"a_proj\.weight is int8"):
        convert(tmp_path, tmp_path / "a")
