"""Models on meshes: 8 simulated devices in one process compared with one device and with Transformers."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from flaxqwen import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Qwen2AudioConfig, Qwen2Config, make_mesh
from flaxqwen.auto import param_shapes
from flaxqwen.cli import main
from flaxqwen.convert import open_checkpoint, save_params
from flaxqwen.convert.names import to_name
from flaxqwen.convert.quantize import quantize_rows
from flaxqwen.convert.shards import Counter as Bytes
from flaxqwen.generation import decoding
from flaxqwen.layout import HeadLayout
from flaxqwen.loading import ShardReader, read_part
from flaxqwen.lora.mesh import with_heads
from flaxqwen.ops.lora import Adapter, expand
from flaxqwen.ops.quantized import contract_quantized
from flaxqwen.quantization import quantize_onto
from flaxqwen.sharding import Sharding
from flaxqwen.training import assemble_params
from tests.mesh_worker import (
    ADAPTED,
    ADAPTERS,
    CHUNK,
    DECODING,
    EVERYTHING,
    HEARING,
    LONG,
    MESHES,
    NEW,
    QUANTIZED,
    TRAINED,
)
from tests.models.test_qwen2_audio import CLIPS, config_dict, expanded, older_prompt
from tests.reference import close, padded_mask, random_ids, th, tiny, torch_model

torch = pytest.importorskip("torch", reason="parity tests compare with PyTorch: pip install flaxqwen[test]")

ROOT = Path(__file__).resolve().parents[1]
LAYERS = 2
# 14 query and 2 key/value heads, as Qwen2.5-0.5B: neither divides by 4 or 8.
CONFIG = tiny(
    hidden_size=56, head_dim=8, intermediate_size=96, num_attention_heads=14, num_key_value_heads=2, vocab_size=320,
    num_hidden_layers=LAYERS,
)  # fmt: skip


@pytest.fixture(scope="module")
def worker(tmp_path_factory) -> dict[str, np.ndarray]:
    """The inputs and results of mesh_worker, and Transformers' logits and greedy tokens."""
    folder = tmp_path_factory.mktemp("mesh")
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    theirs = torch_model("Qwen2ForCausalLM", CONFIG, seed=int(rng.integers(2**31)))
    theirs.save_pretrained(folder)
    ids = random_ids(rng, (8, 9), 320)
    mask = padded_mask([9, 7, 9, 4, 9, 9, 5, 8], 9, "left")
    bias = np.where(np.tril(np.ones((9, 9), bool)), rng.normal(size=(8, 14, 9, 9)), -np.inf).astype(np.float32)
    np.savez(folder / "inputs.npz", ids=ids, mask=mask, bias=bias)
    audio = write_audio(folder / "audio", rng)
    command = [sys.executable, "-m", "tests.mesh_worker", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tokens, seen = torch.tensor(ids.astype(np.int64)), torch.tensor(mask)
    with torch.no_grad():
        position_ids = (seen.cumsum(1) - 1).clamp(min=0)
        logits = theirs(tokens, attention_mask=seen, position_ids=position_ids).logits
        greedy = theirs.generate(
            tokens, attention_mask=seen, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    reference = {"theirs/logits": logits.numpy(), "theirs/greedy": greedy.numpy(), "mask": mask, "folder": folder}
    return {**np.load(folder / "results.npz"), **reference, **audio}


def write_audio(folder: Path, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A Qwen2-Audio whose decoder has the heads of CONFIG, four rows with clips, and Transformers' logits for them."""
    import transformers

    values = {name: value for name, value in config_dict().items() if name != "model_type"}
    values["text_config"] = CONFIG | {"max_position_embeddings": 512}
    torch.manual_seed(int(rng.integers(2**31)))
    theirs = transformers.Qwen2AudioForConditionalGeneration(transformers.Qwen2AudioConfig(**values)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(folder)
    rows = expanded(older_prompt(rng, CLIPS[2], "left"))
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask", "input_features", "feature_attention_mask")}
    np.savez(folder / "inputs.npz", **inputs)
    with torch.no_grad():
        logits = theirs(**{name: th(value) for name, value in inputs.items()}).logits
    return {"theirs/heard": logits.numpy(), "heard/mask": inputs["attention_mask"]}


@pytest.mark.parametrize("mesh", MESHES)
def test_logits_and_greedy_tokens(worker, mesh):
    """Logits within 1e-5 of one device's, tokens identical; and nothing compiles twice."""
    close(worker[f"logits/{mesh}"], worker["logits/one"], relative=1e-5)
    close(worker["logits/one"], worker["theirs/logits"], where=worker["mask"] == 1)
    assert (worker[f"greedy/{mesh}"] == worker["greedy/one"]).all()
    assert (worker["greedy/one"] == worker["theirs/greedy"]).all()
    assert worker[f"compiled/{mesh}"] == 0


@pytest.mark.parametrize("mesh", EVERYTHING)
def test_every_kind_of_decoding(worker, mesh):
    """Beams, sampling, processors on the host, a cache that goes on: the tokens of one device."""
    for kind in ("beams", "sampled", "host", "continued"):
        assert (worker[f"{kind}/{mesh}"] == worker[f"{kind}/one"]).all(), kind
    close(worker[f"steps/{mesh}"], worker["steps/one"], relative=1e-5)
    assert (worker[f"loaded/{mesh}"] == worker["greedy/one"]).all(), "programs from a file"


@pytest.mark.parametrize("mesh", ["one", *EVERYTHING])
def test_attention_by_a_kernel(worker, mesh):
    """Each device runs it over its own rows and heads: the plain one's logits, off by rounding."""
    assert worker[f"kernels of splash/{mesh}"]
    assert not worker[f"kernels of xla/{mesh}"]
    for way in ("splash", "blocks"):
        close(worker[f"{way}/{mesh}"], worker["xla/one"], relative=1e-5)


@pytest.mark.parametrize("mesh", EVERYTHING)
def test_heads_show_as_in_the_checkpoint(worker, mesh):
    """Masks and attentions have the checkpoint's 14 heads, and so have saved weights, byte for byte."""
    close(worker[f"biased/{mesh}"], worker["biased/one"], relative=1e-5)
    assert worker[f"attentions/{mesh}"].shape == (LAYERS, 8, 14, 9, 9)
    close(worker[f"attentions/{mesh}"], worker["attentions/one"], relative=1e-5)
    with open_checkpoint(worker["folder"]) as stored, open_checkpoint(worker["folder"] / mesh) as saved:
        assert sorted(stored.tensors) == sorted(saved.tensors)
        for name in stored.tensors:
            assert np.array_equal(stored.read(name), saved.read(name)), name


@pytest.mark.parametrize("mesh", HEARING)
def test_audio(worker, mesh):
    """Qwen2-Audio: logits within 1e-5 of one device's, greedy tokens identical, saved weights the checkpoint's."""
    close(worker["heard/one"], worker["theirs/heard"], where=worker["heard/mask"] == 1)
    close(worker[f"heard/{mesh}"], worker["heard/one"], relative=1e-5, where=worker["heard/mask"] == 1)
    assert (worker[f"answer/{mesh}"] == worker["answer/one"]).all()
    folder = worker["folder"] / "audio"
    stored, saved = (AutoModelForSeq2SeqLM.from_pretrained(path).params for path in (folder, folder / "saved"))
    assert jax.tree.all(jax.tree.map(np.array_equal, stored, saved))


@pytest.mark.parametrize("mesh", ["one", *EVERYTHING])
def test_orbax_restores_onto_another_mesh(worker, mesh):
    """What one mesh has saved, another one (fsdp 4, tensor 2) computes with, and one device has byte for byte."""
    close(worker[f"restored/{mesh}"], worker["logits/one"], relative=1e-5)
    folder = worker["folder"] / mesh / "orbax"
    restored = AutoModelForCausalLM.from_pretrained(folder)
    with open_checkpoint(worker["folder"]) as stored:
        for path, leaf in flax.traverse_util.flatten_dict(restored.params).items():
            assert np.array_equal(stored.read(to_name(path)), leaf), path
    with pytest.raises(ValueError, match=r"does not fit the model: .*missing model.layers.2.mlp.up_proj.weight \[96"):
        AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=3)


CUT = [(scheme, mesh) for scheme, meshes in QUANTIZED.items() for mesh in meshes]


@pytest.mark.parametrize(("scheme", "mesh"), CUT)
def test_quantized_weights(worker, scheme, mesh):
    """Logits within 1e-5 of the same quantized model's on one device, tokens identical.

    Whether quantized before, while they load or when they are drawn: the same integers and scales, bit for bit, in the
    same places, and saved as on one device; of the plain checkpoint each byte is read once, but for repeated biases.
    """
    close(worker[f"logits/{scheme}/{mesh}"], worker[f"logits/{scheme}/one"], relative=1e-5)
    if mesh in DECODING:
        assert (worker[f"greedy/{scheme}/{mesh}"] == worker[f"greedy/{scheme}/one"]).all()
    assert worker[f"same/{scheme}/{mesh}"]
    assert worker[f"read/{scheme}/{mesh}"] == pytest.approx(1, rel=0.01)
    for kind in ("", "drawn-"):
        saved, one = (worker["folder"] / scheme / f"{kind}{name}/flax_model.safetensors" for name in (mesh, "one"))
        assert saved.read_bytes() == one.read_bytes()


@pytest.mark.parametrize("mesh", ADAPTED)
def test_adapters(worker, mesh):
    """Beside the weights, merged and by row as on one device; saved they are what was loaded, drawn what is drawn."""
    for kind in ("plain", "dora"):
        assert np.abs(worker[f"{kind}/one"] - worker["logits/one"]).max() > 0.1 * np.abs(worker["logits/one"]).max()
        close(worker[f"{kind}/{mesh}"], worker[f"{kind}/one"], relative=1e-5)
        close(worker[f"merged-{kind}/{mesh}"], worker[f"{kind}/one"], relative=2e-5)
    close(worker[f"mixed/{mesh}"], worker["mixed/one"], relative=1e-5)
    rows = {"plain": [0, 4, 5], "logits": [1, 6]}  # of each adapter, and of none
    for kind, chosen in rows.items():
        close(worker["mixed/one"][chosen], worker[f"{kind}/one"][chosen], where=worker["mask"][chosen] == 1)
    for kind in ADAPTERS:
        drawn, loaded = (worker["folder"] / name / mesh / kind for name in ("drawn", "loaded"))
        one = worker["folder"] / "drawn/one" / kind / "adapter_model.safetensors"
        assert (loaded / one.name).read_bytes() == one.read_bytes()
        wanted, found = load_file(one), load_file(drawn / one.name)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            close(found[name], value, relative=1e-6)


@pytest.mark.parametrize("mesh", TRAINED)
def test_training(worker, mesh):
    """Losses and gradients of one device, and after 4 steps its parameters: copies of heads have stayed alike."""
    assert (np.diff(worker["losses/one"]) < 0).all()
    np.testing.assert_allclose(worker[f"losses/{mesh}"], worker["losses/one"], rtol=1e-5)
    for kind in ("gradient", "trained"):
        names = [name for name in worker if name.startswith(kind) and name.endswith("/one")]
        assert len(names) == 12 * LAYERS + 3
        for name in names:
            close(worker[name.replace("/one", f"/{mesh}")], worker[name], relative=1e-5)
    assert worker["logits/tokens/one"] == CHUNK
    assert worker[f"logits/tokens/{mesh}"] == CHUNK / MESHES[mesh][0], "a chunk has tokens of every device"


def test_parameters_with_the_heads_of_a_mesh_are_not_trained():
    config = Qwen2Config.from_dict(CONFIG)
    module = AutoModelForCausalLM.module_of(config, mesh=make_mesh(devices=jax.devices()[:1]))
    sharding = dataclasses.replace(module.sharding, heads=HeadLayout.fit(config, 4))
    module = module.clone(sharding=sharding, config=sharding.heads.replace_in(config))
    params = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    message = r"k_proj.bias is \[32\], the checkpoint's has 16 in that place: .* give sharding.undo_heads"
    with pytest.raises(ValueError, match=message):
        assemble_params(module)({"params": params}, {})


STEPS, _ = decoding.CHUNK["cpu"]  # of a program
STATE = ("s32[8,512]", "pred[8,512]", f"s32[{STEPS},8]", f"pred[{STEPS},8]")
OPERATIONS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
COLLECTIVE = re.compile(rf"= (\S+|\([^()]*\)) ({OPERATIONS})(?:-start)?\(")


@pytest.mark.parametrize("mesh", DECODING)
def test_collectives_of_decoding(worker, mesh):
    """Two all-reduces a layer, [56, rows] on a CPU, and one of the embedding; of the rest none is of hidden size."""
    found = Counter((op, shape.split("{")[0]) for shape, op in COLLECTIVE.findall(str(worker[f"hlo/{mesh}"])))
    rows = 8 // MESHES[mesh][0]
    assert found.pop(("all-reduce", f"f32[56,{rows}]")) == 2 * LAYERS
    assert found.pop(("all-reduce", f"f32[{rows},1,56]")) == 1
    assert_small(found)


@pytest.mark.parametrize(("scheme", "mesh"), [("int8", "1x8"), ("int4", "2x4")])
def test_collectives_of_quantized_decoding(worker, scheme, mesh):
    """As many. On a CPU int8 is multiplied as three digits, and int4's even and odd channels are reduced at once."""
    found = Counter()
    for shape, op in COLLECTIVE.findall(str(worker[f"hlo/{scheme}/{mesh}"])):
        found[op, re.sub(r"\{[\d,]*\}", "", shape)] += 1
    rows = 8 // MESHES[mesh][0]
    whole = {"int8": f"s32[3,{rows},56]", "int4": f"(f32[{rows},1,56], f32[{rows},1,56])"}[scheme]
    assert found.pop(("all-reduce", whole)) == 2 * LAYERS
    assert found.pop(("all-reduce", f"s8[{rows},1,56]")) == 1
    assert_small(found)


def test_a_long_context_is_shared_out(worker):
    """The KV cache cut by slots: tokens of one device, and of a layer's collectives besides none is of hidden size."""
    assert (worker[f"long/{LONG}"] == worker["long/one"]).all()
    assert set(worker[f"places/{LONG}"]) == {"data"}
    found = Counter()
    for shape, op in COLLECTIVE.findall(str(worker[f"long-hlo/{LONG}"])):
        found[op, re.sub(r"\{[\d,]*\}", "", shape)] += 1
    assert found.pop(("all-reduce", "f32[1,1,56]")) == 2 * LAYERS + 1
    assert found.pop(("all-reduce", "f32[1,1,7,1,8]")) == LAYERS  # of half of the heads, each of 8
    assert found.pop(("all-reduce", "f32[1,1,7,1]")) == 2 * LAYERS  # largest scores, and sums
    assert_small(found)


def assert_small(found: Counter) -> None:
    """No collective is larger than a number for each row, but for those of the rows' tokens."""
    for op, shape in (key for key in found if not key[1].startswith(STATE)):
        sizes = [int(n) for n in re.findall(r"\d+", shape.split("[")[1])]
        assert np.prod(sizes) <= 8, (op, shape)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "parts", "padded", "repeated"),
    [
        (14, 2, 2, 14, 2), (14, 2, 4, 16, 4), (14, 2, 8, 16, 8), (14, 2, 16, 16, 16),  # 0.5B
        (12, 2, 4, 12, 4), (12, 2, 8, 16, 8),  # 1.5B
        (16, 2, 16, 16, 16),  # 3B
        (28, 4, 4, 28, 4), (28, 4, 8, 32, 8), (28, 4, 16, 32, 16),  # 7B
        (40, 8, 16, 48, 16),  # 14B and 32B
        (64, 8, 16, 64, 16),  # 72B
        (6, 3, 2, 6, 6), (6, 3, 1, 6, 3),
    ],
)  # fmt: skip
def test_head_layout(rng, heads, kv_heads, parts, padded, repeated):
    """Each device has whole groups; every query head keeps its key/value head; the inverse gives it back."""
    H, D = 4, 8
    config = Qwen2Config(
        hidden_size=D, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=H, num_hidden_layers=1
    )
    layout = HeadLayout.fit(config, parts)
    assert (len(layout.queries), len(layout.keys)) == (padded, repeated)
    assert padded % repeated == 0
    assert repeated % parts == 0
    assert [layout.queries[place] for place in layout.own_queries] == list(range(heads))
    for place, head in enumerate(layout.queries):
        if head >= 0:
            assert layout.keys[place // (padded // repeated)] == head // (heads // kv_heads)
    laid = layout.replace_in(config)
    assert (laid.num_attention_heads, laid.num_key_value_heads, laid.head_dim) == (padded, repeated, H)
    for owner, shape in {"q_proj": (heads * H, D), "k_proj": (kv_heads * H, D), "o_proj": (D, heads * H)}.items():
        weight = rng.normal(size=shape).astype(np.float32)
        path = ("self_attn", owner, "weight")
        source = layout.source(path, shape)
        moved = weight if source is None else source.apply(jnp.asarray(weight))
        assert layout.stored_shape(path, moved.shape) == shape
        assert np.array_equal(moved if source is None else source.undo(moved), weight)
        if owner == "o_proj":
            columns = np.asarray(moved).reshape(D, padded, H)
            zero = [place for place, head in enumerate(layout.queries) if head < 0]
            assert not columns[:, zero].any()


@pytest.mark.parametrize("owner", ["q_proj", "k_proj", "o_proj", "up_proj"])
def test_adapters_have_the_heads_of_a_mesh(rng, owner):
    """A layer's output with its adapter's, heads moved: that with the heads of the adapter moved."""
    layout = HeadLayout.fit(Qwen2Config.from_dict(CONFIG), 4)
    layer = ("model", "layers_0", "self_attn", owner)
    out, width = {"q_proj": (112, 56), "k_proj": (16, 56), "o_proj": (56, 112), "up_proj": (96, 56)}[owner]
    shapes = {"A": (4, width), "B": (out, 4), "bias": (out,), "gain": (out,)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    adapter, x = Adapter(scaling=np.float32(0.5), **arrays), rng.normal(size=(2, 3, width)).astype(np.float32)

    def run(adapter, x):
        return adapter.gain * expand(adapter, x @ adapter.A.T)

    source = layout.source((*layer, "weight"), (out, width))
    into, onto = (source, None) if owner == "o_proj" else (None, source and layout.source((*layer, "bias"), (out,)))
    x, want = (a if s is None else s.apply(jnp.asarray(a)) for a, s in ((x, into), (run(adapter, x), onto)))
    close(run(with_heads(layout, layer, adapter), x), want, relative=1e-6)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize(("heads", "parts"), [(14, 4), (4, 8)])  # in int4's groups of 2 heads, and all in one
def test_quantized_columns_of_padded_heads(rng, scheme, heads, parts):
    """What padded heads give goes nowhere; the others are multiplied as in the checkpoint."""
    config = Qwen2Config.from_dict(CONFIG | {"num_attention_heads": heads})
    layout = HeadLayout.fit(config, parts)
    sharding = dataclasses.replace(Sharding.fit(make_mesh(devices=jax.devices()[:1]), config), heads=layout)
    weight = rng.normal(size=(56, heads * 8)).astype(np.float32)
    values, scale = quantize_onto(sharding, ("self_attn", "o_proj", "weight"), jnp.asarray(weight), scheme).values()
    x = rng.normal(size=(3, len(layout.queries), 8)).astype(np.float32)
    assert layout.is_padded
    found = contract_quantized(jnp.asarray(x.reshape(3, -1)), values, scale)
    own = jnp.asarray(x[:, layout.own_queries].reshape(3, -1))
    close(found, contract_quantized(own, *map(jnp.asarray, quantize_rows(weight, scheme))), relative=1e-6)


def test_parts_of_a_checkpoint(rng, tmp_path):
    """Any box of any tensor in the layout of a mesh, from the file: the values, and the bytes that they have there."""
    layout = HeadLayout.fit(Qwen2Config.from_dict(CONFIG), 4)
    names = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "v_proj.bias", "o_proj.weight", "down_proj.weight")
    shapes = ((112, 56), (112,), (16, 56), (16,), (56, 112), (56, 96))
    stored = {  # no value twice
        f"self_attn.{name}": 1 + rng.permutation(np.prod(shape)).reshape(shape).astype(np.float32)
        for name, shape in zip(names, shapes, strict=True)
    }
    for layout_on_disk in ("checkpoint", "linen"):
        folder = tmp_path / layout_on_disk
        save_params(stored, folder, to="flax", layout=layout_on_disk)
        with open_checkpoint(folder) as checkpoint:
            for name, value in stored.items():
                path = tuple(name.split("."))
                source = layout.source(path, value.shape)
                whole = value if source is None else np.asarray(source.apply(jnp.asarray(value)))
                for step in (1, 8) * 10:
                    ends = (sorted(rng.choice(size // step + 1, 2, replace=False)) for size in whole.shape)
                    box = tuple((int(first) * step, int(last) * step) for first, last in ends)
                    wanted = whole[tuple(slice(*ends) for ends in box)]
                    counter = Bytes()
                    part = read_part(checkpoint.tensors[name], box, source, counter)
                    assert np.array_equal(part, wanted)
                    if step == 8:  # whole heads: each is read once
                        assert counter.nbytes == np.unique(wanted[wanted != 0]).size * 4


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_host_memory_of_loading(tmp_path, dtype):
    """A shard of 8 MB takes less than twice that on the way to its device, heads put in place and cast included."""
    values = {
        "q_proj.weight": np.ones((14 * 8 * 128, 128), np.float32),
        "o_proj.weight": np.ones((128, 14 * 1024), "f"),
    }
    save_params({f"self_attn.{name}": value for name, value in values.items()}, tmp_path)
    config = Qwen2Config.from_dict(CONFIG | {"head_dim": 1024})
    sharding = dataclasses.replace(
        Sharding.fit(make_mesh(devices=jax.devices()[:1]), config), heads=HeadLayout.fit(config, 4)
    )
    shapes = {("self_attn", "q_proj", "weight"): (16384, 128), ("self_attn", "o_proj", "weight"): (128, 16384)}
    for path, shape in shapes.items():
        with open_checkpoint(tmp_path) as checkpoint:
            tracemalloc.start()
            tensor, reader = checkpoint.tensors[to_name(path)], ShardReader(sharding, np.dtype(dtype))
            array = reader._array(path, tensor, sharding.heads.source(path, tensor.shape), np.dtype(dtype))
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert array.shape == shape
        assert peak < 2 * 16384 * 128 * 4


def test_every_parameter_has_a_rule():
    """On a mesh that divides all axes, each weight is cut along it; norms are whole."""
    device = jax.devices()[0]
    sharding = Sharding.fit(make_mesh(devices=[device]), Qwen2Config.from_dict(CONFIG))
    for path, shape in param_shapes(AutoModelForCausalLM.module_of(Qwen2Config.from_dict(CONFIG))).items():
        spec = sharding.of_parameter(path, shape).spec
        assert "tensor" in spec or path[-2].endswith("norm"), path
    audio = AutoModelForSeq2SeqLM.module_of(Qwen2AudioConfig.from_dict(config_dict()))
    for path, shape in param_shapes(audio).items():
        assert sharding.of_parameter(path, shape).shard_shape(shape) == shape, path
    with pytest.raises(ValueError, match=r"model.gate.weight \[4, 4\]: no rule in flaxqwen.sharding.PARAMETER_RULES"):
        sharding.of_parameter(("model", "gate", "weight"), (4, 4))


def test_what_is_refused():
    config = Qwen2Config.from_dict(CONFIG)
    mesh = make_mesh(devices=jax.devices()[:1])
    assert mesh.shape == {"data": 1, "fsdp": 1, "tensor": 1}
    with pytest.raises(ValueError, match="does not make up 1 devices"):
        make_mesh(3, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="one of them may be -1"):
        make_mesh(-1, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="'heds' is no logical axis"):
        AutoModelForCausalLM.from_config(config, mesh=mesh, mesh_axes={"heds": ()})
    with pytest.raises(ValueError, match="axis 'model', of 'heads', is not in the mesh"):
        AutoModelForCausalLM.from_config(config, mesh=mesh, mesh_axes={"heads": ("model",)})


def test_info_shows_the_mesh(tmp_path, capsys):
    """Qwen2.5-7B on tensor=8: what is padded and repeated, and the bytes of a device."""
    values = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
    values |= {"num_attention_heads": 28, "num_key_value_heads": 4, "torch_dtype": "bfloat16", "model_type": "qwen2"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert main(["info", str(tmp_path), "--mesh", "tensor=8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["mesh"]
    assert found["query_heads"] == [28, 32]
    assert found["key_value_heads"] == [4, 8]
    attention = 4096 * 3584 * 2 + 1024 * 3584 * 2 + 4096 + 2 * 1024
    layer = (attention + 3 * 18944 * 3584) / 8 + 2 * 3584
    assert found["bytes_per_device"] == 2 * (28 * layer + 2 * 152064 * 3584 / 8 + 3584)
    assert main(["info", str(tmp_path), "--mesh", "tensor=8"]) == 0
    text = capsys.readouterr().out
    assert "heads: 28 padded to 32, key/value 4 repeated to 8" in text
    assert "model.layers.*.self_attn.o_proj.weight" in text
    # int4: a scale of each head of o_proj, and of 64 of down_proj's channels, as 18,944 / 8 are no multiple of 128.
    values["quantization_config"] = {"quant_method": "flaxqwen", "weights": "int4"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert main(["info", str(tmp_path), "--mesh", "tensor=8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["mesh"]
    weights = (4096 + 2 * 1024) * 3584 + 3584 * 4096 + 3 * 18944 * 3584
    scales = (4096 + 2 * 1024) * 28 + 3584 * 32 + 2 * 18944 * 28 + 3584 * 296
    layer = (weights / 2 + 4 * scales + 2 * (4096 + 2 * 1024)) / 8 + 2 * 2 * 3584
    embedding, head = 152064 * 3584 / 8 + 4 * 152064, 152064 * (3584 + 4) / 8
    assert found["bytes_per_device"] == 28 * layer + embedding + head + 2 * 3584
    assert main(["info", str(tmp_path), "--mesh", "tensor=-1"]) == 2
    assert "give the sizes of the mesh, none of them -1" in capsys.readouterr().err
