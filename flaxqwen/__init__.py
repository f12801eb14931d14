"""Qwen2, Qwen2.5 and Qwen2-Audio in JAX/Flax: the checkpoints, arguments and numbers of PyTorch's Transformers."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> where it lives. Imported on first use: `import flaxqwen` alone takes no time, and never torch.
_HOMES = {
    "AutoConfig": "flaxqwen.auto",
    "AutoModel": "flaxqwen.auto",
    "AutoModelForCausalLM": "flaxqwen.auto",
    "AutoModelForQuestionAnswering": "flaxqwen.auto",
    "AutoModelForMultimodalLM": "flaxqwen.auto",
    "AutoModelForSeq2SeqLM": "flaxqwen.auto",
    "AutoModelForSequenceClassification": "flaxqwen.auto",
    "AutoModelForTokenClassification": "flaxqwen.auto",
    "GenerationConfig": "flaxqwen.generation.config",
    "LoraConfig": "flaxqwen.lora.config",
    "KVCache": "flaxqwen.cache",
    "Model": "flaxqwen.model",
    "Qwen2AudioConfig": "flaxqwen.config",
    "Qwen2AudioEncoder": "flaxqwen.models.qwen2_audio",
    "Qwen2AudioForConditionalGeneration": "flaxqwen.models.qwen2_audio",
    "Qwen2AudioModel": "flaxqwen.models.qwen2_audio",
    "Qwen2AudioMultiModalProjector": "flaxqwen.models.qwen2_audio",
    "Qwen2Config": "flaxqwen.config",
    "Qwen2ForCausalLM": "flaxqwen.models.qwen2",
    "Qwen2ForQuestionAnswering": "flaxqwen.models.heads",
    "Qwen2ForSequenceClassification": "flaxqwen.models.heads",
    "Qwen2ForTokenClassification": "flaxqwen.models.heads",
    "Qwen2Model": "flaxqwen.models.qwen2",
    "init_cache": "flaxqwen.cache",
    "load_audio": "flaxqwen.audio",
    "log_mel": "flaxqwen.ops.mel",
    "make_mesh": "flaxqwen.sharding",
    "process_audio": "flaxqwen.audio",
    # Handed on from Transformers as they are.
    "AutoFeatureExtractor": "transformers",
    "AutoProcessor": "transformers",
    "AutoTokenizer": "transformers",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flaxqwen' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
