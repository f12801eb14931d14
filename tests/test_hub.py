"""Hub ids: the real huggingface_hub on a cache made by hand, and stand-ins for what would go over the network."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects, hf_raise_for_status

from flaxqwen import AutoConfig, AutoModelForCausalLM, Qwen2Config
from flaxqwen.convert.checkpoint import WEIGHT_FILES
from flaxqwen.convert.staging import ORBAX
from flaxqwen.hub import WEIGHTS, resolve_folder
from flaxqwen.model import Model

SHA = "0123456789abcdef0123456789abcdef01234567"
NAME = "somebody/tiny-qwen"
GEOMETRY = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def model() -> Model:
    return AutoModelForCausalLM.from_config(Qwen2Config(**GEOMETRY, **HEADS))


def same(ours: Model, other: Model) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, ours.params, other.params)))


def make_cache(folder: Path, cache: Path, name: str = NAME) -> Path:
    """A hub's cache with the folder's files: links into blobs, named by their hashes."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / SHA
    for part in (snapshot, repository / "blobs", repository / "refs"):
        part.mkdir(parents=True)
    (repository / "refs" / "main").write_text(SHA)
    for file in folder.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, repository / "blobs" / digest)
        (snapshot / file.name).symlink_to(f"../../blobs/{digest}")
    return cache


@pytest.mark.parametrize("size", ["5GB", "3KB"])
@pytest.mark.parametrize("to", ["flax", "pytorch"])
def test_a_cached_repository_loads_without_the_hub(to: Any, size: str, model: Model, tmp_path: Path):
    model.save_pretrained(tmp_path / "saved", to=to, max_shard_size=size)
    where = {"cache_dir": make_cache(tmp_path / "saved", tmp_path / "cache"), "local_files_only": True}
    assert same(AutoModelForCausalLM.from_pretrained(NAME, **where), model)
    assert same(AutoModelForCausalLM.from_pretrained(NAME, revision=SHA, **where), model)
    assert AutoConfig.from_pretrained(NAME, **where, num_labels=5).num_labels == 5
    with pytest.raises(
        FileNotFoundError, match=f"^{NAME}: no such folder, and not to be had from the hub: Cannot find"
    ):
        AutoModelForCausalLM.from_pretrained(NAME, revision="v2", **where)


OFFLINE = """
import sys
from flaxqwen import AutoModelForCausalLM
from flaxqwen.hub import resolve_folder

resolve_folder(sys.argv[2])
assert "huggingface_hub" not in sys.modules, "a local folder does without"
print(AutoModelForCausalLM.from_pretrained(sys.argv[1]).num_parameters())
try:
    resolve_folder("somebody/else")
except FileNotFoundError as error:
    print(error)
"""


def test_offline_by_the_environment(model: Model, tmp_path: Path):
    """HF_HUB_OFFLINE is read when huggingface_hub is imported: in a process of its own."""
    model.save_pretrained(tmp_path / "saved")
    cache = make_cache(tmp_path / "saved", tmp_path / "cache")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    arguments = [sys.executable, "-c", OFFLINE, NAME, str(tmp_path)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, error = done.stdout.splitlines()
    assert int(count) == model.num_parameters()
    assert error.startswith("somebody/else: no such folder, and not to be had from the hub: Cannot find an appropriate")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("somebody/else", "not to be had from the hub: Cannot find"),
        ("some--body/else", "not to be had from the hub: Cannot have -- or .."),
        ("./nowhere", "no such folder$"),
        ("/nowhere/at/all", "no such folder$"),
        ("a/b/c", "no such folder$"),
        (__file__, "a file; expected the folder of a model, or a hub id$"),
        ("", "an empty name; expected the folder of a model, or a hub id$"),
    ],
)
def test_names_that_lead_nowhere_have_one_clear_error(name: str, reason: str, tmp_path: Path):
    for weights in (True, False):
        with pytest.raises(FileNotFoundError, match=reason) as caught:
            resolve_folder(name, weights=weights, cache_dir=tmp_path, local_files_only=True)
        assert str(caught.value).startswith(f"{name}: ")
        assert "\n" not in str(caught.value)


def test_a_cache_without_weights_says_so(model: Model, tmp_path: Path):
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "flax_model.safetensors").unlink()
    where = {"cache_dir": make_cache(tmp_path / "saved", tmp_path / "cache"), "local_files_only": True}
    assert resolve_folder(NAME, weights=False, **where).name == SHA
    with pytest.raises(
        FileNotFoundError, match=r"no weights in the cache of the repository; expected one of model\.saf"
    ):
        resolve_folder(NAME, **where)


