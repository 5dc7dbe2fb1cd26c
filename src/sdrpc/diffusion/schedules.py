"""Noise levels: the model's own scale of them, and the schedules that pick some of it.

The arithmetic is that of stable-diffusion.cpp (denoiser.hpp), in single precision where it is there. A schedule is a
function from a number of steps and the model's :class:`NoiseScale` to ``steps + 1`` falling float32 levels, the last 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from . import libm

F32 = NDArray[np.float32]
Real = np.float32 | float

TIMESTEPS = 1000

f32 = np.float32


@dataclass(frozen=True)
class NoiseScale:
    """The levels of noise (sigma) that a model was trained on, one per timestep, from its betas.

    The betas are the family's "scaled linear" ones: squares of evenly spaced numbers from √start to √end.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.0120

    @cached_property
    def sigmas(self) -> F32:
        """Shape (1000,), rising: √((1 - ᾱ) / ᾱ) of the cumulated product ᾱ of 1 - β."""
        start, end = np.sqrt(f32(self.beta_start)), np.sqrt(f32(self.beta_end))
        roots = start + (end - start) * (np.arange(TIMESTEPS, dtype=f32) / f32(TIMESTEPS - 1))
        product = np.cumprod(f32(1) - roots * roots, dtype=f32)
        return np.sqrt((f32(1) - product) / product)

    @cached_property
    def log_sigmas(self) -> F32:
        return libm.log(self.sigmas)

    @property
    def smallest(self) -> f32:
        return f32(self.sigmas[0])

    @property
    def largest(self) -> f32:
        return f32(self.sigmas[-1])

    def sigma(self, timestep: Real) -> f32:
        """The level at a timestep between 0 and 999, interpolated in the logarithm."""
        t = np.clip(f32(timestep), f32(0), f32(TIMESTEPS - 1))
        low, high = math.floor(t), math.ceil(t)
        w = t - f32(low)
        return f32(np.exp((f32(1) - w) * self.log_sigmas[low] + w * self.log_sigmas[high]))

    def timestep(self, sigma: Real) -> f32:
        """The (fractional) timestep of a positive level, interpolated in the logarithm and kept within 0 … 999."""
        log_sigma = libm.log(np.array([sigma], f32))[0]
        low = min(max(int(np.count_nonzero(log_sigma - self.log_sigmas >= 0)) - 1, 0), TIMESTEPS - 2)
        below, above = self.log_sigmas[low], self.log_sigmas[low + 1]
        w = np.clip((below - log_sigma) / (below - above), f32(0), f32(1))
        return f32((f32(1) - w) * f32(low) + w * f32(low + 1))


Schedule = Callable[[int, NoiseScale], F32]


def make_sigmas(name: str, steps: int, scale: NoiseScale) -> F32:
    """The levels of schedule ``name``: float32 (steps + 1,), falling to 0.

    Raises :class:`UsageError` for a schedule that does not exist (here) or a number of steps below 1.
    """
    name = ALIASES.get(name, name)
    if name not in SCHEDULES:
        reason = "not supported yet" if name in ELSEWHERE else "does not exist"
        raise UsageError(f"--scheduler {name}: {reason}; there are {', '.join(SCHEDULES)}")
    if steps < 1:
        raise UsageError(f"--steps {steps}: at least 1 is needed")
    if steps == 1 and name in _SPREAD:  # there is no distance to spread; the reference divides by zero here
        return _ending_in_zero([scale.largest])
    return SCHEDULES[name](steps, scale)


def _ending_in_zero(sigmas: list[f32] | F32) -> F32:
    return np.append(np.asarray(sigmas, f32), f32(0))


def _at_timesteps(timesteps: list[f32] | list[int] | F32, scale: NoiseScale) -> F32:
    return _ending_in_zero([scale.sigma(t) for t in timesteps])


def _running_sum(start: float, end: float, count: int) -> F32:
    """``count`` values from ``start`` by repeated addition, so with its rounding errors."""
    increments = np.full(count, (f32(end) - f32(start)) / f32(count - 1), f32)
    increments[0] = start
    return np.cumsum(increments, dtype=f32)


def discrete(steps: int, scale: NoiseScale) -> F32:
    """Evenly spaced timesteps from the last to the first."""
    last = f32(TIMESTEPS - 1)
    if steps == 1:
        return _at_timesteps([last], scale)
    return _at_timesteps(last - last / f32(steps - 1) * np.arange(steps, dtype=f32), scale)


def karras(steps: int, scale: NoiseScale) -> F32:
    """Evenly spaced in the seventh root (Karras et al. 2022, equation 5)."""
    rho = 7.0
    low, high = (f32(float(s) ** float(f32(1 / rho))) for s in (scale.smallest, scale.largest))
    ramp = np.arange(steps, dtype=f32) / f32(steps - 1)
    return _ending_in_zero((high + ramp * (low - high)).astype(np.float64) ** rho)


