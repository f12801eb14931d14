"""Orbax checkpoints of parameters: each process writes and reads its own shards, and any mesh restores any other's.

The arrays are the checkpoint's, whatever the heads of the mesh: a folder serves one device, a pod, and training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from flaxqwen.convert.errors import CheckpointError
from flaxqwen.convert.names import Path as ParamPath
from flaxqwen.convert.names import to_name
from flaxqwen.convert.orbax_folder import ORBAX, import_orbax
from flaxqwen.convert.save import refuse_others
from flaxqwen.sharding import Sharding

# So that `flaxqwen convert` reads what is written here in little memory: by default a shard is one compressed chunk.
CHUNK_BYTES = 1 << 24


def save_native(params: Mapping[str, Any], folder: Path, sharding: Sharding | None = None) -> Callable[[], None]:
    """Begin to write parameters into a model's folder; training may go on, and donate them, meanwhile.

    Args:
      sharding: that the parameters lie by, if they are on a mesh.

    Returns:
      A function that waits until all is written, and raises what went wrong. Until then the folder has no checkpoint,
      or the one before.

    Raises:
      ImportError: orbax is not installed.
      FileExistsError: the folder holds weights of another framework, which would be stale.
    """
    orbax = import_orbax()
    refuse_others(folder, "orbax")
    checkpointer = orbax.StandardCheckpointer()
    tree = dict(params) if sharding is None else sharding.undo_heads(params)
    chunks = jax.tree.map(lambda _: orbax.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    checkpointer.save((folder / ORBAX).absolute(), tree, save_args=chunks, force=True)

    def wait() -> None:
        try:
            checkpointer.wait_until_finished()
        finally:
            checkpointer.close()

    return wait


def restore_native(
    path: Path, shapes: Mapping[ParamPath, tuple[int, ...]], dtype: np.dtype, sharding: Sharding | None = None
) -> dict[str, Any]:
    """The parameters of an orbax checkpoint, straight onto the devices; each process reads what it needs.

    Args:
      shapes: of every parameter, as it is on the mesh.
      dtype: that they are cast to.

    Raises:
      CheckpointError: parameters are missing, unexpected or wrongly shaped: all are listed.
      ImportError: orbax is not installed.
    """
    path = path.absolute()
    wanted = dict(shapes) if sharding is None else sharding.stored_shapes(shapes)
    with import_orbax().StandardCheckpointer() as checkpointer:
        stored = flax.traverse_util.flatten_dict(checkpointer.metadata(path).item_metadata.tree)
        _check(path, {name: tuple(leaf.shape) for name, leaf in stored.items()}, wanted)
        one = SingleDeviceSharding(jax.local_devices()[0])
        like = {
            name: jax.ShapeDtypeStruct(
                shape, dtype, sharding=one if sharding is None else sharding.of_parameter(name, shape)
            )
            for name, shape in wanted.items()
        }
        params: dict[str, Any] = checkpointer.restore(path, flax.traverse_util.unflatten_dict(like))
    return params if sharding is None else sharding.apply_heads(params)


def _check(path: Path, found: Mapping[ParamPath, tuple[int, ...]], wanted: Mapping[ParamPath, tuple[int, ...]]) -> None:
    """CheckpointError that lists all in which a checkpoint is not that of the model."""
    problems = [f"unexpected {to_name(name)} {list(shape)}" for name, shape in found.items() if name not in wanted]
    problems += [f"missing {to_name(name)} {list(shape)}" for name, shape in wanted.items() if name not in found]
    problems += [
        f"{to_name(name)} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not fit the model: {'; '.join(problems)}. Orbax checkpoints load into the class that they "
            "are of: for another, `flaxqwen convert` it to safetensors"
        )
