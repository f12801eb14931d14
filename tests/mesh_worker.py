"""Runs a checkpoint on one device and on meshes of 8 simulated ones: python -m tests.mesh_worker FOLDER.

Reads inputs.npz in FOLDER, writes results.npz: every result under `name/mesh`. Apart from the tests, because the number
of devices is fixed when jax starts.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # not where the tests import it: their other processes would have 8 devices, too
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")

import flax.traverse_util
import jax
import numpy as np
import optax

from flaxqwen import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LoraConfig, loading, make_mesh
from flaxqwen.cache import init_cache
from flaxqwen.convert import open_checkpoint
from flaxqwen.convert.names import to_name
from flaxqwen.generation import loop
from flaxqwen.ops import attention as ops_attention
from flaxqwen.ops.dispatch import Attention
from flaxqwen.sharding import shapes_of
from flaxqwen.training import TrainState, make_train_step

MESHES = {"8x1": (8, 1, 1), "1x8": (1, 1, 8), "2x4": (2, 1, 4), "4x2": (4, 1, 2), "fsdp": (1, 4, 2)}
# Where beams, sampling and what users see of heads run too: heads are padded and repeated, and rows cut, there.
EVERYTHING = ("2x4",)
# Where all parameters are trained: heads are padded and repeated, and weights cut.
TRAINED = ("2x4",)
# Tokens of a chunk of their loss.
CHUNK = 24
# Where Qwen2-Audio runs: heads are padded, clips and weights are cut.
HEARING = ("2x4", "fsdp")
# Whose decoding programs are looked at.
DECODING = ("1x8", "2x4", "4x2")
# Where quantized weights run. Heads of 8 and groups of 16, and 24 of 96 channels and groups of 32, share no border.
QUANTIZED = {"int8": ("1x8",), "int4": ("2x4", "fsdp")}
# Where the slots of the KV cache are cut, for one row.
LONG = "4x2"
# Where adapters run, and which: every linear layer; magnitudes, biases, a whole module; another beside the first.
ADAPTED = ("2x4",)
ADAPTERS = {
    "plain": LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False),
    "dora": LoraConfig(
        r=3, use_dora=True, bias="all", target_modules=("q_proj", "k_proj", "o_proj"), modules_to_save=("v_proj",),
        init_lora_weights=False,
    ),
    "small": LoraConfig(r=2, target_modules=("o_proj", "v_proj"), init_lora_weights=False),
}  # fmt: skip
NEW = 8


def main(folder: Path) -> None:
    """Run everything."""
    jax.config.update("jax_default_matmul_precision", "highest")
    ops_attention.FEWEST_SCORES = 0  # blocks for short prompts, too
    inputs = dict(np.load(folder / "inputs.npz"))
    results: dict[str, Any] = {}
    programs: dict[str, str] = {}
    for name, sizes in {"one": None, **MESHES}.items():
        model = AutoModelForCausalLM.from_pretrained(folder, mesh=None if sizes is None else make_mesh(*sizes))
        assert model.config.num_attention_heads == 14
        kinds = run_everything(model, inputs, folder / name) if name in ("one", *EVERYTHING) else {}
        if name in EVERYTHING:
            kinds["loaded"] = run_saved(model, inputs, folder / name / "programs")
        with watched() if name in DECODING else nullcontext([""]) as texts:
            found = {**run(model, inputs), **kinds}
        results |= {f"{kind}/{name}": value for kind, value in found.items()}
        programs[f"hlo/{name}"] = texts[0]
    for scheme, meshes in QUANTIZED.items():
        for name in ("one", *meshes):
            found = quantized(folder, scheme, name, inputs)
            results |= {f"{kind}/{scheme}/{name}": value for kind, value in found.items()}
    for name in ("one", LONG):
        found = stretched(folder, name, inputs)
        results |= {f"{kind}/{name}": value for kind, value in found.items()}
    for name in ("one", *ADAPTED):
        found = adapted(folder, name, inputs)
        results |= {f"{kind}/{name}": value for kind, value in found.items()}
    for name in ("one", *TRAINED):
        found = trained(folder, name, inputs)
        results |= {f"{kind}/{name}": value for kind, value in found.items()}
    for name in ("one", *HEARING):
        found = hear(folder / "audio", None if name == "one" else make_mesh(*MESHES[name]))
        results |= {f"{kind}/{name}": value for kind, value in found.items()}
    np.savez(folder / "results.npz", **results, **programs)


def quantized(folder: Path, scheme: Any, name: str, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """forward; greedy decoding and its program, and on a mesh what is saved, loaded and read of the files."""
    mesh = None if name == "one" else make_mesh(*MESHES[name])
    model = AutoModelForCausalLM.from_pretrained(folder, quantize=scheme, mesh=mesh)
    prompts = {"input_ids": inputs["ids"], "attention_mask": inputs["mask"]}
    found: dict[str, Any] = {"logits": np.asarray(model(**prompts).logits)}
    greedy = {"max_new_tokens": NEW, "do_sample": False}
    if mesh is None:
        found["greedy"] = model.generate(**prompts, **greedy)
    elif name in DECODING:
        with watched() as programs:
            found["greedy"] = model.generate(**prompts, **greedy)
        found["hlo"] = programs[0]
    model.save_pretrained(folder / scheme / name)
    drawn = AutoModelForCausalLM.from_config(model.config, seed=3, mesh=mesh)
    drawn.save_pretrained(folder / scheme / f"drawn-{name}")
    if mesh is None:
        return found
    stored = AutoModelForCausalLM.from_pretrained(folder / scheme / "one", mesh=mesh)
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding and np.array_equal(a, b), model.params, stored.params)
    reader = loading.ShardReader(model.module.sharding, np.dtype(np.float32))
    with open_checkpoint(folder) as checkpoint:
        shapes = model.module.sharding.stored_shapes(shapes_of(model.params))
        reader.load(checkpoint.quantized(scheme), shapes)
        nbytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    return found | {"same": np.asarray(jax.tree.all(same)), "read": np.asarray(reader.counter.nbytes / nbytes)}


def stretched(folder: Path, name: str, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """Greedy decoding of one row, its prompt in two parts, where devices share its KV cache out by slots."""
    row = {"input_ids": inputs["ids"][:1], "max_new_tokens": NEW, "prefill_chunk_size": 4, "do_sample": False}
    if name == "one":
        return {"long": AutoModelForCausalLM.from_pretrained(folder).generate(**row)}
    mesh, axes = make_mesh(*MESHES[name]), {"slots": ("data",)}
    model = AutoModelForCausalLM.from_pretrained(folder, mesh=mesh, mesh_axes=axes)
    with watched() as programs:
        output = model.generate(**row, return_dict_in_generate=True)
    places = [str(leaf.sharding.spec[2]) for leaf in jax.tree.leaves(output.past_key_values.layers)]
    return {"long": output.sequences, "places": np.asarray(places), "long-hlo": programs[0]}


def adapted(folder: Path, name: str, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """Adapters drawn, loaded and saved, beside the weights and merged, and one for each row."""
    mesh = None if name == "one" else make_mesh(*MESHES[name])
    model = together = AutoModelForCausalLM.from_pretrained(folder, mesh=mesh)
    prompts = {"input_ids": inputs["ids"], "attention_mask": inputs["mask"]}
    found = {}
    for kind, config in ADAPTERS.items():
        model.add_adapter(config, seed=3).save_adapter(folder / "drawn" / name / kind)
        loaded = model.load_adapter(folder / "drawn" / "one" / kind)
        loaded.save_adapter(folder / "loaded" / name / kind)
        together = together.load_adapter(folder / "drawn" / "one" / kind, kind)
        if kind != "small":
            found[kind] = np.asarray(loaded(**prompts).logits)
            if mesh is not None:
                found[f"merged-{kind}"] = np.asarray(loaded.merge_adapter()(**prompts).logits)
    names = ["plain", "__base__", "small", "small", "plain", "plain", "__base__", "small"]
    return found | {"mixed": np.asarray(together(**prompts, adapter_names=names).logits)}


def trained(folder: Path, name: str, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """Steps of training with momentum: losses, the gradients of the first, and the parameters after the last."""
    mesh = None if name == "one" else make_mesh(*MESHES[name])
    model = AutoModelForCausalLM.from_pretrained(folder, mesh=mesh)
    params = model.params if mesh is None else model.module.sharding.undo_heads(model.params)
    optimizer = optax.chain(optax.trace(0.9), optax.scale(-0.05))
    state = TrainState.create({"params": params}, optimizer)
    batch = {"input_ids": inputs["ids"], "labels": inputs["ids"]}
    step = jax.jit(make_train_step(model.module, optimizer, loss_chunk=CHUNK)).lower(state, batch).compile()
    losses, found = [], {"logits/tokens": tokens_with_logits(step.as_text(), model.config, mesh)}
    for _ in range(4):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        if len(losses) == 1:
            found |= flattened("gradient", state.opt_state[0].trace["params"])
    return found | flattened("trained", state.trainable["params"]) | {"losses": np.asarray(losses)}


def tokens_with_logits(text: str, config: Any, mesh: Any) -> int:
    """The most tokens whose logits a device has in one array of a compiled program."""
    own = config.vocab_size // (1 if mesh is None else mesh.shape["tensor"])
    shapes = [[int(n) for n in shape.split(",")] for shape in re.findall(r"\[(\d+(?:,\d+)+)\]", text)]
    return max(math.prod(shape) // own for shape in shapes if own in shape and config.hidden_size not in shape)


def flattened(kind: str, tree: Any) -> dict[str, Any]:
    """Each leaf of a tree of parameters, by its tensor's name behind `kind`."""
    return {f"{kind}/{to_name(path)}": np.asarray(leaf) for path, leaf in flax.traverse_util.flatten_dict(tree).items()}


