"""Log-mel spectrograms in jnp, so that a program can begin at the waveform: those of WhisperFeatureExtractor.

Axes: S samples, F frames, K frequencies of the transform, W mel bins.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

SAMPLING_RATE, WINDOW, HOP = 16000, 400, 160  # Hz, samples, samples
# Slaney's scale: 3 mels for 200 Hz up to 1 kHz, from there on 27 for each factor of 6.4.
LINEAR, KNEE, LOG_STEP = 3 / 200, 1000.0, np.log(6.4) / 27
FLOOR, RANGE = 1e-10, 8.0  # of the power; of its log10, below the loudest


def log_mel(waveform: jax.Array, bins: int = 128) -> jax.Array:
    """Waveforms as the features of Qwen2-Audio and Whisper.

    Args:
      waveform: [..., S] in -1 to 1, at 16 kHz, padded with zeros to the length of all clips (30 s: 480,000).
      bins: W.

    Returns:
      [..., W, F] float32, F = S // 160.

    Source: WhisperFeatureExtractor in transformers/models/whisper/feature_extraction_whisper.py.
    """
    x = jnp.asarray(waveform, jnp.float32)
    F = x.shape[-1] // HOP
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(WINDOW // 2, WINDOW // 2)], mode="reflect")
    frames = x[..., np.arange(F)[:, None] * HOP + np.arange(WINDOW)]
    real, imaginary = jnp.split(_transform(frames), 2, axis=-1)
    power = jnp.square(real) + jnp.square(imaginary)
    mel = jnp.einsum("wk,...fk->...wf", np.float32(mel_filters(bins)), power, precision="highest")
    log = jnp.log10(jnp.maximum(mel, FLOOR))
    loudest = log.max(axis=(-2, -1), keepdims=True)
    return (jnp.maximum(log, loudest - RANGE) + 4) / 4


def _transform(frames: jax.Array) -> jax.Array:
    """Windowed frames [..., WINDOW] as their Fourier transform [..., 2 K], real and then imaginary parts.

    In products of a coarse part, of 8 bits, and the rest: sums of the coarse ones are exact, and rounding is 2 ** -8 of
    what it is in a float32 FFT, whose noise covers the quiet bins of a loud frame: features are off by 2e-5 to 4e-5.
    """
    n = np.arange(WINDOW)
    angles = 2 * np.pi * (np.outer(n, np.arange(WINDOW // 2 + 1)) % WINDOW) / WINDOW
    matrix = np.hanning(WINDOW + 1)[:-1, None] * np.concatenate([np.cos(angles), -np.sin(angles)], axis=1)
    coarse = np.round(matrix * 128) / 128
    scale = jnp.exp2(jnp.ceil(jnp.log2(jnp.maximum(jnp.abs(frames).max(axis=-1, keepdims=True), FLOOR)))) / 128
    loud = jnp.round(frames / scale) * scale
    product = partial(jnp.matmul, precision="highest")
    rest = product(loud, np.float32(matrix - coarse)) + product(frames - loud, np.float32(matrix))
    return product(loud, np.float32(coarse)) + rest


def mel_filters(bins: int) -> np.ndarray:
    """[W, K]: triangles evenly spaced in mels from 0 to 8 kHz, each of area 1 in Hz (Slaney's Auditory Toolbox)."""
    edges = _hertz(np.linspace(0, _mels(SAMPLING_RATE / 2), bins + 2))
    low, peak, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    frequencies = np.linspace(0, SAMPLING_RATE / 2, WINDOW // 2 + 1)
    triangles = np.minimum((frequencies - low) / (peak - low), (high - frequencies) / (high - peak))
    return np.maximum(triangles, 0) * 2 / (high - low)


def _mels(hertz: float) -> float:
    return KNEE * LINEAR + np.log(hertz / KNEE) / LOG_STEP if hertz > KNEE else hertz * LINEAR


def _hertz(mels: np.ndarray) -> np.ndarray:
    knee = KNEE * LINEAR
    return np.where(mels > knee, KNEE * np.exp((mels - knee) * LOG_STEP), mels / LINEAR)
