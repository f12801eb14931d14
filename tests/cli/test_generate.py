"""`flaxqwen generate`: Transformers' tokens, streamed text, options, and prompts that must be refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from flaxqwen import AutoModelForCausalLM, LoraConfig
from flaxqwen.cli.generate import CompileClock, sampling_options
from flaxqwen.cli.text import TextStream, decoder, load_tokenizer
from flaxqwen.model import Model
from tests.cli.conftest import CHATML, END_OF_TURN, SENTENCE, Run, assert_refused, encode

GREEDY = ("--temperature", "0", "--json")


def transformers_tokens(folder: Path, prompt: list[int], **options: Any) -> list[int]:
    """The new tokens of Transformers' greedy search."""
    torch = pytest.importorskip("torch", reason="the oracle is Transformers' model: pip install flaxqwen[test]")
    import transformers

    model = transformers.Qwen2ForCausalLM.from_pretrained(folder)
    ids = torch.tensor([prompt])
    sequences = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    return sequences[0, len(prompt) :].tolist()


def test_json_has_transformers_greedy_tokens(run: Run, random_model: Path, rng: np.random.Generator):
    prompt = "".join(map(chr, rng.integers(32, 127, 20)))
    result = run("generate", random_model, f"x{prompt}", "--max-new-tokens", "30", *GREEDY)
    values = json.loads(result.out)
    assert values["prompt_tokens"] == encode(random_model, f"x{prompt}")
    expected = transformers_tokens(random_model, values["prompt_tokens"], max_new_tokens=30)
    assert values["new_tokens"] == expected
    assert values["text"] == load_tokenizer(random_model).decode(expected, skip_special_tokens=True)
    assert values["finish_reason"] == ("eos" if expected[-1] == END_OF_TURN else "length")
    assert values["model"] == str(random_model)
    names = ["load_seconds", "compile_seconds", "first_token_seconds", "decode_tokens_per_second"]
    assert list(values["timings"]) == names
    assert all(value is None or value > 0 for name, value in values["timings"].items() if name != "compile_seconds")
    assert (values["timings"]["decode_tokens_per_second"] is None) == (len(expected) == 1)
    assert result.err == ""


def test_what_is_traced_within_another_counts_once():
    @jax.jit
    def inner(x):
        time.sleep(0.05)
        return x + 1

    before = time.perf_counter()
    with CompileClock() as clock:
        jax.jit(lambda x: inner(inner(x) * 2))(np.ones(3))
        elapsed = time.perf_counter() - before
        assert 0.05 < clock.compiling < elapsed


def test_real_chat_template(run: Run, copied: Path, shared: Path):
    """Qwen2.5's own tokenizer and template, with a small model of that vocabulary."""
    import flaxqwen

    config = flaxqwen.AutoConfig.from_pretrained(copied, vocab_size=151936, tie_word_embeddings=True)
    flaxqwen.AutoModelForCausalLM.from_config(config).save_pretrained(copied, to="pytorch")
    for path in (shared / "data" / "tokenizer" / "qwen2.5-instruct").iterdir():
        copied.joinpath(path.name).write_bytes(path.read_bytes())
    args = ("generate", copied, "你好!", "--chat", "--system", "Answer.", "--max-new-tokens", "8", *GREEDY)
    values = json.loads(run(*args).out)
    text = "<|im_start|>system\nAnswer.<|im_end|>\n<|im_start|>user\n你好!<|im_end|>\n<|im_start|>assistant\n"
    assert values["prompt_tokens"] == encode(copied, text)
    assert values["new_tokens"] == transformers_tokens(copied, values["prompt_tokens"], max_new_tokens=8)


def test_text_is_the_answer_alone(run: Run, sentence_model: Path, monkeypatch: pytest.MonkeyPatch):
    for options in ([], ["--chat"], ["--no-stream"]):
        result = run("generate", sentence_model, "Speak.", *options)
        assert (result.code, result.out, result.err) == (0, f"{SENTENCE}\n", "")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run("generate", sentence_model, "Speak.").out == f"{SENTENCE}\n"


def test_terminal_gets_whole_characters_as_they_come(sentence_model: Path):
    tokenizer = load_tokenizer(sentence_model)
    pieces: list[str] = []
    stream = TextStream(decoder(tokenizer), pieces.append, now=lambda: 7.0)
    stream.put(np.asarray([[1, 2, 3]]))
    assert stream.first_at == 0
    tokens = [*encode(sentence_model, SENTENCE), END_OF_TURN]
    for token in tokens:
        stream.put(np.asarray([token]))
    assert pieces == list(SENTENCE)
    assert (stream.tokens, stream.text, stream.first_at) == (tokens, SENTENCE, 7.0)
    stream.put(np.asarray([encode(sentence_model, "🦜")[0]]))
    assert stream.text == SENTENCE
    stream.end()  # a character that was not finished
    assert pieces[-1] == "\ufffd"


