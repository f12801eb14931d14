"""Running the layers of a stack, so that a program traces those that are alike once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def layer_runner(
    stack: nn.Module,
    static: tuple[int, ...],
    changes: Callable[[Any], Mapping[str, Any]] = lambda layer: {},
) -> Callable[..., Any]:
    """A function of (layer, *its arguments) that in a program, under jit, traces equal layers once.

    Tracing is Python's: of 24 layers of a decoding step it takes 1.4 s, of one and 24 calls 0.3 s. XLA puts the calls
    in line and copies nothing. The function is a new one for each program, so that nothing that is traced outlives its
    context. Eagerly, with random numbers (dropout), and where variables change (`init`, intermediates), a layer is
    called as it is.

    Args:
      stack: the module whose layers are run.
      static: which of the arguments are no arrays.
      changes: fields of a layer that another one has in common with it, whatever its own say.
    """
    scope = stack.scope
    # Within a program even a constant is traced; in a gradient or vmap outside of one, x alone would be, and a function
    # that is new for each call would be compiled for each.
    in_program = isinstance(jnp.zeros(()), jax.core.Tracer)
    if not in_program or scope is None or scope.mutable or scope.rngs:
        return lambda layer, *arguments: layer(*arguments)

    def apply(layer: nn.Module, variables: Any, *arguments: Any) -> Any:
        return layer.apply(variables, *arguments)

    shared = jax.jit(apply, static_argnums=(0, *(2 + i for i in static)))

    def run(layer: nn.Module, *arguments: Any) -> Any:
        return shared(layer.clone(**changes(layer), name=None, parent=None), layer.variables, *arguments)

    return run
