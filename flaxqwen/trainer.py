"""A training run: steps, checkpoints, evaluation and metrics, in a folder that the run can be resumed from.

out/checkpoints/    the state every save_every steps, by orbax; the last two are kept
out/metrics.jsonl   a line per log_every steps
out/training.json   the options
out/                when the run is complete, the model in PyTorch's format, or the adapter in peft's
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxqwen.adapters import DEFAULT_NAME
from flaxqwen.auto import DTYPES
from flaxqwen.config import PretrainedConfig
from flaxqwen.config_values import thaw
from flaxqwen.dataset import Batches, import_extra
from flaxqwen.distributed import agree, is_main
from flaxqwen.files import replacing
from flaxqwen.lora import LoraConfig
from flaxqwen.model import Model
from flaxqwen.models.losses import IGNORE_INDEX
from flaxqwen.sharding import module_sharding
from flaxqwen.training import (
    Optim,
    Remat,
    TrainState,
    Variables,
    assemble_adapter,
    assemble_params,
    make_eval_step,
    make_optimizer,
    make_schedule,
    make_train_step,
)

SETTINGS = "training.json"  # of the run that a folder holds
Rows = dict[str, np.ndarray]
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """What decides a run; its JSON stands beside the checkpoints.

    steps: optimiser steps; None: as many as `epochs` take.
    epochs: how often each row is seen, where steps is None.
    batch_size: rows of a micro-batch, of all devices together; accumulate: micro-batches of a step.
    learning_rate: the highest; warmup_steps from 0 to it, then a cosine to final_learning_rate.
    optim, weight_decay, beta1, beta2, eps, max_grad_norm: see make_optimizer.
    lora: an adapter of this config is trained, in place of all parameters.
    dtype: of the arithmetic; what is trained is kept in float32.
    remat: see make_train_step.
    seed: of the order of the data, and of a new adapter.
    log_every, save_every, eval_every: in steps; the last step does all three, and an evaluation is logged.

    Raises:
      ValueError: a value out of its range, or a name that is not known.
    """

    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-5
    final_learning_rate: float = 0.0
    warmup_steps: int = 0
    optim: Optim = "adamw"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    lora: LoraConfig | None = None
    dtype: str = "bfloat16"
    remat: Remat = "none"
    seed: int = 0
    log_every: int = 10
    save_every: int = 500
    eval_every: int = 500

    def __post_init__(self) -> None:
        def require(names: str, holds: Callable[[Any], bool], expected: str) -> None:
            for name in names.split():
                if not holds(value := getattr(self, name)):
                    raise ValueError(f"{name} is {value}; expected {expected}")

        def is_whole(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        require("learning_rate epochs", lambda x: 0 < x < math.inf, "more than 0, and finite")
        require("seed", lambda x: is_whole(x) and 0 <= x < 2**32, f"0 to {2**32 - 1}")
        require("beta1 beta2", lambda x: 0 <= x < 1, "0 or more, and less than 1")
        require("steps", lambda x: x is None or (is_whole(x) and x > 0), "a whole number above 0, or None")
        counts = "batch_size accumulate log_every save_every eval_every"
        require(counts, lambda x: is_whole(x) and x > 0, "a whole number above 0")
        require("warmup_steps", lambda x: is_whole(x) and x >= 0, "a whole number, 0 or more")
        require("final_learning_rate weight_decay eps", lambda x: 0 <= x < math.inf, "0 or more, and finite")
        require("max_grad_norm", lambda x: x >= 0, "0 or more")
        for name, known in (("optim", get_args(Optim)), ("remat", get_args(Remat)), ("dtype", tuple(DTYPES))):
            require(name, known.__contains__, f"one of {', '.join(known)}")

    def steps_for(self, rows: int) -> int:
        """Steps of the run, on a number of rows."""
        return (
            self.steps
            if self.steps is not None
            else max(1, math.ceil(self.epochs * rows / (self.batch_size * self.accumulate)))
        )


def train(
    model: Model,
    rows: Rows,
    out: Path,
    options: TrainingOptions,
    *,
    held_out: Rows | None = None,
    resume: bool = False,
    report: Callable[[Record, int], None] = lambda record, steps: None,
) -> tuple[Model, int]:
    """Train all parameters of a model, or an adapter beside them.

    Args:
      model: without adapters, and not quantized; with options.lora it may be.
      rows: of dataset.pack; held_out: likewise, for the evaluation.
      resume: go on from the last checkpoint in `out`, bit for bit; from the start where there is none yet.
      report: called with each record of the metrics, and the steps of the run.

    Returns:
      (the trained model, in float32 what was trained; the steps that were taken): fewer than the run's after SIGTERM,
      which ends it with a checkpoint; of several processes, when the first one is at a step that is logged.

    Raises:
      FileExistsError: `out` has a run already, and resume is False.
      ValueError: the run in `out` has other options or other data; a config of an adapter that is not supported; a
        model whose parameters cannot be trained.
      ImportError: grain or orbax is not installed.
    """
    steps = options.steps_for(len(rows["input_ids"]))
    schedule = make_schedule(steps, options.learning_rate, options.warmup_steps, options.final_learning_rate)
    optimizer = make_optimizer(
        schedule,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        optim=options.optim,
    )
    batches = Batches(rows, options.batch_size, options.accumulate, options.seed)
    parts = _whole(model) if options.lora is None else _adapter(model, options.lora, options.seed)
    model = parts.model
    module = model.module.clone(dtype=jnp.dtype(options.dtype))
    train_step = make_train_step(module, optimizer, remat=options.remat, assemble=parts.assemble)
    evaluate = Evaluation(model.module, held_out, options.batch_size)
    with _Run(out, options, rows, resume) as run, _terminated() as is_terminated:
        state = run.restore(lambda: _first_state(parts, optimizer))
        places = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = jax.jit(train_step, donate_argnums=0, out_shardings=(places, None))
        taken, ended = int(state.step), False
        clock = _Clock(taken)
        while taken < steps and not ended:
            state, metrics = step(state, place(batches[taken], model), parts.frozen)
            taken += 1
            is_last = taken == steps
            is_evaluated = held_out is not None and (taken % options.eval_every == 0 or is_last)
            is_logged = taken % options.log_every == 0 or is_last or is_evaluated
            if is_logged:
                tokens = rows["input_ids"].shape[1] * options.batch_size * options.accumulate
                record = {"step": taken, **{name: float(value) for name, value in metrics.items()}}
                record |= {"learning_rate": float(schedule(taken - 1)), "tokens_per_second": clock.rate(taken, tokens)}
                if is_evaluated:
                    record |= evaluate(parts.assemble(state.trainable, parts.frozen))
                run.log(record)
                report(record, steps)
            if taken % options.save_every == 0 or is_last:
                run.save(taken, state)
            if is_logged or jax.process_count() == 1:
                ended = bool(agree(is_terminated()))  # several processes end together, as the first one says
        run.save(taken, state)
    return parts.trained(state.trainable), taken


@dataclasses.dataclass(frozen=True)
class _Parts:
    """A model taken apart for training.

    trainable, frozen: what is trained and what is not. assemble: from both to the variables of the model's module.
    trained: the model with other tensors in the place of `trainable`.
    """

    model: Model
    trainable: Variables
    frozen: Variables
    assemble: Callable[[Variables, Variables], Variables]
    trained: Callable[[Variables], Model]


def refuse_quantized(config: PretrainedConfig) -> None:
    """ValueError where all parameters are to be trained, and some are integers."""
    if config.quantization_config is not None:
        raise ValueError(
            "integer weights are not trained: train an adapter beside them (--lora, or options.lora), or bring them "
            "back by `flaxqwen convert SRC DST --dtype bfloat16`"
        )


def _whole(model: Model) -> _Parts:
    """All parameters are trained, in float32, on a mesh as the checkpoint has them."""
    if model.adapters.loaded:
        raise ValueError(
            "the model has adapters: merge_and_unload() or unload() it first, or train one by options.lora"
        )
    refuse_quantized(model.config)
    sharding = module_sharding(model.module)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.params)
    params = params if sharding is None else sharding.undo_heads(params)

    def trained(trainable: Variables) -> Model:
        params = trainable["params"]
        return dataclasses.replace(model, params=params if sharding is None else sharding.apply_heads(params))

    return _Parts(model, {"params": params}, {}, assemble_params(model.module), trained)


def _adapter(base: Model, config: LoraConfig, seed: int) -> _Parts:
    """A new adapter is trained, beside parameters that stay as they are."""
    assemble = assemble_adapter(base.module, config)
    model = base.add_adapter(config, seed=seed)

    def trained(trainable: Variables) -> Model:
        return model.replace_adapter(DEFAULT_NAME, trainable["adapter"])

    adapter = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.adapter())  # modules_to_save are the base's
    return _Parts(model, {"adapter": adapter}, {"params": base.params}, assemble, trained)


def _first_state(parts: _Parts, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, of copies: the step donates what it is given, and the model stays as it is."""
    state = TrainState.create(jax.tree.map(jnp.copy, parts.trainable), optimizer)
    if (sharding := module_sharding(parts.model.module)) is None:
        return state
    devices = set(sharding.mesh.devices.flat)

    def on_mesh(leaf: jax.Array) -> jax.Array:  # the optimiser makes its counters and constants on one device
        return leaf if leaf.sharding.device_set == devices else jax.device_put(leaf, sharding.of((), ()))

    return jax.tree.map(on_mesh, state)