def test_streams_between_chunks(run: Run, sentence_model: Path, monkeypatch: pytest.MonkeyPatch):
    pieces: list[str] = []
    monkeypatch.setattr("flaxqwen.cli.generate.print_now", pieces.append)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run("generate", sentence_model, "Speak.")
    assert "".join(pieces) == SENTENCE
    assert len(pieces) == len(SENTENCE)
    run("generate", sentence_model, "Speak.", "--no-stream")
    run("generate", sentence_model, "Speak.", "--json")
    assert len(pieces) == len(SENTENCE)


def test_finish_reasons(run: Run, sentence_model: Path, monkeypatch: pytest.MonkeyPatch):
    values = json.loads(run("generate", sentence_model, "Speak.", "--json").out)
    assert (values["finish_reason"], values["new_tokens"][-1]) == ("eos", END_OF_TURN)
    values = json.loads(run("generate", sentence_model, "Speak.", "--json", "--max-new-tokens", "1").out)
    assert (values["finish_reason"], len(values["new_tokens"])) == ("length", 1)
    assert values["timings"]["decode_tokens_per_second"] is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "stopped after 4 tokens" in run("generate", sentence_model, "Speak.", "--max-new-tokens", "4").err


def test_beams_of_the_models_own_config(run: Run, copied: Path):
    """A checkpoint may ask for beam search, which cannot stream: the text comes at the end."""
    path = copied / "generation_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(settings | {"num_beams": 3, "do_sample": False}))
    values = json.loads(run("generate", copied, "Hello", "--json", "--max-new-tokens", "5").out)
    model = AutoModelForCausalLM.from_pretrained(copied)
    prompt = np.asarray([values["prompt_tokens"]])
    want = model.generate(prompt, max_new_tokens=5)[0, prompt.shape[1] :].tolist()
    assert values["new_tokens"] == want
    result = run("generate", copied, "Hello", "--max-new-tokens", "5")
    assert (result.code, result.out) == (0, values["text"] + "\n")


