"""Compiling a step of training for TPUs without one: what a chip holds of the weights, the optimizer and the rest.

Axes: B batch, T tokens of a row.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxqwen.aot import Chip, bytes_of, refuse_quantized
from flaxqwen.auto import AutoModelForCausalLM, parse_dtype
from flaxqwen.config import Qwen2Config
from flaxqwen.lora import LoraConfig, init_adapter
from flaxqwen.sharding import Sharding, module_sharding
from flaxqwen.training import Remat, TrainState, Variables, assemble_adapter, make_optimizer, make_train_step


@dataclass(frozen=True)
class TrainingProgram:
    """What the compiler says of a step; bytes are per chip.

    frozen, trainable, optimizer: of the arguments. aliased: what is updated in place. temporaries: gradients, too.
    fits: whether all of it is in the chip's HBM. seconds: of compiling.
    step_seconds: the matrix units' at their peak: what a step takes at least. tokens_per_second: of all chips then.
    """

    frozen: int
    trainable: int
    optimizer: int
    aliased: int
    temporaries: int
    fits: bool
    seconds: float
    step_seconds: float
    tokens_per_second: float


def compile_training(
    config: Qwen2Config, chip: Chip, mesh: Mesh, rows: int, tokens: int, lora: LoraConfig | None = None,
    remat: Remat = "full",
) -> TrainingProgram:  # fmt: skip
    """Compile a step of AdamW over rows [B, T] in the config's dtype, of all parameters or of an adapter.

    What is trained is kept in float32, and so are AdamW's moments; the weights under an adapter are in the config's
    dtype. Parameters are cut as everywhere (see flaxqwen.sharding), adapters are whole on every chip.

    Raises:
      ValueError: as make_train_step and make_optimizer; a quantized model.
    """
    refuse_quantized(config)
    dtype = parse_dtype(config.dtype) or np.dtype("float32")
    base = AutoModelForCausalLM.module_of(config, np.dtype("float32") if lora is None else dtype, mesh)
    sharding = module_sharding(base)
    assert sharding is not None
    params = jax.eval_shape(base.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    trainable: Variables = {"params": jax.eval_shape(sharding.undo_heads, params)}
    frozen: Variables = {}
    more: dict[str, Any] = {}
    if lora is not None:
        adapter = jax.eval_shape(lambda params: init_adapter(base, params, lora), params)
        trainable, frozen = {"adapter": adapter}, {"params": params}
        more = {"assemble": assemble_adapter(base, lora)}
    optimizer = make_optimizer(1e-5)
    step = make_train_step(base.clone(dtype=dtype), optimizer, remat=remat, **more)
    state = _placed(sharding, jax.eval_shape(lambda tree: TrainState.create(tree, optimizer), trainable))
    frozen = _placed(sharding, frozen)
    of_rows = sharding.of(("batch", None), (rows, tokens))
    batch = {
        name: jax.ShapeDtypeStruct((rows, tokens), jnp.int32, sharding=of_rows)
        for name in ("input_ids", "labels", "segment_ids", "position_ids")
    }
    lowered = jax.jit(step, donate_argnums=0).lower(state, batch, frozen)
    start = time.perf_counter()
    try:
        memory: Any = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        memory = None
    seconds = time.perf_counter() - start
    taken = math.inf
    if memory is not None:
        taken = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
        taken += memory.output_size_in_bytes - memory.alias_size_in_bytes
    least = _flops(config, params, rows * tokens, lora is None, remat) / (mesh.size * chip.flops)
    return TrainingProgram(
        frozen=bytes_of(frozen),
        trainable=bytes_of(state.trainable),
        optimizer=bytes_of(state.opt_state),
        aliased=memory.alias_size_in_bytes if memory else 0,
        temporaries=memory.temp_size_in_bytes if memory else 0,
        fits=taken <= chip.hbm,
        seconds=seconds,
        step_seconds=least,
        tokens_per_second=rows * tokens / least,
    )


def _placed(sharding: Sharding, tree: Any) -> Any:
    """Shapes with their places: the parameters, and what the optimizer keeps of each, as parameters; the rest whole."""
    whole = NamedSharding(sharding.mesh, PartitionSpec())

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        keys = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
        is_parameter = keys[:1] == ["params"]
        where = sharding.of_parameter(tuple(keys[1:]), leaf.shape) if is_parameter else whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(place, tree)


def _flops(config: Qwen2Config, params: Any, tokens: int, whole: bool, remat: Remat) -> float:
    """2 a weight and token forward, as many for the gradients of inputs and of weights, and again for what is remade.

    A frozen weight has no gradient of its own. The head counts, a table that is looked up does not.
    """
    layers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    table = config.vocab_size * config.hidden_size
    layers -= table if config.tie_word_embeddings else 2 * table
    passes = 2 + whole  # forward, inputs' gradients, weights'
    return 2.0 * tokens * (layers * (passes + (remat == "full")) + table * (passes + 1))
