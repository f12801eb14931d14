"""model.save_programs() and load_programs(): another process compiles nothing, and has the same tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest

from flaxqwen import AutoModelForCausalLM, Qwen2Config
from flaxqwen.generation import programs
from tests.reference import counted_compilations, padded_mask, random_ids, tiny

CONFIG = tiny(vocab_size=339, num_hidden_layers=1, max_position_embeddings=2048)
OPTIONS = {"max_new_tokens": 24, "do_sample": True, "top_k": 5, "eos_token_id": [3]}
OTHER_VALUES = {"temperature": 0.7, "top_k": 9, "eos_token_id": None, "seed": 5}

OTHER_PROCESS = """
import json, sys
import jax, numpy as np
events = []
jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: events.append(event))
from flaxqwen import AutoModelForCausalLM
folder, calls = sys.argv[1], json.loads(sys.argv[2])
with jax.default_matmul_precision("highest"):
    model = AutoModelForCausalLM.from_pretrained(folder)
    events.clear()
    model = model.load_programs(folder + "/programs")
    tokens = [model.generate(**call).tolist() for call in calls]
counted = [sum(event.endswith(name) for event in events) for name in ("trace_duration", "backend_compile_duration")]
print(json.dumps([counted, tokens]))
"""


def generate_elsewhere(folder, calls):
    """How often another process traced and compiled, and the tokens of its calls of generate()."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMP")}
    command = [sys.executable, "-c", OTHER_PROCESS, str(folder), json.dumps(calls)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_config(Qwen2Config.from_dict(CONFIG), seed=3)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A folder with the model and its programs, for two rows of 500 tokens."""
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    with jax.default_matmul_precision("highest"):
        model.save_programs(folder / "programs", [2], [500], **OPTIONS)
    return folder


def test_another_process_compiles_nothing(rng, model, saved):
    """Nor does it trace: with and without padding, across 512 tokens, with other values of the same options."""
    calls = []
    for changes, shorter in (({}, 496), ({}, 500), (OTHER_VALUES, 496)):
        mask = padded_mask([500, shorter], 500, "left").tolist()
        calls.append({"input_ids": random_ids(rng, (2, 500), 339).tolist(), "attention_mask": mask, "seed": 1})
        calls[-1] |= OPTIONS | changes
    (traced, compiled), tokens = generate_elsewhere(saved, calls)
    assert traced == compiled == 0
    for call, theirs in zip(calls, tokens, strict=True):
        assert model.generate(**call).tolist() == theirs


def test_another_call_compiles(rng, model, saved):
    """Of another length, by other processors, at another precision: with the tokens that it has anyway."""
    loaded = model.load_programs(saved / "programs")
    ids = random_ids(rng, (2, 500), 339)
    for call in ({"inputs": ids[:, :100]}, {"inputs": ids, "do_sample": False, "top_k": None}):
        call = OPTIONS | {"seed": 2} | call
        with counted_compilations() as compiled:
            ours = loaded.generate(**call)
        assert compiled
        assert (ours == model.generate(**call)).all()
    with jax.default_matmul_precision("bfloat16"), counted_compilations() as compiled:
        loaded.generate(ids, **OPTIONS)
    assert compiled


def test_options_that_make_programs(rng, model, tmp_path):
    options = OPTIONS | {"prefill_chunk_size": 16, "num_return_sequences": 2, "cache_dtype": "int8"}
    model.save_programs(tmp_path / "programs", [1], [40], **options)
    loaded, ids = model.load_programs(tmp_path / "programs"), random_ids(rng, (1, 40), 339)
    jax.clear_caches()
    with counted_compilations() as compiled:
        ours = loaded.generate(ids, **options, seed=4)
    assert not compiled
    assert (ours == model.generate(ids, **options, seed=4)).all()


def test_what_came_from_jaxs_own_cache(rng, model, tmp_path):
    """Programs that this process has from JAX's persistent cache are compiled again: they cannot be saved."""
    settings = {"jax_compilation_cache_dir": str(tmp_path / "cache"), "jax_persistent_cache_min_compile_time_secs": 0}
    before = {name: getattr(jax.config, name) for name in settings}
    ids, options = random_ids(rng, (1, 7), 339), {"max_new_tokens": 3}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        programs.reset_cache()
        for _ in range(2):
            jax.clear_caches()
            expected = model.generate(ids, **options)
        assert list((tmp_path / "cache").iterdir())
        model.save_programs(tmp_path / "programs", [1], [7], **options)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        programs.reset_cache()
    jax.clear_caches()
    assert (model.load_programs(tmp_path / "programs").generate(ids, **options) == expected).all()


def test_files_add_up(rng, model, tmp_path):
    for rows in (1, 2):
        model.save_programs(tmp_path / f"{rows}", [rows], [7], max_new_tokens=3)
    loaded = model.load_programs(tmp_path / "1").load_programs(tmp_path / "2")
    jax.clear_caches()
    with counted_compilations() as compiled:
        for rows in (1, 2):
            loaded.generate(random_ids(rng, (rows, 7), 339), max_new_tokens=3)
    assert not compiled


def test_the_cache_stays_in_place(model, saved):
    """A loaded program updates the state that it is given: the cache is donated, and not copied."""
    compiled = model.load_programs(saved / "programs").programs.compiled
    decoding = [program for key, program in compiled.items() if key[1] == "decode"]
    assert len(decoding) == 4  # with padding and without, within 512 slots and beyond
    cache = 2 * 2 * 2 * 1024 * 16 * 4  # keys and values of 2 rows, 2 heads, 1,024 slots, 16 floats
    assert all(program.memory_analysis().alias_size_in_bytes >= cache for program in decoding)


def test_an_adapter_is_not_left_out(rng, model, saved):
    """Programs without it do not fit the model with it."""
    from flaxqwen import LoraConfig

    loaded = model.load_programs(saved / "programs")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ids = random_ids(rng, (2, 500), 339)
    with counted_compilations() as compiled:
        ours = loaded.add_adapter(config).generate(ids, **OPTIONS, seed=6)
    assert compiled
    assert (ours == model.add_adapter(config).generate(ids, **OPTIONS, seed=6)).all()


def rewrite(source, target, change):
    """A file of programs with another header."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            text = old.read(name)
            new.writestr(name, json.dumps(change(json.loads(text))) if name == programs.HEADER else text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "TPU v5"}, "compiled for device TPU v5, here it is cpu"),
        ({"version of": {"jax": "0.1"}}, "compiled for version of jax 0.1, here it is "),
        ({"code of flaxqwen": "0"}, "compiled for code of flaxqwen 0, here it is "),
        ({"processor": "x86_64 0"}, "compiled for processor x86_64 0, here it is "),
    ],
)
def test_made_elsewhere(model, saved, tmp_path, changes, message):
    rewrite(saved / "programs", tmp_path / "other", lambda header: header | changes)
    with pytest.raises(ValueError, match=message) as error:
        model.load_programs(tmp_path / "other")
    assert str(tmp_path / "other") in str(error.value)


@pytest.mark.parametrize(
    ("changes", "dtype", "message"),
    [
        ({"num_hidden_layers": 2}, None, "config num_hidden_layers 1, here it is 2"),
        ({"rms_norm_eps": 1e-5}, None, "config rms_norm_eps 1e-06, here it is 1e-05"),
        ({}, "bfloat16", "config dtype float32, here it is bfloat16"),
    ],
)
def test_made_for_another_model(saved, changes, dtype, message):
    other = AutoModelForCausalLM.from_config(Qwen2Config.from_dict(CONFIG | changes), dtype=dtype)
    with pytest.raises(ValueError, match=message):
        other.load_programs(saved / "programs")


def test_no_such_file_or_a_damaged_one(rng, model, saved, tmp_path):
    with pytest.raises(FileNotFoundError):
        model.load_programs(tmp_path / "none")
    data = (saved / "programs").read_bytes()
    damaged = {"cut": data[: len(data) // 2], "other": b"text"}
    for place in rng.integers(len(data) // 4, 3 * len(data) // 4, 8):  # in the programs
        damaged[f"byte {place}"] = data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="no file of save_programs"):
            model.load_programs(tmp_path / name)


def test_a_file_is_written_whole_or_not_at_all(model, tmp_path, monkeypatch):
    (tmp_path / "programs").write_text("before")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(programs.serialize_executable, "serialize", fail)
    with pytest.raises(OSError, match="no space"):
        model.save_programs(tmp_path / "programs", [1], [7], max_new_tokens=3)
    assert [path.name for path in tmp_path.iterdir()] == ["programs"]
    assert (tmp_path / "programs").read_text() == "before"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits_processor": [lambda ids, scores, cur_len: scores]}, "does not take logits_processor"),
        ({"num_beams": 2}, "does not cover num_beams=2"),
    ],
)
def test_refused(model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        model.save_programs(tmp_path / "programs", [1], [7], **options)
    assert not list(tmp_path.iterdir())


def test_numbers_of_other_settings_are_not_taken(model):
    """The key of a program has the precision of products in it."""
    arguments = (np.zeros(3, np.float32),)
    keys = set()
    for precision in ("highest", "bfloat16"):
        with jax.default_matmul_precision(precision):
            keys.add(programs.key_of(jax.jit(lambda x: x), arguments, {}))
    assert len(keys) == 2