def set_generation(folder: Path, **settings: Any) -> None:
    """Add to the model's own generation config."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_stop_strings_of_the_models_own_config(run: Run, sentence_model: Path, tmp_path: Path):
    """The command line has the tokenizer that they need."""
    folder = shutil.copytree(sentence_model, tmp_path / "model")
    set_generation(folder, stop_strings=[SENTENCE[2:4]])
    values = json.loads(run("generate", folder, "Speak.", "--json").out)
    assert (values["text"], values["finish_reason"]) == (SENTENCE[:4], "stop")
    whole = run("generate", folder, "Speak.", "--json", "--max-new-tokens", "2")
    assert json.loads(whole.out)["finish_reason"] == "length"


@pytest.mark.parametrize("beams", [1, 3])
def test_several_texts_of_the_models_own_config_are_one(
    run: Run, copied: Path, monkeypatch: pytest.MonkeyPatch, beams: int
):
    """The others would be computed, and dropped; greedy decoding has no others."""
    rows, generate = [], Model.generate

    def counting(model: Model, *args: Any, **options: Any) -> Any:
        output = generate(model, *args, **options)
        rows.append(len(output))
        return output

    monkeypatch.setattr(Model, "generate", counting)
    set_generation(copied, do_sample=True, num_beams=beams, num_return_sequences=2)
    for options in ((), ("--temperature", "0")):
        result = run("generate", copied, "Hello", "--max-new-tokens", "5", *options)
        assert (result.code, result.err) == (0, "")
    assert rows == [1, 1]


def test_a_system_message_that_is_no_text(run: Run, random_model: Path):
    assert_refused(run("generate", random_model, "Hi", "--chat", "--system", "\udcff"), "system message: not UTF-8")


def test_a_tokenizer_that_is_nested_too_deep(run: Run, copied: Path):
    (copied / "tokenizer_config.json").write_text("[" * 100_000 + "]" * 100_000)
    assert_refused(run("generate", copied, "Hi"), f"{copied}: a JSON file of the tokenizer is nested too deep")


def test_prompt_from_file_and_stdin(run: Run, random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "prompt.txt"
    file.write_text("Höre\n\n", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("Höre\n\n"))
    options = ("--max-new-tokens", "4", *GREEDY)
    from_file, from_stdin, from_argument = (
        json.loads(run("generate", random_model, *source, *options).out)
        for source in (["--file", file], ["-"], ["Höre\n"])
    )
    assert from_file["prompt_tokens"] == encode(random_model, "Höre\n")
    for values in (from_stdin, from_argument):
        assert values["prompt_tokens"] == from_file["prompt_tokens"]
        assert values["new_tokens"] == from_file["new_tokens"]


def test_ids_need_no_tokenizer(run: Run, copied: Path):
    with_text = json.loads(run("generate", copied, "Hello", "--max-new-tokens", "5", *GREEDY).out)
    for path in copied.glob("tokenizer*"):
        path.unlink()
    ids = " ".join(map(str, with_text["prompt_tokens"]))
    values = json.loads(run("generate", copied, "--ids", ids, "--max-new-tokens", "5", *GREEDY).out)
    assert (values["new_tokens"], values["text"]) == (with_text["new_tokens"], None)
    result = run("generate", copied, "--ids", ids.replace(" ", ","), "--max-new-tokens", "5", "--temperature", "0")
    assert list(map(int, result.out.split())) == values["new_tokens"]
    assert_refused(run("generate", copied, "Hello"), "no tokenizer", "--ids")
    assert_refused(run("generate", copied, "Hello", "--chat"), "no tokenizer", "--ids")
    assert_refused(run("chat", copied), "no tokenizer")


def test_without_template_no_chat(run: Run, copied: Path):
    path = copied / "tokenizer_config.json"
    path.write_text(path.read_text().replace(json.dumps(CHATML), "null"))
    assert_refused(run("generate", copied, "Hello", "--chat"), "no chat template")
    assert_refused(run("chat", copied), "no chat template")


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ((None, None, None, None, None), {}),
        ((0.0, None, None, None, None), {"do_sample": False}),
        ((0.7, None, None, None, None), {"do_sample": True, "temperature": 0.7}),
        ((None, 0.8, None, None, None), {"do_sample": True, "top_p": 0.8}),
        ((None, None, 0, None, None), {"do_sample": True, "top_k": 0}),
        ((0.0, None, None, 1.1, 3), {"do_sample": False, "repetition_penalty": 1.1, "seed": 3}),
        ((None, None, None, 1.1, 3), {"repetition_penalty": 1.1, "seed": 3}),
    ],
)
def test_sampling_options(given: tuple[Any, ...], options: dict[str, Any]):
    assert sampling_options(*given) == options


def test_sampling_follows_the_seed_and_the_models_config(run: Run, copied: Path):
    (copied / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 2.0, "top_k": 0}))

    def tokens(*options: Any) -> list[int]:
        return json.loads(run("generate", copied, "Hello", "--max-new-tokens", "12", "--json", *options).out)[
            "new_tokens"
        ]

    one = tokens("--seed", 1)
    assert one == tokens("--seed", 1)
    assert one != tokens("--seed", 2)
    greedy = tokens("--temperature", 0)
    assert greedy == transformers_tokens(copied, encode(copied, "Hello"), max_new_tokens=12)
    assert greedy != one


def test_length_defaults(run: Run, copied: Path):
    """The model's own; else 256, in the room that the context of 256 leaves."""
    ids = ("--ids", "1 2 3 4 5 6", "--json")
    (copied / "generation_config.json").write_text("{}")
    assert len(json.loads(run("generate", copied, *ids).out)["new_tokens"]) == 250
    (copied / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3}))
    assert len(json.loads(run("generate", copied, *ids).out)["new_tokens"]) == 3
    (copied / "generation_config.json").write_text(json.dumps({"max_length": 10}))
    assert len(json.loads(run("generate", copied, *ids).out)["new_tokens"]) == 4


@pytest.mark.filterwarnings("default::UserWarning")
def test_past_the_context_is_a_warning(run: Run, random_model: Path):
    result = run("generate", random_model, "--ids", " ".join(["7"] * 254), "--max-new-tokens", "4", "--json")
    assert len(json.loads(result.out)["new_tokens"]) == 4
    (line,) = result.err.splitlines()
    assert line.startswith("warning: ")
    assert "256" in line


def test_dtype(run: Run, random_model: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    generate = Model.generate
    monkeypatch.setattr(
        Model, "generate", lambda self, *a, **k: seen.append(self.dtype.name) or generate(self, *a, **k)
    )
    for dtype in ("auto", "bfloat16"):
        assert run("generate", random_model, "a", "--max-new-tokens", "1", "--dtype", dtype).code == 0
    assert seen == ["float32", "bfloat16"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--ids", ""], ["--ids"]),
        (["--ids", "1 two"], ["'two'"]),
        (["--ids", "1 264"], ["264", "263"]),
        (["--ids", "1,-5"], ["-5"]),
        (["--ids", "9" * 30], ["integer"]),
        (["--ids", "7 " * 257], ["257", "256"]),
        ([""], ["prompt is empty"]),
        (["", "--chat"], ["prompt is empty"]),
        (["y" * 300], ["300", "256"]),
        (["\udcff"], ["UTF-8"]),
        (["--file", "absent.txt"], ["absent.txt", "No such file"]),
    ],
)
def test_bad_prompts_are_refused(run: Run, random_model: Path, args: list[str], words: list[str]):
    assert_refused(run("generate", random_model, *args), *words)


