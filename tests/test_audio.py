"""Waveforms: features as WhisperFeatureExtractor's, files of every kind, prompts by the processor without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxqwen import load_audio, log_mel
from flaxqwen.audio import check_waveform, split_audio
from flaxqwen.models.audio_inputs import tokens_of
from tests.models.test_qwen2_audio import AUDIO, BINS, FRAMES, models  # noqa: F401
from tests.reference import close

SECOND, CLIP = 16000, 480000
soundfile = pytest.importorskip("soundfile", reason="reads audio: pip install 'flaxqwen[audio]'")
pytest.importorskip("soxr", reason="resamples audio: pip install 'flaxqwen[audio]'")


def extractor(bins: int = 128):
    transformers = pytest.importorskip("transformers", reason="features are compared with Transformers'")
    return transformers.WhisperFeatureExtractor(feature_size=bins)


def padded(*waveforms: np.ndarray) -> np.ndarray:
    """[clips, 480,000], zeros after the end of each."""
    return np.stack([np.pad(waveform, (0, CLIP - len(waveform))) for waveform in waveforms])


def test_log_mel_is_theirs(shared, rng):
    """Within 1e-5 of their numpy code, where their torch code is off by 4e-5: speech, quiet speech, noise, silence."""
    speech = load_audio(shared / "data/audio/jfk.wav")
    noise = rng.normal(scale=0.1, size=CLIP).astype(np.float32)
    waveforms = padded(speech, speech[20000:26000], speech * 0.01, noise, np.zeros(1000, np.float32))
    wanted = extractor()._np_extract_fbank_features(waveforms, "cpu")
    assert np.abs(jax.jit(log_mel)(waveforms) - wanted).max() <= 1e-5
    wanted = extractor(80)._np_extract_fbank_features(waveforms[:1], "cpu")
    assert np.abs(jax.jit(log_mel, static_argnums=1)(waveforms[0], 80) - wanted[0]).max() <= 1e-5


def test_waveform_to_logits_in_one_program(models, rng):  # noqa: F811
    """Features are made within a compiled forward, and a gradient reaches the samples."""
    _, module, params = models
    waveform = rng.normal(scale=0.1, size=(1, FRAMES * 160)).astype(np.float32)
    frames = np.ones((1, FRAMES), np.int32)
    ids = np.full((1, int(tokens_of(frames)[0]) + 2), AUDIO)
    ids[0, [0, -1]] = 7

    def run(features):
        inputs = {"feature_attention_mask": frames, "logits_to_keep": 1, "use_cache": False}
        return module.apply({"params": params}, ids, features, **inputs).logits

    def hear(waveform):
        logits = run(log_mel(waveform, BINS))
        return jnp.square(logits).sum(), logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(hear, has_aux=True))(waveform)
    features = extractor(BINS)._np_extract_fbank_features(waveform, "cpu").astype(np.float32)
    close(logits, jax.jit(run)(features))
    assert np.isfinite(gradient).all()
    assert gradient.any()


def tone(rate: int, seconds: float = 1.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_rates_and_channels(rate, suffix, tmp_path: Path):
    """Two channels, of which one is silent: half a tone, at 16 kHz whatever the file's rate."""
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, np.stack([tone(rate), np.zeros(rate)], axis=1), rate)
    found = load_audio(path)
    assert found.dtype == np.float32
    assert found.shape == (SECOND,)
    inside = slice(1000, -1000)  # the resampling filter sees silence beyond the ends
    assert np.abs(found - tone(SECOND) / 2)[inside].max() < 1e-3


def test_long_audio_is_split_and_used_whole(rng):
    """20 minutes and a bit are 41 windows of 30 s and less; nothing is lost."""
    waveform = rng.random(20 * 60 * SECOND + 7, np.float32)
    windows = split_audio(waveform)
    assert [len(window) for window in windows] == [CLIP] * 40 + [7]
    np.testing.assert_array_equal(np.concatenate(windows), waveform)


