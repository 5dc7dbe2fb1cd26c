"""Samplers: from noise to latents, a step at a time.

Each is one function over numpy float32 arrays with the arithmetic of stable-diffusion.cpp (denoiser), scalars in single
precision where they are there. A sampler asks a :class:`Denoise` what the picture without noise would be and moves
towards it; some then add new noise (ancestral ones, and those of stochastic differential equations). Most have one
form for all predictions; new noise is added otherwise where latents and noise are mixed (flow models).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np

from ..errors import InvalidValue
from .brownian import BrownianTree
from .predictions import F32, TIMESTEPS, Prediction, Scaling, f32
from .rng import Rng


class Guess(NamedTuple):
    """What a model makes of latents: with guidance, and for the negative prompt alone where that was computed."""

    guided: F32
    unconditional: F32 | None = None


Denoise = Callable[[F32, f32], Guess]
"""(latents, their level of noise) → the model's guesses of the latents without noise."""

Predict = Callable[[F32, f32], Guess]
"""(scaled latents, timestep) → what the diffusion model itself predicts."""

OnStep = Callable[[int, int], None]
"""Called with the number of steps that are done, and of all steps."""


def denoiser(predict: Predict, prediction: Prediction, timestep_shift: int = 0) -> Denoise:
    """A :class:`Denoise` from a model and what it predicts.

    The model gets a fractional timestep, as in stable-diffusion.cpp. With a ``timestep_shift`` it is told another one,
    timestep · shift / 1000, and its answer means what it means there: NitroFusion's models (Chen et al. 2024).
    """

    def denoise(x: F32, sigma: f32) -> Guess:
        scaling, timestep = prediction.scaling(sigma), prediction.timestep(sigma)
        if timestep_shift:
            timestep = f32(np.clip(np.floor(timestep * f32(timestep_shift / TIMESTEPS) + f32(0.5)), 0, TIMESTEPS - 1))
            there = prediction.scaling(prediction.sigma(timestep))
            scaling = Scaling(there.skip * scaling.into / there.into, there.out, scaling.into)
        guided, unconditional = predict(x * scaling.into, timestep)
        rest = x * scaling.skip
        return Guess(guided * scaling.out + rest, None if unconditional is None else unconditional * scaling.out + rest)

    return denoise


def kept_outside(denoise: Denoise, latents: F32, anew: F32) -> Denoise:
    """``denoise`` where ``anew`` (broadcast to the latents) is 1; where it is 0 what is there without noise is known:
    ``latents``. As in stable-diffusion.cpp; what is known follows them through every sampler."""

    def masked(guess: F32) -> F32:
        return guess * anew + latents * (f32(1) - anew)

    def inside(x: F32, sigma: f32) -> Guess:
        guided, unconditional = denoise(x, sigma)
        return Guess(masked(guided), None if unconditional is None else masked(unconditional))

    return inside


def _quiet(_done: int, _total: int) -> None:
    pass


@dataclass(frozen=True)
class Run:
    """What a sampler works with besides the latents.

    ``sigmas``: the schedule, float32 (steps + 1,), falling to 0; ``flow``: whether the model is a flow model; ``eta``:
    how much new noise is added; ``rng``: where it comes from.
    """

    denoise: Denoise
    sigmas: F32
    rng: Rng
    eta: float = 0.0
    flow: bool = False
    on_step: OnStep = _quiet

    def steps(self) -> Iterator[tuple[f32, f32]]:
        """Pairs of levels: from one to the following. ``on_step`` is called before the first and after each."""
        total = len(self.sigmas) - 1
        self.on_step(0, total)
        for done, (sigma, following) in enumerate(pairwise(self.sigmas), start=1):
            yield f32(sigma), f32(following)
            self.on_step(done, total)

    def guess(self, x: F32, sigma: f32) -> F32:
        """The latents without noise, with guidance."""
        return self.denoise(x, sigma).guided

    def guesses(self, x: F32, sigma: f32) -> tuple[F32, F32]:
        """The same, and for the negative prompt alone. Raises :class:`InvalidValue` where that is not computed."""
        guided, unconditional = self.denoise(x, sigma)
        if unconditional is None:
            raise InvalidValue("cfg_scale", 1, "this sampler follows the negative prompt; it needs another scale")
        return guided, unconditional

    def noise(self, x: F32) -> F32:
        """New noise in the shape of the latents."""
        return self.rng.normal(x.size).reshape(x.shape)

    def descent(self, sigma: f32, following: f32) -> Descent:
        """How to get from one level to the following with ``eta`` of new noise."""
        return (_flow_descent if self.flow else _descent)(sigma, following, self.eta)


def _slope(x: F32, denoised: F32, sigma: f32) -> F32:
    """How latents change with the level of noise."""
    return cast(F32, (x - denoised) / sigma)  # float64 in numpy's stubs


