"""From a name to a model: every kind of checkpoint gives Transformers' logits; what does not fit is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import flaxqwen
from flaxqwen import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from flaxqwen.auto import parse_dtype
from flaxqwen.convert import convert
from tests.reference import close, leaves_of, random_ids, th, tiny, torch, torch_model

# flaxqwen's and Transformers' auto class -> the class of both, and what it gives that is compared
HEADS = {
    "AutoModel": ("Qwen2Model", ("last_hidden_state",)),
    "AutoModelForCausalLM": ("Qwen2ForCausalLM", ("logits",)),
    "AutoModelForSequenceClassification": ("Qwen2ForSequenceClassification", ("logits",)),
    "AutoModelForTokenClassification": ("Qwen2ForTokenClassification", ("logits",)),
    "AutoModelForQuestionAnswering": ("Qwen2ForQuestionAnswering", ("start_logits", "end_logits")),
}
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 157, "pad_token_id": 11}


def save(folder: Path, kind: str = "Qwen2ForCausalLM", seed: int = 0, **changes: Any) -> Any:
    """A random model of Transformers, saved by it; float32, whatever its config says."""
    model = torch_model(kind, tiny(**SMALL | changes), seed)
    model.save_pretrained(folder)
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "model.safetensors")


def store(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to, dirs_exist_ok=True))


def same_outputs(ours: Any, theirs: Any, rng: np.random.Generator, fields: tuple[str, ...] = ("logits",)) -> None:
    """Both models give the same for the same tokens, which hold no padding."""
    ids = random_ids(rng, (2, 9), SMALL["vocab_size"])
    ids[ids == SMALL["pad_token_id"]] = 0
    with torch.no_grad():
        want = theirs(input_ids=th(ids))
    got = ours(ids)
    for field in fields:
        close(got[field], want[field])


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of an untied Qwen2ForCausalLM, and Transformers' model of it. Not to be changed: `copy_of` it."""
    folder = tmp_path_factory.mktemp("causal")
    return folder, save(folder)


@pytest.mark.parametrize("auto", HEADS)
def test_folders_of_transformers(auto: str, tmp_path: Path, rng: np.random.Generator):
    kind, fields = HEADS[auto]
    theirs = save(tmp_path, kind, seed=int(rng.integers(99)), num_labels=3)
    model = getattr(flaxqwen, auto).from_pretrained(tmp_path)
    assert type(model.module).__name__ == kind == model.config.architectures[0]
    assert model.config == model.module.config == AutoConfig.from_pretrained(tmp_path)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model.params))
    assert model.num_parameters() == theirs.num_parameters()
    same_outputs(model, theirs, rng, fields)


FORMATS = {
    "sharded": {"to": "pytorch", "max_shard_size": "60KB"},
    "flax": {"to": "flax"},
    "flax-sharded": {"to": "flax", "max_shard_size": "60KB"},
    "flax-linen": {"to": "flax", "layout": "linen"},
    "flax-msgpack": {"to": "flax", "format": "msgpack"},
}


@pytest.mark.parametrize("kind", ["bin", "bin-sharded", "sharded-by-transformers", *FORMATS])
def test_every_format_gives_the_same_model(kind: str, causal: tuple[Path, Any], tmp_path: Path, rng):
    source, theirs = causal
    if kind in FORMATS:
        convert(source, tmp_path / "model", **FORMATS[kind])
    elif kind == "sharded-by-transformers":
        theirs.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    else:
        save_bin(copy_of(source, tmp_path / "model"), theirs, shards=2 if kind == "bin-sharded" else 1)
    folder = tmp_path / "model"
    assert (len(list(folder.glob("*.index.json"))) == 1) == ("sharded" in kind)
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    for name, leaf in leaves_of(model).items():
        assert np.array_equal(leaf, theirs.state_dict()[name].numpy()), name
    same_outputs(model, theirs, rng)


