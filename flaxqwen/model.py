"""A module with its parameters: what AutoModel...from_pretrained returns.

Axes: B batch, T new tokens, S cache capacity.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import os
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh

from flaxqwen.adapters import AdapterMethods, Adapters
from flaxqwen.cache import KVCache, grow_cache
from flaxqwen.config import PretrainedConfig, Qwen2AudioConfig
from flaxqwen.convert import save_params
from flaxqwen.convert.quantize import SCALE
from flaxqwen.distributed import is_main
from flaxqwen.generation.config import GenerationConfig
from flaxqwen.generation.generate import generate, stream
from flaxqwen.generation.inputs import SMALLEST_CACHE, CausalLM, bucket, check_token_ids, to_array
from flaxqwen.generation.outputs import compute_transition_scores
from flaxqwen.generation.programs import Programs, Recorder, read_programs, write_programs
from flaxqwen.generation.streamers import Stream
from flaxqwen.generation.warmup import warmup
from flaxqwen.models.audio_inputs import check_audio_tokens
from flaxqwen.models.heads import Qwen2ForSequenceClassification, Qwen2ForTokenClassification
from flaxqwen.models.losses import IGNORE_INDEX
from flaxqwen.models.qwen2 import Qwen2ForCausalLM
from flaxqwen.models.qwen2_audio import Qwen2AudioForConditionalGeneration, Qwen2AudioModel
from flaxqwen.native import save_native
from flaxqwen.sharding import module_sharding

Params = dict[str, Any]

# Arguments that are numbers of the program, not of the data.
STATIC_INTS = ("logits_to_keep", "num_logits_to_keep")
FLAGS = ("use_cache", "output_attentions", "output_hidden_states", "return_dict", "deterministic")
# The weights that a push replaces: shards of an earlier one would stay beside a single file, or the other way round.
REPLACED = {
    "pytorch": ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    "flax": ("flax_model.*", "flax_model-*.safetensors"),
}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model(AdapterMethods):
    """A Linen module and its parameters, with the methods that Transformers' models have.

    module: the pure function: `module.apply({"params": params}, input_ids, ...)`.
    params: plain nested dict of jax arrays, named as the checkpoint.
    config, generation_config: what the folder's files say.
    adapters: what is loaded beside the parameters.
    programs: what need not be compiled.
    """

    module: nn.Module
    params: Params
    config: PretrainedConfig
    generation_config: GenerationConfig
    adapters: Adapters = dataclasses.field(default_factory=Adapters)
    programs: Programs = dataclasses.field(default_factory=Programs)

    def __repr__(self) -> str:
        return f"Model({type(self.module).__name__}, {self.num_parameters():,} parameters, {self.dtype.name})"

    def __call__(self, *arguments: Any, **inputs: Any) -> Any:
        """forward, jitted: the arguments of the module, as numpy, jax or torch arrays or lists, and its output.

        The cache in past_key_values is left as it was; where it has no room for the new tokens, the one returned is
        larger. Inside a transformation of jax what is traced cannot be looked at: a traced cache must have room.

        Args:
          arguments: the first of the module's, up to inputs_embeds, in its order: input_ids, attention_mask, ..., with
            Qwen2-Audio input_ids, input_features, attention_mask, ...
          inputs: those of the module's `__call__`; and adapter_names, an adapter's name for each row, or "__base__".
            input_ids is [B, T] int, or inputs_embeds [B, T, D]; attention_mask is 0 and 1 for all tokens so far, those
            in past_key_values included, or 4D as in the module.

        Raises:
          TypeError: unknown arguments, or one that is there twice.
          ValueError: token ids out of the vocabulary; a mask or a cache that does not fit the tokens.
        """
        inputs = _named(self.module, arguments, inputs)
        if (names := inputs.pop("adapter_names", None)) is not None:
            given = (inputs.get(name) for name in ("inputs_embeds", "input_ids"))
            return self._mixed(names, len(next((value for value in given if value is not None), ())))(**inputs)
        _check_names(self.module, inputs)
        arrays, static = _split(inputs)
        _check_tokens(arrays, self.config)
        _check_labels(arrays, self.module)
        output = _forward(self.module, self.variables, _fit(arrays), tuple(sorted(static.items())))
        return _with_mask(self.module, output, arrays.get("attention_mask"))

    def generate(self, inputs: Any = None, generation_config: Any = None, *arguments: Any, **options: Any) -> Any:
        """Continue prompts; see flaxqwen.generation.generate.

        adapter_names, besides: an adapter's name for each prompt, or "__base__", as in peft.

        Raises:
          TypeError: the model has no language-model head.
        """
        model = self._with_names(inputs, generation_config, options)
        return generate(model._causal_lm(), inputs, generation_config, *arguments, **options)

    def stream(self, inputs: Any = None, generation_config: Any = None, *arguments: Any, **options: Any) -> Stream[Any]:
        """The pieces of generate(), read while they come by `for` or `async for`; see flaxqwen.generation.stream.

        Raises:
          TypeError: the model has no language-model head.
        """
        model = self._with_names(inputs, generation_config, options)
        return stream(model._causal_lm(), inputs, generation_config, *arguments, **options)

    def warmup(self, batch_sizes: Sequence[int], prompt_lengths: Sequence[int], **options: Any) -> None:
        """Compile what later calls of generate() need; see flaxqwen.generation.warmup.

        Raises:
          TypeError: the model has no language-model head.
        """
        warmup(self._causal_lm(), batch_sizes, prompt_lengths, **options)

    def save_programs(
        self, path: str | os.PathLike[str], batch_sizes: Sequence[int], prompt_lengths: Sequence[int], **options: Any
    ) -> None:
        """Write what warmup() compiles to a file, for load_programs().

        Args:
          path: of the file.
          batch_sizes, prompt_lengths, options: as of warmup(); no functions of your own, which are not kept.

        Raises:
          TypeError: the model has no language-model head.
          ValueError: as warmup(); logits_processor or stopping_criteria; several processes.
          OSError: the file cannot be written; it appears whole or not at all.
        """
        if own := [name for name in ("logits_processor", "stopping_criteria") if options.get(name)]:
            raise ValueError(f"save_programs() does not take {own[0]}: another process has other functions")
        if jax.process_count() > 1:
            raise ValueError("programs are saved by one process: those of several cannot be saved yet")
        recorder = Recorder(self.module)
        dataclasses.replace(self, programs=recorder).warmup(batch_sizes, prompt_lengths, **options)
        write_programs(path, recorder, self.variables)

    def load_programs(self, path: str | os.PathLike[str]) -> Model:
        """The model with the programs of save_programs(): calls of generate() that they are for compile nothing.

        All other calls compile what they need, as ever; so do adapters that are loaded afterwards. Files add up.
        A file is code: load none that you do not trust.

        Raises:
          FileNotFoundError: no such file.
          ValueError: the file is damaged, or was made by other versions, for another device or another model.
        """
        loaded = read_programs(path, self.module, self.variables)
        kept = self.programs.compiled if self.programs.module == self.module else {}
        return dataclasses.replace(self, programs=Programs(self.module, {**kept, **loaded.compiled}))

    def compute_transition_scores(
        self, sequences: Any, scores: Any, beam_indices: Any = None, normalize_logits: bool = False
    ) -> np.ndarray:
        """The score of each token that generate() chose; see flaxqwen.generation.compute_transition_scores."""
        return compute_transition_scores(sequences, scores, beam_indices, normalize_logits)

    def _with_names(self, inputs: Any, generation_config: Any, options: dict[str, Any]) -> Model:
        """The model with the adapters of a call's prompts; adapter_names is taken out of its options."""
        if (names := options.pop("adapter_names", None)) is None:
            return self
        given = (inputs, options.get("input_ids"), options.get("inputs_embeds"))
        prompts = next((prompt for prompt in given if prompt is not None), (None,))
        scale = options.get("guidance_scale", GenerationConfig.coerce(generation_config).guidance_scale)
        scale = self.generation_config.guidance_scale if scale is None else scale
        return self._mixed(names, len(prompts), copies=1 if scale in (None, 1) else 2)

    def _causal_lm(self) -> CausalLM:
        if not self.can_generate():
            raise TypeError(
                f"{type(self.module).__name__} has no language-model head: load it by AutoModelForCausalLM, "
                "Qwen2-Audio by AutoModelForSeq2SeqLM"
            )
        return cast(CausalLM, self)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        to: Literal["flax", "pytorch", "orbax"] = "flax",
        max_shard_size: str | int | None = None,
    ) -> None:
        """Write config.json, generation_config.json and the weights into a folder.

        Args:
          save_directory: made if need be; weights of the same framework in it are replaced.
          to: "flax" for flax_model.safetensors, "pytorch" for the model.safetensors that Transformers loads, "orbax"
            for a checkpoint of which each process writes its own shards.
          max_shard_size: bytes of a file, as int or like "200MB"; default: 5GB. Not for orbax.

        Raises:
          FileExistsError: the folder holds weights of the other framework, which would be stale.
          ValueError: adapters are loaded; an unknown `to`, or no size; quantized weights for PyTorch or orbax;
            several processes, but for orbax.
          OSError: a file cannot be written. Nothing is left of weights that are not whole.
        """
        if self.adapters.loaded:
            raise ValueError(
                "the model has adapters: save_adapter(folder) writes one alone, and "
                "merge_and_unload().save_pretrained(folder) all of it"
            )
        if to == "pytorch" and self.config.quantization_config is not None:
            raise ValueError(
                "PyTorch's Transformers does not read our quantized weights: save them with to='flax', and bring them "
                "back to floating point by `flaxqwen convert SRC DST --to pytorch --dtype bfloat16`"
            )
        if to == "orbax" and max_shard_size is not None:
            raise ValueError("max_shard_size is of files of safetensors; orbax cuts by the mesh")
        if to == "orbax" and self.config.quantization_config is not None:
            raise ValueError("orbax checkpoints are of plain weights: save quantized ones with to='flax'")
        config = dataclasses.replace(self.config, architectures=(type(self.module).__name__,), dtype=self.dtype.name)
        sharding = module_sharding(self.module)
        if to == "orbax":
            save_native(self.params, Path(save_directory), sharding)()
            if is_main():
                config.save_pretrained(save_directory)
                if self.can_generate():
                    self.generation_config.save_pretrained(save_directory)
        elif jax.process_count() > 1:
            raise ValueError(f"to={to!r} is written by one process; to='orbax' by several")
        else:
            params = self.params if sharding is None else sharding.undo_heads(self.params)
            size = "5GB" if max_shard_size is None else max_shard_size
            companions = {"config.json": config.to_json_string().encode()}
            if self.can_generate():
                companions["generation_config.json"] = self.generation_config.to_json_string().encode()
            save_params(params, save_directory, to=to, max_shard_size=size, companions=companions)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        to: Literal["flax", "pytorch"] = "flax",
        max_shard_size: str | int | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
    ) -> str:
        """Save, and upload to a repository of the hub, which is made if need be, as is the branch `revision`.

        Weights of the same framework from an earlier push are removed in the same commit.

        Returns:
          The commit's address.

        Raises:
          ValueError: as save_pretrained; orbax, of which a folder that is replaced cannot be told from others.
        """
        if to not in REPLACED:
            raise ValueError(f"to={to!r} is not one of {', '.join(REPLACED)}")
        import huggingface_hub  # 0.2 s, and few push

        api = huggingface_hub.HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, to=to, max_shard_size=max_shard_size)
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=commit_message or f"Upload {type(self.module).__name__}",
                revision=revision,
                delete_patterns=list(REPLACED[to]),
            )
        return commit.commit_url

    def can_generate(self) -> bool:
        """Whether the model has a language-model head."""
        return isinstance(self.module, Qwen2ForCausalLM | Qwen2AudioForConditionalGeneration)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many parameters there are; a tied head counts once, as in Transformers.

        All are trainable but the positions of Qwen2-Audio's encoder, which are among the embeddings as well.

        Of a quantized weight the values count, not the bytes, and no scales.
        """
        sharding, total = module_sharding(self.module), 0
        for path, leaf in jax.tree.leaves_with_path(self.params):
            keys = tuple(key.key for key in path)
            if SCALE in keys or (exclude_embeddings and "embed_tokens" in keys):
                continue
            if (exclude_embeddings or only_trainable) and "embed_positions" in keys:
                continue
            shape = leaf.shape if sharding is None else sharding.heads.stored_shape(keys, leaf.shape)
            total += math.prod(shape) * (2 if leaf.dtype == np.uint8 else 1)
        return total

    @property
    def dtype(self) -> np.dtype:
        """dtype of the parameters; where they are quantized, of the others and of the arithmetic."""
        if self.config.quantization_config is not None:
            return np.dtype(self.module.dtype)
        return jax.tree.leaves(self.params)[0].dtype

    @property
    def mesh(self) -> Mesh | None:
        """The mesh that the model lies on; None: one device."""
        sharding = module_sharding(self.module)
        return None if sharding is None else sharding.mesh

    @property
    def device(self) -> jax.Device:
        """The device of the parameters (the first, when they are sharded)."""
        return min(jax.tree.leaves(self.params)[0].devices(), key=lambda device: device.id)


@partial(jax.jit, static_argnames=("module", "static"))
def _forward(module: nn.Module, variables: Params, arrays: dict[str, Any], static: tuple[tuple[str, Any], ...]) -> Any:
    return module.apply(variables, **arrays, **dict(static))


def _with_mask(module: nn.Module, output: Any, mask: Any) -> Any:
    """The output, where it holds the attention mask, with the caller's own: the module's is as wide as its cache."""
    if mask is None or not isinstance(module, Qwen2AudioModel | Qwen2AudioForConditionalGeneration):
        return output
    return (*output[:-1], mask) if isinstance(output, tuple) else output.replace(attention_mask=mask)


def _named(module: nn.Module, arguments: Sequence[Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name: those without one are the module's first, up to inputs_embeds, in its own order."""
    if not arguments:
        return inputs
    names = list(inspect.signature(module.__call__).parameters)
    names = names[: names.index("inputs_embeds") + 1] if "inputs_embeds" in names else names
    if len(arguments) > len(names):
        raise TypeError(f"{len(arguments)} arguments have no name; give those after {names[-1]} by name")
    for name in names[: len(arguments)]:
        if name in inputs:
            raise TypeError(f"{type(module).__name__} got {name} twice: by its place and by its name")
    return dict(zip(names, arguments, strict=False)) | inputs


