"""torch's CPU random numbers in jnp: the generator MT19937, and the beginning of torch.randperm, without its loop.

Watermarks seed a generator with each token, and call green what comes first in a permutation of the vocabulary. To be
found by Transformers' detectors it must be torch's permutation: Fisher-Yates, where step i swaps position i with
position j(i) = i + draw(i) mod (n - i). The swaps come one after another; where a value ends can be found for all at
once: after the steps below `count`, a position past them holds the value that the last step to hit it had moved, which
an earlier hit may have moved before. So the hits are scattered, and their chains followed by doubling.

Source: Matsumoto and Nishimura 1998; randperm_cpu in aten/src/ATen/native/TensorFactories.cpp of PyTorch.

Axes: ... seeds, R steps of the permutation (static), n its length.
"""

from __future__ import annotations

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# Where values are, since which step, whether they are in front, and whether any of them moved.
Followed = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

STATE, SHIFT = 624, 397  # words of the generator's state, and how far it looks ahead
PLACES = 6  # of a value, that one pass over the steps looks at; of 40 values, few move on more often


def draws(seed: jax.Array, count: int) -> jax.Array:
    """[..., count] uint32: the first numbers of torch.Generator().manual_seed(seed), for seeds [...] uint32."""
    words = jnp.moveaxis(_states(seed, count), 0, -2)
    return _temper(words.reshape(*seed.shape, -1)[..., :count])