def hear(folder: Path, mesh: Any) -> dict[str, np.ndarray]:
    """Qwen2-Audio: forward and greedy decoding of rows with clips; saves the weights into a folder."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, mesh=mesh)
    prompts = dict(np.load(folder / "inputs.npz"))
    greedy = model.generate(**prompts, max_new_tokens=NEW, do_sample=False)
    if mesh is not None:
        model.save_pretrained(folder / "saved", to="pytorch")
    return {"heard": np.asarray(model(**prompts).logits), "answer": greedy}


def run(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """forward and greedy decoding of left-padded prompts."""
    prompts = {"input_ids": inputs["ids"], "attention_mask": inputs["mask"]}
    greedy = model.generate(**prompts, max_new_tokens=NEW, do_sample=False)
    before = compilations()
    again = model.generate(
        inputs["ids"][::-1], attention_mask=inputs["mask"][::-1], max_new_tokens=NEW, do_sample=False
    )
    assert (again == greedy[::-1]).all()
    compiled = np.asarray(compilations() - before)
    return {"logits": np.asarray(model(**prompts).logits), "greedy": greedy, "compiled": compiled}


def run_everything(model: Any, inputs: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """The other kinds of decoding, and everything in which heads show; saves the weights into a folder."""
    prompts = {"input_ids": inputs["ids"], "attention_mask": inputs["mask"], "max_new_tokens": NEW}
    settings = {"do_sample": True, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 7}
    first = model.generate(**prompts, do_sample=False, return_dict_in_generate=True, output_logits=True)
    longer = {"input_ids": np.concatenate([first.sequences, inputs["ids"][:, :3]], axis=1), "max_new_tokens": NEW}
    longer["attention_mask"] = np.pad(inputs["mask"], ((0, 0), (0, NEW + 3)), constant_values=1)
    biased = model(inputs["ids"], attention_mask=inputs["bias"], output_attentions=True)
    model.save_pretrained(folder, to="pytorch")
    model.save_pretrained(folder / "orbax", to="orbax")
    other = AutoModelForCausalLM.from_pretrained(folder / "orbax", mesh=make_mesh(tensor=2, fsdp=4))
    return run_kernels(model, inputs) | {
        "beams": model.generate(**prompts, num_beams=3, num_return_sequences=2, do_sample=False),
        "sampled": model.generate(**prompts, **settings, num_return_sequences=2),
        "host": model.generate(**prompts, do_sample=False, prefix_allowed_tokens_fn=lambda row, ids: [row + 1, 7, 30]),
        "steps": np.stack(first.logits),
        "continued": model.generate(**longer, past_key_values=first.past_key_values, do_sample=False),
        "biased": np.asarray(biased.logits),
        "restored": np.asarray(other(inputs["ids"], inputs["mask"]).logits),
        "attentions": np.stack(biased.attentions),
    }


def run_saved(model: Any, inputs: dict[str, np.ndarray], path: Path) -> np.ndarray:
    """Greedy tokens by programs from a file, which compile nothing."""
    prompts = {"input_ids": inputs["ids"], "attention_mask": inputs["mask"], "max_new_tokens": NEW}
    model.save_programs(path, [8], [9], max_new_tokens=NEW, do_sample=False)
    loaded = model.load_programs(path)
    before = compilations()
    greedy = loaded.generate(**prompts, do_sample=False)
    assert compilations() == before
    return np.asarray(greedy)


def run_kernels(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Logits of longer left-padded prompts by splash attention, interpreted, by a CPU's blocks, and by the plain one.

    And whether kernels run.
    """
    ids = np.tile(inputs["ids"], (1, 12))[:, :100]
    mask = np.arange(100)[None] >= 5 * np.arange(8)[:, None]
    options = {"max_new_tokens": 2, "return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    found = {}
    for name in ("xla", "splash", "blocks"):
        attention = Attention(prefill=name, interpret=True)
        by = dataclasses.replace(model, module=model.module.clone(attention=attention))
        if name != "xla" or model.module.sharding is None:
            found[name] = np.stack(by.generate(ids, attention_mask=mask, **options).logits)
        cache = init_cache(by.module.config, 8, 128, np.float32)
        cache = cache.replace(length=cache.length[0])
        run = partial(by.module.apply, past_key_values=cache)
        program = jax.make_jaxpr(run)(by.variables, np.ones((8, 128), np.int32))
        found[f"kernels of {name}"] = np.asarray("pallas_call" in str(program))
    return found


@contextmanager
def watched() -> Iterator[list[str]]:
    """Decoding programs that generate() of a model on a mesh runs within, as optimised HLO."""
    texts: list[str] = []
    decode = loop.decode

    def look_and_run(*arguments: Any, **static: Any) -> Any:
        texts.append(decode.lower(*arguments, **static).compile().as_text())
        return decode(*arguments, **static)  # which jit does not compile again

    loop.decode = look_and_run
    try:
        yield texts
    finally:
        loop.decode = decode


COMPILED: list[str] = []


def compilations() -> int:
    """How many programs XLA has compiled so far."""
    return len(COMPILED)


def listen(event: str, duration: float, **_: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(event)


if __name__ == "__main__":
    jax.monitoring.register_event_duration_secs_listener(listen)
    main(Path(sys.argv[1]))
