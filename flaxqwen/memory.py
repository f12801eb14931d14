"""Where parameters lie that were computed, not read."""

from __future__ import annotations

import jax
import numpy as np

from flaxqwen.convert.memory import WeightMemory


def in_huge_pages(weight: jax.Array, memory: WeightMemory) -> jax.Array:
    """The same array; one of a CPU's is moved to memory such as a checkpoint is read into.

    What a program returns there lies in pages of 4 KB, in which a step of 0.5B in bfloat16 takes longer: 64 ms in place
    of 56, 56 of 53, 62 of 54; in a slow hour 65 of 64 and 60, 58 of 55 (processes in turns, on a virtual machine, whose
    host has pages of its own).
    """
    if len(weight.devices()) > 1:
        return weight
    [device] = weight.devices()
    if device.platform != "cpu":
        return weight
    moved = memory.take(weight.nbytes).view(weight.dtype).reshape(weight.shape)
    np.copyto(moved, weight)
    return jax.device_put(moved, device)