def _states(seed: jax.Array, count: int) -> jax.Array:
    """[blocks, ..., 624] uint32: the generator's states that give its first `count` numbers, and a few more."""

    def fill(word: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        return 1812433253 * (word ^ (word >> 30)) + index, word

    def block(state: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        state = _twist(state)
        return state, state

    state = jnp.moveaxis(jax.lax.scan(fill, seed, jnp.arange(1, STATE + 1, dtype=jnp.uint32))[1], 0, -1)
    return jax.lax.scan(block, state, None, length=-(-count // STATE))[1]


def _temper(words: jax.Array) -> jax.Array:
    """The numbers that words of a state give."""
    words ^= words >> 11
    words ^= (words << 7) & np.uint32(0x9D2C5680)
    words ^= (words << 15) & np.uint32(0xEFC60000)
    return words ^ (words >> 18)


def _twist(state: jax.Array) -> jax.Array:
    """The next state [..., 624]; in three parts, as each word needs the new word 227 before it."""

    def mix(ahead: jax.Array, here: jax.Array, following: jax.Array) -> jax.Array:
        word = (here & np.uint32(1 << 31)) | (following & np.uint32((1 << 31) - 1))
        return ahead ^ (word >> 1) ^ jnp.where(word & 1, np.uint32(0x9908B0DF), np.uint32(0))

    step = STATE - SHIFT
    first = mix(state[..., SHIFT:], state[..., :step], state[..., 1 : step + 1])
    second = mix(first, state[..., step : 2 * step], state[..., step + 1 : 2 * step + 1])
    following = jnp.concatenate([state[..., 2 * step + 1 :], first[..., :1]], axis=-1)
    third = mix(second[..., : STATE - 2 * step], state[..., 2 * step :], following)
    return jnp.concatenate([first, second, third], axis=-1)


def swaps(seed: jax.Array, n: int, steps: int) -> jax.Array:
    """[..., R] int32: j(i), the position that step i of torch.randperm(n) swaps with position i; for i < n - 1."""
    step = jnp.arange(steps)
    return step + _remainder(draws(seed, steps), n - step)


def _remainder(number: jax.Array, divisor: jax.Array) -> jax.Array:
    """int32: number, uint32, modulo divisor, int32 above 1. Integer division has no vector form: 3 times the time.

    The first float quotient leaves a rest of at most 2 divisor + 1024, the second of one divisor more or less.
    """
    inverse = 1 / divisor.astype(jnp.float32)
    quotient = jnp.floor(number.astype(jnp.float32) * inverse).astype(jnp.uint32)
    rest = (number - quotient * divisor.astype(jnp.uint32)).astype(jnp.int32)
    rest -= jnp.floor(rest.astype(jnp.float32) * inverse).astype(jnp.int32) * divisor
    rest = jnp.where(rest < 0, rest + divisor, rest)
    return jnp.where(rest >= divisor, rest - divisor, rest)


def permutation_starts_with(seed: jax.Array, n: int, count: ArrayLike, steps: int) -> jax.Array:
    """[n] bool: which values are among the first `count` of torch.randperm(n) for one seed; count <= steps, static."""
    step, hit = jnp.arange(steps), swaps(seed, n, steps)
    counts = step < count
    last = (
        jnp.full(n, -1).at[jnp.where(counts & (hit > step), hit, n)].max(step, mode="drop")
    )  # of the hits, by position
    origin = jnp.where(
        last[:steps] >= 0, last[:steps], step
    )  # whose value step i moves: its own, or that of a hit before

    def double(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        further = carry[0][carry[0]]
        return further, jnp.any(further != carry[0])

    origin = jax.lax.while_loop(lambda carry: carry[1], double, (origin, jnp.asarray(True)))[0]
    # A position from `count` on holds its own value if nothing hit it, else that of its last hit. The rest is in front.
    behind = (jnp.arange(n) >= count) & (last < 0)
    moved = counts & (hit >= count) & (last[jnp.minimum(hit, n - 1)] == step)
    return ~behind.at[jnp.where(moved, origin, n)].set(True, mode="drop")


def permutation_starts_with_value(seed: jax.Array, value: jax.Array, n: int, count: ArrayLike, steps: int) -> jax.Array:
    """[C] bool: whether value [C] is among the first `count` of torch.randperm(n), each for its own seed [C].

    Only the value is followed: it stays where it is until a step hits it, which puts it in front, or until the steps
    come to it, which moves it away. Where it would move to depends on no hit; so the next few places come first, and
    one pass over the steps, block by block as they are drawn, looks for hits at all of them. At 40 seeds and 38,000
    steps that takes 2.4 ms on a CPU; a pass for each place, over the swaps laid out by seed, 7.
    """
    states = _states(seed, steps)
    blocks, rows = jnp.arange(states.shape[0]), jnp.arange(value.shape[0])

    def move(place: jax.Array) -> jax.Array:
        """Where the step that comes to a place [C] moves the value there."""
        word = states[jnp.minimum(place // STATE, blocks[-1]), rows, place % STATE]
        return jnp.where(place < count, place + _remainder(_temper(word), n - place), place)

    def follow(carry: Followed) -> Followed:
        place, since, front, _ = carry
        places = [place]
        for _ in range(PLACES - 1):
            places.append(move(places[-1]))

        def look(found: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            step = block[0] * STATE + jnp.arange(STATE)
            at = jnp.full(found.shape, -1)
            for place in reversed(places):
                at = jnp.where(step <= place[:, None], place[:, None], at)
            hit = step + _remainder(_temper(block[1]), n - step)
            return found | ((hit == at) & (step > since[:, None]) & (step < count)), None

        found, _ = jax.lax.scan(look, jnp.zeros(states.shape[1:], bool), (blocks, states))
        front |= jnp.any(found, axis=-1)
        further = move(places[-1])
        moves = ~front & (further != places[-1])
        # No step comes after n: while other values move on, earlier hits at the last place of this one are not its own.
        return further, jnp.where(moves, places[-1], n), front, jnp.any(moves)

    start = value, jnp.full_like(value, -1), jnp.zeros(value.shape, bool), jnp.asarray(True)
    return jax.lax.while_loop(lambda carry: carry[3], follow, start)[2]


@lru_cache(maxsize=4)
def randperm(n: int, seed: int) -> np.ndarray:
    """torch.randperm(n) of a generator with this seed, on the host. 0.6 s for a million."""
    step = np.arange(n)
    values = step.tolist()
    for i, j in enumerate((step + host_draws(n, seed) % (n - step)).tolist()):
        values[i], values[j] = values[j], values[i]
    return np.asarray(values, np.int32)


def host_draws(count: int, seed: int) -> np.ndarray:
    """[count] uint32: the first numbers of torch.Generator().manual_seed(seed), of whose seed 32 bits count."""
    return np.random.RandomState(seed % 2**32).randint(0, 2**32, size=count, dtype=np.uint32)