def test_files_that_are_not_audio(tmp_path: Path):
    def refused(name: str, match: str, content: bytes | None = None, error: type[Exception] = ValueError) -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(error, match=match) as caught:
            load_audio(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)

    soundfile.write(tmp_path / "whole.wav", tone(SECOND), SECOND)
    soundfile.write(tmp_path / "whole.flac", tone(SECOND), SECOND)
    wav, flac = ((tmp_path / f"whole.{suffix}").read_bytes() for suffix in ("wav", "flac"))
    refused("cut.wav", "cut off: 9956 of 32000 bytes of audio are there", wav[:10000])
    refused("header.wav", "not audio that can be read", wav[:20])
    refused("cut.flac", "not audio that can be read", flac[: len(flac) // 2])
    refused("text.wav", "not audio that can be read: Format not recognised", b"What is said here?\n")
    refused("nothing.wav", "not audio that can be read", b"")
    refused("none.wav", "no such audio file", error=FileNotFoundError)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), SECOND)
    refused("empty.wav", "the audio has no samples")
    broken = tone(SECOND)
    broken[100] = np.nan
    soundfile.write(tmp_path / "nan.wav", broken, SECOND, subtype="FLOAT")
    refused("nan.wav", r"not finite \(NaN or infinity\)")
    # A stream's header does not know its length: all of it is audio.
    (tmp_path / "stream.wav").write_bytes(wav[:40] + b"\xff" * 4 + wav[44:])
    np.testing.assert_array_equal(load_audio(tmp_path / "stream.wav"), load_audio(tmp_path / "whole.wav"))
    with pytest.raises(ValueError, match=r"shape \(2, 5\); expected \[samples\]: mix the channels"):
        check_waveform(np.zeros((2, 5)))


# As on a machine without torch: Transformers imports it wherever it is.
PROCESS = """
import json, sys
sys.modules["torch"] = None
import numpy as np
from flaxqwen import AutoFeatureExtractor, AutoProcessor, load_audio, process_audio
folder, speech, out = sys.argv[1:]
processor, extractor = AutoProcessor.from_pretrained(folder), AutoFeatureExtractor.from_pretrained(folder)
waveform = load_audio(speech)
long = np.concatenate([waveform] * 3)
texts = ["<|audio_bos|><|AUDIO|><|audio_eos|>What is said?", "First <|AUDIO|>, then <|AUDIO|>.", "Nothing."]
inputs = process_audio(processor, texts, [waveform, long, waveform[:5000]], padding=True, padding_side="left")
np.savez(out, waveform=waveform, single=extractor(waveform, sampling_rate=16000).input_features[0], **inputs)
errors = []
for clips in ([], [waveform] * 4, [waveform, waveform, waveform[:0]]):
    try:
        process_audio(processor, texts, clips)
    except ValueError as error:
        errors.append(str(error))
json.dump({"errors": errors, "template": processor.apply_chat_template([{"role": "user", "content": [
    {"type": "audio", "audio": "speech.wav"}, {"type": "text", "text": "What?"}]}], tokenize=False)}, sys.stdout)
"""


def test_processor_without_torch(shared, tmp_path: Path):
    """Rows with one clip, two of which one is longer than 30 s, and none; the features are those of log_mel."""
    pytest.importorskip("transformers", reason="the processor is Transformers' own")
    folder = tmp_path / "processor"
    shutil.copytree(shared / "data/tokenizer/qwen2-audio-minimal", folder)
    folder.chmod(0o755)  # shared/ may be read-only
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copyfile(shared / "data/configs/Qwen2-Audio-7B" / name, folder / name)
    arguments = (str(folder), str(shared / "data/audio/jfk.wav"), str(tmp_path / "inputs.npz"))
    done = subprocess.run([sys.executable, "-c", PROCESS, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    inputs, said = np.load(tmp_path / "inputs.npz"), json.loads(done.stdout)
    waveform = inputs["waveform"]
    assert len(waveform) == 11 * SECOND
    long = np.concatenate([waveform] * 3)
    wanted = jax.jit(log_mel)(padded(waveform, long[:CLIP], long[CLIP:], waveform[:5000]))
    assert np.abs(inputs["input_features"] - wanted).max() <= 1e-5
    assert np.abs(inputs["single"] - wanted[0]).max() <= 1e-5
    frames = inputs["feature_attention_mask"]
    assert frames.sum(-1).tolist() == [1100, 3000, 300, 32]
    counts = (inputs["input_ids"] == 151646).sum(-1)
    tokens = tokens_of(frames)
    assert counts.tolist() == [tokens[0], tokens[1:].sum(), 0]
    assert tokens.tolist() == [275, 750, 75, 8]
    assert inputs["attention_mask"][:, -1].all()  # padded on the left, as asked
    assert said["errors"] == [
        "the text has 3 <|AUDIO|>, expected one for each of the 0 clips",
        "the text has 3 <|AUDIO|>, expected one for each of the 4 clips",
        "the audio has no samples",
    ]
    assert "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\nWhat?" in said["template"]