def save_bin(folder: Path, model: Any, shards: int) -> None:
    """In place of the folder's weights, those of older versions: pickles of torch."""
    (folder / "model.safetensors").unlink()
    state = list(model.state_dict().items())
    if shards == 1:
        torch.save(dict(state), folder / "pytorch_model.bin")
        return
    names = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    parts = [dict(state[i::shards]) for i in range(shards)]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, folder / name)
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("head", ["absent", "repeated", "own"])
def test_tied_checkpoints(head: str, tmp_path: Path, rng: np.random.Generator):
    """Transformers does not tie a head that differs from the embedding, whatever the config says; nor do we."""
    import transformers

    theirs = save(tmp_path, tie_word_embeddings=True)
    tensors = tensors_of(tmp_path)
    assert "lm_head.weight" not in tensors
    if head != "absent":
        shift = np.float32(0.25 * (head == "own"))
        store(tmp_path, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + shift})
        theirs = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert ("lm_head" in model.params) == (head == "own") != model.config.tie_word_embeddings
    assert model.num_parameters() == theirs.num_parameters()
    same_outputs(model, theirs, rng)
    base = AutoModel.from_pretrained(tmp_path)
    assert set(base.params) == {"embed_tokens", "layers_0", "layers_1", "norm"}


def test_a_base_checkpoint_becomes_a_tied_language_model(tmp_path: Path, rng: np.random.Generator):
    import transformers

    save(tmp_path, "Qwen2Model", tie_word_embeddings=True)
    assert "embed_tokens.weight" in tensors_of(tmp_path)
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    same_outputs(AutoModelForCausalLM.from_pretrained(tmp_path), theirs, rng)
    edit_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"missing lm_head\.weight \[157, 64\]$"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_language_model_becomes_a_base_model(causal: tuple[Path, Any], rng: np.random.Generator):
    folder, theirs = causal
    model = AutoModel.from_pretrained(folder)
    assert model.num_parameters() == theirs.model.num_parameters()
    same_outputs(model, theirs.model, rng, ("last_hidden_state",))


@pytest.mark.parametrize("auto", [auto for auto in HEADS if auto.endswith(("Classification", "Answering"))])
def test_a_head_that_is_not_there_is_drawn_with_a_warning(auto: str, causal: tuple[Path, Any], rng):
    folder, _ = causal
    kind, fields = HEADS[auto]
    labels = {} if kind == "Qwen2ForQuestionAnswering" else {"num_labels": 7}
    with pytest.warns(UserWarning, match="newly initialised") as caught:
        model = getattr(flaxqwen, auto).from_pretrained(folder, initializer_range=0.5, **labels)
    assert [warning.filename for warning in caught] == [__file__]
    name = "qa_outputs" if kind == "Qwen2ForQuestionAnswering" else "score"
    head = model.params[name]
    bias = "" if kind == "Qwen2ForSequenceClassification" else f"{name}.bias, "
    assert str(caught[0].message) == f"{folder} has no {bias}{name}.weight: newly initialised, to be trained"
    assert head["weight"].shape == (labels.get("num_labels", 2), 64)
    assert 0.4 < np.std(head["weight"]) < 0.6
    assert not np.any(head.get("bias", 0))
    # The same head in Transformers' model on the same decoder gives the same.
    theirs = torch_model(kind, tiny(**SMALL | labels))
    state = {name: torch.from_numpy(leaf.copy()) for name, leaf in leaves_of(model).items()}
    assert not any(theirs.load_state_dict(state))
    same_outputs(model, theirs, rng, fields)


def test_a_head_that_is_there_is_loaded_without_a_warning(tmp_path: Path):
    save(tmp_path, "Qwen2ForSequenceClassification", num_labels=4)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert np.array_equal(model.params["score"]["weight"], tensors_of(tmp_path)["score.weight"])
    assert model.config.num_labels == 4
    with pytest.raises(ValueError, match=r"score\.weight has shape \[4, 64\], expected \[6, 64\]"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=6)
    bare = AutoModel.from_pretrained(tmp_path)  # as in Transformers, without the head
    assert jax.tree.all(jax.tree.map(np.array_equal, bare.params, model.params["model"]))


