"""Checkpoints of PyTorch's Transformers and of Flax: open, load, save, convert. Imports neither torch nor jax."""

from flaxqwen.convert.check import check
from flaxqwen.convert.checkpoint import Checkpoint, open_checkpoint
from flaxqwen.convert.conversion import convert
from flaxqwen.convert.errors import CheckpointError
from flaxqwen.convert.load import has_own_head, load_params
from flaxqwen.convert.names import to_name, to_path
from flaxqwen.convert.progress import Progress
from flaxqwen.convert.save import save_params

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Progress",
    "check",
    "convert",
    "has_own_head",
    "load_params",
    "open_checkpoint",
    "save_params",
    "to_name",
    "to_path",
]
