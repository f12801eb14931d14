"""The command line, `flaxqwen`. Importing it takes neither jax nor transformers: the commands do."""

from flaxqwen.cli.entry import main

__all__ = ["main"]
