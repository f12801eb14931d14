"""From a command line to an exit code: errors in one line, warnings too, and where compiled programs are kept."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import typer

from flaxqwen.allocator import keep_freed_memory
from flaxqwen.cli.app import app

USAGE_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141  # exit codes; the latter two as a shell reports the signals
# What a user can cause, and repair: one line. Anything else is a bug, and shows its traceback.
USER_ERRORS = (ValueError, KeyError, OSError, ImportError, MemoryError)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line (default: that of the process) and return the exit code.

    0; 1 where parity does not hold; 2, after one line on stderr, for what the user can repair; 130 after Ctrl-C; 141
    where nobody reads the output. Other exceptions are bugs, and propagate.
    """
    _open_streams()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its hints are about models in PyTorch
    if args is None:
        keep_compiled_programs()
        if sys.argv[1:2] == ["train"]:  # one program, over and over
            keep_freed_memory()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = _run(sys.argv[1:] if args is None else list(args))
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more when it ends: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:  # whichever: _is_users tells those that a user can mend, and bugs go on as they are
        if not _is_users(error):
            raise
        print(f"error: {describe(error)}", file=sys.stderr)
        return USAGE_ERROR


def _open_streams() -> None:
    """Have the standard streams that were closed (`>&-`), which Python leaves None, read and write nothing."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (they stay open)


def keep_compiled_programs() -> None:
    """Have JAX keep what it compiles in ~/.cache/flaxqwen/compiled, for the next process; call before jax is imported.

    JAX's own variables win: JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=0 is the off
    switch.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(home, "flaxqwen", "compiled")))
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2 * 10**9))  # bytes; the least recently used go
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def _run(args: list[str]) -> int:
    """Run a command line, without typer's own treatment of errors; returns the exit code."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("flaxqwen", args) as context:
            command.invoke(context)
    except typer.Exit as exit:
        return exit.exit_code
    return 0


def _is_users(error: Exception) -> bool:
    """Whether an error is one that a user can repair: USER_ERRORS, a wrong usage, a full accelerator."""
    is_usage = hasattr(error, "format_message")  # typer's own errors, which have changed their class
    is_full = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return isinstance(error, USER_ERRORS) or is_usage or is_full


def describe(error: Exception) -> str:
    """An error in one line."""
    text: Any = error
    if hasattr(error, "format_message"):
        text = error.format_message()
    elif isinstance(error, KeyError) and error.args:  # its str is the repr of the message
        text = error.args[0]
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(str(text).split()) or type(error).__name__


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=file or sys.stderr)
