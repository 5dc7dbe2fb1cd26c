"""stable-diffusion.cpp's three generators of noise, bit for bit.

Each is a class made from a seed; :meth:`Rng.normal` draws the next ``count`` normal values. They follow rng_philox.hpp,
rng_mt19937.hpp and rng.hpp of stable-diffusion.cpp, including where its expressions are evaluated in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidValue
from . import libm

F32 = NDArray[np.float32]

BLOCK = 1 << 15
"""Values that Philox makes at a time: what lies between them stays in a core's cache."""
THREADS = 4
_WORD, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)


class Rng(Protocol):
    """A seeded source of noise."""

    def normal(self, count: int) -> F32:
        """The next ``count`` values of a standard normal distribution, float32."""
        ...


class Philox:
    """``cuda``: what torch draws on a CUDA device (Philox 4x32-10 and Box-Muller).

    Each call is a new offset of the counter; value i of a call depends on seed, offset and i only.
    """

    _MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
    _WEYL = (0x9E3779B9, 0xBB67AE85)
    _ROUNDS = 10

    def __init__(self, seed: int) -> None:
        self._key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
        self._offset = 0

    def normal(self, count: int) -> F32:
        values = np.empty(count, np.float32)
        offset, self._offset = self._offset, self._offset + 1

        def fill(start: int) -> None:
            part = values[start : start + BLOCK]
            part[:] = self._some(offset, start, len(part))

        if count <= BLOCK:
            fill(0)
        else:
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(fill, range(0, count, BLOCK)))
        return values

    def _some(self, offset: int, start: int, count: int) -> F32:
        """Values ``start`` … ``start + count - 1`` of the call with this ``offset``."""
        inverse = np.float32(2.3283064e-10)
        inverse_2pi = inverse * np.float32(6.2831855)
        first, second = (words.astype(np.uint32).astype(np.float32) for words in self._words(offset, start, count))
        u = first * inverse + inverse / np.float32(2)
        v = second * inverse_2pi + inverse_2pi / np.float32(2)
        # there log, sqrt and sin are C's double precision functions; the radius is kept as a float
        radius = np.sqrt(-2.0 * np.log(u.astype(np.float64))).astype(np.float32)
        return (radius * np.sin(v.astype(np.float64))).astype(np.float32)

    def _words(self, offset: int, start: int, count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """The first two of the four words (32 bits, held in 64) that Philox makes of each counter (offset, 0, i, 0)."""
        none = np.zeros(count, np.uint64)
        a, b, c, d = none + np.uint64(offset), none, np.arange(start, start + count, dtype=np.uint64), none
        key = self._key
        for _ in range(self._ROUNDS):
            low, high = a * self._MULTIPLIERS[0], c * self._MULTIPLIERS[1]
            a = (high >> _WORD) ^ b ^ np.uint64(key[0])
            c = (low >> _WORD) ^ d ^ np.uint64(key[1])
            b, d = high & _LOW, low & _LOW
            key = ((key[0] + self._WEYL[0]) & 0xFFFFFFFF, (key[1] + self._WEYL[1]) & 0xFFFFFFFF)
        return a, b


class MersenneTwister:
    """``cpu``: what torch draws on a CPU (MT19937 and Box-Muller on blocks of sixteen).

    Fewer than sixteen values come from a double precision Box-Muller that keeps its second value for later.
    """

    _BLOCK = 16

    def __init__(self, seed: int) -> None:
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)
        self._spare: float | None = None

    def normal(self, count: int) -> F32:
        if count < self._BLOCK:
            return np.array([self._single() for _ in range(count)], np.float32)
        values = self._uniform(count)
        whole = count - count % self._BLOCK
        values[:whole] = _box_muller_16(values[:whole])
        if whole < count:  # the last sixteen are drawn again
            values[-self._BLOCK :] = _box_muller_16(self._uniform(self._BLOCK))
        return values

    def _bits(self, count: int) -> NDArray[np.uint32]:
        return self._twister.randint(0, 1 << 32, size=count, dtype=np.uint32)

    def _uniform(self, count: int) -> F32:
        return (self._bits(count) & np.uint32((1 << 24) - 1)).astype(np.float32) * np.float32(2.0**-24)

    def _single(self) -> float:
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        words = [int(word) for word in self._bits(4)]
        angle, radius = ((((words[i] << 32) | words[i + 1]) & ((1 << 53) - 1)) * 2.0**-53 for i in (0, 2))
        length, theta = math.sqrt(-2.0 * math.log1p(-radius)), 2.0 * math.pi * angle
        self._spare = length * math.sin(theta)
        return length * math.cos(theta)