def place(batch: Rows, model: Model) -> dict[str, jax.Array]:
    """A batch, which every process gives whole, on the model's devices: cut along the batch axis of its mesh."""
    sharding = module_sharding(model.module)
    if sharding is None:
        return {name: jnp.asarray(values) for name, values in batch.items()}

    def put(values: np.ndarray) -> jax.Array:
        where = sharding.of((*(None,) * (values.ndim - 2), "batch", None), values.shape)
        return jax.make_array_from_callback(values.shape, where, values.__getitem__)

    return {name: put(values) for name, values in batch.items()}


class Evaluation:
    """The loss on held-out rows, in nats per label, and its exponential, the perplexity."""

    def __init__(self, module: Any, rows: Rows | None, batch_size: int) -> None:
        self._rows, self._size = rows, batch_size
        self._step = jax.jit(make_eval_step(module))

    def __call__(self, variables: Variables) -> Record:
        """eval_loss and perplexity; every process evaluates all rows."""
        assert self._rows is not None
        loss = items = 0.0
        for start in range(0, len(self._rows["input_ids"]), self._size):
            batch = {name: values[start : start + self._size] for name, values in self._rows.items()}
            missing = self._size - len(batch["input_ids"])
            batch = {name: np.pad(values, ((0, missing), (0, 0))) for name, values in batch.items()}
            batch["labels"][self._size - missing :] = IGNORE_INDEX
            sums = self._step(variables, batch)
            loss, items = loss + float(sums["loss"]), items + float(sums["items"])
        mean = loss / max(items, 1)
        with np.errstate(over="ignore"):  # a run that diverges goes on to its checkpoint
            return {"eval_loss": mean, "perplexity": float(np.exp(mean))}


