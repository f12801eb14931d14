"""Training: a pure step from (state, batch) to (state, metrics), its loss, and its optimiser.

    optimizer = make_optimizer(make_schedule(steps=1000, learning_rate=1e-5))
    state = TrainState.create({"params": model.params}, optimizer)
    step = jax.jit(make_train_step(model.module, optimizer), donate_argnums=0)
    state, metrics = step(state, batch)

On a mesh the arrays say where they lie, and the module's own constraints do the rest; where heads are padded or
repeated, the checkpoint's parameters are trained (assemble_params). The dtype of the arithmetic is the module's:
`module.clone(dtype=jnp.bfloat16)` computes in bfloat16 with float32 weights.

Axes: A accumulated micro-batches, B batch, T tokens, C clips, W mel bins, F mel frames, P vectors of a clip, D model,
V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
import optax.contrib

from flaxqwen.lora import LoraConfig, make_variables
from flaxqwen.models.losses import IGNORE_INDEX, chunked_cross_entropy
from flaxqwen.models.qwen2 import (
    Qwen2DecoderLayer,
    Qwen2ForCausalLM,
    make_visibility,
    packed_segments,
    token_slots,
)
from flaxqwen.models.qwen2_audio import (
    Qwen2AudioEncoderLayer,
    Qwen2AudioForConditionalGeneration,
    all_to_all,
    audio_positions,
    visible_labels,
)
from flaxqwen.ops.linear import Linear
from flaxqwen.ops.products import PRODUCT
from flaxqwen.ops.rotary import rotary_embedding
from flaxqwen.sharding import constrain, module_sharding

Variables = dict[str, Any]
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
Remat = Literal["none", "dots", "full"]
Optim = Literal["adamw", "muon"]

# Tokens whose logits are in memory at once: 1,024 x 152k in float32 are 0.6 GB, where 8,192 would be 5.
LOSS_CHUNK = 1024
# For Muon: the root mean square of AdamW's updates (Liu et al. 2025), and the axes of a matrix, [..., out, in].
MUON_RMS = 0.2
OUT_IN = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
# What the forward pass keeps of a layer for the backward pass, which computes the rest again.
POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names(PRODUCT)
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
INPUTS = ("input_ids", "labels", "attention_mask", "position_ids", "segment_ids")
AUDIO_INPUTS = ("input_features", "feature_attention_mask")


class TrainState(flax.struct.PyTreeNode):
    """All that a step changes.

    step: [] int32, how many steps were taken.
    trainable: what is trained, {"params": ...} or {"adapter": ...}, in the dtype in which it is kept.
    opt_state: of optax.
    """

    step: jax.Array
    trainable: Variables
    opt_state: optax.OptState

    @classmethod
    def create(cls, trainable: Variables, optimizer: optax.GradientTransformation) -> TrainState:
        """The state before the first step."""
        return cls(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))


def make_schedule(
    steps: int, learning_rate: float, warmup_steps: int = 0, final_learning_rate: float = 0.0
) -> optax.Schedule:
    """The learning rate by step: a linear warm-up from 0, then a cosine that ends after `steps`, warm-up included."""
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    cosine = optax.cosine_decay_schedule(
        learning_rate, max(steps - warmup_steps, 1), final_learning_rate / learning_rate
    )
    return optax.join_schedules([warmup, cosine], [warmup_steps]) if warmup_steps else cosine


def make_optimizer(
    schedule: optax.ScalarOrSchedule,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    optim: Optim = "adamw",
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019), with defaults as Transformers' Trainer; or Muon (Jordan et al. 2024).

    Args:
      schedule: the learning rate, or of make_schedule.
      weight_decay: of matrices; norms and biases do not decay.
      betas, eps: of AdamW; Muon's momentum is 0.95.
      max_grad_norm: the global norm to which gradients are clipped; 0: they are not, as in Transformers.
      optim: "muon" takes the matrices of layers, with updates scaled to the size of AdamW's, so that its learning rates
        serve (Liu et al. 2025), and AdamW what remains: embeddings, heads, convolutions, vectors.

    Raises:
      ValueError: another optim.
    """
    if optim not in get_args(Optim):
        raise ValueError(f"optim is {optim!r}; expected one of {', '.join(get_args(Optim))}")
    steps = optax.adamw(schedule, *betas, eps, weight_decay=weight_decay, mask=_decays)
    if optim == "muon":
        muon = optax.contrib.muon(
            schedule,
            weight_decay=weight_decay,
            muon_weight_dimension_numbers=lambda matrices: jax.tree.map(lambda _: OUT_IN, matrices),
            consistent_rms=MUON_RMS,
        )
        steps = optax.partition({"muon": muon, "adamw": steps}, _optimizer_names)
    return steps if not max_grad_norm else optax.chain(optax.clip_by_global_norm(max_grad_norm), steps)


