"""The package as a whole: what an import costs and brings along, who may import whom, and the style's hooks."""

from __future__ import annotations

import ast
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import flaxqwen

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"flaxqwen": ROOT / "flaxqwen", "flaxqwen.convert": ROOT / "convert"}


def run(code: str, *arguments: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORT = """
import time, jax, flax.linen
start = time.perf_counter()
import flaxqwen
print(time.perf_counter() - start)
import sys
assert not {"torch", "transformers", "huggingface_hub"} & set(sys.modules), "import flaxqwen"
for name in flaxqwen.__all__:
    if flaxqwen._HOMES.get(name) != "transformers":
        getattr(flaxqwen, name)
assert not {"torch", "transformers", "huggingface_hub"} & set(sys.modules), "the names of our own"
"""


def test_import_is_fast_and_lazy():
    """At most 0.3 s over jax and flax.linen; neither torch nor transformers, not even when our own names are used."""
    assert statistics.median(float(run(IMPORT)) for _ in range(3)) <= 0.3


def test_public_names():
    assert len(set(flaxqwen.__all__)) == len(flaxqwen.__all__)
    for name in flaxqwen.__all__:
        assert getattr(flaxqwen, name) is not None
    assert set(flaxqwen.__all__) <= set(dir(flaxqwen))
    with pytest.raises(AttributeError, match="module 'flaxqwen' has no attribute 'AutoModelForMaskedLM'"):
        flaxqwen.AutoModelForMaskedLM  # noqa: B018
    assert [name for name, home in flaxqwen._HOMES.items() if getattr(flaxqwen, name).__name__ != name] == []


def test_names_of_transformers_are_handed_on():
    transformers = pytest.importorskip("transformers", reason="the names are Transformers' own")
    for name in ("AutoTokenizer", "AutoProcessor", "AutoFeatureExtractor"):
        assert getattr(flaxqwen, name) is getattr(transformers, name)


def test_version_is_the_projects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert flaxqwen.__version__ == project["version"]


# As on a machine without torch: Transformers imports it wherever it is.
TOKENIZE = """
import json, sys
sys.modules["torch"] = None
from flaxqwen import AutoTokenizer
from pathlib import Path
texts, *folders = sys.argv[1:]
found = {}
for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text)["input_ids"] for text in json.loads(Path(texts).read_text())]
    found[folder] = {"ids": ids, "decoded": tokenizer.decode(ids[-1])}
json.dump(found, sys.stdout)
"""


def test_real_tokenizers_without_torch(shared: Path, tmp_path: Path):
    """The ids that llama.cpp keeps for 46 texts, and those of Transformers' own integration test."""
    data = shared / "data"
    vectors = data / "tokenizer" / "llama_cpp_vectors" / "ggml-vocab-qwen2.gguf.inp"
    texts = vectors.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    expected = [list(map(int, line.split())) for line in vectors.with_suffix(".out").read_text().split("\n")]
    assert len(texts) == len(expected) == 47  # the last is empty
    known = json.loads((data / "real_checkpoint_expectations.json").read_text(encoding="utf-8"))[
        "tokenizer_integration"
    ]
    (tmp_path / "texts.json").write_text(json.dumps([*texts, known["decoded"]]))
    folders = [str(data / "tokenizer" / name) for name in ("qwen2", "qwen2.5-instruct", "qwen2.5-base")]
    got = json.loads(run(TOKENIZE, str(tmp_path / "texts.json"), *folders))
    for folder in folders:
        assert got[folder]["ids"] == [*expected, known["ids"]], folder
        assert got[folder]["decoded"] == known["decoded"], folder


# Floors, as in the design: a file imports from its own floor and those below, and there is no circle.
FLOORS = (
    ("convert.*", "hub", "config", "config_values", "rope_config", "distributed", "files"),
    ("cache", "ops.*", "layout", "sharding"),
    ("models.*", "audio"),
    ("generation.*", "lora.*", "training", "dataset", "native", "allocator", "memory"),
    ("adapters", "model", "auto", "initialization", "loading", "aot", "aot_training", "quantization"),
    ("trainer", "batch", "parity", "parity_*", "cli", "cli.*", "demo.*"),
)
# Who may import torch or transformers, and only inside a function.
LAZY_DOORS = ("convert.torch_file", "parity", "parity_*", "cli.*")
HEAVY = ("torch", "transformers")
SLOW = ("huggingface_hub", "matplotlib", "orbax")


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Module name, without `flaxqwen.`, and syntax tree of every file of both packages; packages as `ops.*` too."""
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [*package.split(".")[1:], *path.relative_to(folder).with_suffix("").parts]
            yield ".".join(parts).removesuffix(".__init__") or "__init__", ast.parse(path.read_text(encoding="utf-8"))


def imports_of(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Every module that is imported, with the names taken from it, and whether only in a function or for types."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lazy = {id(inner) for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((f"{node.module}.{alias.name}", id(node) in lazy) for alias in node.names)


def fits(module: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(module, pattern) or f"{module}.*" == pattern for pattern in patterns)


def floor_of(module: str) -> int:
    found = [number for number, patterns in enumerate(FLOORS) if fits(module, patterns)]
    assert found, f"{module} has no floor: put it on one in FLOORS, as the design has it"
    return found[0]


def test_files_import_from_below_and_never_in_a_circle():
    modules = {name: tree for name, tree in sources() if name != "__init__"}
    below: dict[str, set[str]] = {name: set() for name in modules}
    for name, tree in modules.items():
        for target, _ in imports_of(tree):
            if target == "flaxqwen":  # all of it, and lazily
                assert floor_of(name) == len(FLOORS) - 1, f"{name} imports the package itself: import from the file"
            if not target.startswith("flaxqwen."):
                continue
            own = target.removeprefix("flaxqwen.")
            while own not in modules:  # the name of a function or class
                own = own.rpartition(".")[0]
                assert own, f"{name} imports {target}, which is nowhere"
            assert floor_of(own) <= floor_of(name), f"{name} imports {own}, which is above it"
            if own != name:
                below[name].add(own)
    while below:
        free = {name for name, others in below.items() if not others}
        assert free, f"these import each other in a circle: {sorted(below)}"
        below = {name: others - free for name, others in below.items() if name not in free}


def test_torch_and_transformers_come_in_by_lazy_doors_alone():
    for name, tree in sources():
        for target, is_lazy in imports_of(tree):
            top = target.split(".")[0]
            if top in HEAVY:
                assert fits(name, LAZY_DOORS), f"{name} imports {target}"
            if top in HEAVY + SLOW:
                assert is_lazy, f"{name} imports {target} when it is imported itself"


def test_files_and_functions_are_short():
    """A file is read on a few screens, a function on one, its docstring aside."""
    for name, tree in sources():
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
        assert max((node.end_lineno or 0 for node in nodes), default=0) < 500, f"{name} is too long"
        for function in (node for node in nodes if isinstance(node, ast.FunctionDef)):
            start = function.body[1].lineno if ast.get_docstring(function) and function.body[1:] else function.lineno
            lines = (function.end_lineno or start) - start + 1
            assert lines <= 60, f"{name}.{function.name} has {lines} lines"


def test_hooks_pass():
    """What people run before a commit is what CI runs: every hook of .pre-commit-config.yaml."""
    yaml = pytest.importorskip("yaml", reason="needs pyyaml, to read .pre-commit-config.yaml")
    path = ROOT / ".pre-commit-config.yaml"
    if not path.is_file():
        pytest.skip("needs .pre-commit-config.yaml, which is not in this copy of the source")
    hooks = [hook for repo in yaml.safe_load(path.read_text(encoding="utf-8"))["repos"] for hook in repo["hooks"]]
    commands = [shlex.split(hook["entry"]) for hook in hooks]
    assert [command[0] for command in commands] == ["ruff", "ruff", "mypy"]
    failures = []
    for tool, *arguments in commands:
        program = shutil.which(tool, path=str(Path(sys.executable).parent)) or shutil.which(tool)
        if program is None:
            pytest.skip(f"needs {tool}: pip install -e '.[test]'")
        done = subprocess.run([program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            failures.append(f"{shlex.join([tool, *arguments])}:\n{done.stdout}{done.stderr}")
    assert not failures, "\n".join(failures)
