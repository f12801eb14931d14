"""`flaxqwen info`: a model's size, from its config alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from rich.table import Table

from flaxqwen.auto import param_shapes, parse_dtype
from flaxqwen.cache import init_cache
from flaxqwen.cli.common import Console, format_bytes, heads_text, module_of
from flaxqwen.config import Qwen2Config, config_from_file
from flaxqwen.convert.names import Path as ParamPath
from flaxqwen.convert.names import to_name
from flaxqwen.convert.quantize import METHOD, SCALE, quantized_shapes, scheme_of
from flaxqwen.hub import resolve_folder
from flaxqwen.sharding import Sharding, parse_mesh

CONTEXTS = (2048, 8192, 32768, 131072)
MAX_DEVICES = 2**16  # the largest pods have some 10,000; as many heads are laid out one by one


def show_info(name: str, *, as_json: bool, mesh: str | None = None) -> None:
    """Print what a model is and what memory it takes, and where it lies on a mesh: as text, or as one JSON object.

    Raises:
      ValueError: a mesh in another form than "data=2,tensor=4"; a model that no module is for.
    """
    folder = resolve_folder(name, weights=False)
    config = config_from_file(folder)
    values = model_info(config)
    if mesh is not None:
        values["mesh"] = mesh_info(config, parse_mesh(mesh))
    if as_json:
        print(json.dumps({"model": name, **values}))
    else:
        print_info(name, values)


def model_info(config: Any) -> dict[str, Any]:
    """Architecture, parameters, bytes, and memory by context length, of a batch of 1; nothing is allocated.

    Raises:
      ValueError: a config that no module is for.
    """
    module = module_of(config)
    whole = module.config
    dtype = whole.dtype or "float32"  # as Transformers takes a config without one
    config, audio = whole.get_text_config(), getattr(whole, "audio_config", None)
    shapes = param_shapes(module)
    parameters = sum(map(math.prod, shapes.values()))
    quantization = whole.quantization_config
    weight_bytes = size_of_weights(shapes, dtype, quantization)
    lengths = [n for n in CONTEXTS if n < config.context_length] + [config.context_length]
    caches = {n: cache_bytes(config, n, dtype) for n in lengths}
    return {
        "architecture": type(module).__name__,
        "model_type": whole.model_type,
        "audio_encoder": audio and {"layers": audio.encoder_layers, "width": audio.d_model},
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "attention_heads": config.num_attention_heads,
        "key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "tied_embeddings": config.tie_word_embeddings and audio is None,
        "rope": config.rope_parameters.rope_type,
        "sliding_window": config.sliding_window,
        "context_length": config.context_length,
        "quantization": quantization and quantization.get("quant_method", "unknown"),
        "quantized_to": quantization.get("weights") if is_ours(quantization) else None,
        "dtype": dtype,
        "parameters": parameters,
        "weight_bytes": weight_bytes,
        "kv_cache_bytes_per_token": cache_bytes(config, 1, dtype),
        "memory": [
            {"context": n, "kv_cache_bytes": size, "total_bytes": weight_bytes + size} for n, size in caches.items()
        ],
    }


def size_of_weights(
    shapes: Mapping[ParamPath, tuple[int, ...]], dtype: str, quantization: Mapping[str, Any] | None
) -> int:
    """Bytes of the parameters; of weights quantized by another method, unquantized."""
    wide = np.dtype(parse_dtype(dtype)).itemsize
    if not is_ours(quantization):
        return sum(map(math.prod, shapes.values())) * wide
    scheme = scheme_of(quantization)
    assert scheme is not None
    total = 0
    for path, shape in shapes.items():
        stored = quantized_shapes({path: shape}, scheme)
        is_plain = len(stored) == 1
        total += math.prod(stored.pop(path)) * (wide if is_plain else 1)
        total += sum(math.prod(scale) * 4 for scale in stored.values())
    return total


def is_ours(quantization: Mapping[str, Any] | None) -> bool:
    """Whether weights are quantized in our own format."""
    return quantization is not None and quantization.get("quant_method") == METHOD


def cache_bytes(config: Qwen2Config, tokens: int, dtype: str) -> int:
    """Bytes of the KV cache of one row of `tokens` tokens."""
    cache = jax.eval_shape(lambda: init_cache(config, 1, tokens, parse_dtype(dtype)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))


def print_info(name: str, values: dict[str, Any]) -> None:
    """The text of `info`."""
    console = Console(highlight=False, soft_wrap=True)
    heads = f"{values['attention_heads']} heads of {values['head_dim']}, {values['key_value_heads']} key/value"
    window = f", sliding window {values['sliding_window']:,}" if values["sliding_window"] else ""
    rows = {
        "model": name,
        "architecture": f"{values['architecture']} ({values['model_type']})",
        "layers": f"{values['layers']} of width {values['hidden_size']:,}, MLP {values['intermediate_size']:,}",
        "attention": heads + window,
        "vocabulary": f"{values['vocab_size']:,}, head {'tied' if values['tied_embeddings'] else 'untied'}",
        "context": f"{values['context_length']:,} tokens, rope {values['rope']}",
        "parameters": f"{values['parameters']:,}",
        "weights": f"{format_bytes(values['weight_bytes'])} in {values['dtype']}",
        "KV cache": f"{format_bytes(values['kv_cache_bytes_per_token'])} a token",
    }
    if (audio := values["audio_encoder"]) is not None:
        rows["audio encoder"] = f"{audio['layers']} layers of width {audio['width']:,}"
    if values["quantized_to"]:
        rows["weights"] = f"{format_bytes(values['weight_bytes'])} in {values['quantized_to']} and {values['dtype']}"
    elif values["quantization"]:
        rows["quantization"] = f"{values['quantization']}, not supported: sizes are of the unquantized model"
    for label, text in rows.items():
        console.print(f"[bold]{label:<13}[/bold] {text}")
    table = Table("context", "KV cache", "weights + KV cache", box=None, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for row in values["memory"]:
        table.add_row(f"{row['context']:,}", format_bytes(row["kv_cache_bytes"]), format_bytes(row["total_bytes"]))
    console.print("\nMemory for one sequence, activations not counted:")
    console.print(table)
    if "mesh" in values:
        print_mesh(console, values["mesh"], values["weight_bytes"])


def mesh_info(config: Any, sizes: dict[str, int]) -> dict[str, Any]:
    """Where the parameters lie on a mesh, by their place in the model, and what became of the heads.

    Raises:
      ValueError: sizes that are not all given, or come to more than MAX_DEVICES; weights quantized by another method.
    """
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, **sizes}
    if min(sizes.values()) < 1:
        raise ValueError("info looks for no devices: give the sizes of the mesh, none of them -1")
    if (count := math.prod(sizes.values())) > MAX_DEVICES:
        raise ValueError(f"--mesh: {count:,} devices; expected {MAX_DEVICES:,} at most")
    scheme = scheme_of(config.quantization_config)
    # A mesh without devices: those that are here do not matter.
    sharding = Sharding.fit(cast(Mesh, AbstractMesh(tuple(sizes.values()), tuple(sizes))), config)
    heads, text = sharding.heads, config.get_text_config()
    module = module_of(config)
    itemsize = np.dtype(parse_dtype(module.config.dtype or "float32")).itemsize
    stored = param_shapes(module)
    stored = stored if scheme is None else quantized_shapes(stored, scheme)
    groups: dict[str, dict[str, Any]] = {}
    for path, stored_shape in stored.items():
        name = re.sub(r"\.\d+\.", ".*.", to_name(path))
        source = sharding.source(path, stored)
        shape = stored_shape if source is None else source.laid_shape(stored_shape)
        place = sharding.of_parameter(path, shape)
        is_integer = (*path[:-1], SCALE) in stored and path[-1] == "weight"
        width = 4 if path[-1] == SCALE else 1 if is_integer else itemsize
        part = math.prod(place.shard_shape(shape)) * width
        group = groups.setdefault(name, {"count": 0, "shape": list(shape), "axes": axes_text(place.spec), "bytes": 0})
        group["count"] += 1
        group["bytes"] += part
    return {
        "sizes": sizes,
        "query_heads": [text.num_attention_heads, len(heads.queries)],
        "key_value_heads": [text.num_key_value_heads, len(heads.keys)],
        "parameters": groups,
        "bytes_per_device": sum(group["bytes"] for group in groups.values()),
    }


def axes_text(spec: Any) -> str:
    """A PartitionSpec for people: "tensor, -"."""
    return ", ".join("-" if part is None else part if isinstance(part, str) else "+".join(part) for part in spec)


def print_mesh(console: Console, found: dict[str, Any], weight_bytes: int) -> None:
    """The table of `--mesh`."""
    console.print("\nOn a mesh of " + ", ".join(f"{axis} {size}" for axis, size in found["sizes"].items()) + ":")
    table = Table("parameter", "number", "shape", "cut along", "bytes per device", box=None, pad_edge=False)
    for column in (table.columns[1], table.columns[4]):
        column.justify = "right"
    table.columns[0].min_width = max(map(len, found["parameters"]))
    for name, group in found["parameters"].items():
        shape = " x ".join(map(str, group["shape"]))
        table.add_row(name, str(group["count"]), shape, group["axes"], format_bytes(group["bytes"]))
    table.add_row("all", "", "", "", format_bytes(found["bytes_per_device"]))
    console.print(table)
    share = found["bytes_per_device"] * found["sizes"]["fsdp"] * found["sizes"]["tensor"] / weight_bytes - 1
    console.print(
        f"heads: {heads_text(found['query_heads'], found['key_value_heads'])}; {share:.1%} more than one copy"
    )
