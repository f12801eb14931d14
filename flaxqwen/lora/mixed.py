"""Several adapters in one batch, one for each row, in one program.

Adapters are stacked, padded with zeros to one rank, and a traced index says which of them a row has: which adapters
they are, and what is in them, compiles nothing; their number and rank are rounded up for the same reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from flaxqwen.lora.config import LoraConfig
from flaxqwen.lora.mesh import with_heads
from flaxqwen.lora.tree import Path, Tree, layer_adapter, layer_paths, own_weights
from flaxqwen.ops.lora import Adapter
from flaxqwen.sharding import Sharding

BASE = "__base__"  # peft's name for rows without an adapter
SMALLEST_SLOTS, SMALLEST_RANK = 4, 8


def mix_adapters(
    adapters: Mapping[str, tuple[LoraConfig, Tree]],
    names: Sequence[str],
    params: Tree,
    sharding: Sharding | None = None,
) -> Tree:
    """The collection "lora" of a batch.

    Args:
      adapters: all that are loaded, so that any choice of them is the same program.
      names: of each row; "__base__" for none.
      params: of the base; what an adapter shares with them changes nothing.
      sharding: of the model on its mesh, if it has one.

    Raises:
      ValueError: an unknown name; an adapter that has more than A and B.
    """
    known = (BASE, *adapters)
    for name in names:
        if name not in known:
            raise ValueError(f"adapter {name!r} is not loaded; expected one of {', '.join(map(repr, known))}")
    parts: list[dict[Path, Adapter]] = [{}]
    for name, (config, tree) in adapters.items():
        if config.use_dora or config.lora_bias or own_weights(tree, params, sharding):
            if name not in names:
                parts.append({})
                continue
            raise ValueError(f"adapter {name!r} has DoRA, biases or modules_to_save: adapter_names takes A and B alone")
        found = {path: layer_adapter(config, {}, tree, path) for path in layer_paths(tree)}
        if sharding is not None:
            found = {path: with_heads(sharding.heads, path, adapter) for path, adapter in found.items()}
        parts.append(jax.device_get(found))
    slots = _round_up(len(parts), SMALLEST_SLOTS)
    rank = _round_up(max((a.B.shape[-1] for part in parts for a in part.values()), default=1), SMALLEST_RANK)
    rows = np.asarray([known.index(name) for name in names], np.int32)
    layers: dict[Path, Any] = {}
    for path in dict.fromkeys(path for part in parts for path in part):
        layers[*path, "adapters"] = (_stack([part.get(path) for part in parts], slots, rank, rows),)
    return flax.traverse_util.unflatten_dict(layers)


def _stack(parts: Sequence[Adapter | None], slots: int, rank: int, rows: np.ndarray) -> Adapter:
    """One layer's adapters as one; None adds nothing."""
    some = next(part for part in parts if part is not None)
    A = np.zeros((slots, rank, some.A.shape[1]), np.float32)
    B = np.zeros((slots, some.B.shape[0], rank), np.float32)
    scaling = np.zeros(slots, np.float32)
    for i, part in enumerate(parts):
        if part is not None:
            A[i, : len(part.A)], B[i, :, : len(part.A)], scaling[i] = part.A, part.B, part.scaling
    return Adapter(A, B, scaling, rows=rows)


def _round_up(n: int, smallest: int) -> int:
    """A power of two, at least n."""
    return max(smallest, 1 << (n - 1).bit_length())
