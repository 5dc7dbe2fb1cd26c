"""The solver of extended reverse-time stochastic differential equations."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from ..predictions import F32, f32
from .base import Run


def er_sde(run: Run, x: F32) -> F32:
    """Extended reverse-time SDE solver (Cui et al. 2023), up to the third order; ``eta`` > 0 adds its noise."""
    one, half = f32(1), f32(0.5)
    guesses: deque[F32] = deque(maxlen=1)
    slopes: deque[F32] = deque(maxlen=1)
    lambdas: deque[f32] = deque(maxlen=3)
    for level, following in run.steps():
        sigma = min(level, _FLOW_HIGHEST) if run.flow and level > 1 else level
        denoised = run.guess(x, sigma)
        alpha, now = _er_alpha_lambda(sigma, run.flow)
        lambdas.appendleft(now)
        if following == 0:
            x = denoised
            continue
        alpha_next, then = _er_alpha_lambda(following, run.flow)
        scaled_then = _er_noise_scale(then)
        ratio = scaled_then / _er_noise_scale(now)
        x = alpha_next / alpha * ratio * x + alpha_next * (one - ratio) * denoised
        if guesses and (since := now - lambdas[1]) != 0:
            distance = then - now
            step = -distance / f32(_ER_POINTS)
            points = then + np.arange(_ER_POINTS, dtype=f32) * step
            scaled = _er_noise_scale(points)
            slope = (denoised - guesses[0]) / since
            first = np.cumsum(one / scaled)[-1] * step
            x = x + alpha_next * (distance + first * scaled_then) * slope
            if slopes:
                second = np.cumsum((points - now) / scaled)[-1] * step
                curve = (slope - slopes[0]) / ((now - lambdas[2]) * half)
                x = x + alpha_next * (half * distance * distance + second * scaled_then) * curve
            slopes.appendleft(slope)
        variance = then * then - now * now * ratio * ratio
        if run.eta > 0 and variance > 0:
            x = x + run.noise(x) * (alpha_next * np.sqrt(variance))
        guesses.appendleft(denoised)
    return x


_ER_POINTS = 200
"""Into how many parts er_sde's integrals are divided."""

_LOWEST, _FLOW_HIGHEST = f32(1e-6), f32(1) - f32(1e-4)


def _er_alpha_lambda(sigma: f32, flow: bool) -> tuple[f32, f32]:
    """How much of the latents a level keeps, and its noise in parts of that."""
    if not flow:
        return f32(1), max(sigma, _LOWEST)
    sigma = min(max(sigma, _LOWEST), _FLOW_HIGHEST)
    return f32(1) - sigma, sigma / max(f32(1) - sigma, _LOWEST)


def _er_noise_scale(level: Any) -> Any:
    """The paper's best noise scale, of a float32 number or array."""
    return level * (np.exp(np.power(level, f32(0.3))) + f32(10))