class Hub:
    """Repositories in memory, in place of snapshot_download: gives the files that the patterns allow, and notes them.

    calls: the arguments of each call. fetched: every file given so far.
    """

    def __init__(self, root: Path, files: dict[str, bytes]) -> None:
        self.root, self.files = root, files
        self.calls: list[dict[str, Any]] = []
        self.fetched: set[str] = set()

    def snapshot_download(
        self, repo_id: str, *, allow_patterns: Any = None, ignore_patterns: Any = None, **where: Any
    ) -> str:
        self.calls.append({"repo_id": repo_id, **where})
        folder = self.root / "snapshots" / SHA
        folder.mkdir(parents=True, exist_ok=True)
        for name in filter_repo_objects(self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(self.files[name])
            self.fetched.add(name)
        return str(folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, bytes]], Hub]:
    """Makes a Hub, which takes the place of the real one for the rest of the test."""

    def make(files: dict[str, bytes]) -> Hub:
        made = Hub(tmp_path / "hub", files)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
        return made

    return make


SMALL = {"config.json", "generation_config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "LICENSE"}
PYTORCH_SHARDS = {
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
}
# Files of weights in a repository, and those of them that are fetched.
REPOSITORIES = [
    ({"model.safetensors", "pytorch_model.bin", "flax_model.msgpack"}, {"model.safetensors"}),
    (PYTORCH_SHARDS | {"pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"}, PYTORCH_SHARDS),
    ({"pytorch_model.bin", "flax_model.safetensors", "training_args.bin"}, {"pytorch_model.bin"}),
    ({"flax_model.safetensors", "flax_model.msgpack", "tf_model.h5"}, {"flax_model.safetensors"}),
    ({"flax_model.msgpack"}, {"flax_model.msgpack"}),
    ({"model.safetensors", "model.fp16.safetensors", "adapter_model.safetensors"}, {"model.safetensors"}),
    ({"model.safetensors", "original/model.safetensors", "onnx/config.json"}, {"model.safetensors"}),
]


@pytest.mark.parametrize(("weights", "wanted"), REPOSITORIES)
def test_one_format_of_weights_is_fetched(weights: set[str], wanted: set[str], hub: Callable[..., Hub]):
    made = hub(dict.fromkeys(SMALL | weights | {"README.md", "image.png"}, b"{}"))
    folder = resolve_folder(NAME, weights=False)
    indexes = {name for name in weights if name.endswith("index.json")}
    assert made.fetched == SMALL | indexes
    assert resolve_folder(NAME) == folder
    assert made.fetched == SMALL | indexes | wanted


def test_formats_are_fetched_in_the_order_in_which_they_are_opened():
    first = [name for name in WEIGHT_FILES if not name.endswith("index.json") and name != ORBAX]  # a folder: local only
    assert [files[0] for files in WEIGHTS] == first


def test_what_the_hub_is_asked_for(hub: Callable[..., Hub], tmp_path: Path, model: Model):
    """The revision first, then the commit that it was: a push in between does not mix two states."""
    model.save_pretrained(tmp_path / "saved")
    made = hub({file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()})
    where = {"token": "secret", "cache_dir": "/some/cache", "local_files_only": False}
    assert same(AutoModelForCausalLM.from_pretrained(NAME, revision="v1", **where), model)
    resolve_folder(NAME, revision="v1", **where)
    assert [call.pop("revision") for call in made.calls].count(SHA) == len(made.calls) - 2 > 2
    assert all(call == {"repo_id": NAME, **where} for call in made.calls)


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": {"quant_method": "gptq"}},
        {"model_type": "llama"},
        {"model_type": "qwen2_audio"},
        {"hidden_act": "mish"},
    ],
)
def test_a_config_is_refused_before_weights_are_fetched(changes: dict[str, Any], hub: Callable[..., Hub]):
    config = {"model_type": "qwen2", **GEOMETRY, **HEADS, **changes}
    made = hub({"config.json": json.dumps(config).encode(), "model.safetensors": b""})
    with pytest.raises(ValueError, match=r"not supported|supported: qwen2|does not load model_type 'qwen2_audio'"):
        AutoModelForCausalLM.from_pretrained(NAME)
    assert made.fetched == {"config.json"}


def test_no_weights_in_the_repository(hub: Callable[..., Hub]):
    hub({"config.json": b"{}", "tf_model.h5": b""})
    with pytest.raises(FileNotFoundError, match=f"^{NAME}: no weights in the repository; expected one of model.saf"):
        resolve_folder(NAME)


def answer(status: int, code: str) -> Callable[..., str]:
    """A snapshot_download that fails as on this answer of the hub's server."""
    url = f"https://hub.example/api/models/{NAME}/revision/main"
    response = errors.Response(status, headers={"X-Error-Code": code, "X-Request-Id": "7"})
    http = importlib.import_module(errors.Response.__module__.split(".")[0])  # httpx, or httpx2 from 2.0 on
    response.request = http.Request("GET", url)

    def fail(*_: Any, **__: Any) -> str:
        hf_raise_for_status(response)
        raise AssertionError("unreachable")

    return fail


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (401, "RepoNotFound", "Repository Not Found for url"),
        (404, "RevisionNotFound", "Revision Not Found for url"),
        (403, "GatedRepo", "Cannot access gated repo for url"),
        (500, "", "Server error '500"),
    ],
)
def test_answers_of_the_hub_become_one_line(status: int, code: str, reason: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer(status, code))
    with pytest.raises(FileNotFoundError) as caught:
        resolve_folder(NAME)
    message = str(caught.value)
    assert message.startswith(f"{NAME}: no such folder, and not to be had from the hub: ")
    assert reason in message
    assert "\n" not in message


