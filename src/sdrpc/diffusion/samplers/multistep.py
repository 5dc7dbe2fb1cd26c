"""Multistep methods: what was computed in earlier steps is used again."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ..brownian import BrownianTree
from ..predictions import F32, f32
from .base import Run, exp_minus, expm1_minus, minus_log, phi1, phi2, slope_at


def dpmpp_2m(run: Run, x: F32) -> F32:
    return _dpmpp_2m(run, x, lambda h, h_last: (h_last / h, h))


def dpmpp_2m_v2(run: Run, x: F32) -> F32:
    def ratio_and_step(h: f32, h_last: f32) -> tuple[f32, f32]:
        short, long = min(h, h_last), max(h, h_last)
        return long / short, (long + short) / f32(2)

    return _dpmpp_2m(run, x, ratio_and_step)


def _dpmpp_2m(run: Run, x: F32, ratio_and_step: Callable[[f32, f32], tuple[f32, f32]]) -> F32:
    """DPM-Solver++(2M): extrapolates from the last step's guess by the ratio of the two steps' lengths in -log σ."""
    before, h_last = x, f32(0)
    for index, (sigma, following) in enumerate(run.steps()):
        denoised = run.guess(x, sigma)
        h = step = minus_log(following) - minus_log(sigma)
        target = denoised
        if index > 0 and following > 0:
            ratio, step = ratio_and_step(h, h_last)
            extra = f32(1) / (f32(2) * ratio)
            target = (f32(1) + extra) * denoised - extra * before
        x = (following / sigma) * x - expm1_minus(step) * target
        before, h_last = denoised, h
    return x


def dpmpp_2m_sde(run: Run, x: F32) -> F32:
    """DPM-Solver++(2M) of the stochastic equation, midpoint variant (Lu et al. 2022)."""
    return _dpmpp_2m_sde(run, x, lambda x, _sigma, _following: run.noise(x))


def dpmpp_2m_sde_bt(run: Run, x: F32) -> F32:
    """The same with noise from one Brownian path, so that more steps follow the same path more closely."""
    levels = run.sigmas[run.sigmas > 0].astype(np.float64)
    if levels.max() <= levels.min():
        return x
    seed = int.from_bytes(run.rng.normal(2).astype("<f4").tobytes(), "little")
    tree = BrownianTree(x.shape, float(levels.min()), float(levels.max()), seed)
    return _dpmpp_2m_sde(run, x, lambda _x, sigma, following: tree.noise(float(sigma), float(following)))


def _dpmpp_2m_sde(run: Run, x: F32, noise: Callable[[F32, f32, f32], F32]) -> F32:
    before: F32 | None = None
    h_last, eta = f32(0), f32(run.eta)
    for sigma, following in run.steps():
        denoised = run.guess(x, sigma)
        if following == 0:
            x = denoised
            continue
        h = minus_log(following) - minus_log(sigma)
        eta_h = eta * h
        gain = -f32(math.expm1(-h - eta_h))
        x = following / sigma * f32(math.exp(-eta_h)) * x + gain * denoised
        if before is not None:
            x = x + (f32(0.5) * gain / (h_last / h)) * (denoised - before)
        if eta > 0:
            up = following * np.sqrt(-f32(math.expm1(f32(-2) * eta_h)))
            x = x + noise(x, sigma, following) * up
        before, h_last = denoised, h
    return x


_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Weights of the newest slope and those before it, by how many there are."""


def ipndm(run: Run, x: F32) -> F32:
    """Pseudo numerical methods, improved (Zhang & Chen 2022): Adams-Bashforth up to the fourth order."""
    return _ipndm(run, x, lambda _step, _step_before: _ADAMS_BASHFORTH[1])


def ipndm_v(run: Run, x: F32) -> F32:
    """The same; the second order minds that steps differ in length."""
    return _ipndm(
        run, x, lambda step, before: (float((f32(2) + step / before) / f32(2)), float(-step / before / f32(2)))
    )


def _ipndm(run: Run, x: F32, second_order: Callable[[f32, f32], tuple[float, ...]]) -> F32:
    slopes: deque[F32] = deque(maxlen=4)
    before = f32(0)
    for sigma, following in run.steps():
        slopes.appendleft(slope_at(x, run.guess(x, sigma), sigma))
        step = following - sigma
        weights = second_order(step, before) if len(slopes) == 2 else _ADAMS_BASHFORTH[len(slopes) - 1]
        x = x + _combined(slopes, weights) * step
        before = step
    return x


def lms(run: Run, x: F32) -> F32:
    """Linear multistep: the integral of the polynomial in σ through the slopes, up to the fourth order.

    As in stable-diffusion.cpp the terms of the third and fourth order take slopes that are one step newer than those
    that the polynomial goes through: 0, 1, 1, 2 steps old instead of 0, 1, 2, 3 (k-diffusion).
    """
    slopes: deque[F32] = deque(maxlen=4)
    levels: deque[float] = deque(maxlen=4)
    for sigma, following in run.steps():
        slopes.appendleft(slope_at(x, run.guess(x, sigma), sigma))
        levels.appendleft(float(sigma))
        weights = [_lagrange_integral(levels, which, float(following)) for which in range(len(levels))]
        ages = (0, 1, 1, 2)[: len(levels)]
        x = x + _combined([slopes[age] for age in ages], weights)
    return x


def _lagrange_integral(levels: Sequence[float], which: int, end: float) -> float:
    """From ``levels[0]`` to ``end``, over the polynomial that is 1 at one level and 0 at the others (at most three).

    Gauss's rule with two points, which is exact up to the third degree.
    """
    middle, half = (levels[0] + end) / 2, (end - levels[0]) / 2
    others = [level for index, level in enumerate(levels) if index != which]
    return half * sum(
        math.prod((middle + sign * half / math.sqrt(3) - other) / (levels[which] - other) for other in others)
        for sign in (-1, 1)
    )


def _combined(arrays: Iterable[F32], weights: Sequence[float]) -> F32:
    first, *others = (array * f32(weight) for array, weight in zip(arrays, weights, strict=True))
    return sum(others, start=first)


def res_multistep(run: Run, x: F32) -> F32:
    """A second-order exponential integrator (Zhang et al. 2023) that uses the last step's guess."""
    before: F32 | None = None
    sigma_before = down_before = f32(0)
    for sigma, following in run.steps():
        denoised = run.guess(x, sigma)
        descent = run.descent(sigma, following)
        if descent.down == 0 or before is None:
            x = x + slope_at(x, denoised, sigma) * (descent.down - sigma)
        else:
            h = minus_log(descent.down) - minus_log(sigma)
            one, two = phi1(-h), phi2(-h)
            with np.errstate(divide="ignore", invalid="ignore"):  # between equal levels
                c2 = (minus_log(sigma_before) - minus_log(down_before)) / h
                b1, b2 = (b if np.isfinite(b) else f32(0) for b in (one - two / c2, two / c2))
            x = exp_minus(h) * x + h * (b1 * denoised + b2 * before)
        x = descent.renoised(run, x)
        before, sigma_before, down_before = denoised, sigma, descent.down
    return x
