"""Several processes that run one program, each with its own devices: how they find each other, and how they end.

jax.distributed does the work. All processes give the same command or call, with the same arguments.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.typing import ArrayLike

# The usual variables; without them jax asks SLURM's, Open MPI's, Kubernetes' and those of TPU pods.
COORDINATOR, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Seconds after which a process that is not heard of counts as dead; compiling does not stop the sign of life.
HEARTBEAT = 30
LOST = 3  # exit code of a process whose others are gone


def initialize() -> None:
    """Join the other processes: before any other use of jax's devices. Waits until all are there, 5 minutes at most.

    Raises:
      ValueError: nothing says where the others are.
    """
    number, own = os.environ.get(PROCESSES), os.environ.get(PROCESS)
    try:
        jax.distributed.initialize(
            coordinator_address=os.environ.get(COORDINATOR),
            num_processes=None if number is None else int(number),
            process_id=None if own is None else int(own),
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except ValueError as error:
        raise ValueError(
            f"the other processes are not known ({error}): set {COORDINATOR} (host:port of process 0), {PROCESSES} and "
            f"{PROCESS}, or start under SLURM, Open MPI, Kubernetes or on a TPU pod"
        ) from None


@contextmanager
def joined(distributed: bool) -> Iterator[None]:
    """Run a command as one of several processes, or (distributed=False) as it is.

    Where another process has gone, this one ends with one line on stderr and exit code LOST, not in a hang: the next
    collective fails within seconds, or the sign of life within HEARTBEAT. One that fails itself leaves at once.

    Raises:
      ValueError: as `initialize`.
    """
    if not distributed:
        yield
        return
    initialize()
    # gloo greets on file descriptor 1, where a command's result goes.
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        yield
        sys.stdout.flush()
        jax.distributed.shutdown()
    except BaseException as error:
        who = f"process {jax.process_index()} of {jax.process_count()}"
        text = " ".join(str(error).split()) or type(error).__name__
        is_lost = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in text  # of which some are ValueErrors
        print(f"error: {who}{' lost another one' if is_lost else ''}: {text}", file=sys.stderr, flush=True)
        os._exit(LOST if is_lost else 2)  # an orderly end would wait for the others


def is_main() -> bool:
    """Whether this process is the one that prints and writes what is there once."""
    return jax.process_index() == 0


def gather(x: jax.Array | np.ndarray) -> np.ndarray:
    """The whole of an array, in every process; all of them call."""
    if isinstance(x, np.ndarray) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def agree(value: ArrayLike) -> np.ndarray:
    """The main process's value, in every process."""
    if jax.process_count() == 1:
        return np.asarray(value)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(value)))
