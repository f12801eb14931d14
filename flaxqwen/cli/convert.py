"""`flaxqwen convert`."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from flaxqwen.auto import param_shapes
from flaxqwen.cli.common import format_bytes, module_of
from flaxqwen.config import Qwen2Config, config_from_file
from flaxqwen.convert import Progress, convert, has_own_head, open_checkpoint
from flaxqwen.convert.names import Path as ParamPath
from flaxqwen.convert.quantize import quantized_shapes, scheme_of
from flaxqwen.hub import resolve_folder


def convert_model(src: str, dst: Path, **options: Any) -> None:
    """Convert the checkpoint `src`, checked against the model of its config, and print what is in `dst` then.

    Args:
      src: a folder, a file of weights, or a hub id.
      options: of flaxqwen.convert.convert.
    """
    started = time.perf_counter()
    source = Path(src) if Path(src).is_file() else resolve_folder(src)
    expected = expected_shapes(source)
    with Progress("Converting") as report:
        convert(source, dst, expected=expected, progress=report, **options)
    seconds = time.perf_counter() - started
    sizes = {path.name: path.stat().st_size for path in sorted(dst.iterdir()) if path.is_file()}
    print(f"{dst}: {len(sizes)} files, {format_bytes(sum(sizes.values()))}, in {seconds:.1f} s")
    for name, size in sizes.items():
        print(f"  {name:<{max(map(len, sizes))}}  {format_bytes(size):>8}")


def expected_shapes(source: Path) -> dict[ParamPath, tuple[int, ...]]:
    """The shape of every parameter of the model that the config beside the weights describes.

    Raises:
      FileNotFoundError: there is no config.json, or no checkpoint.
      ValueError: a config that is not supported.
    """
    config = config_from_file(source.parent if source.is_file() else source)
    try:
        scheme = scheme_of(config.quantization_config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if isinstance(config, Qwen2Config) and config.tie_word_embeddings:
        with open_checkpoint(source) as checkpoint:
            # Such a model is not tied, whatever its config says, and needs its head.
            config = dataclasses.replace(config, tie_word_embeddings=not has_own_head(checkpoint))
    shapes = param_shapes(module_of(config))
    return shapes if scheme is None else quantized_shapes(shapes, scheme)
