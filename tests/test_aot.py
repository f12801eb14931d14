"""Compiling for TPUs without one: what libtpu's compiler says of a tiny model and of Qwen2.5-7B's real geometry."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import jax
import pytest

from flaxqwen import Qwen2AudioConfig, Qwen2Config, aot, make_mesh
from flaxqwen.aot_training import compile_training
from flaxqwen.cli import main
from flaxqwen.config import config_from_file
from flaxqwen.ops.dispatch import Attention

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install 'flaxqwen[tpu]'"
)
TINY = {
    "model_type": "qwen2", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024,
    "torch_dtype": "bfloat16",
}  # fmt: skip


@needs_libtpu
def test_7b_decodes_on_one_chip(shared):
    """Batch 1, cache of 8,192: fits, 64 MB of temporaries at most, the cache in place, and no copy of a weight."""
    config = config_from_file(shared / "data" / "configs" / "Qwen2.5-7B")
    assert isinstance(config, Qwen2Config)
    chip, mesh = aot.topology_mesh("v6e:2x2", tensor=1)
    made = aot.plan(config, chip, mesh, batch=1, context=8192)
    found = aot.compile_decode(made)
    cache = 28 * 2 * 4 * 8192 * 128 * 2
    assert found.fits
    assert found.temporaries <= 64e6
    assert found.aliased >= cache
    assert found.copies == found.collectives == {}
    assert found.arguments == pytest.approx(7_615_616_512 * 2 + cache, rel=1e-4)
    # Its lower bound: the weights, but for the table that is looked up, and the cache, at 1.64 TB/s.
    assert found.step_seconds == pytest.approx((2 * (7_615_616_512 - 152_064 * 3_584) + cache) / 1.64e12, rel=1e-3)
    assert found.bound == "HBM"


@needs_libtpu
def test_the_cache_is_a_pool_of_pages_as_it_lies(shared, monkeypatch):
    """7B by JAX's paged attention: a kernel in every layer, keys and values in place, and none of them copied."""
    config = config_from_file(shared / "data" / "configs" / "Qwen2.5-7B")
    chip, mesh = aot.topology_mesh("v6e:2x2", tensor=1)
    made, texts = aot.plan(config, chip, mesh, batch=8, context=8192), []
    operations = aot.operations
    monkeypatch.setattr(aot, "operations", lambda text, hidden: (texts.append(text), operations(text, hidden))[1])
    paged = dataclasses.replace(made, module=made.module.clone(attention=Attention(decode="paged")))
    kernel = aot.compile_decode(paged)
    assert texts[0].count('custom_call_target="tpu_custom_call"') == config.num_hidden_layers
    assert kernel.fits
    assert kernel.aliased >= 8 * 28 * 2 * 4 * 8192 * 128 * 2
    assert kernel.copies == {}
    assert kernel.temporaries <= 64e6


@needs_libtpu
def test_a_long_context_is_its_cache(shared):
    """7B at 32,768 tokens, four times 8,192: beside keys and values nothing grows that is a hundredth of them."""
    config = config_from_file(shared / "data" / "configs" / "Qwen2.5-7B")
    chip, mesh = aot.topology_mesh("v6e:2x2", tensor=1)
    short, long = (aot.plan(config, chip, mesh, batch=1, context=context) for context in (8192, 32768))
    cache = 28 * 2 * 4 * 32768 * 128 * 2
    for compile_phase in (aot.compile_decode, aot.compile_prefill):
        before, found = compile_phase(short), compile_phase(long)
        assert found.fits
        assert found.aliased >= cache
        assert found.arguments - before.arguments == pytest.approx(cache * 3 / 4, rel=1e-3)
        assert found.temporaries <= before.temporaries + cache / 100


@needs_libtpu
def test_collectives_of_tensor_parallel_decoding():
    """14 query and 2 key/value heads on 8 chips: two all-reduces a layer and one of the embedding."""
    chip, mesh = aot.topology_mesh("v5e:2x4")
    found = aot.compile_decode(aot.plan(Qwen2Config.from_dict(TINY), chip, mesh, batch=4, context=512))
    assert found.collectives is not None
    assert found.small is not None
    assert {name: number for name, (number, _) in found.collectives.items()} == {"all-reduce": 2 * 3 + 1}
    assert sum(size for _, size in found.small.values()) <= 64
    assert found.copies == {}