class Descent(NamedTuple):
    """An ancestral step: go ``down`` to a level, keep that times ``keep``, add noise of level ``up``."""

    down: f32
    up: f32
    keep: f32

    def renoised(self, run: Run, x: F32) -> F32:
        """Latents at level ``down`` with new noise."""
        if self.up <= 0:
            return x
        return (x * self.keep if run.flow else x) + run.noise(x) * self.up


def _descent(sigma: f32, following: f32, eta: float) -> Descent:
    if eta <= 0:
        return Descent(following, f32(0), f32(1))
    high, low = sigma * sigma, following * following
    up = min(following, f32(eta) * np.sqrt(max(low * (high - low) / high, f32(0))))
    return Descent(np.sqrt(max(low - up * up, f32(0))), up, f32(1))


def _flow_descent(sigma: f32, following: f32, eta: float) -> Descent:
    """The same where latents and noise are mixed; more ``eta`` than 1 counts as 1."""
    one = f32(1)
    if eta <= 0 or following <= 0:
        return Descent(following, f32(0), one)
    down = following * (one + (following / sigma - one) * f32(min(eta, 1.0)))
    down = max(f32(0), min(following, down))
    if down >= 1:
        return Descent(following, f32(0), one)
    keep = (one - following) / (one - down)
    share = max(-one, min(one, down / following * keep))
    return Descent(down, following * np.sqrt(max(one - share * share, f32(0))), keep)


# Euler's method and its relatives


def euler(run: Run, x: F32) -> F32:
    for sigma, following in run.steps():
        x = x + _slope(x, run.guess(x, sigma), sigma) * (following - sigma)
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
        slope = _slope(x, denoised, sigma)
        corrected = slope if before is None else slope * f32(gamma) + before * (f32(1) - f32(gamma))
        x = descent.renoised(run, x + corrected * (descent.down - sigma))
        before = slope
    return x


def euler_cfg_pp(run: Run, x: F32) -> F32:
    """CFG++ (Chung et al. 2024): from the guided guess back to noise along the unconditional one."""
    for sigma, following in run.steps():
        guided, unconditional = run.guesses(x, sigma)
        x = guided + _slope(x, unconditional, sigma) * following
    return x


def euler_a_cfg_pp(run: Run, x: F32) -> F32:
    """The same with new noise; for flow models too as if noise were added."""
    for sigma, following in run.steps():
        guided, unconditional = run.guesses(x, sigma)
        descent = _descent(sigma, following, run.eta)
        x = guided + _slope(x, unconditional, sigma) * descent.down
        if following > 0:
            x = x + run.noise(x) * descent.up
    return x


# Two evaluations in a step


def heun(run: Run, x: F32) -> F32:
    for sigma, following in run.steps():
        slope, distance = _slope(x, run.guess(x, sigma), sigma), following - sigma
        if following > 0:
            trial = x + slope * distance
            slope = (slope + _slope(trial, run.guess(trial, following), following)) / f32(2)
        x = x + slope * distance
    return x


def dpm2(run: Run, x: F32) -> F32:
    for sigma, following in run.steps():
        slope = _slope(x, run.guess(x, sigma), sigma)
        if following > 0:
            middle = f32(math.exp(0.5 * (math.log(sigma) + math.log(following))))
            trial = x + slope * (middle - sigma)
            slope = _slope(trial, run.guess(trial, middle), middle)
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
            t, t_next = _minus_log(sigma), _minus_log(down)
            h = t_next - t
            middle = _exp_minus(t + f32(0.5) * h)
            trial = (middle / _exp_minus(t)) * x - _expm1_minus(h * f32(0.5)) * denoised
            x = (_exp_minus(t_next) / _exp_minus(t)) * x - _expm1_minus(h) * run.guess(trial, middle)
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
            t = _minus_log(sigma)
            h = _minus_log(descent.down) - t
            b2 = _phi2(-h) / c2
            b1 = _phi1(-h) - b2
            first = denoised - x
            trial = x + first * (h * (c2 * _phi1(-h * c2)))
            second = run.guess(trial, _exp_minus(t + h * c2)) - x
            x = x + h * (b1 * first + b2 * second)
        x = descent.renoised(run, x)
    return x


# Multistep: what was computed before is used again


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
        h = step = _minus_log(following) - _minus_log(sigma)
        target = denoised
        if index > 0 and following > 0:
            ratio, step = ratio_and_step(h, h_last)
            extra = f32(1) / (f32(2) * ratio)
            target = (f32(1) + extra) * denoised - extra * before
        x = (following / sigma) * x - _expm1_minus(step) * target
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
        h = _minus_log(following) - _minus_log(sigma)
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
        slopes.appendleft(_slope(x, run.guess(x, sigma), sigma))
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
        slopes.appendleft(_slope(x, run.guess(x, sigma), sigma))
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
            x = x + _slope(x, denoised, sigma) * (descent.down - sigma)
        else:
            h = _minus_log(descent.down) - _minus_log(sigma)
            phi1, phi2 = _phi1(-h), _phi2(-h)
            with np.errstate(divide="ignore", invalid="ignore"):  # between equal levels
                c2 = (_minus_log(sigma_before) - _minus_log(down_before)) / h
                b1, b2 = (b if np.isfinite(b) else f32(0) for b in (phi1 - phi2 / c2, phi2 / c2))
            x = _exp_minus(h) * x + h * (b1 * denoised + b2 * before)
        x = descent.renoised(run, x)
        before, sigma_before, down_before = denoised, sigma, descent.down
    return x


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


