"""Tiny random models of Transformers, and their weights as our parameters: what parity tests compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxqwen.config import Qwen2Config
from flaxqwen.convert.names import to_name, to_path

torch = pytest.importorskip("torch", reason="parity tests compare with PyTorch: pip install flaxqwen[test]")

# f32 at matmul precision "highest": max |error| <= 2e-5 x max |reference|.
RELATIVE = 2e-5

TINY = {
    "model_type": "qwen2",
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def tiny(**changes: Any) -> dict[str, Any]:
    """config.json of a tiny Qwen2, as a dict."""
    return TINY | changes


def torch_model(kind: str, config: dict[str, Any], seed: int = 0) -> Any:
    """A seeded random transformers.<kind> in float32 with eager attention; norms and biases are random too."""
    import transformers

    torch.manual_seed(seed)
    theirs = transformers.Qwen2Config.from_dict(config)
    theirs._attn_implementation = "eager"
    model = getattr(transformers, kind)(theirs).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:  # the initialiser's 0.02 leaves attention nearly uniform: too kind to errors
                parameter.copy_(torch.randn_like(parameter) * (0.12 if parameter.ndim > 1 else 0.5))
    return model


def params_of(model: Any) -> dict[str, Any]:
    """The model's weights as a nested dict of jax arrays; a tied head is left out."""
    tied = model.config.tie_word_embeddings
    params: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        *modules, leaf = to_path(name)
        node = params
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = jnp.asarray(tensor.detach().numpy())
    return params


def pair(kind: str, module: type, seed: int = 0, **changes: Any) -> tuple[Any, Any, dict[str, Any]]:
    """(transformers model, our module, our params) of one tiny config."""
    config = tiny(**changes)
    theirs = torch_model(kind, config, seed)
    return theirs, module(Qwen2Config.from_dict(config)), params_of(theirs)


def leaves_of(model: Any) -> dict[str, np.ndarray]:
    """Parameters by their Hugging Face names."""
    leaves = jax.tree.leaves_with_path(model.params)
    return {to_name(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def close(ours: Any, theirs: Any, relative: float = RELATIVE, where: Any = None) -> None:
    """max |ours - theirs| <= relative x max |theirs|, at the places `where` (a bool array) holds."""
    ours = np.asarray(ours, np.float64)
    theirs = np.asarray(theirs.detach().numpy() if hasattr(theirs, "detach") else theirs, np.float64)
    assert ours.shape == theirs.shape
    if where is not None:
        ours, theirs = ours[where], theirs[where]
    assert np.isfinite(ours).all()
    error, scale = np.abs(ours - theirs).max(), np.abs(theirs).max()
    assert error <= relative * scale, f"max error {error:.3g}, {error / scale:.3g} of the largest value"


def random_ids(rng: np.random.Generator, shape: tuple[int, ...], vocab_size: int = TINY["vocab_size"]) -> np.ndarray:
    """Uniform token ids, int32, without 0: the tests' padding, which is masked wherever no mask is given."""
    return rng.integers(1, vocab_size, shape).astype(np.int32)


def padded_mask(lengths: list[int], width: int, side: str) -> np.ndarray:
    """[B, width] int32 of 0 and 1, padded on the left or right."""
    column = np.arange(width)[None]
    length = np.asarray(lengths)[:, None]
    return (column >= width - length if side == "left" else column < length).astype(np.int32)


def torch_losses(
    model: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    schedule: Callable[[int], Any],
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
) -> list[float]:
    """What requires a gradient, trained by torch's AdamW with clipping, a step a batch; decays as in Trainer."""
    from transformers import Trainer

    decaying: Any = Trainer.get_decay_parameter_names(None, model)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    trained = [parameter for _, parameter in named]
    groups = [
        {"params": [p for name, p in named if name in decaying], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name not in decaying], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=eps)
    losses = []
    for number, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(number))
        loss = model(**{name: th(values) for name, values in batch.items()}, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


def th(x: np.ndarray) -> Any:
    """A torch tensor; integers as int64."""
    x = np.asarray(x)
    return torch.tensor(x.astype(np.int64) if x.dtype == np.int32 else x)


@contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """The events of XLA compiling a program, in the list."""
    events: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
