"""`flaxqwen generate --audio`, and `/audio` in a chat, on a tiny Qwen2-Audio with the real tokenizer and features."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flaxqwen import AutoModelForSeq2SeqLM, load_audio, process_audio
from flaxqwen.cli.chat import Conversation, answer, obey
from flaxqwen.cli.text import TextStream, decoder, load_processor
from flaxqwen.generation import audio
from tests.cli.conftest import Run, assert_refused, save_audio_model

soundfile = pytest.importorskip("soundfile", reason="reads audio: pip install 'flaxqwen[audio]'")
NEW = 6


@pytest.fixture(scope="module")
def folder(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_audio_model(tmp_path_factory.mktemp("audio") / "model", shared)


@pytest.fixture(scope="module")
def speech(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """11 s of wav, and 33 s of flac with two equal channels."""
    short = shared / "data/audio/jfk.wav"
    samples, _ = soundfile.read(short)
    long = tmp_path_factory.mktemp("speech") / "long.flac"
    soundfile.write(long, np.stack([np.tile(samples, 3)] * 2, axis=1), 16000)
    return short, long


def theirs_of(folder: Path, text: str, waveforms: list[np.ndarray]) -> tuple[list[int], list[int]]:
    """Prompt and greedy tokens by Transformers alone; clips are of 30 s at most."""
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    import transformers

    processor = transformers.AutoProcessor.from_pretrained(folder)
    inputs = processor(text=text, audio=waveforms, sampling_rate=16000, return_tensors="pt")
    model = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=NEW)[0].tolist()
    length = inputs["input_ids"].shape[1]
    return tokens[:length], tokens[length:]


@pytest.mark.parametrize("chat", [False, True])
def test_generate(run: Run, folder: Path, speech: tuple[Path, Path], chat: bool):
    """The tokens of Transformers, given the same clips: the longer one as windows of 30 s and 3 s."""
    arguments = [argument for path in speech for argument in ("--audio", path)]
    options = ["--chat", "--system", "Hear."] if chat else []
    result = run("generate", folder, "What is said?", *arguments, *options, "--max-new-tokens", NEW, "--json")
    assert result.code == 0, result.err
    short, long = map(load_audio, speech)
    clips = "<|audio_bos|><|AUDIO|><|audio_eos|>", "<|audio_bos|><|AUDIO|><|AUDIO|><|audio_eos|>"
    text = f"{clips[0]}{clips[1]}What is said?"
    if chat:
        text = (
            "<|im_start|>system\nHear.<|im_end|>\n<|im_start|>user\n"
            f"Audio 1: {clips[0]}\nAudio 2: {clips[1]}\nWhat is said?<|im_end|>\n<|im_start|>assistant\n"
        )
    prompt, new = theirs_of(folder, text, [short, long[:480000], long[480000:]])
    found = json.loads(result.out)
    assert found["prompt_tokens"] == prompt
    assert found["new_tokens"] == new


def test_refusals(run: Run, folder: Path, random_model: Path, speech: tuple[Path, Path], tmp_path: Path):
    short, long = speech
    assert_refused(run("generate", random_model, "What?", "--audio", short), "--audio is for Qwen2-Audio", "'qwen2'")
    assert_refused(run("generate", folder, "--ids", "1 2", "--audio", short), "--audio goes with a text")
    assert_refused(run("generate", folder, "What?", "--audio", tmp_path / "none.wav"), "none.wav", "no such audio file")
    text = tmp_path / "text.wav"
    text.write_text("What is said here?")
    assert_refused(run("generate", folder, "What?", "--audio", text), "text.wav", "not audio that can be read")
    raw = tmp_path / "samples.raw"
    raw.write_bytes(bytes(64))
    assert_refused(
        run("generate", folder, "What?", "--audio", raw), "samples.raw: raw samples, without a sampling rate"
    )
    three = ["--audio", long] * 3
    assert_refused(run("generate", folder, "What?", *three), "tokens, the model's context is 2048: shorten it")
    assert_refused(run("generate", folder, "<|AUDIO|> or <|AUDIO|>?", "--audio", short), "2 <|AUDIO|>", "1 clips")
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("preprocessor_config.json", "*.safetensors"))
    assert_refused(run("generate", bare, "What?", "--audio", short), "no processor (preprocessor_config.json")
    assert_refused(run("convert", folder, tmp_path / "int8", "--quantize", "int8"), "does not run quantized yet")
    assert not (tmp_path / "int8").exists()
    assert_refused(run("train", folder, text, "--out", tmp_path / "out"), "a Qwen2-Audio, which this command does not")
    assert_refused(run("batch", folder, text, tmp_path / "out"), "a Qwen2-Audio, which this command does not run")
    assert not (tmp_path / "out").exists()


def test_one_clip_and_files(folder: Path, speech: tuple[Path, Path]):
    """As Transformers' processor takes them: a waveform alone, a file, none."""
    processor, path = load_processor(folder), speech[0]
    text = "<|audio_bos|><|AUDIO|><|audio_eos|>What?"
    wanted = process_audio(processor, text, [load_audio(path)])
    for given in (load_audio(path), path, str(path), [path]):
        found = process_audio(processor, text, given)
        assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    assert process_audio(processor, "What?", None).keys() == {"input_ids", "attention_mask"}


