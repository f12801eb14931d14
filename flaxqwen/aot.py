"""Compiling generation for TPUs without one: memory, collectives and roofline of prefill and decoding.

The compiler is the real one, of libtpu; nothing runs. Figures of the chips are those of Google Cloud's documentation
("TPU v5e", "TPU v5p", "TPU v6e": system architecture).

Axes: B batch, S cache capacity, L layers.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxqwen.auto import AutoModelForCausalLM, AutoModelForSeq2SeqLM, param_shapes, parse_dtype
from flaxqwen.cache import init_cache
from flaxqwen.config import PretrainedConfig, Qwen2AudioConfig, Qwen2Config
from flaxqwen.generation import loop
from flaxqwen.generation.audio import encode_clips
from flaxqwen.generation.decoding import DEFAULT_CHUNK
from flaxqwen.generation.inputs import SMALLEST_CACHE, bucket
from flaxqwen.generation.processors import pad_ids
from flaxqwen.generation.sampling import TokenChoice
from flaxqwen.models.qwen2_audio import ENCODER_PARTS, FRAMES_PER_POSITION
from flaxqwen.sharding import CACHE_AXES, Sharding, make_mesh, module_sharding


@dataclass(frozen=True)
class Chip:
    """A TPU chip: bytes of HBM, its bandwidth in bytes/s, bfloat16 FLOP/s, and bytes/s of one link in one direction."""

    hbm: float
    bandwidth: float
    flops: float
    link: float


CHIPS = {
    "v4": Chip(32 * 2**30, 1.228e12, 275e12, 45e9),
    "v5e": Chip(16 * 2**30, 0.819e12, 197e12, 45e9),
    "v5p": Chip(95 * 2**30, 2.765e12, 459e12, 90e9),
    "v6e": Chip(32 * 2**30, 1.640e12, 918e12, 90e9),
}
HOP = 1e-6  # seconds from a chip to the next: what small messages cost
CLIPS = 2  # of Qwen2-Audio: encoded at once, and in a chunk of prompts
PREFILL_CHUNK = 1024  # tokens of a prompt that are run at once: what is beside weights and cache grows with it
LARGE_COPY = 1 << 20  # bytes from which on a copy is of a weight or of a cache

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
OPERATION = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|copy|transpose)(?:-start)?\("
)
ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Program:
    """What the compiler says of a program; bytes are per chip.

    arguments: weights and, of decoding, the cache. aliased: of the arguments, what is updated in place.
    fits: whether all of it is in the chip's HBM. seconds: of compiling.
    collectives: operation -> [how many, bytes of their results] of one step, those of hidden size; small: the others.
    copies: copies and transposes of LARGE_COPY bytes or more. These three: None where libtpu does not show the program.
    step_seconds: the roofline: the slower of HBM and matrix units, and the links; None: the compiler itself found that
      it does not fit. bound: which of them is the slowest.
    tokens_per_second: of the whole batch.
    """

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    fits: bool
    seconds: float
    collectives: dict[str, list[int]] | None
    small: dict[str, list[int]] | None
    copies: dict[str, list[int]] | None
    step_seconds: float | None
    bound: str
    tokens_per_second: float


@dataclass(frozen=True)
class Plan:
    """A model, the mesh it is compiled for, and how much it is to hold: `batch` rows of `context` tokens."""

    module: Any
    chip: Chip
    batch: int
    context: int
    sharding: Sharding

    @property
    def config(self) -> Qwen2Config:
        """The decoder's config with the heads of the mesh."""
        return self.module.config.get_text_config()

    @property
    def capacity(self) -> int:
        """Slots of the cache: room for the context and for what a program of steps may run over."""
        return bucket(self.context, SMALLEST_CACHE)


def topology_mesh(topology: str, data: int = 1, fsdp: int = 1, tensor: int = -1) -> tuple[Chip, Mesh]:
    """The chip that a topology such as "v6e:2x2" names, and a mesh on its devices, or on the first of them.

    Raises:
      ImportError: libtpu is not installed.
      ValueError: no such chip or topology; a mesh that it has no room for.
    """
    kind = topology.partition(":")[0]
    if kind not in CHIPS or ":" not in topology:
        raise ValueError(f"topology {topology!r} is not known; expected one of {', '.join(CHIPS)} and sizes: v6e:2x2")
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("the TPU compiler is not installed: pip install 'flaxqwen[tpu]'")
    # Nothing is run: no metadata server is asked, and other processes may compile too.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # What it would look for on a machine of the cloud, and complain of at length where it is not one.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{kind}-8")
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # jax wraps whatever the plugin says
        raise ValueError(f"topology {topology!r}: {str(error).splitlines()[0]}") from None
    wanted = math.prod((data, fsdp, tensor)) if -1 not in (data, fsdp, tensor) else len(devices)
    if wanted > len(devices):
        raise ValueError(f"the mesh needs {wanted} chips; {topology} has {len(devices)}")
    return CHIPS[kind], make_mesh(data, fsdp, tensor, devices[:wanted])


