"""From a model's name to a folder: local paths as they are, hub ids through huggingface_hub, `demo` in the package."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
# Models in the package, by their id. The name wins over a folder of the same name, which is meant by ./demo.
BUILT_IN = {"demo": Path(__file__).parent / "demo" / "model", "demo-draft": Path(__file__).parent / "demo" / "draft"}
SMALL_FILES = ("*.json", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
# The files of each format of weights, in the order in which open_checkpoint looks for them in a folder. A repository
# may hold several formats and variants ("model.fp16.safetensors") of the same weights: only the first is fetched.
WEIGHTS = (
    ("model.safetensors", "model-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*.bin"),
    ("flax_model.safetensors", "flax_model-*.safetensors"),
    ("flax_model.msgpack",),
)


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
      name: a folder, or a hub id such as "Qwen/Qwen2.5-0.5B-Instruct"; or "demo", the model in the package,
        and "demo-draft", its draft model.
      weights: False fetches only what is small: config, tokenizer, licence.
      revision, token, cache_dir, local_files_only: of the hub, as in Transformers; a folder has no use for them.
        HF_HUB_OFFLINE=1 is heeded.

    Raises:
      FileNotFoundError: no such folder, nor such a repository (or it cannot be reached, and is not in the cache).
    """
    if str(name) in BUILT_IN:
        return BUILT_IN[str(name)]
    if not os.fspath(name):  # which as a path is the current folder
        raise FileNotFoundError(f"{name}: an empty name; expected the folder of a model, or a hub id")
    path = Path(os.path.expanduser(name))  # which leaves a ~user that there is none of; Path's own raises RuntimeError
    if path.is_dir():
        return path
    if path.exists():
        raise FileNotFoundError(f"{name}: a file; expected the folder of a model, or a hub id")
    if not HUB_ID.fullmatch(str(name)):
        raise FileNotFoundError(f"{name}: no such folder")
    where: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    folder = _snapshot(str(name), SMALL_FILES, revision=revision, **where)
    if not weights:
        return folder
    for files in WEIGHTS:
        # The folder's name is the commit: a push in between does not mix two states of the repository.
        folder = _snapshot(str(name), files, revision=folder.name, **where)
        if any(path for pattern in files for path in folder.glob(pattern)):
            return folder
    expected = ", ".join(files[0] for files in WEIGHTS)
    where_from = "the cache of the repository" if local_files_only else "the repository"
    raise FileNotFoundError(f"{name}: no weights in {where_from}; expected one of {expected}, or shards of it")


def resolve_adapter(name: str | os.PathLike[str], **where: Any) -> Path:
    """The folder of an adapter's files, fetched from the hub if need be; arguments as of resolve_folder.

    Raises:
      FileNotFoundError: no such folder, nor such a repository.
    """
    folder = resolve_folder(name, weights=False, **where)
    if Path(os.path.expanduser(name)).is_dir() or any(folder.glob("adapter_model.*")):
        return folder
    return _snapshot(str(name), ("adapter_*",), **(where | {"revision": folder.name}))


def _snapshot(name: str, patterns: tuple[str, ...], **where: Any) -> Path:
    """The folder of a repository's state, with the files of its root that fit the patterns."""
    import huggingface_hub  # 0.2 s, and local folders do without
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=["*/*"], **where)
        )
    except (errors.HTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        # "401 Client Error. (Request ID: ...)" stands before the hub's own words.
        reason = lines[1] if lines[0][0].isdigit() and len(lines) > 1 else lines[0]
        raise FileNotFoundError(f"{name}: no such folder, and not to be had from the hub: {reason}") from error