def test_all_that_does_not_fit_is_listed(causal: tuple[Path, Any], tmp_path: Path):
    folder = copy_of(causal[0], tmp_path)
    tensors = tensors_of(folder)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.5.mlp.up_proj.weight"] = np.zeros((3, 2), np.float32)
    tensors["model.norm.weight"] = np.zeros(65, np.float32)
    store(folder, tensors)
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message
    for problem in (
        "missing model.layers.1.mlp.up_proj.weight [112, 64]",
        "unexpected model.layers.5.mlp.up_proj.weight [3, 2]",
        "model.norm.weight has shape [65], expected [64]",
    ):
        assert problem in message


@pytest.mark.parametrize(
    ("asked", "said", "stored", "expected"),
    [
        (None, "bfloat16", np.float32, "bfloat16"),
        ("auto", "float16", np.float32, "float16"),
        (None, None, np.float16, "float16"),
        ("auto", None, ml_dtypes.bfloat16, "bfloat16"),
        ("float32", "bfloat16", ml_dtypes.bfloat16, "float32"),
        (torch.float16, "bfloat16", np.float32, "float16"),
    ],
)
def test_dtype_is_what_transformers_takes(asked, said, stored, expected, causal: tuple[Path, Any], tmp_path: Path):
    import transformers

    folder = copy_of(causal[0], tmp_path)
    tensors = {name: tensor.astype(stored) for name, tensor in tensors_of(folder).items()}
    store(folder, tensors)
    edit_config(folder, dtype=said)
    # Their Auto classes take dtype=None for "not as the config says"; left out, it is as here.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, **{} if asked is None else {"dtype": asked})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=asked)
    assert str(theirs.dtype).removeprefix("torch.") == model.dtype.name == model.config.dtype == expected
    state = {name: tensor.float().numpy() for name, tensor in theirs.state_dict().items()}
    for name, leaf in leaves_of(model).items():
        assert leaf.dtype == expected
        assert np.array_equal(leaf.astype(np.float32), state[name])


@pytest.mark.parametrize("wide", ["norm.weight", "lm_head.weight"])
def test_mixed_dtypes_become_one(wide: str, causal: tuple[Path, Any], tmp_path: Path):
    """As in Transformers, that of the first tensor by name."""
    import transformers

    folder = copy_of(causal[0], tmp_path)
    edit_config(folder, dtype=None)
    tensors = tensors_of(folder)
    store(folder, {k: t if k.endswith(wide) else t.astype(ml_dtypes.bfloat16) for k, t in tensors.items()})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    dtypes = {leaf.dtype.name for leaf in leaves_of(AutoModelForCausalLM.from_pretrained(folder)).values()}
    assert dtypes == {str(theirs.dtype).removeprefix("torch.")}


def test_float64_becomes_float32(causal: tuple[Path, Any], tmp_path: Path):
    """jax does not compute in float64 unless it is told to."""
    folder = copy_of(causal[0], tmp_path)
    edit_config(folder, dtype=None)
    store(folder, {name: tensor.astype(np.float64) for name, tensor in tensors_of(folder).items()})
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {leaf.dtype.name for leaf in leaves_of(model).values()} == {"float32"} == {model.config.dtype}


