"""LoRA adapters: peft's configs and files, trees of tensors beside frozen parameters, and how they reach the layers."""

from flaxqwen.lora.config import LoraConfig
from flaxqwen.lora.files import fit_adapter, read_tensors, write_adapter
from flaxqwen.lora.tree import adapted_module, init_adapter, make_variables

__all__ = [
    "LoraConfig",
    "adapted_module",
    "fit_adapter",
    "init_adapter",
    "make_variables",
    "read_tensors",
    "write_adapter",
]
