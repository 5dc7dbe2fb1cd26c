"""Euler's method and its relatives: one evaluation of the model in a step, and nothing remembered but a slope."""

from __future__ import annotations

from ..predictions import F32, f32
from .base import Run, diffusion_descent, slope_at


def euler(run: Run, x: F32) -> F32:
    for sigma, following in run.steps():
        x = x + slope_at(x, run.guess(x, sigma), sigma) * (following - sigma)
    return x


def euler_a(run: Run, x: F32) -> F32:
    """Ancestral: a step further down, then new noise. DDIM in these variables, eta included."""
    for sigma, following in run.steps():
        denoised = run.guess(x, sigma)
        descent = run.descent(sigma, following)
        ratio = descent.down / sigma
        x = descent.renoised(run, ratio * x + (f32(1) - ratio) * denoised)
    return x


def euler_ge(run: Run, x: F32, gamma: float = 2.0) -> F32:
    """Gradient estimation (Permenter & Yuan 2024): extrapolates the slope by ``gamma`` from the last one."""
    before: F32 | None = None
    for sigma, following in run.steps():
        denoised = run.guess(x, sigma)
        if following == 0:
            x = denoised
            continue
        descent = run.descent(sigma, following)
        slope = slope_at(x, denoised, sigma)
        corrected = slope if before is None else slope * f32(gamma) + before * (f32(1) - f32(gamma))
        x = descent.renoised(run, x + corrected * (descent.down - sigma))
        before = slope
    return x


def euler_cfg_pp(run: Run, x: F32) -> F32:
    """CFG++ (Chung et al. 2024): from the guided guess back to noise along the unconditional one."""
    for sigma, following in run.steps():
        guided, unconditional = run.guesses(x, sigma)
        x = guided + slope_at(x, unconditional, sigma) * following
    return x


def euler_a_cfg_pp(run: Run, x: F32) -> F32:
    """The same with new noise; for flow models too as if noise were added."""
    for sigma, following in run.steps():
        guided, unconditional = run.guesses(x, sigma)
        descent = diffusion_descent(sigma, following, run.eta)
        x = guided + slope_at(x, unconditional, sigma) * descent.down
        if following > 0:
            x = x + run.noise(x) * descent.up
    return x
