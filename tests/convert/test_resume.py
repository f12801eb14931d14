"""What a killed conversion has finished is taken over, and the result is that of an undisturbed one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flaxqwen.convert import CheckpointError, check, convert, save_params
from flaxqwen.convert.staging import JOURNAL, Staging
from tests.convert.samples import assert_same, expected_of, random_tensors, read_all

OPTIONS = {"max_shard_size": 400, "dtype": "float32"}

# Kills a conversion before each of its operations on files in turn: each in a fork, which dies as a process does.
KILL = """
import os, signal, sys
from flaxqwen.convert import convert

def run(kill_at, dst, options):
    left = kill_at
    def counted(operation):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)
        return call
    for name in ("open", "pwrite", "fsync", "replace", "unlink", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    convert("src", dst, **options)

def fork(*args):
    pid = os.fork()
    if not pid:
        run(*args)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

options = eval(sys.argv[1])
kill_at = 1
while True:
    status = fork(kill_at, f"dst{kill_at}", options)
    if not status:
        break
    assert status == -signal.SIGKILL, status
    if kill_at % 3 == 0:  # some die twice
        fork(7, f"dst{kill_at}", options)
    state = os.path.isfile(f"dst{kill_at}/checksums.json") and not os.path.exists(f"dst{kill_at}/.journal.flaxqwen")
    if not state:
        assert not fork(0, f"dst{kill_at}", options), kill_at
    kill_at += 1
print(kill_at - 1)
"""


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def src(tmp_path: Path) -> Path:
    folder = tmp_path / "src"
    save_params(random_tensors(), folder, to="pytorch", max_shard_size=700)
    (folder / "config.json").write_text('{"model_type": "qwen2", "dtype": "bfloat16"}')
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")
@pytest.mark.parametrize("options", [OPTIONS, {"format": "msgpack"}, {"to": "orbax"}], ids=str)
def test_a_kill_before_any_operation_changes_nothing(tmp_path: Path, src: Path, options: dict):
    convert(src, tmp_path / "undisturbed", **options)
    expected = contents(tmp_path / "undisturbed")
    command = [sys.executable, "-c", KILL, repr(options)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kills = int(done.stdout)
    assert kills > 5 * len(expected)
    for kill in range(1, kills + 2):
        assert contents(tmp_path / f"dst{kill}") == expected, kill


@pytest.mark.parametrize("options", [OPTIONS, {"to": "orbax", "dtype": "float32"}], ids=str)
def test_finished_files_are_taken_over(tmp_path: Path, src: Path, options: dict):
    die_late(tmp_path, src, options)
    dst = tmp_path / "dst"
    finished = json.loads((dst / JOURNAL).read_text())["files"]
    paths = {name: temporary(dst, name) for name in finished if "model" in name and "json" not in name}
    inodes = {name: path.stat().st_ino for name, path in paths.items()}
    assert len(inodes) > 1
    broken, *kept = inodes
    paths[broken].write_bytes(paths[broken].read_bytes()[:-1] + b"x")  # the size stays
    seen: list[tuple[int, int]] = []
    convert(src, dst, progress=lambda *done: seen.append(done), **options)
    assert all((dst / name).stat().st_ino == inodes[name] for name in kept)
    assert_same(read_all(dst), {name: tensor.astype(np.float32) for name, tensor in random_tensors().items()})
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    check(dst)


@pytest.mark.parametrize("change", ["options", "source", "journal", "deep journal"])
def test_other_work_begins_anew(tmp_path: Path, src: Path, change: str):
    die_late(tmp_path, src)
    dst, options = tmp_path / "dst", dict(OPTIONS)
    tensors = random_tensors()
    if change == "options":
        options["dtype"] = "float16"
    elif change == "source":  # of the same size
        tensors = random_tensors(seed=1)
        save_params(tensors, src, to="pytorch", max_shard_size=700)
    else:
        (dst / JOURNAL).write_text("{" if change == "journal" else "[" * 100_000)
    convert(src, dst, **options)
    assert_same(read_all(dst), {name: tensor.astype(options["dtype"]) for name, tensor in tensors.items()})
    assert not [name for name in contents(dst) if name.startswith(".")]


def test_a_disk_that_is_full_for_the_journal(tmp_path: Path, src: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing is left of a new folder, and the error is the disk's."""

    def full(path: Path, text: str, **_: object) -> None:
        path.write_bytes(text[:5].encode())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left on device"):
        convert(src, tmp_path / "dst", **OPTIONS)
    assert not (tmp_path / "dst").exists()


def test_a_folder_is_that_of_one_conversion(tmp_path: Path, src: Path):
    """What a killed process has left in a temporary folder does not get into another checkpoint."""
    die_late(tmp_path, src, {"to": "orbax"})
    other = {name: tensor for name, tensor in random_tensors(seed=1).items() if "layers.1" not in name}
    save_params(other, tmp_path / "other", to="pytorch")
    convert(tmp_path / "other", tmp_path / "dst", to="orbax")
    check(tmp_path / "dst")
    assert_same(read_all(tmp_path / "dst"), other)


def test_a_file_that_breaks_in_its_place_is_written_again(tmp_path: Path, src: Path):
    """A process is killed once the folder has its name, and a file of it breaks before the next."""
    options = {"to": "orbax"}
    convert(src, tmp_path / "undisturbed", **options)
    command = [sys.executable, "-c", KILL_AT_END, str(src), repr(options)]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 9
    path = tmp_path / "dst/orbax_model/model.norm.weight/c.0"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    convert(src, tmp_path / "dst", **options)
    assert contents(tmp_path / "dst") == contents(tmp_path / "undisturbed")


KILL_AT_END = """
import os, sys
from flaxqwen.convert import convert, staging
staging._sync_folder = lambda folder: folder.name != "dst" or os._exit(9)
convert(sys.argv[1], "dst", **eval(sys.argv[2]))
"""


def temporary(folder: Path, name: str) -> Path:
    top, _, rest = name.partition("/")
    return folder / f".{top}.flaxqwen" / rest


def die_late(folder: Path, src: Path, options: dict = OPTIONS) -> None:
    """A conversion into dst that is killed once it has finished some files."""
    code = """
import os, sys
from flaxqwen.convert import convert
from flaxqwen.convert.staging import Staging
save = Staging._save_journal
Staging._save_journal = lambda staging: (save(staging), len(staging.sizes) > 7 and os._exit(9))
convert(sys.argv[1], "dst", **eval(sys.argv[2]))
"""
    command = [sys.executable, "-c", code, str(src), repr(options)]
    assert subprocess.run(command, cwd=folder, check=False).returncode == 9


# Two at once


@pytest.mark.skipif(sys.platform == "win32", reason="locks are POSIX's")
def test_another_process_may_not_write_the_same_folder(tmp_path: Path, src: Path):
    """It ends with an error, the first one is not disturbed, and after it the folder is free."""
    code = "import sys; from flaxqwen.convert import convert; convert(sys.argv[1], 'dst', force=True)"
    ended: list[subprocess.CompletedProcess] = []

    def interfere(done: int, total: int) -> None:
        if not ended:
            command = [sys.executable, "-c", code, str(src)]
            ended.append(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False))
            with pytest.raises(OSError, match=r"dst: another process is writing it$"):
                save_params(random_tensors(seed=1), tmp_path / "dst")

    convert(src, tmp_path / "dst", progress=interfere, **OPTIONS)
    assert ended[0].returncode == 1
    assert ended[0].stderr.splitlines()[-1] == "OSError: dst: another process is writing it"
    check(tmp_path / "dst")
    assert_same(read_all(tmp_path / "dst"), {name: tensor.astype("f4") for name, tensor in random_tensors().items()})
    convert(src, tmp_path / "dst", force=True)


