"""What several commands share: the module of a config, and sizes for people."""

from __future__ import annotations

import flax.linen as nn
import rich.console

from flaxqwen.auto import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    language_model_class,
)
from flaxqwen.config import PretrainedConfig

UNITS = ("B", "kB", "MB", "GB", "TB")
AUTO_CLASSES = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
)


class Console(rich.console.Console):
    """Rich's, where nobody reading is for `main` to treat: rich itself ends the process with exit code 1."""

    def on_broken_pipe(self) -> None:
        """Called when a write has raised BrokenPipeError."""
        raise BrokenPipeError


def module_of(config: PretrainedConfig) -> nn.Module:
    """The module that the config's `architectures` names; the language model where it names none of ours.

    Raises:
      ValueError: a model_type that has no modules.
    """
    for auto in AUTO_CLASSES:
        module = auto.modules.get(config.model_type)
        if module is not None and module.__name__ in (config.architectures or ()):
            return auto.module_of(config)
    return language_model_class(config).module_of(config)


def format_bytes(count: float) -> str:
    """Bytes in decimal units, as files and --max-shard-size have them: 988.1 MB."""
    power = 0
    while count >= 999.95 and power < 4:  # what would be printed as 1000.0
        count, power = count / 1000, power + 1
    return f"{count:.1f} {UNITS[power]}" if power else f"{count} B"


def heads_text(queries: list[int], keys: list[int]) -> str:
    """What became of the heads: [in the checkpoint, on the mesh] of both kinds."""
    padded = f" padded to {queries[1]}" if queries[1] > queries[0] else ""
    repeated = f" repeated to {keys[1]}" if keys[1] > keys[0] else ""
    return f"{queries[0]}{padded}, key/value {keys[0]}{repeated}"
