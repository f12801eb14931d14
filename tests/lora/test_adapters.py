"""Adapters against the peft library: every kind, loaded and saved, merged, several in a batch."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flaxqwen import AutoModelForCausalLM, LoraConfig, Model
from flaxqwen.generation.config import GenerationConfig
from flaxqwen.lora import make_variables
from flaxqwen.lora.tree import to_tensors
from flaxqwen.models.qwen2 import Qwen2ForCausalLM
from tests.reference import close, counted_compilations, pair, random_ids, th, torch

peft = pytest.importorskip("peft", reason="adapters are compared with the peft library: pip install flaxqwen[test]")

# Transformers' and peft's own, about each other.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 5, "lora_alpha": 8, "use_rslora": True, "target_modules": ATTENTION},
    "dora": {"r": 3, "use_dora": True, "target_modules": [*ATTENTION, "down_proj"]},
    "patterns": {
        "r": 4,
        "rank_pattern": {"q_proj": 2, r".*layers\.1\.self_attn\.v_proj": 6, "^model.layers.0.mlp.up_proj": 3},
        "alpha_pattern": {"v_proj": 3, "layers.0.mlp.up_proj": 20},
        "target_modules": ["q_proj", "v_proj", "up_proj"],
    },
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "regex": {
        "r": 4,
        "target_modules": r".*\.1\.(self_attn\.o_proj|mlp\.(gate|up)_proj)",
        "exclude_modules": ["up_proj"],
    },
    "layers": {"r": 4, "target_modules": ["k_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "whole-names": {"r": 3, "target_modules": ["o_proj", "lm_head"], "layers_to_transform": 1},
    "layers-group": {
        "r": 4,
        "target_modules": ["k_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "(model.layers|layers)",
    },
    "saved": {"r": 4, "target_modules": ["k_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "head": {"r": 4, "target_modules": ["lm_head", "gate_proj"], "lora_bias": True},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "o_proj"]},
    "biases": {"r": 4, "target_modules": ["q_proj", "o_proj"], "bias": "all"},
    "lora-biases": {"r": 4, "target_modules": ["q_proj", "o_proj"], "bias": "lora_only"},
}


@pytest.fixture(scope="module")
def tied():
    return make_base(True)


@pytest.fixture(scope="module")
def untied():
    return make_base(False)


def make_base(tied: bool):
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, tie_word_embeddings=tied, vocab_size=97)
    return theirs, Model(module, params, module.config, GenerationConfig())


def adapter_of_peft(theirs: Any, folder: Path, seed: int = 0, **config: Any) -> Any:
    """A random adapter of peft on a copy of the model, saved into the folder."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(copy.deepcopy(theirs), peft.LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            elif parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def logits_of(theirs: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return theirs(input_ids=th(ids)).logits.numpy()


# With a tied head, those that touch the head or the embedding, which are one array there.
CASES = [(kind, False) for kind in KINDS] + [(kind, True) for kind in ("plain", "saved", "head", "embedding")]


@pytest.mark.parametrize(("kind", "is_tied"), CASES)
def test_adapters_of_peft(kind, is_tied, untied, tied, tmp_path, rng):
    """What peft saves gives peft's logits here, beside the weights and merged; what we save, peft loads again."""
    theirs, model = tied if is_tied else untied
    ids = random_ids(rng, (2, 9), 97)
    theirs_adapted = adapter_of_peft(theirs, tmp_path / "theirs", seed=int(rng.integers(1 << 30)), **KINDS[kind])
    if kind == "lora-biases":  # peft trains these, and leaves them out of the file
        add_biases(theirs_adapted, tmp_path / "theirs")
    want = logits_of(theirs_adapted, ids)
    before = np.asarray(model(ids).logits)
    assert np.abs(want - before).max() > 1e-2 * np.abs(before).max()
    adapted = model.load_adapter(tmp_path / "theirs")
    close(adapted(ids).logits, want)
    assert (np.asarray(adapted.disable_adapters()(ids).logits) == before).all()
    if kind != "head":
        merged = adapted.merge_adapter()
        close(merged(ids).logits, want)
        close(adapted.merge_and_unload()(ids).logits, want)
        assert (np.asarray(merged.unmerge_adapter()(ids).logits) == np.asarray(adapted(ids).logits)).all()
    else:
        with pytest.raises(ValueError, match="no bias that lora_bias could be merged into"):
            adapted.merge_adapter()
    adapted.save_adapter(tmp_path / "ours")
    mine, file = (
        load_file(tmp_path / "ours/adapter_model.safetensors"),
        load_file(tmp_path / "theirs/adapter_model.safetensors"),
    )
    assert set(mine) == set(file)
    assert all((mine[name] == file[name]).all() for name in file)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "ours").eval()
    close(logits_of(back, ids), want)


