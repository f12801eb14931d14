"""Compiled programs in a file, so that a server starts without tracing or compiling.

A program is kept as XLA's executable, and not as StableHLO (jax.export), which would be compiled when it is loaded. So
a file is for one version of jax and of this library, one kind of device, and one model's shapes: all else is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import pickle
import platform
import zipfile
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from flaxqwen.config import PretrainedConfig
from flaxqwen.files import replacing
from flaxqwen.ops.cpu import cpu_flags
from flaxqwen.sharding import module_sharding

HEADER = "made_for.json"
# The default of an option that no program depends on: with options, jax does not take what the process has compiled.
AS_EVER: dict[str, str | bool] = {"xla_dump_hlo_as_text": False}
# What of jax's settings is in a program.
SETTINGS = ("jax_default_matmul_precision", "jax_enable_x64", "jax_default_prng_impl")


@dataclass(frozen=True)
class Programs:
    """Programs that need no compiling.

    module: whose they are.
    compiled: by what a call asks for, as key_of has it.
    """

    module: nn.Module | None = None
    compiled: Mapping[Hashable, jax.stages.Compiled] = field(default_factory=dict)

    def run(self, program: Callable[..., Any], *arguments: Any, **static: Any) -> Any:
        """program(*arguments, **static), by what is here for such shapes; where nothing is, jit compiles it.

        program: jitted; its first argument is a module, or it has none.
        """
        module, traced = split(arguments)
        if self.compiled and (module is None or module == self.module):
            compiled = self.compiled.get(key_of(program, traced, static))
            if compiled is not None:
                return compiled(*traced)
        return program(*arguments, **static)


@dataclass(frozen=True)
class Recorder(Programs):
    """Compiles each program that is asked for, and keeps it."""

    compiled: dict[Hashable, jax.stages.Compiled] = field(default_factory=dict)

    def run(self, program: Any, *arguments: Any, **static: Any) -> Any:
        """As Programs.run."""
        _, traced = split(arguments)
        key = key_of(program, traced, static)
        if key not in self.compiled:
            lowered: jax.stages.Lowered = program.lower(*arguments, **static)
            with compiled_anew():
                self.compiled[key] = lowered.compile(AS_EVER)
        return self.compiled[key](*traced)


@contextmanager
def compiled_anew() -> Iterator[None]:
    """Without JAX's persistent cache: on a CPU, what came from there cannot be saved again (jaxlib 0.10.2)."""
    name = "jax_enable_compilation_cache"
    before = getattr(jax.config, name)
    jax.config.update(name, False)
    reset_cache()  # else the first compilation's setting stays
    try:
        yield
    finally:
        jax.config.update(name, before)
        reset_cache()


def split(arguments: tuple[Any, ...]) -> tuple[nn.Module | None, tuple[Any, ...]]:
    """The module of a program's arguments, if there is one, and the others, which are traced."""
    return (arguments[0], arguments[1:]) if isinstance(arguments[0], nn.Module) else (None, arguments)