def test_an_error_leaves_the_folder_free(tmp_path: Path, src: Path):
    def stop(done: int, total: int) -> None:
        raise RuntimeError("stop")

    (tmp_path / "dst").mkdir()
    with pytest.raises(RuntimeError, match="stop") as caught:  # which keeps the frames, and all that is in them
        convert(src, tmp_path / "dst", progress=stop)
    convert(src, tmp_path / "dst")
    assert caught
    check(tmp_path / "dst")


@pytest.mark.parametrize("write", [convert, save_params])
def test_a_folder_that_was_filled_just_now_is_not_written(
    tmp_path: Path, src: Path, write: Any, monkeypatch: pytest.MonkeyPatch
):
    """Between the look at the folder and the lock, another conversion writes all of it."""
    enter, dst = Staging.__enter__, tmp_path / "new/dst"
    convert(src, tmp_path / "other", to="pytorch")

    def late(staging: Staging) -> Staging:
        shutil.copytree(tmp_path / "other", dst)
        return enter(staging)

    monkeypatch.setattr(Staging, "__enter__", late)
    with pytest.raises(FileExistsError, match=r"is not empty|would no longer be the same model"):
        write(src if write is convert else random_tensors(), dst)
    assert contents(dst) == contents(tmp_path / "other")


# Checks of what is on the disk


