"""Our kernels of attention for CPUs: numpy's results, whatever a row may see, and the plain one's derivatives."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxqwen.ops import kernels
from flaxqwen.ops.attention import Visibility, attend_in_blocks
from tests.ops.heads import B, H, K, S, T, exact, heads_of, left_padding, slots_from
from tests.reference import close

pytestmark = pytest.mark.usefixtures("kernels_for")
native = jax.jit(partial(kernels.native, interpret=False), static_argnums=4)

DECODE = {  # rows, heads, queries a head, capacity, slots of the mask, of H numbers
    "0.5B": (3, 2, 7, 512, 384, 64),
    "7B": (2, 4, 7, 200, 200, 128),
    "slots are shared out": (1, 1, 12, 2048, 2000, 32),
    "a query each": (2, 3, 1, 70, 65, 16),
}


@pytest.mark.parametrize("window", [None, 70, 5])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("case", DECODE)
def test_decode(rng, case, is_padded, window):
    """Rows at their own slots, numpy's in float64; what lies beyond what a row may see is not read: it is NaN."""
    rows, heads, group, capacity, slots, width = DECODE[case]
    query = jnp.asarray(rng.normal(size=(rows, 1, heads * group, width)), jnp.float32)
    key, value = rng.normal(size=(2, rows, heads, capacity, width)).astype(np.float32)
    slot, mask = rng.integers(0, slots, (rows, 1)).astype(np.int32), None
    slot[0] = slots - 1
    if is_padded:
        mask = rng.random((rows, slots)) < 0.7
        mask[np.arange(rows), slot[:, 0]] = True
    visibility = Visibility(jnp.asarray(slot), mask)
    seen = np.asarray(visibility.visible(capacity if mask is None else slots, window))[:, 0]
    wanted = np.zeros(query.shape)
    for row, head in np.ndindex(rows, heads * group):
        keys, values = (a[row, head // group, : seen.shape[1]][seen[row]].astype(np.float64) for a in (key, value))
        scores = keys @ np.asarray(query[row, 0, head], np.float64) * width**-0.5
        weights = np.exp(scores - scores.max())
        wanted[row, 0, head] = weights @ values / weights.sum()
    for row in range(rows):
        first = 0 if window is None else max(0, slot[row, 0] - window + 1)
        for unseen in (slice(0, first), slice(slot[row, 0] + 1, None)):
            key[row, :, unseen] = value[row, :, unseen] = np.nan
    # 1.5e-6 at most in 40 draws, of the plain one 1.2e-6: scores of random numbers are sums of float32's rounding.
    close(native(query, key, value, visibility, window), wanted, relative=3e-6)
    rounded = [jnp.asarray(a, jnp.bfloat16) for a in (query, key, value)]
    exact_of_rounded = native(*(a.astype(jnp.float32) for a in rounded), visibility, window)
    ours = native(*rounded, visibility, window)
    assert ours.dtype == jnp.bfloat16
    assert (ours == exact_of_rounded.astype(jnp.bfloat16)).all()


def test_decode_does_not_depend_on_other_rows(rng):
    """To the last bit: a row alone, and beside rows that see more parts of the cache or begin in others."""
    heads = heads_of(rng, 7, tokens=1, slots=2048)
    for window in (None, 700):
        visibility = Visibility(jnp.asarray([[1203], [2047]], jnp.int32))
        both = native(*heads, visibility, window)
        for row in (0, 1):
            own = Visibility(visibility.query_slot[row : row + 1])
            alone = native(*(a[row : row + 1] for a in heads), own, window)
            assert (alone[0] == both[row]).all()


def test_decode_of_what_rows_share(rng):
    """One slot, or one mask, for all rows; mapped, and queries of another dtype than the cache: as the plain one."""
    query, key, value = heads_of(rng, 3, tokens=1)
    mask = jnp.asarray(rng.random((1, S)) < 0.5).at[0, 200].set(True)
    visibility = Visibility(jnp.full((1, 1), 200, jnp.int32), mask)
    want = attend_in_blocks(query, key, value, visibility)
    close(native(query, key, value, visibility, None), want, relative=2e-6)
    cache = (key.astype(jnp.bfloat16), value.astype(jnp.bfloat16))
    wide = (a.astype(jnp.float32) for a in cache)
    close(native(query, *cache, visibility, None), attend_in_blocks(query, *wide, visibility), relative=2e-6)
    mapped = jax.vmap(lambda *heads: native(*(a[None] for a in heads), visibility, None)[0])(query, key, value)
    close(mapped, want, relative=2e-6)


@pytest.mark.parametrize("place", [0, 3, 70, 120])
def test_decode_with_what_is_not_finite(rng, place):
    """NaN in what is seen, wherever it stands, makes NaN of what sees it; a key that is hidden does nothing."""
    query, key, value = heads_of(rng, 4, tokens=1)
    visibility = Visibility(jnp.full((B, 1), 120, jnp.int32))
    for changed in (
        (query.at[0, 0, :4].set(jnp.nan), key, value),
        (query, key.at[0, 0, place].set(jnp.nan), value),
        (query, key, value.at[0, 0, place].set(jnp.nan)),
    ):
        got = native(*changed, visibility, None)
        assert jnp.isnan(got[0, 0, :4]).all()
        assert jnp.isfinite(got[0, 0, 4:]).all()
        assert jnp.isfinite(got[1]).all()
    hidden = Visibility(visibility.query_slot, jnp.ones((B, S), bool).at[:, place].set(place == 120))
    for unseen in (jnp.nan, 3e38):
        if place != 120:
            got = native(query, key.at[0, 0, place].set(unseen), value, hidden, None)
            assert jnp.isfinite(got).all()


@pytest.mark.parametrize(("tokens", "handler"), [(1, "DecodeAttention"), (T, "PrefillAttention")])
def test_elsewhere_than_on_a_cpu(rng, tokens, handler):
    """Lowered for a TPU it is the plain one."""
    heads, visibility = heads_of(rng, 4, tokens=tokens), Visibility(slots_from(120, tokens))
    traced = jax.jit(partial(kernels.native, window=None, interpret=False)).trace(*heads, visibility)
    assert handler in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert handler not in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_decode_where_nothing_is_seen(rng):
    heads = heads_of(rng, 4, tokens=1)
    visibility = Visibility(jnp.full((B, 1), 100, jnp.int32), jnp.zeros((B, S), bool).at[1, 50].set(True))
    got = native(*heads, visibility, None)
    assert (got[0] == 0).all()
    close(got, exact(*heads, visibility, None), relative=1e-6)


def test_decode_in_a_gradient(rng):
    """That of the plain one, for the slots of the mask alone."""
    heads, dy = heads_of(rng, 4, tokens=1), jnp.asarray(rng.normal(size=(B, 1, 4 * K, H)), jnp.float32)
    visibility = Visibility(jnp.asarray([[200], [30]], jnp.int32), left_padding([0, 20], 256))

    def of(run, slots):
        return jax.grad(lambda q, k, v: jnp.vdot(run(q, k[:, :, :slots], v[:, :, :slots]), dy), (0, 1, 2))(*heads)

    ours = of(lambda *heads: native(*heads, visibility, None), S)
    for mine, other in zip(ours, of(lambda *heads: attend_in_blocks(*heads, visibility), 256), strict=True):
        close(mine, other, relative=1e-5)


PREFILL = {  # rows, heads, queries a head, tokens, slots before them, capacity, of H numbers
    "0.5B": (2, 2, 7, 100, 0, 128, 64),
    "7B goes on": (1, 4, 7, 70, 130, 300, 128),
    "a block of slots and a token": (2, 1, 3, 64, 1, 65, 32),
    "a query each, and odd widths": (3, 2, 1, 33, 90, 200, 20),
    "few tokens, long before": (2, 2, 2, 16, 500, 516, 80),
}


def drawn(rng, case):
    rows, heads, group, tokens, start, capacity, width = PREFILL[case]
    query = rng.normal(size=(rows, tokens, heads * group, width)).astype(np.float32)
    key, value = rng.normal(size=(2, rows, heads, capacity, width)).astype(np.float32)
    return query, key, value, slots_from(start, tokens)


@pytest.mark.parametrize("window", [None, 70, 5])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("case", PREFILL)
def test_prefill(rng, case, is_padded, window):
    """numpy's in float64; blocks of slots that nobody sees are not read: they are NaN."""
    query, key, value, slots = drawn(rng, case)
    mask = None if not is_padded else (rng.random((len(query), int(slots[0, -1]) + 1)) < 0.7)
    if mask is not None:
        slots = jnp.broadcast_to(slots, query.shape[:2])  # as of rows that each have their own
        mask[:, slots[0]] = True
    visibility = Visibility(slots, mask)
    seen = slice(None, int(slots[0, -1]) + 1)
    wanted = exact(query, key[:, :, seen], value[:, :, seen], visibility, window)
    first = 0 if window is None else max(0, int(slots[0, 0]) - window + 1)
    for unseen in (slice(0, first // 64 * 64), slice(-(-seen.stop // 64) * 64, None)):
        key[:, :, unseen] = value[:, :, unseen] = np.nan
    # 1.9e-6 at most in 360 draws, without padding.
    close(native(query, key, value, visibility, window), wanted, relative=3e-6)


@pytest.mark.parametrize("cache_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("case", PREFILL)
def test_prefill_in_bfloat16(rng, case, window, cache_dtype):
    """Nearer to the exact one than the plain one is, on the average and in its squares; whatever dtype the cache has.

    Each number is as near as two roundings to bfloat16's 8 bits leave it, of the weights and of the result. (The
    largest errors of the two are no measure: in 12 draws of each case one was up to 1.33 of the other, by chance.)
    """
    *heads, slots = drawn(rng, case)
    visibility, rounded = Visibility(slots), [jnp.asarray(a, jnp.bfloat16) for a in heads]
    query, key, value = rounded
    want = exact(query, key, value, visibility, window)
    ours = native(query, key.astype(cache_dtype), value.astype(cache_dtype), visibility, window)
    assert ours.dtype == jnp.bfloat16
    error, plain = (np.asarray(a, np.float64) - want for a in (ours, attend_in_blocks(*rounded, visibility, window)))
    assert np.abs(error).mean() <= np.abs(plain).mean()  # 0.95 of it at most in those draws
    assert np.square(error).mean() <= np.square(plain).mean()
    of_weights = 2**-8 * exact(query, key, jnp.abs(value), visibility, window)
    assert (np.abs(error) <= of_weights + 2**-8 * (np.abs(want) + of_weights)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_prefill_does_not_depend_on_other_tokens(rng, dtype):
    """To the last bit: a row alone, a prompt in parts, and the first of more tokens."""
    query, *cache = (jnp.asarray(a, dtype) for a in heads_of(rng, 7, tokens=200, slots=512))
    for window in (None, 90):
        visibility = Visibility(jnp.concatenate([slots_from(203, 200), slots_from(312, 200)]))
        whole = native(query, *cache, visibility, window)
        for row in (0, 1):
            own = Visibility(visibility.query_slot[row : row + 1])
            alone = native(*(a[row : row + 1] for a in (query, *cache)), own, window)
            assert (alone[0] == whole[row]).all()
        for part in (slice(0, 47), slice(47, 200)):
            got = native(query[:, part], *cache, Visibility(visibility.query_slot[:, part]), window)
            assert (got == whole[:, part]).all()


def test_prefill_with_segments_and_padding(rng):
    """A token sees its own segment alone, in one mask for all rows or in each row's; padding that sees nothing is 0."""
    segments = jnp.asarray(np.sort(rng.integers(0, 4, (B, 256)), axis=1), jnp.int32)
    heads, slots = heads_of(rng, 2, 256, 256), slots_from(0, 256)
    for mask in (left_padding([0, 140], 256), left_padding([30], 256), None):
        visibility = Visibility(slots, mask, segments, segments)
        close(native(*heads, visibility, None), exact(*heads, visibility, None), relative=2e-6)
    shared = Visibility(slots, left_padding([30], 256))
    got = native(*heads, shared, None)
    close(got, exact(*heads, shared, None), relative=2e-6)
    assert (got[:, :30] == 0).all()
    mapped = jax.vmap(lambda *heads: native(*(a[None] for a in heads), shared, None)[0])(*heads)
    assert (mapped == got).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("place", [0, 63, 64, 120])
def test_prefill_with_what_is_not_finite(rng, place, dtype):
    """NaN in a key makes NaN of what sees it, in a query of that query, and infinity of a key what it makes plainly."""
    query, key, value = (jnp.asarray(a, dtype) for a in heads_of(rng, 4))
    visibility = Visibility(slots_from(0))
    got = native(query, key.at[0, 0, place].set(jnp.nan), value, visibility, None)
    wanted = np.zeros(got.shape, bool)
    wanted[0, place:, :4] = True
    assert (np.isnan(got) == wanted).all()
    got = native(query.at[0, place, 2].set(jnp.nan), key, value, visibility, None)
    wanted = np.zeros(got.shape, bool)
    wanted[0, place, 2] = True
    assert (np.isnan(got) == wanted).all()
    hidden = Visibility(visibility.query_slot, jnp.ones((1, S), bool).at[:, place].set(False))
    for unseen in (jnp.nan, jnp.inf, 3e38):
        got = native(query, key.at[0, 0, place].set(unseen), value, hidden, None)
        assert jnp.isfinite(got).all()
    unit = 2e-6 if dtype == jnp.float32 else 2**-7
    great = query * 2**13  # the largest weight is 1, others next to 0; scores stay exact
    close(native(great, key, value, visibility, None), exact(great, key, value, visibility, None), relative=unit)
    huge = jnp.full_like(query, 1e9), jnp.full_like(key, 1e18)  # scores of 1e27, which are all alike
    close(native(*huge, value, visibility, None), exact(*huge, value, visibility, None), relative=unit)


def test_prefill_in_a_gradient(rng):
    """That of the plain one, for the slots of the mask alone."""
    heads, dy = heads_of(rng, 4), jnp.asarray(rng.normal(size=(B, T, 4 * K, H)), jnp.float32)
    visibility = Visibility(slots_from(100), left_padding([0, 20], 256))

    def of(run, slots):
        return jax.grad(lambda q, k, v: jnp.vdot(run(q, k[:, :, :slots], v[:, :, :slots]), dy), (0, 1, 2))(*heads)

    ours = of(lambda *heads: native(*heads, visibility, None), S)
    for mine, other in zip(ours, of(lambda *heads: attend_in_blocks(*heads, visibility), 256), strict=True):
        close(mine, other, relative=1e-5)


def test_prefill_with_wide_integers(rng):
    """Where jax_enable_x64 is set, of padded prompts too."""
    heads, mask = heads_of(rng, 4), left_padding([0, 20])
    wanted = native(*heads, Visibility(slots_from(100), mask), None)
    with jax.enable_x64(True):
        assert (native(*heads, Visibility(slots_from(100), mask), None) == wanted).all()