def key_of(program: Callable[..., Any], traced: tuple[Any, ...], static: Mapping[str, Any]) -> Hashable:
    """What tells apart the programs that jit makes of a function: structure, shapes and dtypes, static values."""
    leaves, structure = jax.tree.flatten(traced)
    shapes = tuple((leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else type(leaf) for leaf in leaves)
    settings = tuple(getattr(jax.config, name) for name in SETTINGS)
    return program.__module__, program.__name__, tuple(sorted(static.items())), structure, shapes, settings


def write_programs(path: str | os.PathLike[str], programs: Programs, variables: Any) -> None:
    """Write programs of a module with these variables to a file, which appears whole or not at all.

    Raises:
      OSError: it cannot be written.
    """
    assert programs.module is not None
    with replacing(Path(path)) as unfinished, zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(HEADER, json.dumps(made_for(programs.module, variables), indent=1))
        for index, (key, compiled) in enumerate(programs.compiled.items()):
            archive.writestr(str(index), pickle.dumps((key, serialize_executable.serialize(compiled))))


def read_programs(path: str | os.PathLike[str], module: nn.Module, variables: Any) -> Programs:
    """The programs of a file, on the devices of the variables.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is damaged, or was made for something else than this module with these variables, here.
    """
    header, parts = _read(path)
    check(path, header, made_for(module, variables))
    devices = devices_of(module, variables)
    place: dict[str, Any] = {"backend": devices[0].client, "execution_devices": devices}
    found = map(pickle.loads, parts)
    return Programs(module, {key: serialize_executable.deserialize_and_load(*part, **place) for key, part in found})


def _read(path: str | os.PathLike[str]) -> tuple[Any, list[bytes]]:
    """What a file says it was made for, and its programs; ValueError where it is no such file, or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}  # checked against their sums
        return json.loads(files.pop(HEADER)), list(files.values())
    except (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, RuntimeError) as error:
        raise ValueError(f"{os.fspath(path)}: no file of save_programs(), or a damaged one: {error}") from None


def devices_of(module: nn.Module, variables: Any) -> list[jax.Device]:
    """The devices that a module with these variables runs on."""
    sharding = module_sharding(module)
    return list(jax.tree.leaves(variables)[0].devices() if sharding is None else sharding.mesh.devices.flat)


def made_for(module: nn.Module, variables: Any) -> dict[str, Any]:
    """All that a module's programs depend on but for what is in their keys, as JSON values."""
    device, sharding = devices_of(module, variables)[0], module_sharding(module)
    leaves = jax.tree.leaves_with_path(variables)
    values = {
        "version of": {"jax": jax.__version__, "jaxlib": jaxlib.__version__},
        "code of flaxqwen": _digest(*(path.read_bytes() for path in sorted(_code()))),
        "device": device.device_kind,
        "runtime": device.client.platform_version,
        "processor": _processor() if device.platform == "cpu" else None,
        "mesh": None if sharding is None else [dict(sharding.mesh.shape), sharding.axes],
        "module": type(module).__name__,
        "compute dtype": None if module.dtype is None else jax.numpy.dtype(module.dtype).name,
        "attention": dataclasses.asdict(module.attention),
        "config": _without_notes(module.config).to_dict(),
        "parameter": {jax.tree_util.keystr(keys, simple=True, separator="."): str(jax.typeof(a)) for keys, a in leaves},
    }
    return json.loads(json.dumps(values))


def _code() -> Iterator[Path]:
    """The package's files of code, its kernels' libraries among them."""
    package = Path(__file__).parents[1]
    return itertools.chain(package.rglob("*.py"), package.rglob("*.so"))


def _without_notes(config: PretrainedConfig) -> PretrainedConfig:
    """A config without what no program depends on."""
    inner = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    inner = {name: _without_notes(value) for name, value in inner.items() if isinstance(value, PretrainedConfig)}
    return dataclasses.replace(config, architectures=None, extra={}, **inner)


def _processor() -> str:
    """This machine's instructions: XLA's programs for a CPU use all that it has."""
    flags = cpu_flags()
    return f"{platform.machine()} {_digest(flags.encode()) if flags else platform.processor()}"


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def check(path: str | os.PathLike[str], saved: Any, here: Any) -> None:
    """ValueError for the first thing in which what programs were made for differs from what is here."""
    for name, (found, expected) in _differences(saved, here):
        raise ValueError(
            f"{os.fspath(path)}: compiled for {name} {found}, here it is {expected}: save_programs() makes a file"
        )


def _differences(saved: Any, here: Any, name: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The names and both values of what differs in two trees of dicts."""
    if not (isinstance(saved, dict) and isinstance(here, dict)):
        if saved != here:
            yield name, (saved, here)
        return
    for key in dict.fromkeys([*here, *saved]):
        yield from _differences(saved.get(key), here.get(key), f"{name} {key}".strip())