def plan(config: Qwen2Config | Qwen2AudioConfig, chip: Chip, mesh: Mesh, batch: int, context: int) -> Plan:
    """What is to be compiled: the language model of a config, in its dtype.

    Raises:
      ValueError: a context beyond the model's; a quantized model.
    """
    text = config.get_text_config()
    refuse_quantized(config)
    if context > text.context_length:
        raise ValueError(f"context is {context}; the model's is {text.context_length}")
    dtype = parse_dtype(config.dtype) or np.dtype("float32")
    module = (AutoModelForCausalLM if text is config else AutoModelForSeq2SeqLM).module_of(config, dtype, mesh)
    sharding = module_sharding(module)
    assert sharding is not None
    return Plan(module, chip, batch, context, sharding)


def refuse_quantized(config: Qwen2Config | Qwen2AudioConfig) -> None:
    """ValueError: compiled as if its weights were plain ones, the figures would be wrong."""
    if config.quantization_config is not None:
        raise ValueError("compile is of plain weights: remove quantization_config from config.json to see theirs")


def compile_decode(made: Plan) -> Program:
    """A chunk of greedy decoding steps at the end of the context; figures are of one step."""
    state, steps = _state(made), DEFAULT_CHUNK[0]
    lowered = loop.decode.lower(
        made.module, {"params": _params(made)}, state, _choice(made), steps=steps, keep_scores=False, keep_logits=False
    )
    return _compile(made, lowered, 1)


