"""The methods of a model that concern adapters, with the names of Transformers' PeftAdapterMixin and of peft."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import flax.linen as nn
import jax
import numpy as np

from flaxqwen.config import PretrainedConfig, Qwen2Config
from flaxqwen.generation.config import GenerationConfig
from flaxqwen.hub import resolve_adapter
from flaxqwen.lora import (
    LoraConfig,
    adapted_module,
    fit_adapter,
    init_adapter,
    make_variables,
    read_tensors,
    write_adapter,
)
from flaxqwen.lora.files import check_tensors
from flaxqwen.lora.merge import merged_params
from flaxqwen.lora.mixed import BASE, mix_adapters
from flaxqwen.lora.tree import Tree, to_tensors, with_own_head
from flaxqwen.models.qwen2_audio import ENCODER_PARTS
from flaxqwen.sharding import module_sharding

DEFAULT_NAME = "default"


@dataclass(frozen=True)
class Adapters:
    """What is loaded into a model beside its parameters.

    loaded: config and tensors by name. active: the names of those that act, in order.
    enabled: whether they act. merged: whether they act through the weights.
    variables: what the model's module is applied to with them; None: the parameters alone.
    """

    loaded: Mapping[str, tuple[LoraConfig, Tree]] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    enabled: bool = True
    merged: bool = False
    variables: Tree | None = None


class AdapterMethods:
    """Each returns a new model, which shares the arrays of this one; this one stays as it is."""

    module: nn.Module
    params: Tree
    config: PretrainedConfig
    generation_config: GenerationConfig
    adapters: Adapters

    @property
    def variables(self) -> Tree:
        """What the module is applied to: {"params": params}, and "lora" beside them where adapters are active."""
        return {"params": self.params} if self.adapters.variables is None else self.adapters.variables

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """The config of each adapter, by its name."""
        return {name: config for name, (config, _) in self.adapters.loaded.items()}

    def load_adapter(
        self,
        peft_model_id: str | os.PathLike[str] | None = None,
        adapter_name: str = DEFAULT_NAME,
        *,
        peft_config: Any = None,
        adapter_state_dict: Mapping[str, Any] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """The model with an adapter of peft's format, active alone.

        Args:
          peft_model_id: a folder with adapter_config.json and adapter_model.safetensors, or a hub id.
          peft_config: ours, peft's or a dict, in place of the folder's.
          adapter_state_dict: tensors by name, in place of the folder's; with peft_config there need be no folder.
          adapter_name: to call it by.
          revision, token, cache_dir, local_files_only: of the hub.

        Raises:
          FileNotFoundError: no such folder or repository, or no adapter in it.
          ValueError: the name is taken; a config that is not supported; tensors that do not fit (all that is wrong, in
            one error).
        """
        self._check_new(adapter_name)
        source, tensors = "adapter_state_dict", adapter_state_dict
        if peft_model_id is not None:
            where: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
            folder = resolve_adapter(peft_model_id, revision=revision, **where)
            if peft_config is None:
                peft_config = LoraConfig.from_file(folder)
            if tensors is None:
                source, tensors = read_tensors(folder)
        if peft_config is None or tensors is None:
            raise ValueError("give peft_model_id, or peft_config and adapter_state_dict")
        config = LoraConfig.coerce(peft_config)
        arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
        return self._with(adapter_name, config, fit_adapter(source, config, arrays, self._base_module, self.params))

    def add_adapter(self, adapter_config: Any, adapter_name: str = DEFAULT_NAME, *, seed: int = 0) -> Self:
        """The model with a new adapter, drawn as peft draws it, to be trained; active alone.

        Args:
          adapter_config: a LoraConfig, of ours or of peft, or a dict of its fields.
          seed: of the draws.

        Raises:
          ValueError: the name is taken; a config that is not supported, or names no layer of the model.
        """
        self._check_new(adapter_name)
        config = LoraConfig.coerce(adapter_config)
        return self._with(adapter_name, config, init_adapter(self._base_module, self.params, config, seed))

    def replace_adapter(self, adapter_name: str, adapter: Tree) -> Self:
        """The model with other tensors in an adapter's place: those of a training step, as a tree like `adapter`'s.

        Raises:
          ValueError: no such adapter; tensors of other names or shapes.
        """
        config, _ = self._known(adapter_name)
        check_tensors(adapter_name, config, to_tensors(adapter), self._base_module, self.params)
        loaded = {**self.adapters.loaded, adapter_name: (config, adapter)}
        return self._apply(dataclasses.replace(self.adapters, loaded=loaded))

    def adapter(self, adapter_name: str = DEFAULT_NAME) -> Tree:
        """The tensors of an adapter as a tree named as its file: what is trained, and nothing else."""
        return self._known(adapter_name)[1]

    def set_adapter(self, adapter_name: str | Sequence[str]) -> Self:
        """The model with these adapters active, and no others; the outputs of several add up.

        Raises:
          ValueError: an unknown name; adapters that cannot act together.
        """
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        for name in names:
            self._known(name)
        return self._apply(dataclasses.replace(self.adapters, active=names, enabled=True))

    def delete_adapter(self, adapter_names: str | Sequence[str]) -> Self:
        """The model without these adapters; where none of the active ones stays, the first that does is active.

        Raises:
          ValueError: an unknown name.
        """
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        for name in names:
            self._known(name)
        left = {name: adapter for name, adapter in self.adapters.loaded.items() if name not in names}
        if not left:
            return self.unload()
        active = tuple(name for name in self.adapters.active if name in left) or tuple(left)[:1]
        return self._apply(dataclasses.replace(self.adapters, loaded=left, active=active))

    def enable_adapters(self) -> Self:
        """The model with its active adapters acting."""
        self._need_adapters()
        return self._apply(dataclasses.replace(self.adapters, enabled=True))

    def disable_adapters(self) -> Self:
        """The model as if it had no adapters, which stay loaded."""
        self._need_adapters()
        return self._apply(dataclasses.replace(self.adapters, enabled=False))

    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        self._need_adapters()
        return list(self.adapters.active)

    def get_adapter_state_dict(self, adapter_name: str | None = None) -> dict[str, jax.Array]:
        """An adapter's tensors by their names in peft's file, without its prefix. Default: the first active one."""
        return to_tensors(self.adapter(self._name(adapter_name)))

    def save_adapter(self, save_directory: str | os.PathLike[str], adapter_name: str | None = None) -> None:
        """Write an adapter, by default the first active one, as peft does: peft and Transformers load the folder."""
        config, adapter = self._known(self._name(adapter_name))
        write_adapter(save_directory, config, adapter)

    def merge_adapter(self) -> Self:
        """The model with its active adapters in the weights, which costs nothing at run time.

        The base's own weights stay, for unmerge_adapter, which is exact; merge_and_unload lets them go.

        Raises:
          ValueError: quantized weights; lora_bias over a layer without a bias.
        """
        self._need_adapters()
        return self._apply(dataclasses.replace(self.adapters, merged=True))

    def unmerge_adapter(self) -> Self:
        """The model with its adapters beside the weights again."""
        self._need_adapters()
        return self._apply(dataclasses.replace(self.adapters, merged=False))

    def merge_and_unload(self) -> Self:
        """A plain model with the active adapters in its weights, to be saved, converted or quantized."""
        merged = self.merge_adapter()
        config = self.config
        if isinstance(config, Qwen2Config) and "lm_head" in merged.variables["params"]:
            config = dataclasses.replace(config, tie_word_embeddings=False)
        return self._replace(
            module=merged.module, params=merged.variables["params"], config=config, adapters=Adapters()
        )

    def unload(self) -> Self:
        """The base model without adapters."""
        return self._apply(Adapters())

    def _mixed(self, adapter_names: Sequence[str], rows: int, copies: int = 1) -> Self:
        """The model with one adapter for each of `rows` rows; `copies` of the rows one after the other."""
        self._need_adapters()
        if self.adapters.merged:
            raise ValueError("adapter_names cannot go with merged adapters: call unmerge_adapter first")
        if len(adapter_names) != rows:
            raise ValueError(f"adapter_names has {len(adapter_names)} names; expected {rows}, one for each row")
        if not self.adapters.enabled:  # the base, for every row; the names are looked at all the same
            for name in set(adapter_names) - {BASE}:
                self._known(name)
            return self
        for name, (_, tree) in self.adapters.loaded.items():
            if set(ENCODER_PARTS) & set(tree.get("model", ())):
                raise ValueError(f"adapter {name!r} adapts the audio tower, whose clips are no rows: set_adapter it")
        sharding = module_sharding(self.module)
        stack = mix_adapters(self.adapters.loaded, list(adapter_names) * copies, self.params, sharding)
        # On the devices once, not with each of a call's programs.
        lora = jax.device_put(stack, None if sharding is None else sharding.of((), ()))
        module = adapted_module(self._base_module, [tree for _, tree in self.adapters.loaded.values()])
        params = with_own_head(self._base_module, module, self.params)
        adapters = dataclasses.replace(self.adapters, variables={"params": params, "lora": lora})
        return self._replace(module=module, adapters=adapters)

    @property
    def _base_module(self) -> Any:
        """The module without adapters, whose head may be tied where that with them is not."""
        tied = getattr(self.config, "tie_word_embeddings", None)
        module: Any = self.module
        if tied is None or module.config.tie_word_embeddings == tied:
            return module
        return module.clone(config=dataclasses.replace(module.config, tie_word_embeddings=tied))

    def _apply(self, adapters: Adapters) -> Self:
        """The model with these adapters, those that are active and enabled in its variables."""
        acting = [adapters.loaded[name] for name in adapters.active] if adapters.enabled else []
        base = self._base_module
        if not acting:
            return self._replace(module=base, adapters=dataclasses.replace(adapters, variables=None))
        module = adapted_module(base, [tree for _, tree in acting], adapters.merged)
        if adapters.merged:
            variables = {"params": merged_params(base, self.params, acting)}
        else:
            variables = make_variables(base, self.params, acting)
        return self._replace(module=module, adapters=dataclasses.replace(adapters, variables=variables))

    def _with(self, name: str, config: LoraConfig, adapter: Tree) -> Self:
        loaded = {**self.adapters.loaded, name: (config, adapter)}
        return self._apply(Adapters(loaded, (name,)))

    def _replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]  # Model, which mixes this in, is one

    def _check_new(self, name: str) -> None:
        if name == BASE:
            raise ValueError(f"{BASE} is the model without adapters in adapter_names: give another name")
        if name in self.adapters.loaded:
            raise ValueError(f"Adapter with name {name} already exists. Please use a different name.")
        if self.adapters.merged:
            raise ValueError("the active adapters are merged: call unmerge_adapter before another one is loaded")

    def _need_adapters(self) -> None:
        if not self.adapters.loaded:
            raise ValueError("No adapter loaded. Please load an adapter first.")

    def _known(self, name: str) -> tuple[LoraConfig, Tree]:
        self._need_adapters()
        if name not in self.adapters.loaded:
            raise ValueError(
                f"Adapter with name {name} not found. Please pass the correct adapter name among "
                f"{list(self.adapters.loaded)}"
            )
        return self.adapters.loaded[name]

    def _name(self, name: str | None) -> str:
        if name is not None:
            return name
        if not (active := self.active_adapters()):
            raise ValueError("no adapter is active: give adapter_name")
        return active[0]