def test_a_whole_checkpoint_passes(tmp_path: Path, src: Path):
    convert(src, tmp_path / "dst", **OPTIONS)
    seen: list[tuple[int, int]] = []
    found = check(tmp_path / "dst", expected=expected_of(random_tensors()), progress=lambda *done: seen.append(done))
    sizes = {name: len(data) for name, data in contents(tmp_path / "dst").items() if name != "checksums.json"}
    assert (found.tensors, found.files, found.nbytes) == (len(random_tensors()), len(sizes), sum(sizes.values()))
    assert seen[-1] == (found.nbytes, found.nbytes)
    assert check(src).files == 0  # Transformers writes no sums


def test_all_that_is_wrong_is_listed(tmp_path: Path, src: Path):
    dst = tmp_path / "dst"
    convert(src, dst, **OPTIONS)
    first, second = sorted(dst.glob("flax_model-*"))[:2]
    data = bytearray(first.read_bytes())
    data[-5] ^= 1
    first.write_bytes(data)
    (dst / "config.json").write_text("{}")
    (dst / "model.safetensors").write_bytes(second.read_bytes())
    (dst / "model.safetensors").rename(dst / "flax_model-00099-of-00099.safetensors")
    with pytest.raises(CheckpointError) as caught:
        check(dst)
    message = str(caught.value)
    for text in (
        f"{first.name} has crc32 ",
        "config.json has 2 bytes, expected ",
        "flax_model-00099-of-00099.safetensors is not in checksums.json",
    ):
        assert text in message
    assert second.name not in message
    with pytest.raises(CheckpointError, match=r"missing model\.extra\.weight"):
        check(dst, expected=expected_of(random_tensors() | {"model.extra.weight": np.ones(1)}))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"files": {"a": 1}}',
        '{"files": {"a": {"bytes": 1, "crc32": "x"}}}',
        '{"files": {"a": {"bytes": 1e999, "crc32": "0"}}}',
        "[" * 100_000,
    ],
    ids=range(7),
)
def test_broken_sums_are_one_line(tmp_path: Path, src: Path, text: str):
    (src / "checksums.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"checksums\.json: not valid[^\n]*$"):
        check(src)


def test_a_file_is_checked_with_the_sums_beside_it(tmp_path: Path, src: Path):
    convert(src, tmp_path / "dst")
    path = tmp_path / "dst/flax_model.safetensors"
    assert check(path) == check(tmp_path / "dst")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"flax_model\.safetensors has crc32 "):
        check(path)


def test_sums_of_weights_that_are_gone_go_too(tmp_path: Path, src: Path):
    convert(src, tmp_path / "dst")
    save_params(random_tensors(seed=1), tmp_path / "dst")
    assert not (tmp_path / "dst/checksums.json").exists()


def test_a_dry_run_says_what_would_be_written(tmp_path: Path, src: Path):
    for options in (OPTIONS, {"to": "pytorch"}, {"layout": "linen"}):
        sizes = convert(src, tmp_path / "dst", dry_run=True, **options)
        assert not (tmp_path / "dst").exists()
        written = convert(src, tmp_path / "out", force=True, **options)
        real = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
        assert written == real
        assert sizes == {name: size for name, size in real.items() if name != "checksums.json"}