def _check_names(module: nn.Module, inputs: dict[str, Any]) -> None:
    """TypeError for an argument that the module does not have, even where it is None."""
    if not inputs:  # looking at a signature takes 20 us
        return
    names = tuple(inspect.signature(module.__call__).parameters)
    for name in inputs:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names)}"
            raise TypeError(f"{type(module).__name__} has no argument {name!r}; {hint}")


def _split(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments that are data, as arrays, and those that decide which program it is; None is neither."""
    arrays: dict[str, Any] = {}
    static: dict[str, Any] = {}
    for name, value in inputs.items():
        if name in FLAGS and value is not None:
            if not isinstance(value, bool | np.bool_ | int):
                raise TypeError(f"{name} is {value!r}; expected True or False")
            static[name] = bool(value)
        elif isinstance(value, bool):
            static[name] = value
        elif name in STATIC_INTS and isinstance(value, int | np.integer):
            static[name] = int(value)
        elif name == "past_key_values" and value is not None:
            if not isinstance(value, KVCache):
                raise TypeError(
                    f"past_key_values is a {type(value).__name__}; expected the KVCache of an earlier output"
                )
            arrays[name] = value
        elif value is not None:
            arrays[name] = to_array(name, value)
    return arrays, static


def _check_tokens(arrays: dict[str, Any], config: Any) -> None:
    """ValueError for tokens not [B, T] (embeddings: [B, T, D]), out of vocabulary, or not as many as audio takes."""
    for name, axes in (("input_ids", "[batch, tokens]"), ("inputs_embeds", "[batch, tokens, hidden_size]")):
        if name in arrays and (np.ndim(arrays[name]) != axes.count(",") + 1 or 0 in arrays[name].shape):
            raise ValueError(f"{name} has shape {arrays[name].shape}; expected {axes}, none of them 0")
    ids = arrays.get("input_ids")
    if ids is None:
        return
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"input_ids is {ids.dtype}; expected integers")
    if isinstance(ids, Tracer):
        return
    check_token_ids(ids, config.text_config if isinstance(config, Qwen2AudioConfig) else config)
    frames = arrays.get("feature_attention_mask")
    if "input_features" in arrays and frames is not None and ids.shape[1] > 1 and not isinstance(frames, Tracer):
        check_audio_tokens(np.asarray(ids), np.asarray(frames), config.audio_token_index)


def _check_labels(arrays: dict[str, Any], module: nn.Module) -> None:
    """ValueError for labels that are no class, and for positions whose logits are wanted that are no token's.

    PyTorch raises, too; in a compiled program they give NaN, or the last position.
    """
    keep, new = arrays.get("logits_to_keep"), arrays.get("input_ids", arrays.get("inputs_embeds"))
    if keep is not None and new is not None and not isinstance(keep, Tracer) and np.size(keep):
        _check_range("logits_to_keep", np.asarray(keep), -new.shape[1], new.shape[1])
    count = module.config.get_text_config().vocab_size
    if isinstance(module, Qwen2ForSequenceClassification | Qwen2ForTokenClassification):
        count = module.config.num_labels
    is_scored = isinstance(module, Qwen2ForSequenceClassification) and (
        module.config.problem_type not in (None, "single_label_classification") or count == 1
    )
    for name in ("labels", "shift_labels"):
        labels = arrays.get(name)
        if labels is None or isinstance(labels, Tracer) or is_scored:
            continue
        labels = np.asarray(labels)
        if np.issubdtype(labels.dtype, np.integer):
            _check_range(name, labels[labels != IGNORE_INDEX], 0, count)


def _check_range(name: str, values: np.ndarray, first: int, end: int) -> None:
    wrong = values[(values < first) | (values >= end)]
    if wrong.size:
        ignored = f", or {IGNORE_INDEX} for what does not count" if first == 0 else ""
        raise ValueError(f"{name} has {wrong.flat[0]}; expected {first} to {end - 1}{ignored}")


def _fit(arrays: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with a cache that has room for the new tokens and a mask that fits both.

    Raises:
      ValueError: a cache or a mask that does not.
    """
    new = arrays.get("input_ids", arrays.get("inputs_embeds"))
    if new is None:  # the module says what is missing
        return arrays
    (rows, tokens), seen, fitted = new.shape[:2], 0, dict(arrays)
    capacity = tokens
    if (cache := arrays.get("past_key_values")) is not None:
        if (found := cache.layers[0].key.shape[0]) != rows:
            raise ValueError(f"past_key_values has {found} rows; expected {rows}, as the new tokens")
        filled = arrays["cache_position"][:1] if "cache_position" in arrays else cache.length
        if isinstance(filled, Tracer):
            return arrays
        seen = int(np.asarray(filled).max())
        if seen + tokens > cache.capacity:
            cache = grow_cache(cache, capacity=bucket(seen + tokens, SMALLEST_CACHE))
        fitted["past_key_values"], capacity = cache, cache.capacity
    mask = arrays.get("attention_mask")
    if mask is not None and not isinstance(mask, Tracer):
        fitted["attention_mask"] = _fit_mask(mask, rows, seen, tokens, capacity)
    return fitted


def _fit_mask(mask: Any, rows: int, seen: int, tokens: int, capacity: int) -> Any:
    """The mask; a 2D one as bool and as wide as the cache, so that one which grows with the text compiles nothing anew.

    What is past the tokens is the future, which is hidden in any case.
    """
    columns = seen + tokens
    fits = mask.ndim in (2, 4) and mask.shape[0] in ((rows,) if mask.ndim == 2 else (1, rows))
    if not fits or mask.shape[-1] not in (columns, capacity):
        parts = f": {seen} in past_key_values and {tokens} new" if seen else ""
        raise ValueError(f"attention_mask has shape {mask.shape}; expected {rows} rows of {columns} tokens{parts}")
    if mask.ndim == 4:
        return mask
    mask = np.asarray(mask)
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("attention_mask has values other than 0 and 1; a mask to be added to the scores is 4D")
    return np.pad(mask.astype(bool), ((0, 0), (0, capacity - mask.shape[1])), constant_values=True)
