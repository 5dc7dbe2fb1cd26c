"""A Brownian path that depends on a seed alone, wherever it is looked at.

stable-diffusion.cpp's BrownianTreeNoiseSampler: between two known points of the path lies a normal distribution, whose
value in the middle is drawn by a generator of its own, seeded by the way down a binary tree.
"""

from __future__ import annotations

import math

import numpy as np

from .rng import F32, MinimalStandard

_WORD = (1 << 64) - 1
_DEPTH = 24
"""How often the interval is halved; beyond, the path is straight."""

_SHORTEST = 1e-9
"""The same for the length of an interval."""


class BrownianTree:
    """A path W over ``low`` … ``high`` with W(low) = 0, of independent values in ``shape``."""

    def __init__(self, shape: tuple[int, ...], low: float, high: float, seed: int) -> None:
        self._shape, self._low, self._high = shape, low, high
        self._seed = _mixed(seed, 0x9E3779B97F4A7C15)
        self._last = self._normal(_mixed(seed, 0xBF58476D1CE4E5B9)) * np.float32(math.sqrt(np.float32(high - low)))
        self._known: dict[float, F32] = {}

    def noise(self, start: float, end: float) -> F32:
        """Standard normal noise of the interval between two levels, whichever is higher."""
        first, second = (min(max(level, self._low), self._high) for level in sorted((start, end)))
        span = np.float32(max(abs(end - start), 1e-12))
        return (self._value(second) - self._value(first)) * (np.float32(1) / np.sqrt(span))

    def _value(self, t: float) -> F32:
        if t not in self._known:
            self._known[t] = self._descend(t)
        return self._known[t]

    def _descend(self, t: float) -> F32:
        low, high, seed = self._low, self._high, self._seed
        at_low, at_high = np.zeros(self._shape, np.float32), self._last
        half = np.float32(0.5)
        for _ in range(_DEPTH):
            if high - low < _SHORTEST:
                break
            middle = 0.5 * (low + high)
            deviation = np.float32(math.sqrt((high - middle) * (middle - low) / (high - low)))
            at_middle = half * (at_low + at_high) + deviation * self._normal(seed)
            if t == middle:
                return at_middle
            if t < middle:
                high, at_high, seed = middle, at_middle, _mixed(seed, 1)
            else:
                low, at_low, seed = middle, at_middle, _mixed(seed, 2)
        share = np.float32((t - low) / (high - low)) if high > low else half
        return (np.float32(1) - share) * at_low + share * at_high

    def _normal(self, seed: int) -> F32:
        return MinimalStandard(seed).normal(math.prod(self._shape)).reshape(self._shape)


def _mixed(value: int, salt: int) -> int:
    """64 bits stirred (the finalizer of SplitMix64)."""
    z = (value + salt) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)