def test_dtype_by_every_name():
    names = {
        "float32": ["float32", jnp.float32, np.float32, np.dtype("float32"), torch.float32, "torch.float32"],
        "bfloat16": ["bfloat16", jnp.bfloat16, ml_dtypes.bfloat16, jnp.dtype("bfloat16"), torch.bfloat16],
        "float16": ["float16", jnp.float16, np.float16, np.dtype("float16"), torch.float16],
    }
    for name, others in names.items():
        for other in others:
            assert parse_dtype(other) is getattr(jnp, name)
    assert parse_dtype(None) is parse_dtype("auto") is None
    for wrong in ("int8", np.int32, "float64", float, torch.int8, "half", np.dtype(">f4"), 3):
        with pytest.raises(ValueError, match=r"dtype .* is not supported for weights; expected one of float32"):
            parse_dtype(wrong)


def test_torch_dtype_is_the_older_name(causal: tuple[Path, Any]):
    load = AutoModelForCausalLM.from_pretrained
    assert load(causal[0], torch_dtype="bfloat16").dtype == jnp.bfloat16
    assert load(causal[0], torch_dtype="bfloat16", dtype="float16").dtype == jnp.float16
    with pytest.raises(ValueError, match="dtype 'int8' is not supported"):
        load(causal[0], torch_dtype="int8")
    read = AutoConfig.from_pretrained
    assert AutoModelForCausalLM.from_config(read(causal[0]), torch_dtype="float16").dtype == jnp.float16
    for given in ({"torch_dtype": "float16"}, {"dtype": torch.float16}, {"dtype": jnp.float16, "torch_dtype": "int8"}):
        assert read(causal[0], **given).dtype == "float16"
    assert read(causal[0], dtype="auto") == read(causal[0])


def test_labels_by_strings_or_integers(causal: tuple[Path, Any]):
    """JSON has strings, Python's dicts have integers, and Transformers takes both."""
    import transformers

    names = ["no", "maybe", "yes"]
    for labels in (dict(enumerate(names)), {str(i): name for i, name in enumerate(names)}):
        theirs = transformers.AutoConfig.from_pretrained(causal[0], id2label=labels)
        found = AutoConfig.from_pretrained(causal[0], id2label=labels)
        assert dict(found.id2label) == {int(key): name for key, name in theirs.id2label.items()}
        assert found.num_labels == theirs.num_labels == 3


def test_arguments_of_another_kind(causal: tuple[Path, Any]):
    folder, theirs = causal
    load, config = AutoModelForCausalLM.from_pretrained, AutoConfig.from_pretrained(causal[0])
    for other in (theirs.config, "qwen2", None):
        with pytest.raises(TypeError, match=r"config is a .*; expected one of flaxqwen's, as AutoConfig.from_pre"):
            AutoModelForCausalLM.from_config(other)
    for call, what in ((load, folder), (AutoModelForCausalLM.from_config, config)):
        with pytest.raises(ValueError, match="attention_implementation is 3; expected a name, or names by kind"):
            call(what, attention_implementation=3)
        with pytest.raises(TypeError, match=r"mesh is a str; expected a jax\.sharding\.Mesh"):
            call(what, mesh="tensor=2")
        with pytest.raises(ValueError, match=r"mesh_axes says which axes .*: give the mesh too"):
            call(what, mesh_axes={"heads": ("tensor",)})
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="batch_sizes must be a list of whole numbers above 0"):
        model.warmup([True], [5])


