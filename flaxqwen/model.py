"""A module with its parameters: what AutoModel...from_pretrained returns.

Axes: B batch, T new tokens.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np

from flaxqwen.cache import KVCache, grow_cache
from flaxqwen.config import PretrainedConfig
from flaxqwen.convert import save_params
from flaxqwen.generation.config import GenerationConfig
from flaxqwen.generation.generate import SMALLEST_CACHE, bucket, check_token_ids, generate
from flaxqwen.models.qwen2 import Qwen2ForCausalLM

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A Linen module and its parameters, with the methods that Transformers' models have.

    module: the pure function: `module.apply({"params": params}, input_ids, ...)`.
    params: plain nested dict of jax arrays, named as the checkpoint.
    config, generation_config: what the folder's files say.
    """

    module: nn.Module
    params: Params = dataclasses.field(repr=False)
    config: PretrainedConfig = dataclasses.field(repr=False)
    generation_config: GenerationConfig

    def __call__(self, input_ids: Any = None, attention_mask: Any = None, **inputs: Any) -> Any:
        """forward, jitted: the arguments of the module, with numpy, jax or torch arrays or lists, and its output.

        The cache in past_key_values is left as it was; it grows where it has no room for the new tokens.

        Raises:
          ValueError: token ids out of the vocabulary; a mask that does not fit the tokens seen so far.
          TypeError: unknown arguments.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        static = {k: v for k, v in given.items() if isinstance(v, bool) or (k in STATIC_INTS and isinstance(v, int))}
        arrays = {k: v if isinstance(v, KVCache) else _to_array(v) for k, v in given.items() if k not in static}
        arrays = {k: v for k, v in arrays.items() if v is not None}
        if "input_ids" in arrays:
            check_token_ids(arrays["input_ids"], self.config)
        if "past_key_values" in arrays:
            arrays["past_key_values"] = _with_room(arrays)
        return _forward(self.module, self.params, arrays, tuple(sorted(static.items())))

    def generate(self, inputs: Any = None, generation_config: Any = None, **options: Any) -> Any:
        """Continue prompts; see flaxqwen.generation.generate."""
        if not isinstance(self.module, Qwen2ForCausalLM):
            raise TypeError(f"{type(self.module).__name__} has no language-model head: load it by AutoModelForCausalLM")
        return generate(self, inputs, generation_config, **options)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        to: Literal["flax", "pytorch"] = "flax",
        max_shard_size: str | int = "5GB",
    ) -> None:
        """Write config.json, generation_config.json and the weights (safetensors of Flax or of PyTorch) into a folder."""
        config = dataclasses.replace(self.config, architectures=(type(self.module).__name__,), dtype=str(self.dtype))
        save_params(self.params, save_directory, to=to, max_shard_size=max_shard_size)
        config.save_pretrained(save_directory)
        if self.can_generate():
            self.generation_config.save_pretrained(save_directory)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        to: Literal["flax", "pytorch"] = "flax",
        max_shard_size: str | int = "5GB",
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
    ) -> str:
        """Save, and upload to a repository of the hub, which is made if need be. Returns the commit's address."""
        import huggingface_hub

        api = huggingface_hub.HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, to=to, max_shard_size=max_shard_size)
            message = commit_message or f"Upload {type(self.module).__name__}"
            commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, revision=revision)
        return commit.commit_url

    def can_generate(self) -> bool:
        """Whether the model has a language-model head."""
        return isinstance(self.module, Qwen2ForCausalLM)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many parameters there are (all are trainable); a tied head counts once, as in Transformers."""
        leaves = jax.tree.leaves_with_path(self.params)
        kept = (a for path, a in leaves if not (exclude_embeddings and "embed_tokens" in jax.tree_util.keystr(path)))
        return sum(a.size for a in kept)

    @property
    def dtype(self) -> np.dtype:
        """dtype of the parameters."""
        return jax.tree.leaves(self.params)[0].dtype

    @property
    def device(self) -> jax.Device:
        """The device of the parameters (the first, when they are sharded)."""
        return min(jax.tree.leaves(self.params)[0].devices(), key=lambda device: device.id)


# Arguments that are numbers of the program, not of the data.
STATIC_INTS = ("logits_to_keep", "num_logits_to_keep")


@partial(jax.jit, static_argnames=("module", "static"))
def _forward(module: nn.Module, params: Params, arrays: dict[str, Any], static: tuple[tuple[str, Any], ...]) -> Any:
    return module.apply({"params": params}, **arrays, **dict(static))


def _to_array(value: Any) -> Any:
    """Lists and torch tensors as numpy arrays, 64-bit numbers as the 32-bit ones that jax computes in."""
    if value is None or isinstance(value, jax.Array):
        return value
    array = np.asarray(value)
    narrow = {"int64": np.int32, "float64": np.float32}.get(array.dtype.name)
    return array if narrow is None else array.astype(narrow)


def _with_room(arrays: dict[str, Any]) -> KVCache:
    """The cache, grown if need be; the mask, if 2D, must cover what is in it and the new tokens."""
    cache: KVCache = arrays["past_key_values"]
    new = arrays["input_ids"] if "input_ids" in arrays else arrays["inputs_embeds"]
    at = arrays.get("cache_position")
    needed = int(np.max(jax.device_get(cache.length if at is None else at[:1]))) + new.shape[1]
    mask = arrays.get("attention_mask")
    if mask is not None and mask.shape[-1] not in (needed, cache.capacity):
        raise ValueError(
            f"attention_mask has shape {mask.shape}; expected {needed} columns: "
            f"the {needed - new.shape[1]} tokens in past_key_values and the {new.shape[1]} new ones"
        )
    return cache if needed <= cache.capacity else grow_cache(cache, capacity=bucket(needed, SMALLEST_CACHE))