def add_biases(theirs_adapted: Any, folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    state = theirs_adapted.state_dict()
    biases = {name: tensor.numpy() for name, tensor in state.items() if name.endswith("q_proj.base_layer.bias")}
    assert biases
    save_file(load_file(path) | biases, path, metadata={"format": "pt"})


def test_embeddings_that_peft_saves_besides(untied, tmp_path, rng):
    """As it does after a vocabulary has grown: they take the place of the base's."""
    theirs, model = untied
    ids = random_ids(rng, (2, 9), 97)
    adapted = adapter_of_peft(theirs, tmp_path, seed=int(rng.integers(1 << 30)), **KINDS["plain"])
    with torch.no_grad():
        for module in (adapted.get_input_embeddings(), adapted.get_output_embeddings()):
            module.weight.add_(0.1 * torch.randn_like(module.weight))
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    close(model.load_adapter(tmp_path)(ids).logits, logits_of(adapted, ids))


def test_disabled_adapters_are_so_for_each_row(untied, tmp_path, rng):
    theirs, model = untied
    ids = random_ids(rng, (2, 5), 97)
    adapter_of_peft(theirs, tmp_path, **KINDS["plain"])
    disabled = model.load_adapter(tmp_path, "a").disable_adapters()
    assert np.array_equal(disabled(ids, adapter_names=["a", "__base__"]).logits, model(ids).logits)
    with pytest.raises(ValueError, match="Adapter with name b not found"):
        disabled(ids, adapter_names=["a", "b"])


def test_adapters_of_numpy_are_saved(untied, tmp_path):
    _, model = untied
    made = model.add_adapter(LoraConfig(r=2, target_modules="all-linear"))
    made.save_adapter(tmp_path / "a")
    made.replace_adapter("default", jax.tree.map(np.asarray, made.adapter())).save_adapter(tmp_path / "b")
    name = "adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_real_adapter(shared, tmp_path, rng):
    """A published adapter of Qwen2.5-0.5B-Instruct: all its 24 layers, its true q and v; a small MLP and vocabulary."""
    folder = shared / "data/lora/qwen2.5-0.5b-instruct-r8-qv"
    sizes = {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2, "num_hidden_layers": 24}
    theirs, module, params = pair(
        "Qwen2ForCausalLM", Qwen2ForCausalLM, **sizes, intermediate_size=32, vocab_size=97, tie_word_embeddings=True
    )
    with torch.no_grad():  # as deep as it is, the fixture's large weights would be all that is seen
        for parameter in theirs.parameters():
            parameter.mul_(0.2 if parameter.ndim > 1 else 1.0)
    params = jax.tree.map(lambda a: a * 0.2 if a.ndim > 1 else a, params)
    model = Model(module, params, module.config, GenerationConfig())
    ids = random_ids(rng, (2, 7), 97)
    before = logits_of(theirs, ids)
    want = logits_of(peft.PeftModel.from_pretrained(theirs, folder).eval(), ids)
    assert np.abs(want - before).max() > 1e-3 * np.abs(before).max()  # 5e-3, and 2e-5 is what may differ
    adapted = model.load_adapter(folder)
    close(adapted(ids).logits, want)
    adapted.save_adapter(tmp_path)
    mine, file = (load_file(where / "adapter_model.safetensors") for where in (tmp_path, folder))
    assert set(mine) == set(file)
    assert all((mine[name] == file[name]).all() for name in file)


def test_several_active_adapters_add_up(untied, tmp_path, rng):
    theirs, model = untied
    ids = random_ids(rng, (2, 6), 97)
    for i, name in enumerate("ab"):
        targets = [["q_proj", "v_proj"], "all-linear"][i]
        adapter_of_peft(theirs, tmp_path / name, seed=i, r=4 + i, target_modules=targets)
    both = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "a", adapter_name="a").eval()
    both.load_adapter(tmp_path / "b", adapter_name="b")
    both.base_model.set_adapter(["a", "b"])
    ours = model.load_adapter(tmp_path / "a", "a").load_adapter(tmp_path / "b", "b")
    assert ours.active_adapters() == ["b"]
    ours = ours.set_adapter(["a", "b"])
    want = logits_of(both, ids)
    close(ours(ids).logits, want)
    close(ours.merge_adapter()(ids).logits, want)
    both.base_model.set_adapter(["a"])
    close(ours.delete_adapter("b")(ids).logits, logits_of(both, ids))
    assert ours.delete_adapter("b").active_adapters() == ["a"]
    assert ours.delete_adapter(["a", "b"]).variables == {"params": model.params}
    assert all(x is y for x, y in zip(*map(jax.tree.leaves, (ours.params, model.params)), strict=True))
    merged = ours.delete_adapter("b").merge_adapter().delete_adapter("a")  # with the last one merging is over
    close(merged.load_adapter(tmp_path / "a")(ids).logits, ours.delete_adapter("b")(ids).logits)


