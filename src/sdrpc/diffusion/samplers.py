"""Samplers: from noise to latents, a step at a time.

Each is one function over numpy float32 arrays with the arithmetic of stable-diffusion.cpp (denoiser.hpp), scalars in
single precision where they are there. A sampler asks a :class:`Denoise` what the picture without noise would be and
moves towards it; ancestral ones then add new noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from .schedules import TIMESTEPS, NoiseScale, f32

F32 = NDArray[np.float32]

Denoise = Callable[[F32, f32], F32]
"""(latents, their level of noise) → the model's guess of the latents without noise."""

Predict = Callable[[F32, f32], F32]
"""(scaled latents, timestep) → what the diffusion model itself predicts."""

Noise = Callable[[], F32]
"""The next noise, in the latents' shape."""

Steps = Iterable[tuple[f32, f32]]
"""Pairs of levels of noise: from one to the following. A sampler asks for the next when it is done with one."""


@dataclass(frozen=True)
class Scaling:
    """How a model's input and output relate to latents at a level of noise: denoised = x · skip + prediction · out."""

    skip: f32
    out: f32
    into: f32


def eps_scaling(sigma: f32) -> Scaling:
    """For a model that predicts the noise."""
    return Scaling(f32(1), -sigma, f32(1) / np.sqrt(sigma * sigma + f32(1)))


def v_scaling(sigma: f32) -> Scaling:
    """For a model that predicts the velocity (Salimans & Ho 2022)."""
    square = sigma * sigma + f32(1)
    return Scaling(f32(1) / square, -sigma / np.sqrt(square), f32(1) / np.sqrt(square))


SCALINGS: dict[str, Callable[[f32], Scaling]] = {"eps": eps_scaling, "v": v_scaling}
"""By the names of sd-cli's --prediction."""


def denoiser(predict: Predict, prediction: str, scale: NoiseScale) -> Denoise:
    """A :class:`Denoise` from a model that predicts noise (``eps``) or velocity (``v``).

    The model gets a fractional timestep, as in stable-diffusion.cpp.
    """
    scaling_at = SCALINGS[prediction]

    def denoise(x: F32, sigma: f32) -> F32:
        scaling = scaling_at(sigma)
        predicted = predict(x * scaling.into, scale.timestep(sigma))
        return predicted * scaling.out + x * scaling.skip

    return denoise


def counted_steps(sigmas: F32, on_step: Callable[[int, int], None] = lambda *_: None) -> Iterator[tuple[f32, f32]]:
    """The steps of a schedule. ``on_step`` is told how many of them are done, and how many there are."""
    total = len(sigmas) - 1
    on_step(0, total)
    for done, (sigma, following) in enumerate(pairwise(sigmas)):
        yield f32(sigma), f32(following)
        on_step(done + 1, total)


@dataclass(frozen=True)
class Sampler:
    """A sampler and what belongs to it.

    ``eta``: how much new noise it adds unless told otherwise; ``schedule``: the one it is used with unless told
    otherwise; ``evaluations``: how often it calls the model in a step (the last step to 0 always takes one).
    """

    run: Callable[[Denoise, F32, Steps, Noise, float], F32]
    eta: float = 0.0
    schedule: str = "discrete"
    evaluations: int = 1


def euler(denoise: Denoise, x: F32, steps: Steps, _noise: Noise, _eta: float) -> F32:
    for sigma, following in steps:
        x = x + (x - denoise(x, sigma)) / sigma * (following - sigma)
    return x


def euler_a(denoise: Denoise, x: F32, steps: Steps, noise: Noise, eta: float) -> F32:
    for sigma, following in steps:
        denoised = denoise(x, sigma)
        down, up = _ancestral(sigma, following, eta)
        ratio = down / sigma
        x = ratio * x + (f32(1) - ratio) * denoised
        if up > 0:
            x = x + noise() * up
    return x


def heun(denoise: Denoise, x: F32, steps: Steps, _noise: Noise, _eta: float) -> F32:
    for sigma, following in steps:
        slope, distance = (x - denoise(x, sigma)) / sigma, following - sigma
        if following > 0:
            trial = x + slope * distance
            slope = (slope + (trial - denoise(trial, following)) / following) / f32(2)
        x = x + slope * distance
    return x


def dpm2(denoise: Denoise, x: F32, steps: Steps, _noise: Noise, _eta: float) -> F32:
    for sigma, following in steps:
        slope = (x - denoise(x, sigma)) / sigma
        if following > 0:
            middle = f32(math.exp(0.5 * (math.log(sigma) + math.log(following))))
            trial = x + slope * (middle - sigma)
            slope = (trial - denoise(trial, middle)) / middle
        x = x + slope * (following - sigma)
    return x


def dpmpp_2s_a(denoise: Denoise, x: F32, steps: Steps, noise: Noise, eta: float) -> F32:
    for sigma, following in steps:
        denoised = denoise(x, sigma)
        down, up = _ancestral(sigma, following, eta)
        if down == 0:
            x = denoised
        else:
            t, t_next = _minus_log(sigma), _minus_log(down)
            h = t_next - t
            middle = _exp_minus(t + f32(0.5) * h)
            trial = (middle / _exp_minus(t)) * x - _expm1_minus(h * f32(0.5)) * denoised
            x = (_exp_minus(t_next) / _exp_minus(t)) * x - _expm1_minus(h) * denoise(trial, middle)
        if following > 0:
            x = x + noise() * up
    return x