def _decays(trainable: Variables) -> Any:
    """Whether each leaf decays: no vector, nor those of stacked layers, nor a table of positions, which is fixed.

    DoRA's magnitudes do, as in Transformers' Trainer, which tells vectors by their names.
    """

    def decays(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        is_vector = path[-1].key == "bias" or path[-2].key.endswith("norm")
        if path[-1].key == "lora_magnitude_vector":
            return True
        return not is_vector and leaf.ndim > 1 and path[-2].key != "embed_positions"

    return jax.tree_util.tree_map_with_path(decays, trainable)


def _optimizer_names(trainable: Variables) -> Any:
    """For optim="muon", of each leaf which of the two takes it."""

    def name(path: tuple[Any, ...], decays: bool) -> str:
        return "muon" if decays and any("layers" in key.key for key in path) else "adamw"

    return jax.tree_util.tree_map_with_path(name, _decays(trainable))


def make_train_step(
    module: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    remat: Remat = "none",
    loss_chunk: int = LOSS_CHUNK,
    assemble: Callable[[Variables, Variables], Variables] | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """A pure step of training, to be jitted with the state donated.

    Args:
      module: Qwen2ForCausalLM or Qwen2AudioForConditionalGeneration; its dtype is that of the arithmetic. With layers
        stacked by stack_layers they run in a scan.
      remat: what is kept of each layer: all ("none"), the products with weights ("dots"), or its input ("full").
      loss_chunk: tokens whose logits are in memory at a time; at least one of each row.
      assemble: from what is trained and what is frozen to what the module is applied to. Default: assemble_params(...);
        for an adapter, assemble_adapter(...).

    Returns:
      step(state, batch, frozen={}) -> (state, metrics). The batch has input_ids and labels, and may have segment_ids,
      position_ids and attention_mask, each [B, T]; and with audio input_features [C, W, F] and feature_attention_mask
      [C, F], of all clips in the order of their tokens (a clip without frames takes none, and makes up their number).
      Or each with an axis more in front, [A, B, T], to sum the gradients of A micro-batches. Labels are moved by one in
      the loss and -100 is ignored, and by Qwen2-Audio what the mask hides, as in its forward; the loss is the mean over
      all labels of all micro-batches. `frozen` is what is not trained. Metrics: loss in nats, grad_norm before
      clipping, items (the labels).

    Raises:
      ValueError: not supported in training: other modules, dropout.
    """
    if not isinstance(module, Qwen2ForCausalLM | Qwen2AudioForConditionalGeneration):
        kinds = "Qwen2ForCausalLM and Qwen2AudioForConditionalGeneration"
        raise ValueError(f"training is for {kinds}; found {type(module).__name__}")
    for config in (module.config.get_text_config(), getattr(module.config, "audio_config", None)):
        for name in ("attention_dropout", "dropout", "activation_dropout", "encoder_layerdrop"):
            if rate := getattr(config, name, 0):
                raise ValueError(f"{name} is {rate}; training supports 0 alone")
    assemble = assemble_params(module) if assemble is None else assemble

    def step(state: TrainState, batch: Batch, frozen: Variables | None = None) -> tuple[TrainState, Metrics]:
        items = count_items(module, batch)

        def loss(trainable: Variables, micro: Batch) -> jax.Array:
            variables = assemble(trainable, frozen or {})
            return loss_sum(module, variables, micro, remat=remat, chunk=loss_chunk) / jnp.maximum(items, 1)

        value, gradients = _accumulate(jax.value_and_grad(loss), state.trainable, batch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(gradients), "items": items}
        return TrainState(state.step + 1, trainable, opt_state), metrics

    return step


def assemble_params(module: nn.Module) -> Callable[[Variables, Variables], Variables]:
    """For make_train_step: all collections of what is trained and of what is frozen.

    Where a mesh pads or repeats heads, what is trained are the checkpoint's parameters, `sharding.undo_heads(params)`:
    each step makes the module's of them, so that the gradients of a head's copies add up, and copies stay alike.

    Raises:
      ValueError: when it is called: parameters that are not the checkpoint's.
    """
    sharding = module_sharding(module)

    def assemble(trainable: Variables, frozen: Variables) -> Variables:
        if sharding is None or sharding.heads.is_identity or "params" not in trainable:
            return {**frozen, **trainable}
        sharding.check_stored(trainable["params"])
        return {**frozen, **trainable, "params": sharding.apply_heads(trainable["params"])}

    return assemble


def assemble_adapter(base: nn.Module, config: LoraConfig) -> Callable[[Variables, Variables], Variables]:
    """For make_train_step: from {"adapter": its tensors} and {"params": the base's} to the variables of the module.

    Args:
      base: the module without the adapter; the step's own module is adapted_module(base, [the tensors]).

    Raises:
      ValueError: lora_dropout, which needs random numbers that the step does not draw.
    """
    if config.lora_dropout:
        raise ValueError(f"lora_dropout is {config.lora_dropout}; training supports 0 alone")
    return lambda trainable, frozen: make_variables(base, frozen["params"], [(config, trainable["adapter"])])


def _accumulate(gradient: Callable, trainable: Variables, batch: Batch) -> tuple[jax.Array, Variables]:
    """The summed loss and gradients of micro-batches, tokens [A, B, T]; of one batch, [B, T], as they are."""
    if batch["input_ids"].ndim == 2:
        return gradient(trainable, batch)
    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trainable))

    def add(total: Any, micro: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(trainable, micro)), None

    return jax.lax.scan(add, zeros, dict(batch))[0]