def test_parity(run: Run, folder: Path, speech: tuple[Path, Path], tmp_path: Path):
    """Of every module, the audio tower's too; and of a checkpoint in Flax's files, which Transformers cannot read."""
    pytest.importorskip("torch", reason="parity compares with PyTorch")
    flax = tmp_path / "flax"
    assert run("convert", folder, flax).code == 0
    second = tmp_path / "second.wav"  # of speech: each position has 152,000 logits
    soundfile.write(second, load_audio(speech[0])[16000:32000], 16000)
    result = run("parity", flax, "--audio", second, "--steps", 4, "--json", "--report", tmp_path / "report")
    report = json.loads(result.out)
    assert report["passed"], result.out
    names = [module["name"] for module in report["ours"]["modules"]]
    audio_names = ["model.audio_tower.layers.0", "model.audio_tower.layer_norm", "model.multi_modal_projector"]
    layer = "model.language_model.layers.0"
    assert names == [
        "model.language_model.embed_tokens", *audio_names, f"{layer}.self_attn", f"{layer}.mlp", layer,
        "model.language_model.norm", "logits",
    ]  # fmt: skip
    assert (tmp_path / "report/parity.png").stat().st_size > 10000
    assert all(module["max_rel"] <= 2e-5 for module in report["ours"]["modules"])
    assert len(report["ours"]["kl"]) > 2 * 25  # the positions of both prompts
    assert_refused(run("parity", folder), "parity of Qwen2-Audio needs audio: --audio FILE")


def test_chat(folder: Path, speech: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: Any):
    """Each turn runs the encoder over its own clips alone, and answers as without a cache; a cleared one hears anew."""
    counts: list[int] = []
    program = audio.encode_clips

    def counting(module: Any, variables: Any, features: Any, frames: Any, count: Any, **static: Any) -> Any:
        counts.append(int(count))
        return program(module, variables, features, frames, count, **static)

    monkeypatch.setattr(audio, "encode_clips", counting)
    model, processor = AutoModelForSeq2SeqLM.from_pretrained(folder), load_processor(folder)
    conversation = Conversation(model, processor.tokenizer, None, NEW, {}, processor)

    def asked(message: str) -> list[int]:
        stream = TextStream(decoder(processor.tokenizer))
        conversation.ask(message, stream)
        return stream.tokens

    def without_cache() -> list[int]:
        text = processor.apply_chat_template(conversation.messages[:-1], add_generation_prompt=True, tokenize=False)
        inputs = process_audio(processor, text, conversation.clips)
        new = model.generate(**inputs, max_new_tokens=NEW)[0, inputs["input_ids"].shape[1] :]
        return new.tolist()

    heard = []
    for paths, message in ((speech[:1], "What is said?"), ((), "Is it?"), (speech[1:], "And here?")):
        for path in paths:
            obey(f"/audio {path}", conversation)
        counts.clear()
        tokens = asked(message)
        heard.append(sum(counts))
        assert tokens == without_cache()
    assert heard == [1, 0, 2]
    obey("/clear", conversation)
    conversation.waiting.append(load_audio(speech[0])[::-1])  # as many tokens as the first clip has
    tokens = asked("What is said?")
    assert tokens == without_cache()

    before = list(conversation.messages)
    answer("What is <|AUDIO|>?", conversation)
    assert "expected one for each of the 1 clips" in capsys.readouterr().err
    assert conversation.messages == before

    obey("/audio none.wav", conversation)
    assert capsys.readouterr().out == "error: none.wav: no such audio file\n"
    obey("/audio ~nosuchuser/x.wav", conversation)
    assert capsys.readouterr().out == "error: ~nosuchuser/x.wav: no such audio file\n"
    assert not conversation.waiting
    conversation.processor = None
    obey(f"/audio {speech[0]}", conversation)
    assert "this model does not hear" in capsys.readouterr().out
