"""Rotary position embedding (Su et al. 2021) and its long-context variants.

Equations follow transformers/modeling_rope_utils.py, whose sources are: linear and dynamic NTK (u/kaiokendev, u/bloc97
and u/emozilla, 2023), YaRN (Peng et al. 2023), LongRoPE (Ding et al. 2024), Llama 3.1 (Meta 2024).

Axes: B batch, T new tokens, H head dim.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from flaxqwen.config import Qwen2Config, RopeParameters


def rotary_embedding(config: Qwen2Config, position_ids: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """The cosines and sines that rotate queries and keys.

    Args:
      config: its rope_parameters, head_dim and max_position_embeddings are read.
      position_ids: [B, T] int.
      dtype: of the results; the angles themselves are float32.

    Returns:
      (cos, sin), each [B, T, H]. Dynamic NTK and LongRoPE depend on the largest position of the batch.
    """
    frequencies, scale = inverse_frequencies(config, position_ids)
    angles = position_ids[..., None].astype(jnp.float32) * frequencies  # [B, T, H/2]
    angles = jnp.concatenate([angles, angles], axis=-1)
    return (jnp.cos(angles) * scale).astype(dtype), (jnp.sin(angles) * scale).astype(dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate halves, not pairs: x [B, T, heads, H], cos and sin [B, T, H] in x's dtype."""
    left, right = jnp.split(x, 2, axis=-1)
    return x * cos[:, :, None] + jnp.concatenate([-right, left], axis=-1) * sin[:, :, None]


def inverse_frequencies(config: Qwen2Config, position_ids: jax.Array) -> tuple[np.ndarray | jax.Array, float]:
    """Radians per position of each pair of dimensions, [H/2] float32, and the factor on cosines and sines."""
    rope, dim = config.rope_parameters, config.head_dim
    match rope.rope_type:
        case "default":
            return _geometric(rope.rope_theta, dim), 1.0
        case "linear":
            return _geometric(rope.rope_theta, dim) / np.float32(rope.factor), 1.0
        case "dynamic":
            return _dynamic(rope, dim, config.max_position_embeddings, position_ids), 1.0
        case "yarn":
            return _yarn(rope, dim, config.max_position_embeddings)
        case "llama3":
            return _llama3(rope, dim), 1.0
        case "longrope":
            return _longrope(rope, dim, config.max_position_embeddings, position_ids)
    raise ValueError(f"rope_type {rope.rope_type!r} is not supported")


def _powers(theta: float, dim: int) -> np.ndarray:
    """theta^(2i/H) in float32, rounded once: at position 32,768 one unit in the last place is 1e-3 radians."""
    return (np.float64(theta) ** (np.arange(0, dim, 2) / dim)).astype(np.float32)


def _geometric(theta: float, dim: int) -> np.ndarray:
    return np.float32(1.0) / _powers(theta, dim)


def _dynamic(rope: RopeParameters, dim: int, trained: int, position_ids: jax.Array) -> jax.Array:
    """The base grows with the length, from the trained length on."""
    assert rope.factor is not None
    length = jnp.maximum(jnp.max(position_ids) + 1, trained).astype(jnp.float32)
    growth = (rope.factor * length / trained) - (rope.factor - 1)
    base = rope.rope_theta * growth ** (dim / (dim - 2))
    return 1.0 / base ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def _yarn(rope: RopeParameters, dim: int, max_positions: int) -> tuple[np.ndarray, float]:
    """High frequencies are kept, low ones divided by the factor, a linear ramp between. Applies at every length."""
    original = rope.original_max_position_embeddings
    assert original is not None
    factor = rope.factor if rope.factor is not None else max_positions / original
    scale = rope.attention_factor
    if scale is None:
        scale = _mscale(factor)
        if rope.mscale and rope.mscale_all_dim:
            scale = _mscale(factor, rope.mscale) / _mscale(factor, rope.mscale_all_dim)

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = dimension(rope.beta_fast or 32), dimension(rope.beta_slow or 1)
    # A null of config.json is false in Transformers; what is not there is true.
    if "truncate" not in rope.extra if rope.truncate is None else rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if high == low else high
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1).astype(np.float32)
    powers = _powers(rope.rope_theta, dim)
    kept, stretched = np.float32(1) / powers, np.float32(1) / (np.float32(factor) * powers)
    return stretched * ramp + kept * (1 - ramp), scale


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _llama3(rope: RopeParameters, dim: int) -> np.ndarray:
    """Wavelengths beyond the original context are stretched, short ones kept, a smooth blend between."""
    low, high, original = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings
    assert rope.factor is not None
    assert low is not None
    assert high is not None
    assert original is not None
    kept = _geometric(rope.rope_theta, dim)
    wavelength = 2 * math.pi / kept
    blend = (original / wavelength - low) / (high - low)
    medium = (1 - blend) * kept / rope.factor + blend * kept
    stretched = np.where(wavelength > original / low, kept / rope.factor, kept)
    is_medium = (wavelength >= original / high) & (wavelength <= original / low)
    return np.where(is_medium, medium, stretched).astype(np.float32)


def _longrope(rope: RopeParameters, dim: int, max_positions: int, position_ids: jax.Array) -> tuple[jax.Array, float]:
    """One divisor per pair of dimensions; a second set takes over past the original context."""
    original = rope.original_max_position_embeddings
    assert original is not None
    factor = rope.factor if rope.factor is not None else max_positions / original
    scale = rope.attention_factor
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    powers = _powers(rope.rope_theta, dim)
    short, long = (np.float32(1) / (np.asarray(f, np.float32) * powers) for f in (rope.short_factor, rope.long_factor))
    return jnp.where(jnp.max(position_ids) + 1 > original, long, short), scale