def test_new_adapters_are_peft_s(untied, tmp_path):
    """A new adapter changes nothing, and is drawn from peft's distributions."""
    theirs, model = untied
    config = {"r": 16, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"], "bias": "all"}
    made = model.add_adapter(peft.LoraConfig(**config))
    ids = np.arange(8)[None]
    assert (np.asarray(made(ids).logits) == np.asarray(model(ids).logits)).all()
    mine = made.get_adapter_state_dict()
    reference = peft.get_peft_model(copy.deepcopy(theirs), peft.LoraConfig(**config))
    named = peft.get_peft_model_state_dict(reference, save_embedding_layers=False)
    named = {name.removeprefix("base_model.model."): tensor.numpy() for name, tensor in named.items()}
    assert {name: a.shape for name, a in mine.items()} == {name: a.shape for name, a in named.items()}
    for name, array in mine.items():
        got, want = np.asarray(array), named[name]
        if "lora_" not in name or not want.any():
            assert (got == want).all(), name
        else:
            assert abs(got.std() / want.std() - 1) < 0.1, name
            assert abs(np.abs(got).max() / np.abs(want).max() - 1) < (0.05 if name.endswith("weight") else 0.5), name
    other = model.add_adapter(config, seed=1).get_adapter_state_dict()
    assert any((other[name] != mine[name]).any() for name in mine)
    config = {"r": 8, "lora_alpha": 24, "target_modules": ["q_proj"], "use_dora": True, "init_lora_weights": False}
    drawn = model.add_adapter(peft.LoraConfig(**config)).get_adapter_state_dict()
    layer = "model.layers.1.self_attn.q_proj"
    A, B = (np.asarray(drawn[f"{layer}.lora_{part}.weight"]) for part in "AB")
    whole = np.asarray(model.params["model"]["layers_1"]["self_attn"]["q_proj"]["weight"]) + 24 / 8 * B @ A
    close(drawn[f"{layer}.lora_magnitude_vector"], np.linalg.norm(whole, axis=1))  # as in peft's DoraLinearLayer


def test_gradients_are_peft_s(untied, tmp_path, rng):
    """Of the loss over an adapter's tensors alone, DoRA's magnitudes included."""
    theirs, model = untied
    ids = random_ids(rng, (2, 7), 97)
    for config in ({"r": 4, "target_modules": ATTENTION}, {"r": 4, "use_dora": True, "target_modules": ["q_proj"]}):
        reference = adapter_of_peft(theirs, tmp_path, **config).train()
        reference(input_ids=th(ids), labels=th(ids)).loss.backward()
        adapted = model.load_adapter(tmp_path)
        lora = LoraConfig.coerce(config)

        def loss(adapter, lora=lora):
            variables = make_variables(model.module, model.params, [(lora, adapter)])
            return model.module.apply(variables, ids, labels=ids).loss

        gradients = to_tensors(jax.jit(jax.grad(loss))(adapted.adapter()))
        for name, parameter in reference.named_parameters():
            if parameter.requires_grad:
                short = name.removeprefix("base_model.model.").replace(".default", "")
                short = short.removesuffix(".weight") if "magnitude" in short else short
                close(gradients[short], parameter.grad, 1e-4)


def test_dropout_acts_on_the_adapter_in_training(untied):
    _, model = untied
    config = LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False)
    adapter = model.add_adapter(config).adapter()
    variables = make_variables(model.module, model.params, [(config, adapter)], dropout=True)
    ids = np.arange(8)[None]
    apply = jax.jit(lambda **rngs: model.module.apply(variables, ids, **rngs).logits)
    a, b = (apply(rngs={"dropout": jax.random.key(i)}) for i in range(2))
    close(apply(), model.load_adapter(peft_config=config, adapter_state_dict=to_tensors(adapter))(ids).logits)
    assert np.abs(np.asarray(a) - np.asarray(b)).max() > 1e-3


