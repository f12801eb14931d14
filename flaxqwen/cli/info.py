"""`flaxqwen info`: a model's size, from its config alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from flaxqwen.auto import param_shapes, parse_dtype
from flaxqwen.cache import init_cache
from flaxqwen.cli.common import format_bytes, module_of
from flaxqwen.config import Qwen2Config, config_from_file
from flaxqwen.convert.names import Path as ParamPath
from flaxqwen.convert.quantize import METHOD, quantized_shapes, scheme_of
from flaxqwen.hub import resolve_folder

CONTEXTS = (2048, 8192, 32768, 131072)


def show_info(name: str, *, as_json: bool) -> None:
    """Print what a model is and what memory it takes: as text, or as one JSON object."""
    folder = resolve_folder(name, weights=False)
    values = model_info(config_from_file(folder))
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
    config = module.config
    dtype = config.dtype or "float32"  # as Transformers takes a config without one
    shapes = param_shapes(module)
    parameters = sum(map(math.prod, shapes.values()))
    weight_bytes = size_of_weights(shapes, dtype, config.quantization_config)
    lengths = [n for n in CONTEXTS if n < config.context_length] + [config.context_length]
    caches = {n: cache_bytes(config, n, dtype) for n in lengths}
    quantization = config.quantization_config
    return {
        "architecture": type(module).__name__,
        "model_type": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "attention_heads": config.num_attention_heads,
        "key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "tied_embeddings": config.tie_word_embeddings,
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