def _box_muller_16(uniform: F32) -> F32:
    """Normal values from uniform ones in [0, 1): of each sixteen, the first eight give radii and the others angles."""
    blocks = uniform.reshape(-1, 2, 8)
    radius = np.sqrt(np.float32(-2) * libm.log(np.float32(1) - blocks[:, 0]))
    theta = np.float32(2 * np.float32(math.pi)) * blocks[:, 1]
    return np.stack((radius * libm.cos(theta), radius * libm.sin(theta)), axis=1).reshape(-1)


class MinimalStandard:
    """``std_default``: libstdc++'s default_random_engine (minstd_rand0) and its normal_distribution (polar method)."""

    _MODULUS = (1 << 31) - 1
    _MULTIPLIER = 16807

    def __init__(self, seed: int) -> None:
        self._state = (seed & 0xFFFFFFFF) % self._MODULUS or 1

    def normal(self, count: int) -> F32:
        pieces: list[F32] = []
        missing = count + count % 2  # pairs; the odd one's second half is dropped with the distribution
        while missing:
            states = self._draw(missing * 2)
            pairs = _polar_uniform(states).reshape(-1, 2)
            square = pairs[:, 0] * pairs[:, 0] + pairs[:, 1] * pairs[:, 1]
            inside = np.flatnonzero((square <= 1) & (square != 0))[: missing // 2]
            used = len(square) if len(inside) * 2 < missing else int(inside[-1]) + 1
            self._state = int(states[2 * used - 1])
            square = square[inside]
            factor = np.sqrt(np.float32(-2) * libm.log(square) / square)
            pieces.append((pairs[inside, ::-1] * factor[:, None]).reshape(-1))
            missing -= 2 * len(inside)
        return np.concatenate(pieces)[:count] if pieces else np.empty(0, np.float32)

    def _draw(self, count: int) -> NDArray[np.uint64]:
        """The next ``count`` states of the generator, which itself stays where it is."""
        states = np.array([self._state * self._MULTIPLIER % self._MODULUS], np.uint64)
        while len(states) < count:  # state i + n is state i times multiplier^n
            jump = pow(self._MULTIPLIER, len(states), self._MODULUS)
            states = np.concatenate((states, states * np.uint64(jump) % np.uint64(self._MODULUS)))
        return states[:count]


def _polar_uniform(states: NDArray[np.uint64]) -> F32:
    """libstdc++'s generate_canonical<float> of minstd_rand0's values, stretched to [-1, 1)."""
    canonical = (states - np.uint64(1)).astype(np.float32) / np.float32(2147483646)
    canonical = np.minimum(canonical, np.nextafter(np.float32(1), np.float32(0)))
    return ((np.float32(2) * canonical).astype(np.float64) - 1.0).astype(np.float32)


RNGS: dict[str, Callable[[int], Rng]] = {"cuda": Philox, "cpu": MersenneTwister, "std_default": MinimalStandard}
"""The generators by the names that sd-cli gives them; made from a seed of 0 … 2^63 - 1."""


def make_rng(name: str, seed: int) -> Rng:
    """The generator ``name`` at its start. Raises :class:`InvalidValue` for a name or seed that does not exist."""
    if name not in RNGS:
        raise InvalidValue("rng", name, f"does not exist; there are {', '.join(RNGS)}")
    if not 0 <= seed < 1 << 63:
        raise InvalidValue("seed", seed, "seeds are 0 … 2^63 - 1")
    return RNGS[name](seed)