def test_overrides_are_fields_of_the_config(causal: tuple[Path, Any], rng: np.random.Generator):
    folder, theirs = causal
    load = AutoModelForCausalLM.from_pretrained
    model = load(folder, output_hidden_states=True, rms_norm_eps=0.5)
    ids = random_ids(rng, (1, 5), SMALL["vocab_size"])
    assert len(model(ids).hidden_states) == 3
    assert model.config == AutoConfig.from_pretrained(folder, output_hidden_states=True, rms_norm_eps=0.5)
    given = dataclasses.replace(AutoConfig.from_pretrained(folder), num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"unexpected model\.layers\.1\."):
        load(folder, config=given)
    assert load(folder, config=str(folder)).config == load(folder).config
    with pytest.raises(
        TypeError, match=r"config is a transformers\..*Qwen2Config; expected one of flaxqwen's, or the f"
    ):
        load(folder, config=theirs.config)
    for wrong, near in (
        ({"rms_norm_epsilon": 1e-5}, "rms_norm_eps"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters"),
        ({"rope_theta": 1e6}, "rope_parameters"),
    ):
        for call in (load, AutoConfig.from_pretrained):
            with pytest.raises(TypeError, match=f"unknown argument '{next(iter(wrong))}'; did you mean '{near}'"):
                call(folder, **wrong)
    for wrong in ("device_map", "extra"):
        with pytest.raises(TypeError, match=f"unknown argument '{wrong}'"):
            load(folder, **{wrong: "auto"})


def test_overridden_rope_keeps_theta(tmp_path: Path):
    """The default theta, 10,000, in place of the config's million would be wrong in silence."""
    save(tmp_path, rope_theta=1e6)
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    config = AutoConfig.from_pretrained(tmp_path, rope_parameters=rope)
    assert (config.rope_parameters.rope_type, config.rope_parameters.rope_theta) == ("yarn", 1e6)
    rope["rope_theta"] = 5e3
    assert AutoConfig.from_pretrained(tmp_path, rope_parameters=rope).rope_parameters.rope_theta == 5e3


def test_generation_config_is_read(causal: tuple[Path, Any], tmp_path: Path):
    folder = copy_of(causal[0], tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 5], "repetition_penalty": 1.1}')
    options = AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert (options.eos_token_id, options.repetition_penalty) == ((3, 5), 1.1)
    (folder / "generation_config.json").unlink()
    edit_config(folder, eos_token_id=8)
    options = AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert (options.eos_token_id, options.pad_token_id, options.repetition_penalty) == (8, SMALL["pad_token_id"], None)


@pytest.mark.parametrize("auto", HEADS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "weights quantized by 'awq' are not supported"),
        ({"quantization_config": {"bits": 4}}, "weights quantized by 'unknown' are not supported"),
        ({"model_type": "llama"}, "config.json: model_type is 'llama'; supported: qwen2"),
        ({"hidden_act": "mish"}, "config.json: hidden_act is 'mish', which is not supported"),
        ({"num_attention_heads": 3}, "config.json: num_attention_heads, 3, is not a multiple"),
    ],
)
def test_a_config_is_refused_before_weights_are_looked_for(auto: str, changes, message: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(tiny(**changes)))
    with pytest.raises(ValueError, match=message) as caught:
        getattr(flaxqwen, auto).from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_qwen2_audio_is_sent_to_its_class(shared: Path):
    """As in Transformers, where AutoModelForCausalLM does not load it either."""
    import transformers

    folder = shared / "data" / "configs" / "Qwen2-Audio-7B"
    assert "AutoModelForSeq2SeqLM" in {
        name
        for name in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
        if type(transformers.AutoConfig.from_pretrained(folder)) in getattr(transformers, name)._model_mapping
    }
    assert flaxqwen.AutoModelForMultimodalLM.modules == flaxqwen.AutoModelForSeq2SeqLM.modules
    for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        with pytest.raises(
            ValueError, match=r"does not load model_type 'qwen2_audio': it is for AutoModelForSeq2SeqLM"
        ):
            auto.from_pretrained(folder)
        with pytest.raises(ValueError, match="AutoModelForSeq2SeqLM"):
            auto.from_config(AutoConfig.from_pretrained(folder))


def test_what_is_not_there_is_named(tmp_path: Path):
    load = AutoModelForCausalLM.from_pretrained
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny()))
    with pytest.raises(FileNotFoundError, match="no checkpoint in this folder"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        load(tmp_path)


def test_loading_says_nothing(causal: tuple[Path, Any], capfd: pytest.CaptureFixture[str]):
    """No bar where nobody watches, and no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoModelForCausalLM.from_pretrained(causal[0])
    assert capfd.readouterr() == ("", "")