@needs_libtpu
@pytest.mark.parametrize("tensor", [1, 2])
def test_scores_of_prefill_stay_on_the_chip(tensor):
    """By default: 1,024 tokens over 8,192 slots have 470 MB of scores, of 14 heads, which only the plain one keeps."""
    heads = {"num_attention_heads": 14 * tensor, "num_key_value_heads": 2 * tensor}  # a chip has as many either way
    config = Qwen2Config.from_dict(TINY | heads | {"max_position_embeddings": 8192, "num_hidden_layers": 1})
    chip, mesh = aot.topology_mesh("v6e:2x2", tensor=tensor)
    made = aot.plan(config, chip, mesh, batch=1, context=8192)
    assert made.module.attention == Attention(prefill="splash")
    plain = dataclasses.replace(made, module=made.module.clone(attention=Attention()))
    scores = 14 * 1024 * 8192 * 4
    assert aot.compile_prefill(plain).temporaries >= scores
    assert aot.compile_prefill(made).temporaries <= scores / 8


def test_a_quantized_model_is_refused():
    """Compiled as if it was not, it would have other bytes."""
    values = TINY | {"quantization_config": {"quant_method": "flaxqwen", "weights": "int8"}}
    config = Qwen2Config.from_dict(values)
    mesh = make_mesh(devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="compile is of plain weights"):
        aot.plan(config, aot.CHIPS["v5e"], mesh, batch=1, context=64)
    with pytest.raises(ValueError, match="compile is of plain weights"):
        compile_training(config, aot.CHIPS["v5e"], mesh, rows=1, tokens=64)


@needs_libtpu
def test_audio_on_one_chip():
    """The tower's weights count in all programs; prefill and decoding do not take them as arguments."""
    encoder = {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 512, "d_model": 256}
    config = {"model_type": "qwen2_audio", "audio_config": encoder, "text_config": TINY, "torch_dtype": "bfloat16"}
    arguments = {"topology": "v6e:2x2", "batch": 1, "context": 512}
    found = aot.report(Qwen2AudioConfig.from_dict(config), mesh_sizes={"tensor": 1}, **arguments)
    text = aot.report(Qwen2Config.from_dict(TINY), mesh_sizes={"tensor": 1}, **arguments)
    tower = 2 * (2 * (4 * 256**2 + 2 * 256 * 512) + 3 * (128 + 256) * 256 + 1500 * 256 + 256 * 256)  # but for vectors
    assert found["weight_bytes"] - text["weight_bytes"] == pytest.approx(tower, rel=0.01)
    assert found["decode"]["arguments"] == pytest.approx(text["decode"]["arguments"], rel=1e-3)
    vectors = 2 * 750 * 256 * 2
    assert found["prefill"]["arguments"] - text["prefill"]["arguments"] == pytest.approx(vectors, rel=0.02)
    assert found["encoder"]["outputs"] == pytest.approx(vectors, rel=0.02)
    assert found["encoder"]["fits"]
    assert found["encoder"]["step_seconds"] > 2 * 4 * 1500**2 * 256 * 2 / 918e12
    two = aot.report(Qwen2AudioConfig.from_dict(config), mesh_sizes={"tensor": 2}, **arguments)
    matrices = 2 * 2 * (4 * 256**2 + 2 * 256 * 512)  # of the tower's layers; the rest of it is whole on every chip
    half = text["weight_bytes"] / 2 + matrices / 2 + tower - matrices
    assert two["weight_bytes"] == pytest.approx(half, rel=0.02)
    assert two["encoder"]["fits"]


@needs_libtpu
@pytest.mark.parametrize("lora", [None, "r=16,target_modules=all-linear"])
def test_a_step_of_training(lora, tmp_path, capsys):
    """Float32 of what is trained, and twice as much for AdamW; a quarter of the parameters on each of four chips."""
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"num_attention_heads": 4}))
    more = [] if lora is None else ["--lora", lora]
    arguments = [
        "compile",
        str(tmp_path),
        "--topology",
        "v6e:2x2",
        "--train",
        "--batch",
        "4",
        "--context",
        "128",
        *more,
    ]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sizes = {"qkvo": 256 * 64 * (4 + 2 + 2 + 4), "mlp": 3 * 256 * 512}
    weights = 3 * sum(sizes.values()) + 2 * 512 * 256  # but for vectors
    ranks = 16 * 3 * (2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 512))
    trained = weights / 4 if lora is None else ranks
    assert found["frozen"] == (0 if lora is None else pytest.approx(2 * weights / 4, rel=0.01))
    assert found["trainable"] == pytest.approx(4 * trained, rel=0.01)
    assert found["optimizer"] == pytest.approx(8 * trained, rel=0.01)
    assert found["aliased"] >= found["trainable"] + found["optimizer"] - 64
    assert found["fits"]
    assert found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}


