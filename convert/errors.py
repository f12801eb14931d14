"""The error of a checkpoint that cannot be read or written as asked."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint is corrupt, incomplete, unsupported or does not fit the model; the message is whole in one line."""
