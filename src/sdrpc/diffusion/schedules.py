"""Schedules: which levels of noise a sampler goes through.

The arithmetic is that of stable-diffusion.cpp (denoiser.hpp), in single precision where it is there. A schedule is a
function from a :class:`Setting` to falling float32 levels, the last 0: ``steps + 1`` of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidValue
from . import gits as gits_levels
from . import libm
from .predictions import F32, TIMESTEPS, Prediction, Real, f32, flux_shifted

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Setting:
    """What a schedule is made for.

    ``tokens``: latents per channel, (height / 8) · (width / 8) for most VAEs, of a film in each of its ``frames``
    (latent ones); ``aligned``: the family whose published levels Align Your Steps uses (a key of :data:`ALIGNED`), None
    where there are none.
    """

    steps: int
    prediction: Prediction
    tokens: int = 4096
    aligned: str | None = "sd1"
    frames: int = 1


Schedule = Callable[[Setting], F32]


def make_sigmas(
    name: str,
    steps: int,
    prediction: Prediction,
    *,
    tokens: int = 4096,
    aligned: str | None = "sd1",
    frames: int = 1,
) -> F32:
    """The levels of schedule ``name``: float32 (steps + 1,), falling to 0; see :class:`Setting`.

    ``beta`` gives fewer where several of its steps would be at the same timestep. Raises :class:`InvalidValue` for a
    schedule that does not exist, or not for this family, and for numbers below 1.
    """
    name = ALIASES.get(name, name)
    if name not in SCHEDULES:
        raise InvalidValue("scheduler", name, f"does not exist; there are {', '.join(SCHEDULES)}")
    for field, value in (("steps", steps), ("tokens", tokens), ("frames", frames)):
        if value < 1:
            raise InvalidValue(field, value, "at least 1 is needed")
    if steps == 1 and name in _SPREAD:  # there is no distance to spread; the reference divides by zero here
        return _ending_in_zero([prediction.largest])
    return SCHEDULES[name](Setting(steps, prediction, tokens, aligned, frames))


def _ending_in_zero(sigmas: list[f32] | F32) -> F32:
    return np.append(np.asarray(sigmas, f32), f32(0))


def _at_timesteps(timesteps: Iterable[Real], prediction: Prediction) -> F32:
    return _ending_in_zero([prediction.sigma(t) for t in timesteps])


def _running_sum(start: float, end: float, count: int) -> F32:
    """``count`` values from ``start`` by repeated addition, so with its rounding errors."""
    increments = np.full(count, (f32(end) - f32(start)) / f32(count - 1), f32)
    increments[0] = start
    return np.cumsum(increments, dtype=f32)


def discrete(setting: Setting) -> F32:
    """Evenly spaced timesteps from the last to the first."""
    last, steps = f32(TIMESTEPS - 1), setting.steps
    if steps == 1:
        return _at_timesteps([last], setting.prediction)
    return _at_timesteps(last - last / f32(steps - 1) * np.arange(steps, dtype=f32), setting.prediction)


_LEAST = f32(1e-6)
"""The lowest level that karras and kl_optimal go to."""


def karras(setting: Setting) -> F32:
    """Evenly spaced in the seventh root (Karras et al. 2022, equation 5)."""
    rho = 7.0
    ends = max(setting.prediction.smallest, _LEAST), setting.prediction.largest
    low, high = (f32(float(end) ** float(f32(1 / rho))) for end in ends)
    ramp = np.arange(setting.steps, dtype=f32) / f32(setting.steps - 1)
    return _ending_in_zero((high + ramp * (low - high)).astype(np.float64) ** rho)


def exponential(setting: Setting) -> F32:
    """Evenly spaced in the logarithm."""
    low, high = libm.log(np.array([setting.prediction.smallest, setting.prediction.largest], f32))
    step = (high - low) / f32(setting.steps - 1)
    return _ending_in_zero(np.exp(high - step * np.arange(setting.steps, dtype=f32)))


ALIGNED: dict[str, F32] = {
    "sd1": np.array(
        [14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092,
         0.9642583904, 0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582], f32,
    ),
    "sdxl": np.array(
        [14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141,
         0.5550693289, 0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582], f32,
    ),
    "svd": np.array([700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002], f32),
}  # fmt: skip
"""Align Your Steps' ten-step schedules by family (research.nvidia.com/labs/toronto-ai/AlignYourSteps)."""


