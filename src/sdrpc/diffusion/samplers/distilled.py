"""Samplers of models that were distilled to few steps."""

from __future__ import annotations

import math

import numpy as np

from ..predictions import F32, TIMESTEPS, f32
from .base import Run, slope_at


def lcm(
    run: Run,
    x: F32,
    noise_clip_std: float = 0.0,
    noise_scale_start: float = 1.0,
    noise_scale_end: float | None = None,
) -> F32:
    """Latent consistency models: all noise away, then new noise.

    It is cut off at ``noise_clip_std`` standard deviations (0: not at all) and scaled, linearly over the steps, from
    ``noise_scale_start`` to ``noise_scale_end`` (None: the same).
    """
    start = f32(noise_scale_start)
    end = start if noise_scale_end is None else f32(noise_scale_end)
    last = len(run.sigmas) - 2
    for index, (sigma, following) in enumerate(run.steps()):
        x = run.guess(x, sigma)
        if following > 0:
            if run.flow:
                x = x * (f32(1) - following)
            noise = run.noise(x)
            if noise_clip_std > 0:
                most = f32(noise_clip_std) * f32(noise.std(dtype=np.float64))
                noise = np.clip(noise, -most, most)
            x = x + noise * (following * (start + (end - start) * f32(index / last)))
    return x


def tcd(run: Run, x: F32) -> F32:
    """Trajectory consistency distillation: goes below the next level by ``eta``, then adds noise up to it."""
    one = f32(1)
    for sigma, following in run.steps():
        denoised = run.guess(x, sigma)
        epsilon = slope_at(x, denoised, sigma)
        alpha = one / (following * following + one)
        low = math.floor((one - f32(run.eta)) * f32(_nearest_timestep(following)))
        alpha_low = f32(_ALPHAS[min(max(low, 0), TIMESTEPS - 1)])
        x = np.sqrt(alpha_low / alpha) * denoised + np.sqrt((one - alpha_low) / alpha) * epsilon
        if run.eta > 0 and following > 0:
            x = np.sqrt(alpha / alpha_low) * x + np.sqrt(one / alpha - one / alpha_low) * run.noise(x)
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