# Distilled models


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
        epsilon = _slope(x, denoised, sigma)
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


def _minus_log(sigma: f32) -> f32:
    return f32(-math.log(sigma)) if sigma > 0 else f32(math.inf)


def _exp_minus(t: f32) -> f32:
    return f32(math.exp(-t))


def _expm1_minus(h: f32) -> f32:
    """exp(-h) - 1, subtracted in double precision."""
    return f32(math.exp(-h) - 1.0)


def _phi1(t: f32) -> f32:
    """(eᵗ - 1) / t, by its series near 0."""
    if abs(t) < 1e-6:
        return f32(1) + t * f32(0.5) + t * t / f32(6)
    return (f32(math.exp(t)) - f32(1)) / t


def _phi2(t: f32) -> f32:
    """(φ₁(t) - 1) / t, by its series near 0."""
    if abs(t) < 1e-6:
        return f32(0.5) + t / f32(6) + t * t / f32(24)
    return (_phi1(t) - f32(1)) / t


@dataclass(frozen=True)
class Sampler:
    """A sampler and what belongs to it.

    ``eta``: how much new noise it adds unless told otherwise; ``schedule``: the one it is used with unless told
    otherwise; ``evaluations``: how often it calls the model in a step (the last step to 0 always takes one);
    ``unconditional``: whether it needs the guess for the negative prompt; ``options``: what else it can be given.
    """

    run: Callable[..., F32]
    eta: float = 0.0
    schedule: str = "discrete"
    evaluations: int = 1
    unconditional: bool = False
    options: tuple[str, ...] = ()


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(euler),
    "euler_a": Sampler(euler_a, eta=1.0),
    "heun": Sampler(heun, evaluations=2),
    "dpm2": Sampler(dpm2, evaluations=2),
    "dpm++2s_a": Sampler(dpmpp_2s_a, eta=1.0, evaluations=2),
    "dpm++2m": Sampler(dpmpp_2m),
    "dpm++2mv2": Sampler(dpmpp_2m_v2),
    "ipndm": Sampler(ipndm),
    "ipndm_v": Sampler(ipndm_v),
    "lcm": Sampler(lcm, schedule="lcm", options=("noise_clip_std", "noise_scale_start", "noise_scale_end")),
    "ddim_trailing": Sampler(euler_a, schedule="simple"),
    "tcd": Sampler(tcd, schedule="lcm"),
    "res_multistep": Sampler(res_multistep),
    "res_2s": Sampler(res_2s, evaluations=2),
    "er_sde": Sampler(er_sde, eta=1.0),
    "euler_cfg_pp": Sampler(euler_cfg_pp, unconditional=True),
    "euler_a_cfg_pp": Sampler(euler_a_cfg_pp, eta=1.0, unconditional=True),
    "euler_ge": Sampler(euler_ge, options=("gamma",)),
    "dpm++2m_sde": Sampler(dpmpp_2m_sde, eta=1.0),
    "dpm++2m_sde_bt": Sampler(dpmpp_2m_sde_bt, eta=1.0),
    "lms": Sampler(lms),
}
"""The samplers by the names that sd-cli gives them."""


def find_sampler(name: str) -> Sampler:
    """The sampler of that name. Raises :class:`InvalidValue` when there is none."""
    if name not in SAMPLERS:
        raise InvalidValue("sampling_method", name, f"does not exist; there are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def sample(
    name: str,
    denoise: Denoise,
    x: F32,
    sigmas: F32,
    rng: Rng,
    *,
    flow: bool,
    eta: float | None = None,
    options: Mapping[str, float] | None = None,
    on_step: OnStep = _quiet,
) -> F32:
    """Latents without noise, from latents ``x`` at the level ``sigmas[0]``, by the sampler ``name``.

    ``sigmas`` is a schedule (float32, falling to 0), ``rng`` gives the noise that is added on the way, ``flow`` says
    whether the model is a flow model. ``eta`` None: the sampler's own. ``options`` are the sampler's own, by name.
    Raises :class:`InvalidValue` for a sampler or an option that does not exist, and what ``denoise`` raises.
    """
    sampler = find_sampler(name)
    options = options or {}
    for option, value in options.items():
        if option not in sampler.options:
            known = f"it takes {', '.join(sampler.options)}" if sampler.options else "it takes none"
            raise InvalidValue(option, value, f"no option of the sampler {name}; {known}")
    run = Run(denoise, sigmas, rng, sampler.eta if eta is None else eta, flow, on_step)
    return sampler.run(run, x, **options)
