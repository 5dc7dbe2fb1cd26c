"""What samplers have in common: a run with its noise, ancestral steps, and functions of exponential integrators."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, cast

import numpy as np

from ...errors import InvalidValue
from ..denoising import Denoise
from ..predictions import F32, f32
from ..rng import Rng

OnStep = Callable[[int, int], None]
"""Called with the number of steps that are done, and of all steps."""


def quiet(_done: int, _total: int) -> None:
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
    on_step: OnStep = quiet

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
        return (flow_descent if self.flow else diffusion_descent)(sigma, following, self.eta)


def slope_at(x: F32, denoised: F32, sigma: f32) -> F32:
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


def diffusion_descent(sigma: f32, following: f32, eta: float) -> Descent:
    """Where noise is added to latents."""
    if eta <= 0:
        return Descent(following, f32(0), f32(1))
    high, low = sigma * sigma, following * following
    up = min(following, f32(eta) * np.sqrt(max(low * (high - low) / high, f32(0))))
    return Descent(np.sqrt(max(low - up * up, f32(0))), up, f32(1))


def flow_descent(sigma: f32, following: f32, eta: float) -> Descent:
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


def minus_log(sigma: f32) -> f32:
    return f32(-math.log(sigma)) if sigma > 0 else f32(math.inf)


def exp_minus(t: f32) -> f32:
    return f32(math.exp(-t))


def expm1_minus(h: f32) -> f32:
    """exp(-h) - 1, subtracted in double precision."""
    return f32(math.exp(-h) - 1.0)


def phi1(t: f32) -> f32:
    """(eᵗ - 1) / t, by its series near 0."""
    if abs(t) < 1e-6:
        return f32(1) + t * f32(0.5) + t * t / f32(6)
    return (f32(math.exp(t)) - f32(1)) / t


def phi2(t: f32) -> f32:
    """(φ₁(t) - 1) / t, by its series near 0."""
    if abs(t) < 1e-6:
        return f32(0.5) + t / f32(6) + t * t / f32(24)
    return (phi1(t) - f32(1)) / t
