"""Checkpoints of PyTorch's Transformers and of Flax: open, load, save, convert. Imports neither torch nor jax."""

from flaxqwen.convert.checkpoint import Checkpoint, open_checkpoint
from flaxqwen.convert.errors import CheckpointError
from flaxqwen.convert.load import has_own_head, load_params
from flaxqwen.convert.names import to_name, to_path
from flaxqwen.convert.progress import Progress

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Progress",
    "has_own_head",
    "load_params",
    "open_checkpoint",
    "to_name",
    "to_path",
]