def test_bad_files_are_refused(run: Run, random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\n")
    assert_refused(run("generate", random_model, "--file", file), "prompt.txt: empty")
    file.write_bytes(b"\xff\xfe")
    assert_refused(run("generate", random_model, "--file", file), "prompt.txt: not UTF-8")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert_refused(run("generate", random_model, "-"), "prompt is empty")


def test_options_that_generate_refuses(run: Run, copied: Path):
    assert_refused(run("generate", copied, "a", "--repetition-penalty", "0"), "repetition_penalty")
    (copied / "generation_config.json").write_text(json.dumps({"num_beams": "many"}))
    assert_refused(run("generate", copied, "a"), "generation_config.json", "num_beams")


def test_constrained_and_drafted(run: Run, random_model: Path, tmp_path: Path):
    """--regex and --json-schema hold; a draft model changes nothing."""
    pytest.importorskip("outlines_core", reason="--regex needs it: pip install flaxqwen[grammar]")
    args = ("generate", random_model, "x", "--max-new-tokens", "12")
    digits = run(*args, "--regex", "[0-9]{2}", *GREEDY)
    assert len(json.loads(digits.out)["text"]) == 2
    assert json.loads(digits.out)["text"].isdigit()
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["yes", "no"]}')
    assert json.loads(run(*args, "--json-schema", schema, *GREEDY).out)["text"] in ('"yes"', '"no"')
    drafted = run(*args, "--assistant", random_model, *GREEDY)
    assert json.loads(drafted.out)["new_tokens"] == json.loads(run(*args, *GREEDY).out)["new_tokens"]
    assert_refused(run(*args, "--regex", "a", "--json-schema", schema), "give one of them")
    assert_refused(run(*args, "--regex", "(a"), "cannot be compiled")
    assert_refused(run(*args, "--json-schema", tmp_path / "none.json"), "none.json")
    schema.write_bytes(b"\xff{}")
    assert_refused(run(*args, "--json-schema", schema), f"{schema.name}: not UTF-8 text")


COUNTED = """
import sys
import time
from flaxqwen.cli.entry import keep_compiled_programs, main
keep_compiled_programs()
import jax
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rsplit("/")[-1]))
code = main(sys.argv[1:])
print(code, events.count("cache_hits"), events.count("cache_misses"))
"""


def test_a_second_process_compiles_nothing(random_model: Path, tmp_path: Path):
    """The programs are kept under the user's cache: the first process compiles them, the second loads every one."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMP")} | {
        "XDG_CACHE_HOME": str(tmp_path)
    }
    words = ["generate", str(random_model), "--ids", "1 2 3", *GREEDY]
    counted, installed = [sys.executable, "-c", COUNTED], [str(Path(sys.executable).parent / "flaxqwen")]

    def run(command: list[str], **changes: str) -> str:
        environ = environment | changes
        done = subprocess.run(command + words, env=environ, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout

    off = {"XDG_CACHE_HOME": str(tmp_path / "other"), "JAX_ENABLE_COMPILATION_CACHE": "0"}
    run(installed, **off)
    assert not (tmp_path / "other").exists()
    run(installed)
    compiled = {path.name for path in (tmp_path / "flaxqwen" / "compiled").iterdir()}
    code, hits, misses = map(int, run(counted).splitlines()[-1].split())
    assert (code, misses) == (0, 0)
    assert hits == sum(name.endswith("-cache") for name in compiled) >= 2
    assert {path.name for path in (tmp_path / "flaxqwen" / "compiled").iterdir()} == compiled


def test_adapter(run: Run, random_model: Path, tmp_path: Path):
    """--adapter generates with it."""
    model = AutoModelForCausalLM.from_pretrained(random_model)
    config = LoraConfig(r=4, lora_alpha=256, target_modules="all-linear", init_lora_weights=False)
    adapted = model.add_adapter(config, seed=3)
    adapted.save_adapter(tmp_path)
    args = ("generate", random_model, "--ids", "1,2,3", "--max-new-tokens", "6", *GREEDY)
    plain, got = (json.loads(run(*args, *more).out)["new_tokens"] for more in ((), ("--adapter", tmp_path)))
    want = adapted.generate(np.array([[1, 2, 3]]), max_new_tokens=6, do_sample=False)[0, 3:]
    assert got == want.tolist()
    assert got != plain
    assert_refused(run(*args, "--adapter", random_model), "no adapter_config.json")
