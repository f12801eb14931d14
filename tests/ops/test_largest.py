"""The place of the largest number, against numpy."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from flaxqwen import AutoModelForCausalLM, Qwen2Config
from flaxqwen.generation import loop
from flaxqwen.generation.inputs import Inputs, make_prompt
from flaxqwen.generation.sampling import TokenChoice
from flaxqwen.ops.largest import first_largest

DTYPES = (np.float32, ml_dtypes.bfloat16)


@pytest.mark.parametrize("on_one_device", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 64, 65, 300, 1000, 151936])
@pytest.mark.usefixtures("kernels_for")
def test_first_largest_is_argmax(rng: np.random.Generator, size: int, dtype: np.dtype, on_one_device: bool):
    """Ties give the first, as torch's and numpy's; a row of -inf its first id; a row with NaN the last one."""
    find = jax.jit(partial(first_largest, on_one_device=on_one_device))
    scores = np.round(rng.standard_normal((9, size)) * 2).astype(dtype)
    scores[0] = -np.inf
    scores[1, rng.random(size) < 0.5] = -np.inf
    scores[2] = -np.abs(rng.standard_normal(size)).astype(dtype)
    scores[3] = rng.permutation(size).astype(dtype)
    scores[4] = np.where(rng.random(size) < 0.5, 0.0, -0.0)
    scores[5, -1] = np.inf
    np.testing.assert_array_equal(find(scores), scores.argmax(-1))
    assert find(scores).dtype == jnp.int32
    if size > 1000 and not on_one_device:
        return  # XLA's maximum of many numbers passes over NaN
    for place in (0, size // 2, size - 1):
        odd = scores[6:].copy()
        odd[:, place] = np.nan
        np.testing.assert_array_equal(find(odd), size - 1)


def test_no_rows():
    """As of a server whose rows have all ended."""
    assert jax.jit(partial(first_largest, on_one_device=True))(jnp.zeros((0, 8))).shape == (0,)


@pytest.mark.usefixtures("kernels_for")
def test_greedy_decoding_takes_it():
    """A step of bfloat16 chooses by the kernel from the logits as they are; none are widened, or compared, for it."""
    config = Qwen2Config(vocab_size=997, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_config(config, dtype="bfloat16")
    call = {"keep_scores": False, "keep_logits": False}
    prompt = make_prompt(Inputs(np.ones((1, 8), np.int32), np.ones((1, 8), bool)), 8, 64)
    choice = TokenChoice((), np.zeros(1, np.int32), np.int32(0), np.uint32(0), on_one_device=True)
    shape = {"capacity": 64, "cache_dtype": np.dtype(np.float32), "copies": 1}
    for kernel, taken in ((True, choice), (False, choice.replace(on_one_device=False))):
        state, _ = loop.prefill.trace(model.module, model.variables, prompt, taken, None, **shape, **call).out_info
        text = loop.decode.lower(model.module, model.variables, state, taken, steps=4, **call).compile().as_text()
        assert ("FirstLargest" in text) == kernel
        assert ("f32[1,997]" in text) != kernel