@needs_libtpu
def test_command_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    arguments = ["compile", str(tmp_path), "--topology", "v6e:2x2", "--batch", "2", "--context", "256"]
    assert main([*arguments, "--mesh", "data=2,tensor=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mesh"] == {"data": 2, "fsdp": 1, "tensor": 2}
    assert found["decode"]["fits"]
    assert found["prefill"]["fits"]
    assert found["decode"]["arguments"] >= found["weight_bytes"] + found["cache_bytes"]
    assert found["cache_bytes"] == 3 * 2 * 512 * 64 * 2  # one row, one key/value head, 512 slots
    assert main([*arguments, "--mesh", "tensor=4"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for line in (
        "temporaries",
        "updated in place",
        "fits yes yes",
        "2 all-reduce a layer + 1",
        "roofline",
        "compiled in",
    ):
        assert line in text, text
    for wrong, message in {
        "v7:2x2": "topology 'v7:2x2' is not known; expected one of v4, v5e, v5p, v6e and sizes",
        "v6e:3x5x7": "topology 'v6e:3x5x7': ",
    }.items():
        assert main([*arguments[:2], "--topology", wrong]) == 2
        assert f"error: {message}" in capsys.readouterr().err
    assert main([*arguments, "--mesh", "tensor=8"]) == 2
    assert capsys.readouterr().err == "error: the mesh needs 8 chips; v6e:2x2 has 4\n"
    assert main([*arguments, "--mesh", "tp=8"]) == 2
    assert "mesh 'tp=8': expected sizes of data, fsdp, tensor, such as data=2,tensor=4" in capsys.readouterr().err


@needs_libtpu
def test_what_does_not_fit(tmp_path, capsys):
    """41 GB of embeddings on a chip of 34: the compiler itself gives up, and no roofline is told."""
    values = TINY | {"hidden_size": 4096, "vocab_size": 5_000_000, "num_hidden_layers": 1, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(values))
    arguments = ["compile", str(tmp_path), "--topology", "v6e:2x2", "--mesh", "tensor=1", "--context", "256"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [found[phase]["fits"] for phase in ("prefill", "decode")] == [False, False]
    assert [found[phase]["step_seconds"] for phase in ("prefill", "decode")] == [None, None]
    assert main(arguments) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "fits NO NO" in text
    assert "roofline - -" in text


def test_without_the_compiler(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["compile", str(tmp_path), "--topology", "v6e:2x2"]) == 2
    assert capsys.readouterr().err == "error: the TPU compiler is not installed: pip install 'flaxqwen[tpu]'\n"


HLO = """
  %all-reduce.3 = bf16[8,1,256]{2,1,0:T(8,128)(2,1)} all-reduce(%fusion.1), channel_id=1
  %ar = (bf16[8,1,256]{2,1,0}, bf16[8,1,256]{2,1,0}) all-reduce-start(%fusion.2), channel_id=2
  %all-reduce.9 = f32[8]{0} all-reduce(%max), channel_id=3
  %ag = (s32[4]{0}, s32[8]{0}) all-gather-start(%x), channel_id=4
  %copy.1 = bf16[1024,1024]{1,0:T(8,128)(2,1)} copy(%weight)
  %prefetch = (bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[1024,1024]{1,0}, u32[]{:S(2)}) copy-start(%weight)
  %copy.2 = f32[8]{0} copy(%small)
"""


def test_operations_of_a_program():
    large, small, copies = aot.operations(HLO, hidden=2048)
    assert large == {"all-reduce": [2, 8192]}
    assert small == {"all-reduce": [1, 32], "all-gather": [1, 32]}
    assert copies == {"copy": [1, 2 << 20]}