def test_an_adapter_for_each_row(untied, tmp_path, rng):
    """Each row as alone, in forward and every way of generating; swapping and reloading adapters compiles nothing."""
    theirs, model = untied
    plain = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    kinds = (plain, {"r": 6, "use_rslora": True, "target_modules": "all-linear"})
    for name, kind in zip("ab", kinds, strict=True):
        adapter_of_peft(theirs, tmp_path / name, **kind)
    ours = model.load_adapter(tmp_path / "a", "a").load_adapter(tmp_path / "b", "b")
    names = ["b", "__base__", "a", "b"]
    ids = random_ids(rng, (4, 6), 97)
    alone = {"a": ours.set_adapter("a"), "b": ours.set_adapter("b"), "__base__": model}
    got = ours(ids, adapter_names=names).logits
    for row, name in enumerate(names):
        close(got[row], alone[name](ids[row : row + 1]).logits[0])
    both = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "a", adapter_name="a").eval()
    both.load_adapter(tmp_path / "b", adapter_name="b")
    with torch.no_grad():
        close(got, both(input_ids=th(ids), adapter_names=names).logits)
    options = {"max_new_tokens": 6, "eos_token_id": None}
    ways = [{}, {"num_beams": 2, "num_return_sequences": 2}, {"guidance_scale": 1.5}]
    for way in ways:
        together = ours.generate(ids, adapter_names=names, **options, **way)
        assert len({row.tobytes() for row in together}) == len(together)
        for name in set(names):  # all rows with one adapter, in the same program
            each = ours.generate(ids, adapter_names=[name] * 4, **options, **way)
            rows = np.repeat([name == own for own in names], len(together) // 4)
            assert (together[rows] == each[rows]).all()
    adapter_of_peft(theirs, tmp_path / "c", seed=5, r=8, target_modules=["o_proj", "q_proj"])
    with counted_compilations() as compiled:
        swapped = ours.load_adapter(tmp_path / "c", "c")
        swapped.generate(ids, adapter_names=["c", "a", "a", "b"], **options)
        swapped.delete_adapter("a").load_adapter(tmp_path / "c", "a").generate(ids, adapter_names=["a"] * 4, **options)
        swapped.set_adapter("b")
    assert not compiled


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_rows_with_an_adapter_of_the_vocabulary(target, is_tied, untied, tied, tmp_path, rng):
    """peft writes copies of the base's embeddings beside it, which are the base's own arrays here."""
    theirs, model = tied if is_tied else untied
    ids = random_ids(rng, (2, 9), 97)
    adapted = adapter_of_peft(theirs, tmp_path, r=4, target_modules=[target, "q_proj"])
    copies = [name for name in load_file(tmp_path / "adapter_model.safetensors") if "lora_" not in name]
    assert copies
    want, plain = logits_of(adapted, ids), logits_of(theirs, ids)
    assert np.abs(want - plain).max() > 1e-2 * np.abs(plain).max()
    ours = model.load_adapter(tmp_path, "a")
    close(ours(ids, adapter_names=["a", "__base__"]).logits, np.stack([want[0], plain[1]]))
    own = {id(leaf) for leaf in jax.tree.leaves(model.params)}
    state = ours.get_adapter_state_dict("a")
    assert all(id(leaf) in own for name, leaf in state.items() if "lora_" not in name)
    assert len(state) > len(copies)


def test_generation_with_one_adapter(untied, tmp_path, rng):
    theirs, model = untied
    reference = adapter_of_peft(theirs, tmp_path, r=4, target_modules="all-linear")
    adapted = model.load_adapter(tmp_path)
    ids = random_ids(rng, (2, 6), 97)
    options = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    want = reference.generate(input_ids=th(ids), attention_mask=th(np.ones_like(ids)), **options).numpy()
    assert (adapted.generate(ids, **options) == want).all()
    with counted_compilations() as compiled:
        adapter_of_peft(theirs, tmp_path / "other", seed=3, r=4, target_modules="all-linear")
        model.load_adapter(tmp_path / "other").generate(ids, **options)
    assert not compiled


def test_a_folder_of_an_adapter_alone_loads_its_base(untied, tmp_path, rng):
    theirs, model = untied
    theirs.save_pretrained(tmp_path / "base")
    adapter_of_peft(theirs, tmp_path / "adapter", r=4)
    path = tmp_path / "adapter/adapter_config.json"
    values = json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    path.write_text(json.dumps(values))
    ids = random_ids(rng, (1, 5), 97)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    want = model.load_adapter(tmp_path / "adapter")(ids).logits
    assert (np.asarray(loaded(ids).logits) == np.asarray(want)).all()
    with pytest.raises(ValueError, match="the model has adapters: save_adapter"):
        loaded.save_pretrained(tmp_path / "whole")
    loaded.merge_and_unload().save_pretrained(tmp_path / "whole", to="pytorch")
    import transformers

    close(want, logits_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole"), ids))
    path.write_text(json.dumps(values | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="no base_model_name_or_path"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    for name in (3, ["x"], str(tmp_path / "adapter")):
        path.write_text(json.dumps(values | {"base_model_name_or_path": name}))
        with pytest.raises(ValueError, match=r"adapter_config.json: base_model_name_or_path is .*expected the name of"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")


def test_adapters_over_quantized_weights(untied, tmp_path, rng):
    theirs, _ = untied
    theirs.save_pretrained(tmp_path / "base")
    adapter_of_peft(theirs, tmp_path / "plain", r=4)
    adapter_of_peft(theirs, tmp_path / "dora", r=4, use_dora=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantize="int8")
    ids = random_ids(rng, (1, 5), 97)
    adapted = base.load_adapter(tmp_path / "plain")
    assert np.abs(np.asarray(adapted(ids).logits) - np.asarray(base(ids).logits)).max() > 1e-2
    with pytest.raises(ValueError, match="q_proj is quantized: DoRA and merging need"):
        adapted.merge_adapter()
    with pytest.raises(ValueError, match="q_proj is quantized"):
        base.load_adapter(tmp_path / "dora")
    adapter_of_peft(theirs, tmp_path / "head", r=4, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="embeddings that peft saves besides\\) cannot go over quantized"):
        base.load_adapter(tmp_path / "head")


def test_bad_adapters_are_refused(untied, tmp_path):
    theirs, model = untied
    adapter_of_peft(theirs, tmp_path, r=4)
    loaded = model.load_adapter(tmp_path)
    with pytest.raises(ValueError, match="Adapter with name default already exists"):
        loaded.load_adapter(tmp_path)
    with pytest.raises(ValueError, match="Adapter with name default already exists"):
        loaded.add_adapter(LoraConfig())
    for call in (loaded.set_adapter, loaded.delete_adapter, loaded.adapter):
        with pytest.raises(ValueError, match=r"Adapter with name nothing not found.*\['default'\]"):
            call("nothing")
    for name in ("active_adapters", "disable_adapters", "merge_adapter", "get_adapter_state_dict"):
        with pytest.raises(ValueError, match="No adapter loaded"):
            getattr(model, name)()
    with pytest.raises(ValueError, match="no adapter is active: give adapter_name"):
        loaded.set_adapter([]).save_adapter(tmp_path / "none")
    ids = np.zeros((2, 3), np.int32)
    with pytest.raises(ValueError, match="adapter 'x' is not loaded; expected one of '__base__', 'default'"):
        loaded(ids, adapter_names=["x", "default"])
    with pytest.raises(ValueError, match="adapter_names has 1 names; expected 2"):
        loaded.generate(ids, adapter_names=["default"])
    with pytest.raises(ValueError, match="cannot go with merged adapters"):
        loaded.merge_adapter().generate(ids, adapter_names=["default"] * 2)
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        model.load_adapter(tmp_path.parent)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    first, second, *_ = sorted(tensors)
    odd = {"extra.weight": np.ones(3, np.float32), second: tensors[second][:, :1].copy()}
    save_file({name: a for name, a in tensors.items() if name != first} | odd, file)
    short = [name.removeprefix("base_model.model.") for name in (first, second)]
    with pytest.raises(ValueError, match="does not fit the model") as error:
        model.load_adapter(tmp_path)
    for part in (f"{short[0]} is missing", "extra.weight is unexpected", f"{short[1]} has shape {odd[second].shape}"):
        assert part in str(error.value)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="no weights of an adapter"):
        model.load_adapter(tmp_path)
    other, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, hidden_size=32, vocab_size=97)
    adapter_of_peft(other, tmp_path / "other", r=4)
    with pytest.raises(ValueError, match=r"layers.1.self_attn.v_proj.lora_A.weight has shape \(4, 32\), expected"):
        model.load_adapter(tmp_path / "other")