class _Clock:
    """Tokens per second since it was last asked."""

    def __init__(self, step: int) -> None:
        self._step, self._time = step, time.perf_counter()

    def rate(self, step: int, tokens: int) -> float:
        now, last = time.perf_counter(), self._step
        passed, self._step, self._time = now - self._time, step, now
        return round((step - last) * tokens / passed, 1)


class _Run:
    """The files of a run; see the top of this file."""

    def __init__(self, out: Path, options: TrainingOptions, rows: Rows, resume: bool) -> None:
        self._orbax = import_extra("orbax.checkpoint")
        self._metrics = out / "metrics.jsonl"
        settings = out / SETTINGS
        wanted = json.dumps(thaw(dataclasses.asdict(options)) | {"data": _summary(rows)}, indent=2) + "\n"
        has_begun = settings.is_file()
        if has_begun:
            if not resume:
                raise FileExistsError(f"{out} has a run already: --resume goes on with it, or choose another folder")
            if json.loads(settings.read_text()) != json.loads(wanted):
                raise ValueError(f"{settings} has other options or data: a run is resumed with those it began with")
        agree(0)  # all processes have looked
        if is_main() and not has_begun:
            with replacing(settings) as path:
                path.write_text(wanted)
        # Synchronous: the next step overwrites the state, which is donated.
        how = self._orbax.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = self._orbax.CheckpointManager((out / "checkpoints").absolute(), options=how)

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.close()

    def restore(self, make_first: Callable[[], TrainState]) -> TrainState:
        """The state of the last checkpoint, placed as the first one is; the first one itself where there is none."""
        state, last = make_first(), self._manager.latest_step()
        if last is not None:
            like = jax.tree.map(self._orbax.utils.to_shape_dtype_struct, state)
            del state  # there is not room for two
            state = self._manager.restore(last, args=self._orbax.args.StandardRestore(like))
        if is_main() and self._metrics.is_file():  # lines after the checkpoint will be written again
            lines = [line for line in self._metrics.read_text().splitlines(keepends=True) if line.endswith("}\n")]
            with replacing(self._metrics) as path:
                path.write_text("".join(line for line in lines if json.loads(line)["step"] <= (last or 0)))
        return state

    def save(self, step: int, state: TrainState) -> None:
        if self._manager.latest_step() != step:
            self._manager.save(step, args=self._orbax.args.StandardSave(state))

    def log(self, record: Record) -> None:
        if is_main():
            with self._metrics.open("a") as file:
                file.write(json.dumps(record) + "\n")


def _summary(rows: Rows) -> dict[str, Any]:
    """What tells the data of a run from other data."""
    crc = 0
    for name in sorted(rows):
        crc = zlib.crc32(np.ascontiguousarray(rows[name]).data, crc)
    return {"rows": len(rows["input_ids"]), "length": rows["input_ids"].shape[1], "crc32": crc}


@contextmanager
def _terminated() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM came; it does not end the process meanwhile. Only the main thread may ask for signals."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