def ays(setting: Setting) -> F32:
    """Align Your Steps: the published levels for ten steps, stretched to others in the logarithm."""
    if setting.aligned not in ALIGNED:
        raise InvalidValue("scheduler", "ays", f"there are levels for {', '.join(ALIGNED)} only")
    return _stretched(ALIGNED[setting.aligned], setting.steps)


def gits(setting: Setting) -> F32:
    """GITS: published levels for 2 … 20 steps; for more, those for 20 stretched in the logarithm."""
    most = max(gits_levels.LEVELS)
    levels = gits_levels.LEVELS[min(setting.steps, most)]
    return _stretched(np.array([*levels, gits_levels.LOWEST], f32), setting.steps)


def _stretched(levels: F32, steps: int) -> F32:
    """Falling levels interpolated in the logarithm to another number of steps, the last one replaced by 0."""
    sigmas = levels.copy()
    if steps + 1 != len(sigmas):
        known, wanted = _running_sum(0, 1, len(sigmas)), _running_sum(0, 1, steps + 1)
        sigmas = np.exp(np.interp(wanted, known, libm.log(sigmas[::-1]))).astype(f32)[::-1].copy()
    sigmas[-1] = 0
    return sigmas


def sgm_uniform(setting: Setting) -> F32:
    """Evenly spaced timesteps of which the last one, 0, is left out."""
    return _at_timesteps(_running_sum(TIMESTEPS - 1, 0, setting.steps + 1)[:-1], setting.prediction)


def simple(setting: Setting) -> F32:
    """Whole timesteps, evenly spaced from the last."""
    steps = setting.steps
    offsets = (np.arange(steps, dtype=f32) * (f32(TIMESTEPS) / f32(steps))).astype(int)
    return _at_timesteps(np.maximum(TIMESTEPS - 1 - offsets, 0).astype(f32), setting.prediction)


def smoothstep(setting: Setting) -> F32:
    """Whole timesteps along 3u² - 2u³."""
    if setting.steps == 1:
        return _at_timesteps([f32(TIMESTEPS - 1)], setting.prediction)
    u = f32(1) - np.arange(setting.steps, dtype=f32) / f32(setting.steps)
    eased = u * u * (f32(3) - f32(2) * u) * f32(TIMESTEPS - 1)
    return _at_timesteps(np.floor(eased + f32(0.5)), setting.prediction)


def beta(setting: Setting) -> F32:
    """Whole timesteps at the quantiles of the beta distribution with α = β = 0.6 (Lee et al. 2024); none twice."""
    steps = setting.steps
    if steps == 1:
        return _at_timesteps([f32(TIMESTEPS - 1)], setting.prediction)
    between = (np.arange(TIMESTEPS - 1) + 0.5) / (TIMESTEPS - 1)
    timesteps = np.searchsorted(_beta_distribution(between), 1.0 - np.arange(steps) / steps, side="right")
    return _at_timesteps(timesteps[np.append(True, np.diff(timesteps) != 0)].astype(f32), setting.prediction)


def _beta_distribution(x: F64) -> F64:
    """The cumulative distribution function of Beta(0.6, 0.6) in (0, 1), by its power series around 0.

    I(x) = xᵃ / B(a, a) · Σ (1-a)ₙ xⁿ / (n! (a+n)), which gains a bit per term at x = 1/2; above, I(x) = 1 - I(1-x).
    """
    a, terms = 0.6, 60
    scale = math.gamma(2 * a) / math.gamma(a) ** 2
    low = np.minimum(x, 1 - x)
    total, term = np.zeros_like(low), np.ones_like(low)
    for n in range(terms):
        total += term / (a + n)
        term *= (1 - a + n) / (n + 1) * low
    half = scale * low**a * total
    return np.where(x <= 0.5, half, 1 - half)


def kl_optimal(setting: Setting) -> F32:
    """Evenly spaced in the arctangent (Sabour et al. 2024)."""
    ends = max(setting.prediction.smallest, _LEAST), setting.prediction.largest
    low, high = (f32(math.atan(end)) for end in ends)  # near π/2 the last bit matters
    t = np.arange(setting.steps, dtype=f32) / f32(setting.steps - 1)
    return _ending_in_zero(np.tan(t * low + (f32(1) - t) * high))