def exponential(steps: int, scale: NoiseScale) -> F32:
    """Evenly spaced in the logarithm."""
    low, high = scale.log_sigmas[0], scale.log_sigmas[-1]
    return _ending_in_zero(np.exp(high - (high - low) / f32(steps - 1) * np.arange(steps, dtype=f32)))


_ALIGNED = np.array(
    [14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092,
     0.9642583904, 0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582], f32,
)  # fmt: skip
"""Align Your Steps' ten-step schedule for SD 1.5 (research.nvidia.com/labs/toronto-ai/AlignYourSteps)."""


def ays(steps: int, _scale: NoiseScale) -> F32:
    """Align Your Steps: the published levels for ten steps, stretched to others in the logarithm."""
    sigmas = _ALIGNED.copy()
    if steps + 1 != len(sigmas):
        known, wanted = _running_sum(0, 1, len(sigmas)), _running_sum(0, 1, steps + 1)
        sigmas = np.exp(np.interp(wanted, known, libm.log(sigmas[::-1]))).astype(f32)[::-1].copy()
    sigmas[-1] = 0
    return sigmas


def sgm_uniform(steps: int, scale: NoiseScale) -> F32:
    """Evenly spaced timesteps of which the last one, 0, is left out."""
    return _at_timesteps(_running_sum(TIMESTEPS - 1, 0, steps + 1)[:-1], scale)


def simple(steps: int, scale: NoiseScale) -> F32:
    """Whole timesteps, evenly spaced from the last."""
    offsets = (np.arange(steps, dtype=f32) * (f32(TIMESTEPS) / f32(steps))).astype(int)
    return _at_timesteps(np.maximum(TIMESTEPS - 1 - offsets, 0).astype(f32), scale)


def smoothstep(steps: int, scale: NoiseScale) -> F32:
    """Whole timesteps along 3u² - 2u³."""
    if steps == 1:
        return _at_timesteps([f32(TIMESTEPS - 1)], scale)
    u = f32(1) - np.arange(steps, dtype=f32) / f32(steps)
    eased = u * u * (f32(3) - f32(2) * u) * f32(TIMESTEPS - 1)
    return _at_timesteps(np.floor(eased + f32(0.5)), scale)


def kl_optimal(steps: int, scale: NoiseScale) -> F32:
    """Evenly spaced in the arctangent (Sabour et al. 2024)."""
    low, high = np.arctan(scale.smallest), np.arctan(scale.largest)
    t = np.arange(steps, dtype=f32) / f32(steps - 1)
    return _ending_in_zero(np.tan(t * low + (f32(1) - t) * high))


def lcm(steps: int, scale: NoiseScale) -> F32:
    """Timesteps from the fifty that latent consistency models were distilled at."""
    distilled = 50
    spacing = TIMESTEPS // distilled
    return _at_timesteps([(distilled - i * distilled // steps) * spacing - 1 for i in range(steps)], scale)


def bong_tangent(steps: int, scale: NoiseScale) -> F32:
    """Two arctangents, one down to the middle level and one from there."""
    total = steps + 2
    middle = scale.smallest + (scale.largest - scale.smallest) * f32(0.5)
    pivot = int(f32(total) * f32(0.6))
    first_length = int((f32(total) * f32(0.6) + f32(total) * f32(0.6)) * f32(0.5))
    slope = f32(0.2) / (f32(total) / f32(40))
    first = _arctangent(first_length, slope, pivot, scale.largest, middle)
    second = _arctangent(total - first_length, slope, pivot - first_length, middle, scale.smallest)
    sigmas = np.concatenate((first[:-1], second))[: steps + 1]
    sigmas[-1] = 0
    return sigmas


def _arctangent(count: int, slope: f32, pivot: int, start: f32, end: f32) -> F32:
    """``count`` levels from ``start`` to ``end`` along an arctangent around ``pivot``."""
    x = np.arange(count, dtype=f32)
    curve = ((f32(2) / f32(math.pi)) * np.arctan(-slope * (x - f32(pivot))) + f32(1)) * f32(0.5)
    span = curve[0] - curve[-1]
    if count == 1 or abs(span) < 1e-8:
        return np.full(count, start, f32)
    return ((curve - curve[-1]) * (f32(1) / span)) * (start - end) + end


SCHEDULES: dict[str, Schedule] = {
    function.__name__: function
    for function in (
        discrete, karras, exponential, ays, sgm_uniform, simple, smoothstep, kl_optimal, lcm, bong_tangent,
    )
}  # fmt: skip
"""The schedules by the names that sd-cli gives them."""

ALIASES = {"normal": "discrete"}

ELSEWHERE = frozenset({"gits", "ltx2", "logit_normal", "flux2", "flux", "beta"})
"""Schedules that stable-diffusion.cpp has and this does not."""

_SPREAD = frozenset({"karras", "exponential", "kl_optimal"})
