"""The part of the build that is code: the kernels in flaxqwen/ops/cpp, for x86 CPUs. All else is in pyproject.toml."""

import hashlib
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup

FOLDER = Path("flaxqwen", "ops", "cpp")
# Products and sums are fused where the code says so and nowhere else, so that no result depends on how a loop was
# compiled; and a loop with a condition may be vectorised. Python's own flags let integers wrap around, whereupon GCC
# looks in each turn of a loop whether they have (-fno-wrapv: a row of float32 takes 19 ms in place of 23).
OPTIONS = ("-std=c++20", "-O3", "-fno-wrapv", "-ffp-contract=off", "-fno-trapping-math", "-g0", "-w")
AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16", "fma")
INSTRUCTIONS = {
    "amx": (*AVX512, "amx-tile", "amx-bf16", "amx-int8"),
    "avx512": AVX512,
    "avx2": ("avx2", "fma"),
}


def kernels() -> list[Extension]:
    """One library by set of instructions. Where none can be built, operations of XLA's serve."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return []
    try:
        import jaxlib
    except ImportError:  # of a Python that has no such version
        return []
    sources = sorted(path for path in FOLDER.iterdir() if path.suffix in (".cc", ".h"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return [
        Extension(
            ".".join((*FOLDER.parts, instructions)),
            [str(path) for path in sources if path.suffix == ".cc"],
            depends=["setup.py", *map(str, sources)],
            include_dirs=[str(Path(jaxlib.__file__).with_name("include"))],
            define_macros=[("SOURCES", f'"{digest}"')],
            extra_compile_args=[*OPTIONS, *(f"-m{feature}" for feature in features)],
            optional=True,
        )
        for instructions, features in INSTRUCTIONS.items()
    ]


setup(ext_modules=kernels())
