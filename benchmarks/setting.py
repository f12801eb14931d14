"""When, on what and with which versions a benchmark ran."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("flaxqwen", "jax", "flax", "torch", "transformers")


def setting() -> dict[str, Any]:
    """The date, the processor, and the version of each package, None where it is not installed."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "versions": {name: installed(name) for name in PACKAGES},
    }


def processor() -> str:
    """The CPU's name, as Linux has it, or else its architecture."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def installed(name: str) -> str | None:
    """A package's version."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