def count_items(module: nn.Module, batch: Batch) -> jax.Array:
    """How many tokens of a batch, or of its micro-batches, have a loss."""
    return jnp.sum(_labels(module, batch)[..., 1:] != IGNORE_INDEX)


def _labels(module: nn.Module, batch: Batch) -> jax.Array:
    """The labels of a batch as the module's forward reads them."""
    hears = isinstance(module, Qwen2AudioForConditionalGeneration)
    return visible_labels(batch["labels"], batch.get("attention_mask")) if hears else batch["labels"]


def loss_sum(
    module: nn.Module, variables: Variables, batch: Batch, *, remat: Remat = "none", chunk: int = LOSS_CHUNK
) -> jax.Array:
    """The summed cross-entropy of a batch in nats, float32; arguments as make_train_step's.

    Raises:
      ValueError: an input that the batch cannot have; features without their mask, or a mask without features.
    """
    hears = isinstance(module, Qwen2AudioForConditionalGeneration)
    known = INPUTS + AUDIO_INPUTS if hears else INPUTS
    if unknown := set(batch) - set(known):
        raise ValueError(f"a batch has {', '.join(known)}; found {', '.join(sorted(unknown))}")
    if len(given := set(batch) & set(AUDIO_INPUTS)) == 1:
        raise ValueError(f"{' and '.join(AUDIO_INPUTS)} go together; the batch has {given.pop()} alone")
    with _linears_apart(module):
        hidden = _run_decoder(module, variables, batch, remat)
        labels = _labels(module, batch)
        labels = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)
        return _head_loss(module, variables, hidden, labels, chunk)


