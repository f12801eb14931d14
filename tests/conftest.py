"""What the tests share: where the real inputs are, and one precision for parity."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

# Before jax starts. The tests compile thousands of tiny programs: without LLVM's optimisations in half the CPU time.
# libtpu, and jaxlib 0.12, end the process at flags that they do not know.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
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


# The files that take longest although they have few tests: the other worker is busy meanwhile.
SLOW_FILES = ("test_real_geometry.py", "test_package.py")


def pytest_configure(config: pytest.Config) -> None:
    """Files go to xdist's workers in our order; its own, by the number of their tests, leaves the slowest for last."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow files first."""
    items.sort(key=lambda item: item.path.name not in SLOW_FILES)


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
def no_programs_of_other_files() -> Iterator[None]:
    """A file's compiled programs go with it: those of a whole run, 3 maps each, pass Linux's 65,530 of a process."""
    yield
    jax.clear_caches()