def compile_prefill(made: Plan) -> Program:
    """A chunk of the prompts of all rows, PREFILL_CHUNK tokens at the end of the context; figures are of the chunk."""
    whole, tokens = _whole(made), min(PREFILL_CHUNK, made.context)
    prompt = loop.Prompt(
        tokens=whole((made.batch, tokens), np.int32),
        position_ids=whole((made.batch, tokens), np.int32),
        slot_mask=None,
        input_ids=whole((made.batch, made.capacity), np.int32),
        cur_len=whole((), np.int32),
        last=whole((), np.int32),
    )
    if isinstance(made.module.config, Qwen2AudioConfig):
        shape = (CLIPS, made.module.config.audio_config.max_source_positions // 2, made.config.hidden_size)
        vectors = whole(shape, np.dtype(made.module.param_dtype))
        prompt = prompt.replace(audio=loop.Audio(vectors, whole((made.batch, tokens), np.int32)))
    lowered = loop.prefill.lower(
        made.module, {"params": _params(made)}, prompt, _choice(made), _state(made).cache,
        capacity=made.capacity, cache_dtype=np.dtype(made.module.param_dtype), copies=1, keep_scores=False,
        keep_logits=False,
    )  # fmt: skip
    return _compile(made, lowered, tokens)


def compile_encoder(made: Plan) -> dict[str, Any]:
    """Qwen2-Audio's encoder over CLIPS clips of 30 s, with all weights and the cache beside it: as JSON values."""
    audio, whole = made.module.config.audio_config, _whole(made)
    positions = audio.max_source_positions
    shape = (CLIPS, audio.num_mel_bins, FRAMES_PER_POSITION * positions)
    clips = (whole(shape, np.float32), whole((CLIPS, shape[2]), np.int32), whole((), np.int32))
    start = time.perf_counter()
    compiled = encode_clips.lower(made.module, {"params": _params(made)}, *clips, positions=positions).compile()
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    temporaries, outputs = memory.temp_size_in_bytes, memory.output_size_in_bytes
    flops = 4.0 * positions**2 * audio.d_model * audio.encoder_layers  # of attention
    flops /= _parts(made, "heads", audio.encoder_attention_heads)
    flops += 2.0 * positions * _hearing_bytes(made) / np.dtype(made.module.param_dtype).itemsize
    times = (_hearing_bytes(made) / made.chip.bandwidth, flops / made.chip.flops)
    return {
        "clips": CLIPS,
        "outputs": outputs,
        "temporaries": temporaries,
        "fits": sum(held(made).values()) + temporaries + outputs <= made.chip.hbm,
        "seconds": seconds,
        "step_seconds": CLIPS * max(times),
    }


def _hears(path: tuple[str, ...]) -> bool:
    """Whether a parameter belongs to the encoder or its projector, which neither prefill nor decoding touches."""
    return path[1] in ENCODER_PARTS


def _hearing_bytes(made: Plan) -> int:
    """Bytes of those parameters on a chip."""
    read = ((path, shape) for path, shape in param_shapes(made.module).items() if _hears(path))
    parts = (math.prod(made.sharding.of_parameter(path, shape).shard_shape(shape)) for path, shape in read)
    return sum(parts) * np.dtype(made.module.param_dtype).itemsize


def _compile(made: Plan, lowered: Any, tokens: int) -> Program:
    """Compile, and read what the compiler says. tokens: new ones of each row."""
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Program(0, 0, 0, 0, False, time.perf_counter() - start, {}, {}, {}, None, "memory", 0.0)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    taken = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    taken += memory.output_size_in_bytes - memory.alias_size_in_bytes + _hearing_bytes(made)
    rows = made.batch * tokens / _parts(made, "batch", made.batch)  # that a chip multiplies with its weights
    large, small, copies = _operations(compiled, rows * made.config.hidden_size)
    times = {"HBM": _bytes_read(made) / made.chip.bandwidth, "links": _link_seconds(made, large, rows)}
    times["matrix units"] = _flops(made, rows, rows / tokens) / made.chip.flops
    step = max(times["HBM"], times["matrix units"]) + times["links"]
    return Program(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        fits=taken <= made.chip.hbm,
        seconds=seconds,
        collectives=large,
        small=small,
        copies=copies,
        step_seconds=step,
        bound=max(times, key=lambda name: times[name]),
        tokens_per_second=made.batch * tokens / step,
    )


def _operations(compiled: Any, hidden: float) -> Iterator[dict[str, list[int]] | None]:
    """`operations`, or three None where libtpu cannot write the module down."""
    try:
        with _quiet():
            text = compiled.as_text()
        yield from operations(text, hidden)
    except jax.errors.JaxRuntimeError:  # 0.0.52 fails on prefill: "async-update instruction should have 1 operands"
        yield from (None, None, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what native code writes to stderr: a stack trace, beside the error."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def operations(text: str, hidden: float) -> tuple[dict[str, list[int]], dict[str, list[int]], dict[str, list[int]]]:
    """Collectives of `hidden` values or more, smaller ones, and large copies, of an optimised HLO module.

    Returns:
      Three dicts of operation -> [how many, bytes of their results]; a loop's body counts once.
    """
    found: tuple[Counter[str], ...] = (Counter(), Counter(), Counter())
    sizes: tuple[Counter[str], ...] = (Counter(), Counter(), Counter())
    for result, name in OPERATION.findall(text):
        arrays = [(kind, math.prod(map(int, filter(None, dims.split(","))))) for kind, dims in ARRAY.findall(result)]
        if not arrays:
            continue
        values = max(count for _, count in arrays)
        size = max(count * ITEM_BYTES.get(kind, 4) for kind, count in arrays)
        if name in ("copy", "transpose"):
            if size < LARGE_COPY or "S(1)" in result:  # S(1) is VMEM: what is read next, on its way in
                continue
            which = 2
        else:
            which = 0 if values >= hidden else 1
        found[which][name] += 1
        sizes[which][name] += size
    large, small, copies = ({k: [n, s[k]] for k, n in f.items()} for f, s in zip(found, sizes, strict=True))
    return large, small, copies


def _bytes_read(made: Plan) -> float:
    """Bytes that a step reads of a chip's HBM: the weights, but for a table that is only looked up, and the cache."""
    places = param_shapes(made.module).items()
    read = [(path, shape) for path, shape in places if _is_multiplied(made, path)]
    parts = (math.prod(made.sharding.of_parameter(path, shape).shard_shape(shape)) for path, shape in read)
    return sum(parts) * np.dtype(made.module.param_dtype).itemsize + bytes_of(_state(made).cache.layers)


def _flops(made: Plan, rows: float, last: float) -> float:
    """Of a step on a chip: each weight with each row (the head with the `last` one of each prompt), and attention."""
    config, total = made.config, 0.0
    for path, shape in param_shapes(made.module).items():
        if len(shape) == 2 and _is_multiplied(made, path):
            part = math.prod(made.sharding.of_parameter(path, shape).shard_shape(shape))
            total += part * (last if path[-2] in ("embed_tokens", "lm_head") else rows)
    heads = config.num_attention_heads / _parts(made, "heads", config.num_attention_heads)
    return 2 * (total + 2 * rows * heads * config.head_dim * made.context * config.num_hidden_layers)


def _is_multiplied(made: Plan, path: tuple[str, ...]) -> bool:
    """Whether a step multiplies with a parameter, and so reads all of it."""
    return not _hears(path) and (path[-2] != "embed_tokens" or made.config.tie_word_embeddings)


def bytes_of(tree: Any) -> int:
    """Bytes on a chip of arrays given by their shapes."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def _link_seconds(made: Plan, collectives: dict[str, list[int]] | None, rows: float) -> float:
    """Seconds on the links, none of them hidden behind other work: rings in both directions along one axis."""
    size = max(made.sharding.mesh.shape.values())
    if size == 1:
        return 0.0
    total = 0.0
    if collectives is None:  # what decoding shows
        count = 2 * made.config.num_hidden_layers + 1
        nbytes = count * rows * made.config.hidden_size * np.dtype(made.module.param_dtype).itemsize
        collectives = {"all-reduce": [count, int(nbytes)]}
    for name, (count, nbytes) in collectives.items():
        rounds = 2 if name == "all-reduce" else 1
        total += rounds * max(nbytes * (size - 1) / size / (2 * made.chip.link), count * HOP * size / 2)
    return total


def _parts(made: Plan, logical: str, size: int) -> int:
    """Into how many parts a logical axis of `size` is cut."""
    return size // made.sharding.of((logical,), (size,)).shard_shape((size,))[0]


def _whole(made: Plan) -> Callable[[tuple[int, ...], Any], Any]:
    """Makes the shape of an array that every chip has."""
    everywhere = NamedSharding(made.sharding.mesh, PartitionSpec())
    return lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)


def _params(made: Plan) -> dict[str, Any]:
    """The parameters' shapes on the mesh."""
    shapes = jax.eval_shape(made.module.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]

    def place(keys: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = made.sharding.of_parameter(tuple(key.key for key in keys), leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map_with_path(place, shapes)


def _state(made: Plan) -> loop.DecodeState:
    """The state of decoding in the middle of a text, in shapes."""
    whole, dtype = _whole(made), np.dtype(made.module.param_dtype)
    cache = jax.eval_shape(lambda: init_cache(made.config, made.batch, made.capacity, dtype))

    def place(a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=made.sharding.of(CACHE_AXES, a.shape))

    layers = jax.tree.map(place, cache.layers)
    return loop.DecodeState(
        cache=cache.replace(layers=layers, length=whole((), np.int32), bound=made.capacity),
        slot_mask=None,
        input_ids=whole((made.batch, made.capacity), np.int32),
        cur_len=whole((), np.int32),
        position=whole((made.batch,), np.int32),
        finished=whole((made.batch,), np.bool_),
    )


def _choice(made: Plan) -> TokenChoice:
    """Greedy decoding."""
    whole = _whole(made)
    eos_ids = whole(pad_ids((0,)).shape, np.int32)
    return TokenChoice((), eos_ids, whole((), np.int32), whole((), np.uint32))


def report(
    config: PretrainedConfig, topology: str, mesh_sizes: dict[str, int], batch: int, context: int
) -> dict[str, Any]:
    """Everything about a config on a topology, as JSON values.

    Args:
      topology: such as "v6e:2x2". mesh_sizes: of topology_mesh.
      batch, context: rows, and tokens of each.

    Raises:
      ImportError, ValueError: as topology_mesh and plan.
    """
    if not isinstance(config, Qwen2Config | Qwen2AudioConfig):
        raise ValueError(f"model_type {config.model_type!r} has no language model to compile")
    chip, mesh = topology_mesh(topology, **mesh_sizes)
    made = plan(config, chip, mesh, batch, context)
    heads, text = made.sharding.heads, config.get_text_config()
    result: dict[str, Any] = {
        "topology": topology,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "batch": batch,
        "context": context,
        "dtype": np.dtype(made.module.param_dtype).name,
        "layers": text.num_hidden_layers,
        "prefill_tokens": min(PREFILL_CHUNK, context),
        "query_heads": [text.num_attention_heads, len(heads.queries)],
        "key_value_heads": [text.num_key_value_heads, len(heads.keys)],
        "hbm_bytes": int(chip.hbm),
        **held(made),
    }
    for name, build in (("prefill", compile_prefill), ("decode", compile_decode)):
        result[name] = asdict(build(made))
    if isinstance(config, Qwen2AudioConfig):
        result["encoder"] = compile_encoder(made)
    return result


def held(made: Plan) -> dict[str, int]:
    """Bytes of the weights and of the KV cache on a chip."""
    return {"weight_bytes": bytes_of(_params(made)), "cache_bytes": bytes_of(_state(made).cache.layers)}
