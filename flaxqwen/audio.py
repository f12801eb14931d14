"""Waveforms: read from files, and put into prompts by a processor of Transformers, whole however long they are.

Needs soundfile and soxr for files: pip install 'flaxqwen[audio]'.

Axes: S samples.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxqwen.ops.mel import SAMPLING_RATE

WINDOW_SECONDS = 30  # what the encoder takes at once


def load_audio(path: str | os.PathLike[str]) -> np.ndarray:
    """A file of any format that libsndfile reads (wav, flac, ogg, mp3, ...), as [S] float32 at 16 kHz.

    Channels are mixed in equal parts; other sampling rates are resampled by soxr, in high quality.

    Raises:
      FileNotFoundError: no such file.
      ImportError: soundfile, or soxr for another sampling rate, is not installed.
      ValueError: no audio, a file that has been cut off, or as check_waveform.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{os.fspath(path)}: no such audio file")
    try:
        import soundfile
    except ImportError as error:  # also where libsndfile itself is missing
        raise ImportError("reading audio needs soundfile: pip install 'flaxqwen[audio]'") from error
    try:
        with soundfile.SoundFile(path) as file:
            samples, rate = file.read(dtype="float32", always_2d=True), file.samplerate
            # Of wav files libsndfile says it, and reads on; a size near the largest is of a stream, which has none.
            cut = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{os.fspath(path)}: not audio that can be read: {error.error_string}") from None
    except TypeError:  # soundfile goes by the name, and asks for the rate and the channels
        raise ValueError(f"{os.fspath(path)}: raw samples, without a sampling rate; expected wav, flac, ...") from None
    if cut and int(cut[2]) < int(cut[1]) < 2**31 - 2**16:
        raise ValueError(f"{os.fspath(path)}: cut off: {cut[2]} of {cut[1]} bytes of audio are there")
    try:
        return check_waveform(_resample(samples.mean(axis=1), rate))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None


def check_waveform(waveform: Any) -> np.ndarray:
    """A waveform as [S] float32.

    Raises:
      ValueError: no samples, samples that are not finite, or more than one channel.
    """
    samples = np.asarray(waveform, np.float32)
    if samples.ndim != 1:
        raise ValueError(f"a waveform has shape {samples.shape}; expected [samples]: mix the channels first")
    if not samples.size:
        raise ValueError("the audio has no samples")
    if not np.isfinite(samples).all():
        raise ValueError("the audio has samples that are not finite (NaN or infinity)")
    return samples


def split_audio(waveform: np.ndarray) -> list[np.ndarray]:
    """A waveform [S] at 16 kHz as windows of 30 s, the last one shorter: what the encoder takes at once."""
    length = WINDOW_SECONDS * SAMPLING_RATE
    return [waveform[start : start + length] for start in range(0, len(waveform), length)]


def process_audio(processor: Any, text: str | Sequence[str], audio: Any, **options: Any) -> dict[str, Any]:
    """Prompts with audio as the inputs of forward and generate(): what the processor makes of them, with whole clips.

    The processor alone cuts clips off after 30 s, without a word; here a longer one becomes several windows, which
    stand one after the other where the clip's audio token is.

    Args:
      processor: of AutoProcessor.
      text: prompts, with one `<|AUDIO|>` for each clip.
      audio: waveforms [S] at 16 kHz, as of load_audio, or files, in the order of their tokens; one alone, or None.
      options: more of the processor's, such as padding=True for several prompts.

    Returns:
      input_ids, attention_mask, input_features and feature_attention_mask, as numpy arrays.

    Raises:
      ValueError: another number of clips than of audio tokens, or as check_waveform.
    """
    is_one = isinstance(audio, str | os.PathLike) or getattr(audio, "ndim", None) == 1
    clips = [] if audio is None else [audio] if is_one else audio
    loaded = (load_audio(clip) if isinstance(clip, str | os.PathLike) else clip for clip in clips)
    windows = [split_audio(check_waveform(waveform)) for waveform in loaded]
    texts, token = [text] if isinstance(text, str) else list(text), processor.audio_token
    if (found := sum(prompt.count(token) for prompt in texts)) != len(windows):
        raise ValueError(f"the text has {found} {token}, expected one for each of the {len(windows)} clips")
    counts = iter(map(len, windows))
    texts = [re.sub(re.escape(token), lambda _: token * next(counts), prompt) for prompt in texts]
    flat = [window for clip in windows for window in clip]
    options = {"sampling_rate": SAMPLING_RATE, "return_tensors": "np"} | options
    return dict(processor(text=texts, audio=flat or None, **options))


def audio_inputs(
    processor: Any, prompt: str | list[dict[str, Any]], clips: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """What generate() takes, of a prompt with clips: a chat's messages, or a text, where they come first.

    A text that has audio tokens says itself where they are. Raises ValueError as process_audio.
    """
    if not isinstance(prompt, str):
        text = processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    elif processor.audio_token in prompt:
        text = prompt
    else:
        one = f"{processor.audio_bos_token}{processor.audio_token}{processor.audio_eos_token}"
        text = one * len(clips) + prompt
    return process_audio(processor, text, clips)


def _resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """[S] at `rate` Hz -> [S'] at 16 kHz."""
    if rate == SAMPLING_RATE or not len(samples):
        return samples
    try:
        import soxr
    except ImportError as error:
        raise ImportError(f"resampling from {rate} Hz needs soxr: pip install 'flaxqwen[audio]'") from error
    return soxr.resample(samples, rate, SAMPLING_RATE, quality="HQ")
