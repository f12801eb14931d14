"""The part of the build that is code: the kernels in flaxqwen/ops/cpp, for x86 CPUs. All else is in pyproject.toml."""

import platform
import sys
from pathlib import Path

import jaxlib
from setuptools import Extension, setup

# Products and sums are fused where the code says so and nowhere else, so that no result depends on how a loop was
# compiled; and a loop with a condition may be vectorised.
OPTIONS = ("-std=c++20", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-w")
INSTRUCTIONS = {
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16", "fma"),
    "avx2": ("avx2", "fma"),
}


def kernels() -> list[Extension]:
    """One library by set of instructions. Where none can be built, operations of XLA's serve."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return []
    return [
        Extension(
            f"flaxqwen.ops.cpu_{instructions}",
            ["flaxqwen/ops/cpp/few_rows.cc", "flaxqwen/ops/cpp/decode_attention.cc"],
            depends=["flaxqwen/ops/cpp/common.h"],
            include_dirs=[str(Path(jaxlib.__file__).with_name("include"))],
            extra_compile_args=[*OPTIONS, *(f"-m{feature}" for feature in features)],
            optional=True,
        )
        for instructions, features in INSTRUCTIONS.items()
    ]


setup(ext_modules=kernels())
