"""Two evaluations of the model in a step."""

from __future__ import annotations

import math

import numpy as np

from ..predictions import F32, f32
from .base import Run, exp_minus, expm1_minus, minus_log, phi1, phi2, slope_at


def heun(run: Run, x: F32) -> F32:
    for sigma, following in run.steps():
        slope, distance = slope_at(x, run.guess(x, sigma), sigma), following - sigma
        if following > 0:
            trial = x + slope * distance
            slope = (slope + slope_at(trial, run.guess(trial, following), following)) / f32(2)
        x = x + slope * distance
    return x


def dpm2(run: Run, x: F32) -> F32:
    for sigma, following in run.steps():
        slope = slope_at(x, run.guess(x, sigma), sigma)
        if following > 0:
            middle = f32(math.exp(0.5 * (math.log(sigma) + math.log(following))))
            trial = x + slope * (middle - sigma)
            slope = slope_at(trial, run.guess(trial, middle), middle)
        x = x + slope * (following - sigma)
    return x


def dpmpp_2s_a(run: Run, x: F32) -> F32:
    return _dpmpp_2s_a_flow(run, x) if run.flow else _dpmpp_2s_a(run, x)


def _dpmpp_2s_a(run: Run, x: F32) -> F32:
    for sigma, following in run.steps():
        denoised = run.guess(x, sigma)
        down, up, _ = run.descent(sigma, following)
        if down == 0:
            x = denoised
        else:
            t, t_next = minus_log(sigma), minus_log(down)
            h = t_next - t
            middle = exp_minus(t + f32(0.5) * h)
            trial = (middle / exp_minus(t)) * x - expm1_minus(h * f32(0.5)) * denoised
            x = (exp_minus(t_next) / exp_minus(t)) * x - expm1_minus(h) * run.guess(trial, middle)
        if following > 0:
            x = x + run.noise(x) * up
    return x


def _dpmpp_2s_a_flow(run: Run, x: F32) -> F32:
    one = f32(1)
    for sigma, following in run.steps():
        denoised = run.guess(x, sigma)
        if following == 0:
            x = denoised
            continue
        down, up, keep = run.descent(sigma, following)
        if 1.0 - float(sigma) >= 1e-6:  # at level 1 the middle is the same level, and its guess the same
            odds = np.sqrt(((one - sigma) / sigma) * ((one - down) / down))
            middle = one / (odds + one)
            ratio = middle / sigma
            denoised = run.guess(x * ratio + denoised * (one - ratio), middle)
        ratio = down / sigma
        x = x * ratio + denoised * (one - ratio)
        if run.eta > 0:
            x = keep * x + run.noise(x) * up
    return x


def res_2s(run: Run, x: F32) -> F32:
    """A second-order exponential integrator (Zhang et al. 2023) with its middle at half the step."""
    c2 = f32(0.5)
    for sigma, following in run.steps():
        denoised = run.guess(x, sigma)
        descent = run.descent(sigma, following)
        if descent.down == 0:
            x = denoised
        else:
            t = minus_log(sigma)
            h = minus_log(descent.down) - t
            b2 = phi2(-h) / c2
            b1 = phi1(-h) - b2
            first = denoised - x
            trial = x + first * (h * (c2 * phi1(-h * c2)))
            second = run.guess(trial, exp_minus(t + h * c2)) - x
            x = x + h * (b1 * first + b2 * second)
        x = descent.renoised(run, x)
    return x
