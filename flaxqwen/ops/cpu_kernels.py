"""Our kernels for x86 CPUs, in cpp/: which of them are there, and how a program calls one.

The package's build compiles them, see setup.py. Where it could not, or the CPU has other instructions, there are none,
and operations of XLA's serve. They run on one device: an array that lies on several is gathered for them. jax.export
takes a program with them where it is told to: DisabledSafetyCheck.custom_call(target(...)).
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import warnings
from pathlib import Path
from sysconfig import get_config_var

import jax
import jax.numpy as jnp

FOLDER = Path(__file__).with_name("cpp")
LINE = 64  # bytes of a CPU's cache, at a multiple of which a kernel begins what it writes in memory that it is lent
HANDLERS = ("Products", "GatedProducts", "DecodeAttention", "PrefillAttention", "FirstLargest")


def _register() -> tuple[str, ...]:
    """Tell JAX of the libraries that were built and that run here; their instructions, the widest first."""
    found = []
    for instructions in ("amx", "avx512", "avx2"):
        path = FOLDER / f"{instructions}{get_config_var('EXT_SUFFIX')}"
        try:
            library = ctypes.CDLL(str(path)) if path.exists() else None
            if library is None or not _runs_here(library):
                continue
            capsules = {handler: jax.ffi.pycapsule(getattr(library, handler)) for handler in HANDLERS}
        except (OSError, AttributeError, ValueError) as error:
            warnings.warn(f"{path} cannot be used, install flaxqwen anew: {error}", RuntimeWarning, stacklevel=2)
            continue
        for handler, capsule in capsules.items():
            jax.ffi.register_ffi_target(target(handler, instructions), capsule, platform="cpu")
        found.append(instructions)
    return tuple(found)


def _runs_here(library: ctypes.CDLL) -> bool:
    """Whether the CPU has the instructions of a library; ValueError where it was built for other sources, or a jaxlib.

    XLA refuses a handler for a later interface than its own when the backend starts, and the backend with it.
    """
    library.runs_here.restype, library.sources.restype = ctypes.c_bool, ctypes.c_char_p
    sources = sorted(path for path in FOLDER.iterdir() if path.suffix in (".cc", ".h"))  # those of a clone
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    if sources and library.sources().decode() != digest:
        raise ValueError("it was built from other sources")
    header = (Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text()
    major, minor = (int(re.findall(rf"#define XLA_FFI_API_{part} (\d+)", header)[0]) for part in ("MAJOR", "MINOR"))
    if divmod(library.interface(), 1000)[0] != major or library.interface() > major * 1000 + minor:
        raise ValueError("it was built with a later jaxlib")
    return library.runs_here()


def target(handler: str, instructions: str | None) -> str:
    """What a program calls a kernel; its instructions are in the name, so that a saved program has what it was for."""
    return f"flaxqwen_{handler}_{instructions}"


BUILT = _register()
# Those that the programs use; None: there are no kernels here.
INSTRUCTIONS = next(iter(BUILT), None)


def serve() -> bool:
    """Whether a program that is traced now may call them; not in shard_map, or on a mesh with explicit shardings."""
    return INSTRUCTIONS is not None and jax.sharding.get_abstract_mesh().empty


def call(handler: str, result: jax.ShapeDtypeStruct, *arguments: jax.Array, lent: int = 0) -> jax.Array:
    """A kernel's result, on a CPU; under vmap, that of one call after another.

    Args:
      lent: bytes that the kernel works in. It is a result that nobody reads, so that XLA finds the place.
    """
    lines = [jax.ShapeDtypeStruct((lent + LINE,), jnp.uint8)] if lent else []
    kernel = jax.ffi.ffi_call(target(handler, INSTRUCTIONS), [result, *lines], vmap_method="sequential")
    return kernel(*arguments)[0]
