"""peft's LoraConfig: the fields that change numbers here, and a refusal of those that would elsewhere."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flaxqwen.config_values import assign, freeze_fields, thaw

CONFIG_FILE = "adapter_config.json"
ALL_LINEAR = "all-linear"
# What peft adapts in Qwen2 where target_modules is not given.
DEFAULT_TARGETS = ("q_proj", "v_proj")
# Fields of peft that say where an adapter comes from, or act in training of other kinds alone.
NOTES = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
)  # fmt: skip


@dataclass(frozen=True)
class LoraConfig:
    """An adapter's config; names, meanings and defaults are those of peft.LoraConfig.

    r, lora_alpha: rank, and the numerator of the scaling, which is alpha / r (use_rslora: alpha / sqrt(r)).
    target_modules: names, which the modules' names end in; "all-linear"; or a regular expression of whole names.
      Default: q_proj and v_proj.
    exclude_modules: as target_modules, of what is left out.
    lora_dropout: of an adapter's inputs, in training.
    bias: which of the model's own biases belong to the adapter: "none", "all", or "lora_only", of adapted modules.
    modules_to_save: names of modules that belong to the adapter whole.
    layers_to_transform, layers_pattern: the numbers of the layers that are adapted, and the name of their list.
    rank_pattern, alpha_pattern: r and lora_alpha of some modules, by name or regular expression.
    use_dora: magnitudes are trained apart from directions (Liu et al. 2024).
    lora_bias: B has a bias.
    init_lora_weights: True, "gaussian", or False, which draws B too.
    notes: what the file says besides.

    Raises:
      ValueError: a value that is not supported.
    """

    r: int = 8
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: tuple[str, ...] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: tuple[str, ...] | str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_dora: bool = False
    lora_bias: bool = False
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, set | frozenset):
                assign(self, **{name: sorted(value)})
        for name in ("rank_pattern", "alpha_pattern"):
            assign(self, **{name: getattr(self, name) or {}})
        freeze_fields(self)
        if any(r <= 0 for r in (self.r, *self.rank_pattern.values())):
            raise ValueError(f"r is {self.r} and rank_pattern {dict(self.rank_pattern)}; expected ranks above 0")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; expected from 0 to 1")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias is {self.bias!r}; expected 'none', 'all' or 'lora_only'")
        if self.use_dora and self.lora_bias:
            raise ValueError("lora_bias goes without use_dora, as in peft: leave out one of them")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"init_lora_weights is {self.init_lora_weights!r}, which is not supported: expected true, false or "
                "'gaussian' (peft converts others by save_pretrained(path_initial_model_for_weight_conversion=...))"
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform goes with a list of target_modules, not with a regular expression")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern goes with layers_to_transform, as in peft: give both")
        self._check_expressions()

    def _check_expressions(self) -> None:
        """ValueError for what is no regular expression where one is read."""
        given = [name for name in (self.target_modules, self.exclude_modules) if isinstance(name, str)]
        patterns = self.layers_pattern or ()
        given += [patterns] if isinstance(patterns, str) else patterns
        for expression in (*given, *self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"{expression!r} is no regular expression: {error}") from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """From the content of adapter_config.json.

        Raises:
          ValueError: another method than LoRA; fields that are not supported, each named.
        """
        if (kind := str(values.get("peft_type", "LORA")).rpartition(".")[2]) != "LORA":
            raise ValueError(f"peft_type is {kind!r}, which is not supported; expected 'LORA'")
        names = {f.name for f in dataclasses.fields(cls)} - {"notes"}
        other = {name: value for name, value in values.items() if name not in names and name not in NOTES}
        refused = {name: value for name, value in other.items() if value not in (None, False, [], {}, "", ())}
        if refused:
            listed = ", ".join(f"{name}={value!r}" for name, value in sorted(refused.items()))
            raise ValueError(f"the adapter's config asks for {listed}, which is not supported")
        own = {name: value for name, value in values.items() if name in names and value is not None}
        notes = {name: value for name, value in values.items() if name in NOTES}
        return cls(**own, notes=notes)

    @classmethod
    def from_file(cls, folder: Path) -> LoraConfig:
        """From adapter_config.json of a folder."""
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: no {CONFIG_FILE}, so it is no adapter of peft")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: holds a {type(values).__name__}; expected an object")
        try:
            return cls.from_dict(values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def coerce(cls, config: Any) -> LoraConfig:
        """Ours, from itself, a dict, or peft's own LoraConfig."""
        if isinstance(config, cls):
            return config
        if hasattr(config, "to_dict"):
            config = config.to_dict()
        if not isinstance(config, Mapping):
            raise TypeError(f"the adapter's config is a {type(config).__name__}; expected a LoraConfig or a dict")
        return cls.from_dict({name: value for name, value in config.items() if name != "runtime_config"})

    def to_dict(self) -> dict[str, Any]:
        """What adapter_config.json says."""
        own = {f.name: thaw(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "notes"}
        if self.lora_alpha.is_integer():  # as peft declares it
            own["lora_alpha"] = int(self.lora_alpha)
        defaults = {"task_type": None, "base_model_name_or_path": None}
        return {**defaults, **thaw(self.notes), **own, "peft_type": "LORA", "inference_mode": True}

    def scaling(self, module: str) -> float:
        """What B(A x) is multiplied by in a module."""
        rank = self.rank(module)
        alpha = self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def rank(self, module: str) -> int:
        """r of a module."""
        return self.rank_pattern.get(_pattern(self.rank_pattern, module), self.r)

    def saves(self, module: str) -> bool:
        """Whether a module, or one that it is in, belongs to the adapter whole."""
        parts = module.split(".")
        owners = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        return any(owner.endswith(name) for owner in owners for name in self.modules_to_save or ())

    def targets(self, module: str, is_linear: bool) -> bool:
        """Whether a module is adapted.

        Source: check_target_module_exists in peft/tuners/tuners_utils.py.
        """
        if _named(self.exclude_modules, module) or self.saves(module):
            return False
        wanted = DEFAULT_TARGETS if self.target_modules is None else self.target_modules
        if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
            is_head = module == "lm_head" or (module == "score" and self.notes.get("task_type") == "SEQ_CLS")
            return is_linear and not is_head
        if not isinstance(wanted, str) and module in wanted:  # a whole name is in any layer
            return True
        return _named(wanted, module) and self._transforms(module)

    def _transforms(self, module: str) -> bool:
        """Whether a module is in one of layers_to_transform, if they are given."""
        if self.layers_to_transform in (None, ()):
            return True
        given = self.layers_pattern or ()
        patterns = (given,) if isinstance(given, str) else given
        places = [rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\." for pattern in patterns]
        places = places or [r".*?\.[^.]*\.(?P<layer>\d+)\."]
        found = next(filter(None, (re.match(place, module) for place in places)), None)
        wanted = self.layers_to_transform
        return found is not None and int(found["layer"]) in ((wanted,) if isinstance(wanted, int) else wanted or ())


def _named(names: tuple[str, ...] | str | None, module: str) -> bool:
    """Whether a module's name ends in one of the names, or matches the regular expression."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def _pattern(patterns: Mapping[str, Any], module: str) -> str:
    """The key that a module's name ends in; the name itself where there is none."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)
