"""Memory for weights: aligned, nobody else's, and in huge pages where it fills them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from flaxqwen.convert.memory import ALIGNMENT, HUGE_PAGE, fresh_bytes
from flaxqwen.memory import in_huge_pages

SIZES = [0, 1, 4096, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 5]


def test_it_is_aligned_and_its_own():
    """Any size, writable; what one array is filled with no other sees."""
    arrays = [fresh_bytes(size) for size in SIZES * 2]
    for number, (array, size) in enumerate(zip(arrays, SIZES * 2, strict=True)):
        assert array.shape == (size,)
        assert array.dtype == np.uint8
        if size:
            assert array.ctypes.data % (HUGE_PAGE if size >= HUGE_PAGE else ALIGNMENT) == 0
        array[:] = number
    for number, array in enumerate(arrays):
        assert (array == number).all()


def flags_at(address: int) -> list[str]:
    """Those of the mapping that an address lies in, as Linux shows them; `hg` is: huge pages were asked for."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(edge, 16) for edge in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"{address:#x} is not mapped")


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked of Linux alone")
def test_huge_pages_are_asked_for_where_they_are_filled():
    """And not for what is left over, of which they would take more memory than the weight has."""
    if not Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        pytest.skip("this kernel has no transparent huge pages")
    array = fresh_bytes(2 * HUGE_PAGE + 4096)
    array[:] = 1
    start = array.ctypes.data
    assert "hg" in flags_at(start)
    assert "hg" in flags_at(start + 2 * HUGE_PAGE - 1)
    assert "hg" not in flags_at(start + 2 * HUGE_PAGE)


def test_arrays_of_a_cpu_are_moved(rng: np.random.Generator):
    """To the last bit, of any dtype; small ones stay what they are."""
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8, jnp.uint8):
        array = jnp.asarray(rng.integers(0, 100, (5, HUGE_PAGE)), dtype)
        moved = in_huge_pages(array)
        assert moved.dtype == array.dtype
        assert moved.unsafe_buffer_pointer() % HUGE_PAGE == 0
        np.testing.assert_array_equal(moved, array)
    small = jnp.ones(100)
    assert in_huge_pages(small) is small


def test_arrays_of_several_devices_stay():
    """In a process of its own, which has two."""
    script = (
        "import jax; from flaxqwen.memory import in_huge_pages; from flaxqwen.sharding import make_mesh\n"
        "mesh = make_mesh()\n"
        "array = jax.device_put(jax.numpy.ones((2, 1 << 21)), jax.NamedSharding(mesh, jax.P(mesh.axis_names)))\n"
        "assert len(array.devices()) == 2 and in_huge_pages(array) is array"
    )
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
