"""From a model's name to a folder: local paths as they are, hub ids through huggingface_hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
SMALL_FILES = ("*.json", "*.txt", "*.jinja")
# What a repository's weights may be in, the first that is there; the same order as convert.checkpoint.WEIGHT_FILES.
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "flax_model*.msgpack")


def resolve_folder(
    name: str | os.PathLike[str],
    *,
    weights: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a model's files, fetched from the hub if need be.

    Args:
      name: a folder, or a hub id such as "Qwen/Qwen2.5-0.5B-Instruct".
      weights: False fetches only config and tokenizer.
      revision, token, cache_dir, local_files_only: as in Transformers. HF_HUB_OFFLINE=1 is heeded.

    Raises:
      FileNotFoundError: no such folder, nor such a repository (or it cannot be reached, and is not in the cache).
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise FileNotFoundError(f"{name}: a file; expected the folder of a model, or a hub id")
    if not HUB_ID.fullmatch(str(name)):
        raise FileNotFoundError(f"{name}: no such folder")
    where: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    where["local_files_only"] = local_files_only
    folder = _snapshot(str(name), SMALL_FILES, where)
    if not weights:
        return folder
    for pattern in WEIGHTS:
        folder = _snapshot(str(name), (*SMALL_FILES, pattern), where)
        if any(folder.glob(pattern)):
            return folder
    raise FileNotFoundError(f"{name}: no weights in the repository; expected one of {', '.join(WEIGHTS)}")


def _snapshot(name: str, patterns: tuple[str, ...], where: dict[str, Any]) -> Path:
    import huggingface_hub  # 0.2 s, and local folders do without
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns), **where))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{name}: no such folder, and not to be had from the hub: {reason}") from error