def _head_loss(module: Any, variables: Variables, hidden: jax.Array, labels: jax.Array, chunk: int) -> jax.Array:
    """The summed cross-entropy of hidden [B, T, D] against labels [B, T], by chunks as of make_train_step."""
    path = ("model", "embed_tokens") if _is_tied(module) else ("lm_head",)

    def head(weights: Variables, x: jax.Array) -> jax.Array:
        for name in reversed(path):
            weights = {kind: {name: part} for kind, part in weights.items()}
        return module.apply(weights, x, method=_head)

    B, T, D = hidden.shape
    size = max(min(chunk // B, T), 1)
    hidden = jnp.pad(hidden, ((0, 0), (0, -T % size), (0, 0))).reshape(B, -1, size, D)
    labels = jnp.pad(labels, ((0, 0), (0, -T % size)), constant_values=IGNORE_INDEX).reshape(B, -1, size)
    # A part of every row, so that each device of a mesh, which has rows of its own, has a share of each chunk.
    hidden, labels = jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(labels, 1, 0)
    hidden = constrain(module_sharding(module), hidden, None, "batch", None, None)
    return chunked_cross_entropy(head, _part(variables, *path), hidden, labels)


def _is_tied(module: Any) -> bool:
    return isinstance(module, Qwen2ForCausalLM) and module.config.tie_word_embeddings


def _head(module: Any, x: jax.Array) -> jax.Array:
    return module.model.embed_tokens.attend(x) if _is_tied(module) else module.lm_head(x)


def _decoder(module: Any) -> Any:
    return module.model if isinstance(module, Qwen2ForCausalLM) else module.model.language_model


def _run_decoder(module: Any, variables: Variables, batch: Batch, remat: Remat) -> jax.Array:
    """[B, T, D], what the head reads: as Qwen2Model, layer by layer, so that each may be recomputed or scanned."""
    config = module.config.get_text_config()
    x = _embed(module, variables, batch, remat)
    B, T, _ = x.shape
    slots = token_slots(None, T)
    positions = jnp.broadcast_to(batch.get("position_ids", slots), (B, T))
    rope = rotary_embedding(config, positions, x.dtype)
    mask, segments = batch.get("attention_mask"), batch.get("segment_ids")
    if mask is None and segments is None and "position_ids" in batch:
        segments = packed_segments(positions)
    visibility = make_visibility(config, mask, slots, None, segments)

    def run(x: jax.Array, weights: Variables, index: int) -> jax.Array:
        dtypes = (module.dtype, module.param_dtype)
        layer: Any = Qwen2DecoderLayer(config, index, *dtypes, module.sharding, module.attention)
        return layer.apply(weights, x, rope, visibility, None, False, True)[0]

    decoder = _part(variables, "model", *(() if isinstance(module, Qwen2ForCausalLM) else ("language_model",)))
    if _part(decoder, "layers") and len(set(config.layer_types)) > 1:
        raise ValueError("layers of several kinds (sliding and full attention) do not run in a scan: unstack them")
    x = _run_layers(run, x, decoder, config.num_hidden_layers, remat)
    return module.apply(variables, x, method=lambda m, x: _decoder(m).norm(x))


def _embed(module: Any, variables: Variables, batch: Batch, remat: Remat) -> jax.Array:
    """[B, T, D], what the decoder reads: tokens, and where there is audio its vectors in the place of theirs."""
    ids = batch["input_ids"]
    if "input_features" not in batch:
        return module.apply(variables, ids, method=lambda m, ids: _decoder(m).embed(ids, None))
    audio, frames = _encode(module, variables, batch, remat), batch["feature_attention_mask"]
    return module.apply(variables, ids, audio, frames, method=lambda m, *inputs: m.model.merge(*inputs))


def _encode(module: Any, variables: Variables, batch: Batch, remat: Remat) -> jax.Array:
    """[C, P, D]: as Qwen2AudioModel.encode, layer by layer."""
    config = module.config.audio_config
    x = module.apply(variables, batch["input_features"], method=lambda m, x: m.model.audio_tower.embed(x))
    visibility = all_to_all(audio_positions(batch["feature_attention_mask"], x.shape[1]), x.shape)

    def run(x: jax.Array, weights: Variables, index: int) -> jax.Array:
        layer: Any = Qwen2AudioEncoderLayer(config, module.dtype, module.param_dtype, module.sharding)
        return layer.apply(weights, x, visibility, False, True)[0]

    x = _run_layers(run, x, _part(variables, "model", "audio_tower"), config.encoder_layers, remat)
    return module.apply(variables, x, method=lambda m, x: m.model.multi_modal_projector(m.model.audio_tower.pool(x)))


def _run_layers(
    run: Callable[[jax.Array, Variables, int], jax.Array], x: jax.Array, weights: Variables, count: int, remat: Remat
) -> jax.Array:
    """x through the layers_0, layers_1, ... of a module's weights, or in a scan through its stacked `layers`."""
    if remat != "none":
        run = jax.checkpoint(run, policy=POLICIES[remat], static_argnums=2)
    if stacked := _part(weights, "layers"):
        return jax.lax.scan(lambda x, layer: (run(x, layer, 0), None), x, stacked)[0]
    for i in range(count):
        x = run(x, _part(weights, f"layers_{i}"), i)
    return x


def _part(variables: Variables, *path: str) -> Variables:
    """The variables of a part of the module, of those collections that have any there."""
    for name in path:
        variables = {kind: tree[name] for kind, tree in variables.items() if name in tree}
    return variables


def _linears_apart(module: nn.Module) -> AbstractContextManager[None]:
    """On CPU, a barrier behind each linear layer of the program that is traced within.

    Without, XLA fuses the derivative of SiLU into a transposed copy of the cotangent, which takes 34 ms where the
    derivative alone takes 5 (6,144 tokens, 384 features).
    """

    def apart(method: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        y = method(*args, **kwargs)
        return jax.lax.optimization_barrier(y) if isinstance(context.module, Linear) else y

    # A mesh may be of TPUs that are not here.
    sharding = module_sharding(module)
    platform = jax.default_backend() if sharding is None else sharding.mesh.devices.flat[0].platform
    return nn.intercept_methods(apart) if platform == "cpu" else nullcontext()


def stack_layers(tree: Variables) -> Variables:
    """A collection whose layers_0, layers_1, ... are one `layers`, each leaf [L, ...]: they run in a scan."""
    inner = {name: stack_layers(part) if isinstance(part, dict) else part for name, part in tree.items()}
    names = [name for name in inner if name.startswith("layers_")]
    layers = [inner.pop(f"layers_{i}") for i in range(len(names))]
    return {**inner, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)} if layers else inner


def unstack_layers(tree: Variables) -> Variables:
    """The inverse of stack_layers."""
    inner = {name: unstack_layers(part) if isinstance(part, dict) else part for name, part in tree.items()}
    stacked = inner.pop("layers", {})
    count = jax.tree.leaves(stacked)[0].shape[0] if stacked else 0
    return inner | {f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(count)}


def make_eval_step(module: nn.Module, *, loss_chunk: int = LOSS_CHUNK) -> Callable[..., Metrics]:
    """A function of (variables, batch): the summed loss in nats, and items. exp(loss / items) is the perplexity."""

    def step(variables: Variables, batch: Batch) -> Metrics:
        return {"loss": loss_sum(module, variables, batch, chunk=loss_chunk), "items": count_items(module, batch)}

    return step
