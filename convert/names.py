"""Names: a tensor of a Hugging Face checkpoint <-> a path in the tree of Flax parameters.

The tree has the checkpoint's own names, so the map is a rule: split at the dots, and join the number of a list's item
to the list: `model.layers.0.self_attn.q_proj.weight` <-> ("model", "layers_0", "self_attn", "q_proj", "weight").
What the rule does not cover is data: base-model prefixes, buffers that old checkpoints carry, Flax's usual leaf names.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from fnmatch import fnmatchcase
from typing import Literal

Path = tuple[str, ...]
Layout = Literal["checkpoint", "linen"]

HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"

# The modules of a bare Qwen2Model, and what the models with a head call it (`base_model_prefix` in
# transformers/models/qwen2/modeling_qwen2.py; "transformer" is Qwen2ForQuestionAnswering's).
BASE_MODULES = ("embed_tokens", "layers", "norm")
BASE_PREFIXES = ("model.", "transformer.", "")

# The heads of Qwen2ForSequenceClassification and Qwen2ForTokenClassification; of Qwen2ForQuestionAnswering.
CLASSIFIERS = ("score", "qa_outputs")

# What Qwen2-Audio's modules are called on disk, and by Transformers 5 in memory ("qwen2_audio" in
# transformers/conversion_mapping.py); it writes the former and reads both. The first that fits.
AUDIO_PREFIXES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("audio_tower.", "model.audio_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)

# Buffers that are computed from the config, which older versions of Transformers saved beside the weights.
IGNORED = ("*.rotary_emb.inv_freq", "*.masked_bias")

# Flax's usual name for the leaf `weight`, by the module that owns it; the first pattern that fits. A kernel has its
# axes in reverse order: a linear layer's [out, in] -> [in, out], a convolution's [out, in, width] -> [width, in, out].
KERNEL = "kernel"
LINEN_WEIGHT = (
    ("embed_*", "embedding"),
    ("*norm", "scale"),
    ("*", KERNEL),
)
LINEN_LEAVES = frozenset(leaf for _, leaf in LINEN_WEIGHT)

_PART = re.compile(r"[A-Za-z]\w*", re.ASCII)
_NUMBERED = re.compile(r"(.*)_(\d+)", re.ASCII)


def to_path(name: str) -> Path:
    """The parameter path of a checkpoint's tensor name; the inverse of `to_name`.

    Raises:
      ValueError: a name that would not come back the same, such as `a..b` or `fc_1.weight`.
    """
    path: list[str] = []
    for part in name.split("."):
        if part.isascii() and part.isdigit() and path:
            path[-1] += "_" + part
        elif _PART.fullmatch(part) and not _NUMBERED.fullmatch(part):
            path.append(part)
        else:
            raise ValueError(
                f"tensor name {name!r} has no parameter path: {part!r} is not the name of a module or leaf"
            )
    return tuple(path)


def to_name(path: Iterable[str]) -> str:
    """The checkpoint's tensor name of a parameter path; the inverse of `to_path`."""
    parts: list[str] = []
    for key in path:
        numbers: list[str] = []
        while match := _NUMBERED.fullmatch(key):
            key, number = match.groups()
            numbers.insert(0, number)
        parts += [key, *numbers]
    return ".".join(parts)


def is_ignored(name: str) -> bool:
    """Whether a checkpoint's tensor is a buffer that no model needs."""
    return any(fnmatchcase("." + name, pattern) for pattern in IGNORED)


def is_classifier(name: str) -> bool:
    """Whether a tensor is of a classifier's head."""
    return name.split(".")[0] in CLASSIFIERS


def base_prefix(names: Iterable[str]) -> str | None:
    """What stands before the base model's names: "model.", "transformer." or nothing; None where there is none."""
    names = set(names)
    return next((prefix for prefix in BASE_PREFIXES if prefix + EMBEDDING in names), None)


def with_prefix(name: str, found: str | None, wanted: str | None) -> str:
    """A tensor's name with the base model's prefix `found` replaced by `wanted`; names of other modules stay."""
    if found is None or wanted is None or found == wanted or not name.startswith(found):
        return name
    base = name.removeprefix(found)
    return wanted + base if base.split(".")[0] in BASE_MODULES else name


def newer_audio_name(name: str) -> str:
    """A tensor's name of Qwen2-Audio as Transformers 5 has it in memory; others stay."""
    return next((to + name.removeprefix(old) for old, to in AUDIO_PREFIXES if name.startswith(old)), name)


def with_audio_prefix(name: str, wanted: Container[str]) -> str:
    """A tensor's name as a Qwen2-Audio of the names `wanted` has it, whichever the layout on disk; others stay."""
    newer = newer_audio_name(name)
    bare = newer.removeprefix("model.")
    return next((found for found in (newer, bare) if found in wanted), name if newer != HEAD else HEAD)


def to_linen(path: Path) -> tuple[Path, bool]:
    """Flax's usual path of a parameter, and whether its axes are reversed there."""
    *modules, leaf = path
    if leaf != "weight" or not modules:
        return path, False
    leaf = next(usual for pattern, usual in LINEN_WEIGHT if fnmatchcase(modules[-1], pattern))
    return (*modules, leaf), leaf == KERNEL


def from_linen(path: Path) -> tuple[Path, bool]:
    """The parameter's path of Flax's usual path, and whether its axes are reversed there; the inverse of `to_linen`."""
    *modules, leaf = path
    if leaf not in LINEN_LEAVES:
        return path, False
    return (*modules, "weight"), leaf == KERNEL


def layout_of(paths: Iterable[Path]) -> Layout:
    """The layout that parameter paths are in, told by the names of the leaves."""
    return "linen" if any(path[-1] in LINEN_LEAVES for path in paths) else "checkpoint"
