"""Runs a checkpoint on one device and on meshes of 8 simulated ones: python -m tests.mesh_worker FOLDER.

Reads inputs.npz in FOLDER, writes results.npz: every result under `name/mesh`. Apart from the tests, because the number
of devices is fixed when jax starts.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

# The programs are tiny: compiling them is nearly all of the time.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import jax
import numpy as np

from flaxqwen import AutoModelForCausalLM, AutoModelForSeq2SeqLM, make_mesh
from flaxqwen.cache import init_cache
from flaxqwen.generation import loop
from flaxqwen.ops.dispatch import Attention

MESHES = {"8x1": (8, 1, 1), "1x8": (1, 1, 8), "2x4": (2, 1, 4), "4x2": (4, 1, 2), "fsdp": (1, 4, 2)}
# Where beams, sampling and what users see of heads run too: heads are padded and repeated, and rows cut, there.
EVERYTHING = ("2x4",)
# Where Qwen2-Audio runs: heads are padded, clips and weights are cut.
HEARING = ("2x4", "fsdp")
# Whose decoding programs are looked at.
DECODING = ("1x8", "2x4", "4x2")
NEW = 8


def main(folder: Path) -> None:
    """Run everything."""
    jax.config.update("jax_default_matmul_precision", "highest")
    inputs = dict(np.load(folder / "inputs.npz"))
    results: dict[str, Any] = {}
    programs: dict[str, str] = {}
    for name, sizes in {"one": None, **MESHES}.items():
        model = AutoModelForCausalLM.from_pretrained(folder, mesh=None if sizes is None else make_mesh(*sizes))
        assert model.config.num_attention_heads == 14
        kinds = run_everything(model, inputs, folder / name) if name in ("one", *EVERYTHING) else {}
        found = {**run(model, inputs), **kinds}
        results |= {f"{kind}/{name}": value for kind, value in found.items()}
        if name in DECODING:
            programs[f"hlo/{name}"] = decode_program(model, inputs)
    for name in ("one", *HEARING):
        found = hear(folder / "audio", None if name == "one" else make_mesh(*MESHES[name]))
        results |= {f"{kind}/{name}": value for kind, value in found.items()}
    np.savez(folder / "results.npz", **results, **programs)


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
    model.save_programs(folder / "programs", [8], [9], max_new_tokens=NEW, do_sample=False)
    loaded = model.load_programs(folder / "programs")
    before = compilations()
    greedy = loaded.generate(**prompts, do_sample=False)
    assert compilations() == before
    other = AutoModelForCausalLM.from_pretrained(folder / "orbax", mesh=make_mesh(tensor=2, fsdp=4))
    return run_kernels(model, inputs) | {
        "beams": model.generate(**prompts, num_beams=3, num_return_sequences=2, do_sample=False),
        "sampled": model.generate(**prompts, **settings, num_return_sequences=2),
        "host": model.generate(**prompts, do_sample=False, prefix_allowed_tokens_fn=lambda row, ids: [row + 1, 7, 30]),
        "loaded": greedy,
        "steps": np.stack(first.logits),
        "continued": model.generate(**longer, past_key_values=first.past_key_values, do_sample=False),
        "biased": np.asarray(biased.logits),
        "restored": np.asarray(other(inputs["ids"], inputs["mask"]).logits),
        "attentions": np.stack(biased.attentions),
    }


def run_kernels(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Logits of longer left-padded prompts by splash attention, interpreted, and by the plain one; do kernels run?"""
    ids = np.tile(inputs["ids"], (1, 12))[:, :100]
    mask = np.arange(100)[None] >= 5 * np.arange(8)[:, None]
    options = {"max_new_tokens": 2, "return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    found = {}
    for name, attention in (("plain", Attention()), ("splash", Attention(prefill="splash", interpret=True))):
        by = dataclasses.replace(model, module=model.module.clone(attention=attention))
        found[name] = np.stack(by.generate(ids, attention_mask=mask, **options).logits)
        cache = init_cache(by.module.config, 8, 128, np.float32)
        cache = cache.replace(length=cache.length[0])
        run = partial(by.module.apply, past_key_values=cache)
        program = jax.make_jaxpr(run)(by.variables, np.ones((8, 128), np.int32))
        found[f"kernels of {name}"] = np.asarray("pallas_call" in str(program))
    return found


def decode_program(model: Any, inputs: dict[str, np.ndarray]) -> str:
    """The compiled decoding program of greedy generate(), as optimised HLO."""
    texts: list[str] = []
    decode = loop.decode

    def spy(*arguments: Any, **static: Any) -> Any:
        texts.append(decode.lower(*arguments, **static).compile().as_text())
        return decode(*arguments, **static)

    loop.decode = spy
    try:
        model.generate(inputs["ids"], max_new_tokens=2, do_sample=False)
    finally:
        loop.decode = decode
    return texts[0]


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