def dpmpp_2m(denoise: Denoise, x: F32, steps: Steps, _noise: Noise, _eta: float) -> F32:
    return _multistep(denoise, x, steps, lambda h, h_last: (h_last / h, h))


def dpmpp_2m_v2(denoise: Denoise, x: F32, steps: Steps, _noise: Noise, _eta: float) -> F32:
    def ratio_and_step(h: f32, h_last: f32) -> tuple[f32, f32]:
        short, long = min(h, h_last), max(h, h_last)
        return long / short, (long + short) / f32(2)

    return _multistep(denoise, x, steps, ratio_and_step)


def _multistep(denoise: Denoise, x: F32, steps: Steps, ratio_and_step: Callable[[f32, f32], tuple[f32, f32]]) -> F32:
    """DPM-Solver++(2M): extrapolates from the last step's guess by the ratio of the two steps' lengths in -log σ."""
    before, h_last = x, f32(0)
    for index, (sigma, following) in enumerate(steps):
        denoised = denoise(x, sigma)
        h = step = _minus_log(following) - _minus_log(sigma)
        target = denoised
        if index > 0 and following > 0:
            ratio, step = ratio_and_step(h, h_last)
            extra = f32(1) / (f32(2) * ratio)
            target = (f32(1) + extra) * denoised - extra * before
        x = (following / sigma) * x - _expm1_minus(step) * target
        before, h_last = denoised, h
    return x


def lcm(denoise: Denoise, x: F32, steps: Steps, noise: Noise, _eta: float) -> F32:
    for sigma, following in steps:
        x = denoise(x, sigma)
        if following > 0:
            x = x + noise() * following
    return x


def tcd(denoise: Denoise, x: F32, steps: Steps, noise: Noise, eta: float) -> F32:
    """Trajectory consistency distillation: goes below the next level by ``eta``, then adds noise up to it."""
    one = f32(1)
    for sigma, following in steps:
        denoised = denoise(x, sigma)
        epsilon = (x - denoised) / sigma
        alpha = one / (following * following + one)
        low = math.floor((one - f32(eta)) * f32(_nearest_timestep(following)))
        alpha_low = f32(_ALPHAS[min(max(low, 0), TIMESTEPS - 1)])
        x = np.sqrt(alpha_low / alpha) * denoised + np.sqrt((one - alpha_low) / alpha) * epsilon
        if eta > 0 and following > 0:
            x = np.sqrt(alpha / alpha_low) * x + np.sqrt(one / alpha - one / alpha_low) * noise()
    return x


_ROOTS = np.sqrt(f32(0.00085)) + (np.sqrt(f32(0.0120)) - np.sqrt(f32(0.00085))) * (
    np.arange(TIMESTEPS, dtype=f32) / f32(TIMESTEPS - 1)
)
_ALPHAS = np.cumprod(1.0 - _ROOTS.astype(np.float64) ** 2)
_LEVELS = np.sqrt((1 - _ALPHAS) / _ALPHAS)


def _nearest_timestep(sigma: f32) -> int:
    above = int(np.searchsorted(_LEVELS, sigma))
    if above in (0, TIMESTEPS):
        return min(above, TIMESTEPS - 1)
    return above if abs(_LEVELS[above] - sigma) < abs(_LEVELS[above - 1] - sigma) else above - 1


def _ancestral(sigma: f32, following: f32, eta: float) -> tuple[f32, f32]:
    """The level to go down to and the noise to add, so that the sum's level is ``following``."""
    if eta <= 0:
        return following, f32(0)
    high, low = sigma * sigma, following * following
    up = min(following, f32(eta) * np.sqrt(max(low * (high - low) / high, f32(0))))
    return np.sqrt(max(low - up * up, f32(0))), up


def _minus_log(sigma: f32) -> f32:
    return f32(-math.log(sigma)) if sigma > 0 else f32(math.inf)


def _exp_minus(t: f32) -> f32:
    return f32(math.exp(-t))


def _expm1_minus(h: f32) -> f32:
    """exp(-h) - 1, subtracted in double precision."""
    return f32(math.exp(-h) - 1.0)


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(euler),
    "euler_a": Sampler(euler_a, eta=1.0),
    "heun": Sampler(heun, evaluations=2),
    "dpm2": Sampler(dpm2, evaluations=2),
    "dpm++2s_a": Sampler(dpmpp_2s_a, eta=1.0, evaluations=2),
    "dpm++2m": Sampler(dpmpp_2m),
    "dpm++2mv2": Sampler(dpmpp_2m_v2),
    "lcm": Sampler(lcm, schedule="lcm"),
    "ddim_trailing": Sampler(euler_a, schedule="simple"),  # DDIM in these variables, eta included
    "tcd": Sampler(tcd, schedule="lcm"),
}
"""The samplers by the names that sd-cli gives them."""

DEFAULT_SAMPLER = "euler_a"

ELSEWHERE = frozenset(
    {"ipndm", "ipndm_v", "res_multistep", "res_2s", "er_sde", "euler_cfg_pp", "euler_a_cfg_pp", "euler_ge",
     "dpm++2m_sde", "dpm++2m_sde_bt", "lms"}
)  # fmt: skip
"""Samplers that stable-diffusion.cpp has and this does not."""


def find_sampler(name: str) -> Sampler:
    """The sampler of that name. Raises :class:`UsageError` when there is none (here)."""
    if name not in SAMPLERS:
        reason = "not supported yet" if name in ELSEWHERE else "does not exist"
        raise UsageError(f"--sampling-method {name}: {reason}; there are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
