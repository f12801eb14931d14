"""Attention by kernels, in the terms of `attend_in_blocks`: how each is called, and what it serves.

Axes: B batch, T new tokens, S cache slots, N query heads, K key/value heads, G = N // K query heads per key/value
head, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from flaxqwen.ops import cpu_kernels
from flaxqwen.ops.attention import Visibility, attend_in_blocks

LANES = 128  # of a TPU: splash takes blocks of multiples of it
LARGEST_BLOCK = 512
# Parts of the cache that Pallas' kernel for GPUs runs beside each other, and the fewest slots of one.
SPLITS, SMALLEST_PART = 16, 16
NATIVE_DTYPES = (jnp.float32, jnp.bfloat16)
# Fewer than so many tokens leave most of a block of our kernel for CPUs empty.
FEWEST_TOKENS = 16


def splash(
    query: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility, window: int | None, interpret: bool
) -> jax.Array:
    """JAX's splash attention for TPUs: scores stay in VMEM, and blocks of slots that nobody sees are not read.

    Its own masks are made of numpy for queries that begin at slot 0. Here who sees whom is a function of the slots, and
    the blocks to read are computed, so that a prompt in parts goes on wherever the cache ends, by the same program.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as masks

    B, T, N, H = query.shape
    K, S = key.shape[1:3]
    slots, rows, columns = visibility.query_slot[0], block_size(T), block_size(S)
    is_read, source = blocks_to_read(slots.reshape(-1, rows), S // columns, columns, window)
    parts: Any = (source[None], None, is_read[None], None, slots)  # its stubs say numpy; the kernel takes traced ones
    mask: Any = masks.MaskInfo(*parts)
    attention: Any = library.SplashAttentionKernel(
        mask,
        None,
        None,
        block_sizes=library.BlockSizes(rows, columns),
        is_mqa=True,
        save_residuals=False,
        mask_value=library.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=Sees(window),
        interpret=interpret,
    )

    def row(query: jax.Array, key: jax.Array, value: jax.Array, segment: jax.Array | None) -> jax.Array:
        segments: Any = None
        if segment is not None:
            segments = library.SegmentIds(jax.lax.dynamic_slice_in_dim(segment, slots[0], T), segment)
        return jax.vmap(lambda q, k, v: attention(q, k, v, segments))(query, key, value)

    scaled = (query.astype(jnp.float32) * H**-0.5).astype(query.dtype)
    grouped = scaled.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    heads = (grouped, key.astype(query.dtype), value.astype(query.dtype))
    # Mosaic does not compile products of bfloat16 at a precision beyond theirs, which a user may have set.
    with nullcontext() if query.dtype == jnp.float32 else jax.default_matmul_precision("default"):
        output = jax.vmap(row)(*heads, segments_of(visibility))
    return output.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@dataclass(frozen=True)
class Sees:
    """Whether slots of queries see slots of keys: those before them and their own, the last `window` of them if set."""

    window: int | None

    def __call__(self, query: jax.Array, key: jax.Array) -> jax.Array:
        seen = key <= query
        return seen if self.window is None else seen & (key > query - self.window)


def blocks_to_read(slots: jax.Array, count: int, size: int, window: int | None) -> tuple[jax.Array, jax.Array]:
    """Which of `count` blocks of `size` slots each block of queries, at slots [blocks, queries], sees anything of.

    Returns:
      [blocks, count] int32, 0 and 1; and of each place the block that is in memory there: its own or, where nothing is
      seen of that, the next one that is needed, so that it is read meanwhile.
    """
    block = jnp.arange(count, dtype=jnp.int32)
    last = slots.max(axis=1, keepdims=True) // size
    first = jnp.zeros_like(last)
    if window is not None:
        first = jnp.maximum(slots.min(axis=1, keepdims=True) - window + 1, 0) // size
    following = jnp.roll(first, -1, axis=0)
    source = jnp.where(block < first, first, jnp.where(block > last, following, block))
    return ((first <= block) & (block <= last)).astype(jnp.int32), source.astype(jnp.int32)


def segments_of(visibility: Visibility) -> jax.Array | None:
    """[B, S] int: slots see those of their own number; padding is -1. None where all see all."""
    segment, mask = visibility.slot_segment, visibility.slot_mask
    if mask is None:
        return segment
    return jnp.where(mask, 0 if segment is None else segment, -1).astype(jnp.int32)


def block_size(length: int) -> int:
    """The largest power of two that divides a length, up to LARGEST_BLOCK."""
    return min(length & -length, LARGEST_BLOCK)


def splash_serves(query: jax.Array, key: jax.ShapeDtypeStruct, visibility: Visibility, window: int | None) -> bool:
    """Rows that are aligned, in lengths that blocks divide."""
    return visibility.query_slot.shape[0] == 1 and query.shape[1] % LANES == 0 and key.shape[2] % LANES == 0


def paged(
    query: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility, window: int | None, interpret: bool
) -> jax.Array:
    """JAX's paged attention for TPUs: the cache is read as far as it is seen, and no further. One token a row.

    Its pools are [heads, pages, slots of a page, H], with the pages of a row anywhere. To it each key/value head of a
    row is a row of one head, whose pages follow each other: so the cache is a pool as it lies, and is not copied.
    """
    from jax.experimental.pallas import tpu as pallas
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    B, _, N, H = query.shape
    K, S = key.shape[1:3]
    size = block_size(S)
    pages = jnp.arange(B * K * S // size, dtype=jnp.int32).reshape(B * K, S // size)
    end = jnp.repeat(jnp.broadcast_to(visibility.query_slot[:, 0] + 1, (B,)), K)
    scaled = query.astype(jnp.float32).reshape(B * K, N // K, H) * H**-0.5
    heads = (scaled, *(a.reshape(1, B * K * S // size, size, H) for a in (key, value)))
    # Mosaic does not compile its products of float32 and bfloat16 at another precision, which a user may have set.
    with pallas.force_tpu_interpret_mode() if interpret else nullcontext(), jax.default_matmul_precision("default"):
        output = paged_attention(*heads, end, pages, pages_per_compute_block=1)
    return output.reshape(B, 1, N, H).astype(query.dtype)


def paged_serves(query: jax.Array, key: jax.ShapeDtypeStruct, visibility: Visibility, window: int | None) -> bool:
    """One token a row that sees all slots before it; bfloat16, to which the kernel rounds the cache in any case."""
    is_plain = visibility.slot_mask is None and visibility.query_segment is None and window is None
    is_aligned = query.shape[3] % LANES == 0 and key.shape[2] % LANES == 0
    return is_plain and is_aligned and query.shape[1] == 1 and query.dtype == key.dtype == jnp.bfloat16


def dot_product(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visibility: Visibility,
    window: int | None,
    interpret: bool,
    implementation: Any = "cudnn",
) -> jax.Array:
    """jax.nn.dot_product_attention, for cuDNN's flash attention. It has no interpreter: `interpret` is ignored."""
    attend = partial(jax.nn.dot_product_attention, implementation=implementation)
    return _by_a_library(attend, query, key, value, visibility, window)


def tokamax(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visibility: Visibility,
    window: int | None,
    interpret: bool,
    implementation: Any = ("mosaic", "triton"),
) -> jax.Array:
    """tokamax.dot_product_attention, of whose kernels the first runs that is for the GPU. It has no interpreter.

    Its own default would fall back to XLA, whose scores would be whole.
    """
    from absl import flags
    from tokamax import dot_product_attention  # before its options are set

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # or it would look for its options among the program's own arguments
    attend = partial(dot_product_attention, implementation=implementation)
    return _by_a_library(attend, query, key, value, visibility, window)


def _by_a_library(
    attend: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visibility: Visibility,
    window: int | None,
) -> jax.Array:
    """By a function with the arguments of jax.nn.dot_product_attention.

    Where new tokens are all that there is they begin at slot 0, and what is seen need not be formed: [B, 1, T, S].
    """
    T, S = query.shape[1], key.shape[2]
    heads = (query, *(a.astype(query.dtype).swapaxes(1, 2) for a in (key, value)))
    if T == S and segments_of(visibility) is None:
        return attend(*heads, is_causal=True, local_window_size=None if window is None else (window - 1, 0))
    return attend(*heads, mask=visibility.visible(S, window)[:, None])


def dot_product_serves(query: jax.Array, key: jax.ShapeDtypeStruct, visibility: Visibility, window: int | None) -> bool:
    """Half precision, and heads that cuDNN takes; tokamax's kernels take them, too."""
    return query.dtype.itemsize == 2 and query.shape[3] % 8 == 0 and query.shape[3] <= 128


def decode(
    query: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility, window: int | None, interpret: bool
) -> jax.Array:
    """Pallas' decoding attention for GPUs: the cache of a row is read in parts, beside each other. One token a row."""
    from jax.experimental.pallas.ops.gpu.decode_attention import mqa

    B, _, N, H = query.shape
    K, S = key.shape[1:3]
    slot = jnp.broadcast_to(visibility.query_slot[:, 0], (B,))
    end = jnp.repeat(slot + 1, K)
    begin = None if window is None else jnp.maximum(end - window, 0)
    heads = (query.reshape(B * K, N // K, H), *(a.astype(query.dtype).reshape(B * K, S, H) for a in (key, value)))
    return mqa(*heads, begin, end, k_splits=SPLITS, interpret=interpret).reshape(B, 1, N, H)


def decode_serves(query: jax.Array, key: jax.ShapeDtypeStruct, visibility: Visibility, window: int | None) -> bool:
    """One token a row, without padding, over parts of a length that is a power of two."""
    S = key.shape[2]
    plain = visibility.slot_mask is None and visibility.query_segment is None
    return plain and query.shape[1] == 1 and S % (SPLITS * SMALLEST_PART) == 0


@partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def native(
    query: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility, window: int | None, interpret: bool
) -> jax.Array:
    """Our kernels for CPUs, cpp/decode_attention.cc for one token a row and cpp/prefill_attention.cc for several.

    The cache is read as far as it is seen, and no further: key and value may have slots beyond those of the mask. They
    are of query's dtype, or are its numbers in a wider one. A token that sees nothing gives 0. There is no interpreter:
    `interpret` is not looked at. Elsewhere than on a CPU it is the plain one.
    """
    kernel = partial(_decode_natively if query.shape[1] == 1 else _prefill_natively, window=window)
    plain = partial(_plainly, window=window)
    return jax.lax.platform_dependent(query, key, value, visibility, cpu=kernel, default=plain)


def _decode_natively(
    query: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility, window: int | None
) -> jax.Array:
    B, _, N, H = query.shape
    end = jnp.broadcast_to(visibility.query_slot[:, 0] + 1, (B,))
    begin = jnp.zeros_like(end) if window is None else end - window
    mask = jnp.ones((1, key.shape[2]), bool) if visibility.slot_mask is None else visibility.slot_mask
    rows = query.reshape(B, N, H).astype(jnp.float32)
    result = jax.ShapeDtypeStruct(rows.shape, rows.dtype)
    output = cpu_kernels.call("DecodeAttention", result, rows, key, value, begin, end, mask)
    return output[:, None].astype(query.dtype)


def _prefill_natively(
    query: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility, window: int | None
) -> jax.Array:
    B, T, S = *query.shape[:2], key.shape[2]
    end = jnp.broadcast_to(visibility.query_slot + 1, (B, T))
    begin = jnp.zeros_like(end) if window is None else end - window
    segment = jnp.zeros_like(end) if visibility.query_segment is None else visibility.query_segment.astype(jnp.int32)
    slots = segments_of(visibility)
    slots = jnp.zeros((B, S), jnp.int32) if slots is None else jnp.broadcast_to(slots, (B, slots.shape[1]))
    result = jax.ShapeDtypeStruct(query.shape, query.dtype)
    return cpu_kernels.call("PrefillAttention", result, query, key, value, begin, end, segment, slots)


def _plainly(
    query: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility, window: int | None
) -> jax.Array:
    S = key.shape[2] if visibility.slot_mask is None else visibility.slot_mask.shape[1]
    return attend_in_blocks(query, key[:, :, :S], value[:, :, :S], visibility, window)


@native.defjvp
def _native_jvp(window: int | None, interpret: bool, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """By the plain one."""
    query, key, value, visibility = primals
    plain = partial(_plainly, visibility=visibility, window=window)
    return jax.jvp(plain, (query, key, value), tangents[:3])


def native_serves(query: jax.Array, key: jax.ShapeDtypeStruct, visibility: Visibility, window: int | None) -> bool:
    """Where the kernels are built, and for dtypes that they read. Of one token a row: heads of whole vectors."""
    B, T, N, H = query.shape
    if B == 0 or key.dtype not in NATIVE_DTYPES or query.dtype not in NATIVE_DTYPES or not cpu_kernels.serve():
        return False
    return T >= FEWEST_TOKENS or (T == 1 and H % 16 == 0 and visibility.query_segment is None)
