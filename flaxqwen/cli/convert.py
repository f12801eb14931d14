"""`flaxqwen convert`."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from pathlib import Path
from typing import Any

from flaxqwen.auto import param_shapes
from flaxqwen.cli.common import format_bytes, module_of
from flaxqwen.config import Qwen2Config, config_from_file
from flaxqwen.convert import Progress, check, convert, has_own_head, open_checkpoint
from flaxqwen.convert.checksums import CHECKSUMS
from flaxqwen.convert.names import Path as ParamPath
from flaxqwen.convert.quantize import quantized_shapes, scheme_of
from flaxqwen.hub import resolve_folder
from flaxqwen.quantization import quantization_of


def convert_model(src: str, dst: Path, dry_run: bool = False, **options: Any) -> None:
    """Convert the checkpoint `src`, checked against the model of its config, and print what is in `dst` then.

    Args:
      src: a folder, a file of weights, or a hub id.
      dry_run: print what would be there.
      options: of flaxqwen.convert.convert.
    """
    started = time.perf_counter()
    source = find_source(src)
    expected = expected_shapes(source)
    if (scheme := options.get("quantize")) is not None:
        quantization_of(None, config_from_file(_folder(source)), scheme)  # whether the model would load
    with Progress("Converting") as report:
        sizes = convert(source, dst, expected=expected, progress=report, dry_run=dry_run, **options)
    seconds = time.perf_counter() - started
    end = ", not written" if dry_run else f", in {seconds:.1f} s"
    print(f"{dst}: {len(sizes)} files, {format_bytes(sum(sizes.values()))}{end}")
    shown: Counter[str] = Counter()
    for name, size in sizes.items():
        shown[name.partition("/")[0]] += size  # a folder, which may hold hundreds of files, on one line
    for name, size in sorted(shown.items()):
        print(f"  {name:<{max(map(len, shown))}}  {format_bytes(size):>8}")


def find_source(src: str) -> Path:
    """The file, or the folder, of a model's name; FileNotFoundError where there is none."""
    return Path(src) if Path(src).is_file() else resolve_folder(src)


def _folder(source: Path) -> Path:
    return source.parent if source.is_file() else source


def check_model(src: str) -> None:
    """Read a checkpoint whole, and print that it is the model's of its config and as it was written.

    Args:
      src: as of convert_model.

    Raises:
      FileNotFoundError: no such model.
      CheckpointError: what is wrong with it.
    """
    started = time.perf_counter()
    source = find_source(src)
    with Progress("Checking") as report:
        found = check(source, expected=expected_shapes(source), progress=report)
    seconds = time.perf_counter() - started
    sums = f"{found.files} files as {CHECKSUMS} says" if found.files else f"no {CHECKSUMS} to compare bytes with"
    print(f"{src}: {found.tensors} tensors as the config says, {sums}, in {seconds:.1f} s")


def expected_shapes(source: Path) -> dict[ParamPath, tuple[int, ...]]:
    """The shape of every parameter of the model that the config beside the weights describes.

    Raises:
      FileNotFoundError: there is no config.json, or no checkpoint.
      ValueError: a config that is not supported.
    """
    config = config_from_file(_folder(source))
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
