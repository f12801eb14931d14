"""What the tests share: where the real inputs are, and one precision for parity."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before jax starts. The tests compile thousands of tiny programs: without LLVM's optimisations in half the CPU time,
# and as one module each, not a part for each thread, in four fifths of that.
# libtpu, and jaxlib 0.12, end the process at flags that they do not know.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    if importlib.util.find_spec("libtpu") is None and importlib.metadata.version("jaxlib").startswith("0.10.")
    else ""
) + os.environ.get("XLA_FLAGS", "")

import jax
import numpy as np
import pytest


def find_shared() -> Path | None:
    """The folder of real configs, tokenizers and tools: $FLAXQWEN_SHARED, or `shared` beside the repository."""
    folder = Path(os.environ.get("FLAXQWEN_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    return folder if (folder / "data").is_dir() else None


# The files that take longest although they have few tests, in the order in which they begin: none is left for last.
SLOW_FILES = (
    "test_real_geometry.py",
    "test_sharding.py",
    "test_processes.py",
    "test_package.py",
    "test_readme.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Files go to xdist's workers in our order; its own, by the number of their tests, leaves the slowest for last."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow files first."""
    places = {name: place for place, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish() -> None:
    """What imports have made stays: the collector, 4% of a run's time, need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real inputs; the test is skipped where it is absent."""
    folder = find_shared()
    if folder is None:
        pytest.skip("needs the folder of real inputs (shared/ beside the repository, or $FLAXQWEN_SHARED)")
    return folder


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Fresh random inputs at every run; the seed is in the report of a test that fails."""
    seed = int(os.environ.get("FLAXQWEN_TEST_SEED", int.from_bytes(os.urandom(4), "little")))
    request.node.user_properties.append(("seed", seed))
    print(f"FLAXQWEN_TEST_SEED={seed}")
    return np.random.default_rng(seed)


@pytest.fixture(autouse=True)
def highest_precision() -> Iterator[None]:
    """Parity is measured in float32 products: TPUs and some GPUs take shortcuts by default."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Torch's threads wait for each other: on two busy cores 18 s of CPU for 15, and with 0.5B 300 s for 100."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Compiled programs, 3 maps each, go before they pass Linux's 65,530 maps of a process."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or len(maps.read_bytes().splitlines()) > 30_000:
        jax.clear_caches()
