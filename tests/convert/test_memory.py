"""Memory for weights: aligned, nobody else's, and in huge pages."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest

from flaxqwen.convert.memory import ALIGNMENT, BLOCK, OPEN, SMALLEST, WeightMemory
from flaxqwen.memory import in_huge_pages
from tests.pages import flags_at, has_huge_pages

SIZES = [0, 1, 4096, SMALLEST - 1, SMALLEST, 3 * SMALLEST + 5, BLOCK // 2, BLOCK - 7, BLOCK + 1]


def test_it_is_aligned_and_its_own():
    """Any size, writable; what one array is filled with no other sees, whatever thread has taken it."""
    memory = WeightMemory()
    with ThreadPoolExecutor(4) as pool:
        arrays = list(pool.map(memory.take, SIZES * 2))
    for number, (array, size) in enumerate(zip(arrays, SIZES * 2, strict=True)):
        assert array.shape == (size,)
        assert array.dtype == np.uint8
        if size:
            assert array.ctypes.data % ALIGNMENT == 0
        array[:] = number
    for number, array in enumerate(arrays):
        assert (array == number).all()


def test_weights_lie_side_by_side():
    """In one block while it has room, small ones in what a large one has left; but in few that are open at a time."""
    memory = WeightMemory()
    first, large, second = (memory.take(size) for size in (SMALLEST, BLOCK, SMALLEST + 1))
    assert second.ctypes.data == first.ctypes.data + SMALLEST
    assert not 0 <= large.ctypes.data - first.ctypes.data < BLOCK
    for _ in range(OPEN):
        memory.take(BLOCK)
    assert memory.take(SMALLEST).ctypes.data != second.ctypes.data + SMALLEST + ALIGNMENT


@pytest.mark.skipif(sys.platform != "linux", reason="mappings are Linux's")
def test_a_block_goes_with_its_last_weight():
    """Not before; of two weights, and whatever the memory goes on to give."""
    memory = WeightMemory()
    first, second = memory.take(SMALLEST), memory.take(BLOCK - SMALLEST)
    block = weakref.ref(first.base.base)
    for _ in range(OPEN):
        memory.take(BLOCK)
    del first
    assert block() is not None
    del second
    assert block() is None


@has_huge_pages
def test_huge_pages_are_asked_for():
    """For all of a block that is taken, whatever the weights' sizes."""
    memory = WeightMemory()
    for size in (SMALLEST, BLOCK // 3, BLOCK + 5):
        start = memory.take(size).ctypes.data
        assert "hg" in flags_at(start)
        assert "hg" in flags_at(start + size - 1)


def test_arrays_of_a_cpu_are_moved(rng: np.random.Generator):
    """To the last bit, of any dtype and size, and side by side: no copy is made of what was moved."""
    memory, end = WeightMemory(), 0
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8, jnp.uint8):
        array = jnp.asarray(rng.integers(0, 100, (5, SMALLEST)), dtype)
        moved = in_huge_pages(array, memory)
        assert moved.dtype == array.dtype
        assert moved.unsafe_buffer_pointer() == end or not end
        end = moved.unsafe_buffer_pointer() + moved.nbytes
        np.testing.assert_array_equal(moved, array)
    small = rng.standard_normal(100)
    np.testing.assert_array_equal(in_huge_pages(jnp.asarray(small), memory), small.astype(np.float32))


def test_arrays_of_several_devices_stay():
    """In a process of its own, which has two."""
    script = (
        "import jax; from flaxqwen.convert.memory import WeightMemory\n"
        "from flaxqwen.memory import in_huge_pages; from flaxqwen.sharding import make_mesh\n"
        "mesh = make_mesh()\n"
        "array = jax.device_put(jax.numpy.ones((2, 1 << 21)), jax.NamedSharding(mesh, jax.P(mesh.axis_names)))\n"
        "assert len(array.devices()) == 2 and in_huge_pages(array, WeightMemory()) is array"
    )
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
