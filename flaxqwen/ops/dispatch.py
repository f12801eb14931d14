"""Which implementation of attention runs, by what is computed and on what: a table.

Axes: B batch, T new tokens, S cache slots, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec

from flaxqwen.cache import LayerCache
from flaxqwen.ops import cpu_kernels, kernels
from flaxqwen.ops.attention import Visibility, attend_in_blocks, attend_to_seen_blocks, seen_blocks_serve
from flaxqwen.sharding import Sharding


@dataclass(frozen=True)
class Attention:
    """The name of an implementation for each kind of call: a static field of the modules.

    decode: one new token of each row, over a cache. prefill: several. whole: rows without a cache, as in training.
    interpret: whether kernels are interpreted, as on a CPU in the tests.
    """

    decode: str = "xla"
    prefill: str = "xla"
    whole: str = "xla"
    interpret: bool = False


# What a platform has unless attention_implementation says otherwise. That of TPUs is by the compiler's figures for v6e:
# 1,024 tokens over 8,192 slots, in one layer of a 7B and the head, take 40 MB of temporaries and not 948 (0.5B: 1.7 and
# 473). Decoding is plain there: a step of 7B takes 19 MB so and 24 by "paged", of 64 rows 20 and 36, and heads may be
# of any size, and rows padded. No kernel for GPUs is a default: none has been timed yet. On a CPU our kernels: a layer
# of 0.5B and 1,024 tokens of bfloat16 takes 3.3 ms, in blocks 25, 4,096 tokens 45 and 320 (float32 9.5 and 27; 113 and
# 348; AMX), and a decoding step of 8 rows of 180 tokens 85 us, plainly 290 (Zen 5).
DEFAULTS = {"cpu": Attention(decode="native", prefill="native"), "gpu": Attention(), "tpu": Attention(prefill="splash")}
PLATFORMS = {"cuda": "gpu", "rocm": "gpu"}  # as devices call themselves


@dataclass(frozen=True)
class Implementation:
    """One way to compute attention, beside "xla", the plain one (`attend_in_blocks`).

    run: (query, key, value, visibility, window, interpret) -> [B, T, N, H], as the plain one.
    serves: (query, key, visibility, window) -> whether it can, by shapes and dtypes. For int8 keys and values, masks of
      4 dimensions, and weights that are asked for or dropped out the plain one runs.
    kinds, platform: what it is for.
    otherwise: what runs where it cannot.
    on_mesh: whether it can run on each device's part of the heads.
    whole_cache: whether it takes all slots that there are, of which it reads what is seen. Others get those below the
      cache's bound: a slice, which is a copy for what is no operation of XLA's.
    package: what it needs, if that is no dependency of ours: an extra of the same name.
    """

    run: Callable[..., jax.Array]
    serves: Callable[[jax.Array, jax.ShapeDtypeStruct, Visibility, int | None], bool]
    kinds: tuple[str, ...]
    platform: str
    otherwise: str = "xla"
    on_mesh: bool = True
    whole_cache: bool = False
    package: str | None = None


IMPLEMENTATIONS = {
    "blocks": Implementation(attend_to_seen_blocks, seen_blocks_serve, ("prefill",), "cpu"),
    "splash": Implementation(kernels.splash, kernels.splash_serves, ("prefill",), "tpu"),
    "paged": Implementation(kernels.paged, kernels.paged_serves, ("decode",), "tpu", whole_cache=True),
    "cudnn": Implementation(kernels.dot_product, kernels.dot_product_serves, ("prefill", "whole"), "gpu"),
    "tokamax": Implementation(
        kernels.tokamax, kernels.dot_product_serves, ("prefill", "whole"), "gpu", package="tokamax"
    ),
    "pallas": Implementation(kernels.decode, kernels.decode_serves, ("decode",), "gpu"),
    "native": Implementation(
        kernels.native, kernels.native_serves, ("decode", "prefill"), "cpu", "blocks", on_mesh=False, whole_cache=True
    ),
}


def choose_attention(wanted: str | Mapping[str, str] | None, platform: str) -> Attention:
    """The implementations of a platform.

    Args:
      wanted: one for all that it is for, "xla" for everything; or by kind of call, as {"prefill": "cudnn"}. None: the
        default.

    Raises:
      ValueError: no such implementation, or kind of call; or one for another platform or kind.
      ImportError: one of a package that is not installed.
    """
    platform = PLATFORMS.get(platform, platform)
    default = DEFAULTS.get(platform, Attention())
    if wanted is None:
        return default
    kinds = tuple(field.name for field in fields(Attention) if field.name != "interpret")
    if isinstance(wanted, str):
        found = IMPLEMENTATIONS.get(wanted)
        wanted = dict.fromkeys(kinds if found is None else found.kinds, wanted)
    if not isinstance(wanted, Mapping):
        raise ValueError(f"attention_implementation is {wanted!r}; expected a name, or names by kind of call")
    for kind, name in wanted.items():
        if kind not in kinds:
            raise ValueError(f"attention_implementation has {kind!r}; expected {', '.join(kinds)}")
        if name == "xla":
            continue
        if (found := IMPLEMENTATIONS.get(name)) is None:
            known = ", ".join(("xla", *IMPLEMENTATIONS))
            raise ValueError(f"attention_implementation {name!r} is not known; expected one of {known}")
        if name == "native" and cpu_kernels.INSTRUCTIONS is None:
            raise ValueError("attention_implementation 'native': no kernels were built for this CPU, see setup.py")
        if found.platform != platform or kind not in found.kinds:
            raise ValueError(
                f"attention_implementation {name!r} is for {' and '.join(found.kinds)} on a {found.platform}, "
                f"not for {kind} on a {platform}"
            )
        if found.package is not None and importlib.util.find_spec(found.package) is None:
            needed = f"pip install 'flaxqwen[{found.package}]'"
            raise ImportError(f"attention_implementation {name!r} needs {found.package}: {needed}")
    names: dict[str, Any] = dict(wanted)
    return replace(default, **names)


def find_implementation(
    attention: Attention,
    kind: str,
    query: jax.Array,
    cache: LayerCache,
    bound: int,
    visibility: Visibility,
    window: int | None,
    sharding: Sharding | None,
) -> Implementation | None:
    """What runs a kind of call, by shapes and dtypes; None: the plain one.

    cache: a layer's keys and values, of which slots below `bound` may be seen; window: the layer's.
    """
    if cache.scales is not None or visibility.full is not None:
        return None
    B, K, S, H = cache.key.shape
    name = getattr(attention, kind)
    while (found := IMPLEMENTATIONS.get(name)) is not None:
        key = jax.ShapeDtypeStruct((B, K, S if found.whole_cache else bound, H), cache.key.dtype)
        if (sharding is None or found.on_mesh) and found.serves(query, key, visibility, window):
            return found
        name = found.otherwise
    return None


def run_attention(
    found: Implementation | None,
    query: jax.Array,
    cache: LayerCache,
    readable: LayerCache,
    visibility: Visibility,
    window: int | None,
    sharding: Sharding | None,
    interpret: bool,
) -> jax.Array:
    """Attention [B, T, N, H] by what find_implementation found. Arguments as of `attend_in_blocks`, and:

    cache: keys and values; readable: of them the slots that may be seen.
    sharding: of heads that lie on a mesh; a kernel runs on each device's part of them.
    """
    if found is None:
        return attend_in_blocks(query, readable.key, readable.value, visibility, window, readable.scales)
    key, value = (cache.key, cache.value) if found.whole_cache else (readable.key, readable.value)
    run = partial(found.run, window=window, interpret=interpret)
    if sharding is None:
        return run(query, key, value, visibility)
    heads = sharding.spec(("batch", None, "heads", None), query.shape)
    slots = sharding.spec(("batch", "kv_heads", None, None), key.shape)
    rows = jax.tree.map(lambda a: PartitionSpec(heads[0] if a.shape[0] == query.shape[0] > 1 else None), visibility)
    return jax.shard_map(
        run, mesh=sharding.mesh, in_specs=(heads, slots, slots, rows), out_specs=heads, check_vma=False
    )(query, key, value, visibility)