def lcm(setting: Setting) -> F32:
    """Timesteps from the fifty that latent consistency models were distilled at."""
    distilled, steps = 50, setting.steps
    spacing = TIMESTEPS // distilled
    timesteps = [(distilled - i * distilled // steps) * spacing - 1 for i in range(steps)]
    return _at_timesteps(timesteps, setting.prediction)


def bong_tangent(setting: Setting) -> F32:
    """Two arctangents, one down to the middle level and one from there."""
    total = setting.steps + 2
    smallest, largest = setting.prediction.smallest, setting.prediction.largest
    middle = smallest + (largest - smallest) * f32(0.5)
    pivot = int(f32(total) * f32(0.6))
    first_length = int((f32(total) * f32(0.6) + f32(total) * f32(0.6)) * f32(0.5))
    slope = f32(0.2) / (f32(total) / f32(40))
    first = _arctangent(first_length, slope, pivot, largest, middle)
    second = _arctangent(total - first_length, slope, pivot - first_length, middle, smallest)
    sigmas = np.concatenate((first[:-1], second))[: setting.steps + 1]
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


# What follows is made for flow models: the levels fall from about 1, whatever the model's prediction says.


def flux(setting: Setting) -> F32:
    """FLUX.1's: its time shift by the number of tokens (black-forest-labs/flux, sampling.py)."""
    return _shifted_evenly(_linear(setting.tokens, (256, 0.5), (4096, 1.15)), setting.steps)


def flux2(setting: Setting) -> F32:
    """FLUX.2's: a time shift by tokens and steps, fitted by its authors (black-forest-labs/flux2, sampling.py)."""
    tokens, few, many = f32(setting.tokens), f32(10), f32(200)
    at_many = f32(0.00016927) * tokens + f32(0.45666666)
    if tokens > 4300:
        return _shifted_evenly(at_many, setting.steps)
    at_few = f32(8.73809524e-05) * tokens + f32(1.89833333)
    slope = (at_many - at_few) / (many - few)
    return _shifted_evenly(slope * f32(setting.steps) + (at_many - many * slope), setting.steps)


def ltx2(setting: Setting) -> F32:
    """LTX-Video's: a time shift by the number of all frames' tokens, then stretched so that the last level is 0.1."""
    terminal = f32(0.1)
    tokens = setting.tokens * setting.frames
    sigmas = _shifted_evenly(_linear(tokens, (1024, 0.95), (4096, 2.05)), setting.steps)
    stretch = (f32(1) - sigmas[-2]) / (f32(1) - terminal)
    if setting.steps > 1 and stretch > 1e-8:
        sigmas[:-1] = f32(1) - (f32(1) - sigmas[:-1]) / stretch
    return sigmas


def _linear(tokens: int, low: tuple[float, float], high: tuple[float, float]) -> f32:
    """The line through two points (tokens, shift)."""
    slope = (f32(high[1]) - f32(low[1])) / (f32(high[0]) - f32(low[0]))
    return f32(tokens) * slope + (f32(low[1]) - slope * f32(low[0]))


def _shifted_evenly(shift: f32, steps: int) -> F32:
    """Evenly spaced from 1, moved by FLUX's time shift."""
    even = f32(1) - np.arange(steps, dtype=f32) / f32(steps)
    return _ending_in_zero([flux_shifted(t, shift) for t in even])


def logit_normal(setting: Setting) -> F32:
    """Quantiles of a logit-normal distribution, the wider the picture the nearer to 1 (ideogram4, scheduler.py)."""
    deviation, known_tokens = f32(1.75), f32(1024)
    log_snr_low, log_snr_high = f32(-15), f32(18)
    mean = f32(0.5) * libm.log(np.array([f32(setting.tokens) / known_tokens], f32))[0]
    lowest, highest = (_sigmoid(f32(0.5) * bound) for bound in (log_snr_low, log_snr_high))
    normal = NormalDist()
    quantiles = [normal.inv_cdf(float(f32(i) / f32(setting.steps))) for i in range(1, setting.steps)]
    levels = [_sigmoid(mean - deviation * f32(quantile)) for quantile in quantiles]
    return _ending_in_zero([highest, *(min(max(level, lowest), highest) for level in levels)])


def _sigmoid(x: f32) -> f32:
    return f32(1) / (f32(1) + f32(math.exp(-x)))


SCHEDULES: dict[str, Schedule] = {
    function.__name__: function
    for function in (
        discrete, karras, exponential, ays, gits, sgm_uniform, simple, smoothstep, kl_optimal, lcm, bong_tangent, ltx2,
        logit_normal, flux2, flux, beta,
    )
}  # fmt: skip
"""The schedules by the names that sd-cli gives them."""

ALIASES = {"normal": "discrete"}

_SPREAD = frozenset({"karras", "exponential", "kl_optimal", "gits"})