def test_other_errors_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OSError, match="No space left") as caught:
        resolve_folder(NAME)
    assert not isinstance(caught.value, FileNotFoundError)


class FakeApi:
    """HfApi over a dict of files: what push_to_hub uses of it."""

    def __init__(self, files: dict[str, bytes], token: Any) -> None:
        self.files, self.token = files, token
        self.log: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.log.append(("create_repo", {"repo_id": repo_id, **options}))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def create_branch(self, repo_id: str, **options: Any) -> None:
        self.log.append(("create_branch", {"repo_id": repo_id, **options}))

    def upload_folder(self, *, folder_path: str, delete_patterns: list[str], **options: Any) -> Any:
        """Deletes before it adds, as `HfApi.upload_folder` does."""
        self.log.append(("upload_folder", options))
        for name in list(filter_repo_objects(self.files, allow_patterns=delete_patterns)):
            del self.files[name]
        self.files |= {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}
        return SimpleNamespace(commit_url=f"https://hub.example/me/x/commit/{SHA}")


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> list[FakeApi]:
    """Every HfApi made, all of one repository."""
    made: list[FakeApi] = []
    files: dict[str, bytes] = {"README.md": b"mine"}

    def make(token: Any = None) -> FakeApi:
        made.append(FakeApi(files, token))
        return made[-1]

    monkeypatch.setattr(huggingface_hub, "HfApi", make)
    return made


def test_push_to_hub_uploads_what_save_pretrained_writes(model: Model, api: list[FakeApi], hub: Callable[..., Hub]):
    url = model.push_to_hub("x", private=True, token="secret")
    assert url == f"https://hub.example/me/x/commit/{SHA}"
    (used,) = api
    assert used.token == "secret"
    assert used.log == [
        ("create_repo", {"repo_id": "x", "private": True, "exist_ok": True}),
        ("upload_folder", {"repo_id": "me/x", "commit_message": "Upload Qwen2ForCausalLM", "revision": None}),
    ]
    assert set(used.files) == {"README.md", "config.json", "generation_config.json", "flax_model.safetensors"}
    hub(used.files)
    assert same(AutoModelForCausalLM.from_pretrained("me/x"), model)


@pytest.mark.parametrize("to", ["flax", "pytorch"])
def test_push_to_hub_replaces_the_weights_of_an_earlier_push(to: Any, model: Model, api: list[FakeApi], hub):
    """A single file beside new shards would be found first, and be the old model."""
    changed = Model(model.module, jax.tree.map(lambda a: a + 1, model.params), model.config, model.generation_config)
    for size in ("5GB", "3KB", "5GB"):
        model, changed = changed, model
        model.push_to_hub("x", to=to, max_shard_size=size)
        files = api[-1].files
        assert files["README.md"] == b"mine"
        assert any("index" in name for name in files) == any("-of-" in name for name in files) == (size == "3KB")
        shutil.rmtree(hub(dict(files)).root, ignore_errors=True)  # what the last push was fetched into
        assert same(AutoModelForCausalLM.from_pretrained("me/x"), model)


def test_push_to_hub_makes_the_branch(model: Model, api: list[FakeApi]):
    model.push_to_hub("x", revision="trial", commit_message="why")
    assert [what for what, _ in api[0].log] == ["create_repo", "create_branch", "upload_folder"]
    assert api[0].log[1][1] == {"repo_id": "me/x", "branch": "trial", "exist_ok": True}
    assert api[0].log[2][1] == {"repo_id": "me/x", "commit_message": "why", "revision": "trial"}
    model.push_to_hub("x", revision="refs/pr/3")  # a pull request has its branch
    assert [what for what, _ in api[1].log] == ["create_repo", "upload_folder"]


def test_push_to_hub_makes_nothing_of_what_cannot_be_saved(model: Model, api: list[FakeApi]):
    for to in ("onnx", "orbax"):
        with pytest.raises(ValueError, match=f"to='{to}' is not one of pytorch, flax"):
            model.push_to_hub("x", to=to)  # type: ignore[arg-type]
    assert not any(used.log for used in api)


def test_stand_ins_have_the_arguments_of_the_real_ones():
    """What is called here exists there, by these names."""
    real = huggingface_hub.HfApi
    for method, names in (
        (real, ("token",)),
        (real.create_repo, ("repo_id", "private", "exist_ok")),
        (real.create_branch, ("repo_id", "branch", "exist_ok")),
        (real.upload_folder, ("repo_id", "folder_path", "commit_message", "revision", "delete_patterns")),
    ):
        assert set(names) <= set(inspect.signature(method).parameters)
