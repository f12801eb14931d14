"""Our kernels for x86 CPUs, in cpp/: which of them are there, and how a program calls one.

The package's build compiles them, see setup.py. Where it could not, or the CPU has other instructions, there are none,
and operations of XLA's serve.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from sysconfig import get_config_var

import jax

HANDLERS = ("FewRows", "DecodeAttention")


def _register() -> tuple[str, ...]:
    """Tell JAX of the libraries that were built and that run on this CPU; their instructions, the widest first."""
    found = []
    for instructions in ("avx512", "avx2"):
        path = Path(__file__).with_name(f"cpu_{instructions}{get_config_var('EXT_SUFFIX')}")
        if not path.exists():
            continue
        library = ctypes.CDLL(str(path))
        library.runs_here.restype = ctypes.c_bool
        if library.runs_here():
            for handler in HANDLERS:
                capsule = jax.ffi.pycapsule(getattr(library, handler))
                jax.ffi.register_ffi_target(target(handler, instructions), capsule, platform="cpu")
            found.append(instructions)
    return tuple(found)


def target(handler: str, instructions: str | None) -> str:
    """What a program calls a kernel; its instructions are in the name, so that a saved program has what it was for."""
    return f"flaxqwen_{handler}_{instructions}"


BUILT = _register()
# Those that the programs use; None: there are no kernels here.
INSTRUCTIONS = next(iter(BUILT), None)


def call(handler: str, result: jax.ShapeDtypeStruct, *arguments: jax.Array) -> jax.Array:
    """A kernel's result, on a CPU; under vmap, that of one call after another."""
    return jax.ffi.ffi_call(target(handler, INSTRUCTIONS), result, vmap_method="sequential")(*arguments)
