"""What a diffusion model predicts, and how latents relate to noise: values without state.

A :class:`Prediction` says what latents at a level of noise (sigma) are made of, what the model is given, and what its
answer means. Diffusion models (``eps``, ``v``, ``edm_v``) see latents + sigma · noise; flow models (``sd3_flow``,
``flux_flow``) see (1 - sigma) · latents + sigma · noise with sigma between 0 and 1. The names are those of sd-cli's
--prediction, the arithmetic is that of stable-diffusion.cpp (denoiser.hpp), in single precision where it is there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidValue
from . import libm

F32 = NDArray[np.float32]
Real = np.float32 | float

TIMESTEPS = 1000

f32 = np.float32


@dataclass(frozen=True)
class Scaling:
    """How a model's input and output relate to latents at a level of noise.

    The model is given x · ``into``; latents without noise are x · ``skip`` + prediction · ``out``.
    """

    skip: f32
    out: f32
    into: f32


@dataclass(frozen=True)
class NoiseScale:
    """The levels of noise (sigma) that a diffusion model was trained on, one per timestep, from its betas.

    The betas are the "scaled linear" ones of SD 1, SD 2 and SDXL: squares of evenly spaced numbers from √start to √end;
    or, ``linear``, evenly spaced themselves, as those of PixArt.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.0120
    linear: bool = False

    @cached_property
    def sigmas(self) -> F32:
        """Shape (1000,), rising: √((1 - ᾱ) / ᾱ) of the cumulated product ᾱ of 1 - β."""
        start, end = f32(self.beta_start), f32(self.beta_end)
        if not self.linear:
            start, end = np.sqrt(start), np.sqrt(end)
        spaced = start + (end - start) * (np.arange(TIMESTEPS, dtype=f32) / f32(TIMESTEPS - 1))
        product = np.cumprod(f32(1) - (spaced if self.linear else spaced * spaced), dtype=f32)
        return np.sqrt((f32(1) - product) / product)

    @cached_property
    def log_sigmas(self) -> F32:
        return libm.log(self.sigmas)

    def sigma(self, timestep: Real) -> f32:
        """The level at a timestep between 0 and 999, interpolated in the logarithm."""
        t = np.clip(f32(timestep), f32(0), f32(TIMESTEPS - 1))
        low, high = math.floor(t), math.ceil(t)
        w = t - f32(low)
        return f32(np.exp((f32(1) - w) * self.log_sigmas[low] + w * self.log_sigmas[high]))

    def timestep(self, sigma: Real) -> f32:
        """The (fractional) timestep of a positive level, interpolated in the logarithm and kept within 0 … 999."""
        return _timestep(self, float(f32(sigma)))


@lru_cache(maxsize=1024)
def _timestep(scale: NoiseScale, sigma: float) -> f32:
    """As :meth:`NoiseScale.timestep`: pictures have the same levels again and again."""
    log_sigma = _log(sigma)
    low = min(max(int(np.count_nonzero(log_sigma - scale.log_sigmas >= 0)) - 1, 0), TIMESTEPS - 2)
    below, above = scale.log_sigmas[low], scale.log_sigmas[low + 1]
    w = np.clip((below - log_sigma) / (below - above), f32(0), f32(1))
    return f32((f32(1) - w) * f32(low) + w * f32(low + 1))


class Prediction(ABC):
    """What a model predicts, and the levels of noise that it knows."""

    name: ClassVar[str]
    flow: ClassVar[bool]
    """Whether latents and noise are mixed, (1 - sigma) to sigma, rather than added."""

    @abstractmethod
    def scaling(self, sigma: f32) -> Scaling:
        """The model's input and output at a level."""

    @abstractmethod
    def timestep(self, sigma: Real) -> f32:
        """What the model is given as the timestep of a positive level."""

    @abstractmethod
    def sigma(self, timestep: Real) -> f32:
        """The level at a timestep between 0 and 999. (For flow models not the inverse of :meth:`timestep`.)"""

    @property
    def smallest(self) -> f32:
        """The lowest level that the model was trained on."""
        return self.sigma(0)

    @property
    def largest(self) -> f32:
        """The highest one."""
        return self.sigma(TIMESTEPS - 1)

    @abstractmethod
    def start(self, noise: F32, sigma: Real, latents: F32 | None = None) -> F32:
        """Latents with noise up to a level, of standard normal ``noise`` in the same shape. None: of no picture."""


@dataclass(frozen=True)
class Eps(Prediction):
    """The noise itself (Ho et al. 2020): SD 1, most of SDXL, SD 2 base."""

    name: ClassVar[str] = "eps"
    flow: ClassVar[bool] = False

    scale: NoiseScale = NoiseScale()

    def scaling(self, sigma: f32) -> Scaling:
        return Scaling(f32(1), -sigma, f32(1) / np.sqrt(sigma * sigma + f32(1)))

    def timestep(self, sigma: Real) -> f32:
        return self.scale.timestep(sigma)

    def sigma(self, timestep: Real) -> f32:
        return self.scale.sigma(timestep)

    @property
    def smallest(self) -> f32:
        return f32(self.scale.sigmas[0])

    @property
    def largest(self) -> f32:
        return f32(self.scale.sigmas[-1])

    def start(self, noise: F32, sigma: Real, latents: F32 | None = None) -> F32:
        scaled = noise * f32(sigma)
        return scaled if latents is None else latents + scaled


@dataclass(frozen=True)
class V(Eps):
    """The velocity (Salimans & Ho 2022): SD 2 with 768 pixels, some finetunes of SDXL."""

    name: ClassVar[str] = "v"

    def scaling(self, sigma: f32) -> Scaling:
        square = sigma * sigma + f32(1)
        return Scaling(f32(1) / square, -sigma / np.sqrt(square), f32(1) / np.sqrt(square))


@dataclass(frozen=True)
class EdmV(V):
    """The velocity, at levels that are continuous (Karras et al. 2022): CosXL."""

    name: ClassVar[str] = "edm_v"

    SMALLEST: ClassVar[float] = 0.002
    LARGEST: ClassVar[float] = 120.0

    def timestep(self, sigma: Real) -> f32:
        return f32(0.25) * _log(sigma)

    def sigma(self, timestep: Real) -> f32:
        return _exp(f32(timestep) * f32(4) / f32(TIMESTEPS))

    @property
    def smallest(self) -> f32:
        return f32(self.SMALLEST)

    @property
    def largest(self) -> f32:
        return f32(self.LARGEST)


@dataclass(frozen=True)
class Flow(Prediction):
    """Noise minus latents (rectified flow, Esser et al. 2024): SD 3, Wan, Qwen-Image, Z-Image.

    ``shift`` moves levels towards noise: sigma = shift · t / (1 + (shift - 1) · t). The model's timestep is
    1000 · sigma.
    """

    name: ClassVar[str] = "sd3_flow"
    flow: ClassVar[bool] = True

    SHIFTS: ClassVar[tuple[float, float]] = (1e-3, 1e3)
    """The smallest and the largest shift that are accepted."""

    shift: float = 3.0

    def scaling(self, sigma: f32) -> Scaling:
        return Scaling(f32(1), -sigma, f32(1))

    def timestep(self, sigma: Real) -> f32:
        return f32(sigma) * f32(TIMESTEPS)

    def sigma(self, timestep: Real) -> f32:
        t = (f32(timestep) + f32(1)) / f32(TIMESTEPS)
        shift = f32(self.shift)
        return t if shift == 1 else shift * t / (f32(1) + (shift - f32(1)) * t)

    def start(self, noise: F32, sigma: Real, latents: F32 | None = None) -> F32:
        scaled = noise * f32(sigma)
        return scaled if latents is None else latents * (f32(1) - f32(sigma)) + scaled


@dataclass(frozen=True)
class FluxFlow(Flow):
    """The same with the levels of FLUX: sigma = eˢ / (eˢ + 1/t - 1) with s = ``shift``.

    The model is given sigma itself. 1.15 belongs to FLUX.1 dev; schnell is used with 1.0 by stable-diffusion.cpp.
    """

    name: ClassVar[str] = "flux_flow"

    SHIFTS: ClassVar[tuple[float, float]] = (-80.0, 80.0)  # beyond, eˢ is no float32 number

    shift: float = 1.15

    def timestep(self, sigma: Real) -> f32:
        return f32(sigma)

    def sigma(self, timestep: Real) -> f32:
        return flux_shifted((f32(timestep) + f32(1)) / f32(TIMESTEPS), self.shift)


@dataclass(frozen=True)
class Flux2Flow(FluxFlow):
    """The same, for FLUX.2, whose shift follows from size and steps (:func:`flux2_shift`)."""

    name: ClassVar[str] = "flux2_flow"


PREDICTIONS: dict[str, Prediction] = {made.name: made for made in (Eps(), V(), EdmV(), Flow(), FluxFlow(), Flux2Flow())}
"""What models predict, by the names of sd-cli's --prediction."""

ELSEWHERE = frozenset({"sefi_flow"})
"""What stable-diffusion.cpp has and this does not."""


def prediction(name: str, *, shift: float | None = None) -> Prediction:
    """The prediction called ``name``, with a flow model's ``shift`` (None: its usual one).

    Raises :class:`InvalidValue` for a name that does not exist (here), or a shift that can't be used.
    """
    if name not in PREDICTIONS:
        reason = "not supported yet" if name in ELSEWHERE else "does not exist"
        raise InvalidValue("prediction", name, f"{reason}; there are {', '.join(PREDICTIONS)}")
    found = PREDICTIONS[name]
    if shift is None:
        return found
    if not isinstance(found, Flow):
        raise InvalidValue("flow_shift", shift, f"only flow models have a shift; this one predicts {name}")
    low, high = found.SHIFTS
    if not low <= shift <= high:
        raise InvalidValue("flow_shift", shift, f"it can be {low:g} … {high:g}")
    return replace(found, shift=float(shift))


def flux_shift_by_size(tokens: int) -> float:
    """FLUX.1's shift for a picture of that many tokens (patches of 2×2 latents): 0.5 at 256, 1.15 at 4096, linear.

    For :class:`FluxFlow`; as in diffusers' FluxPipeline (calculate_shift).
    """
    slope = (1.15 - 0.5) / (4096 - 256)
    return tokens * slope + (0.5 - slope * 256)


def flux2_shift(tokens: int, steps: int) -> float:
    """FLUX.2's shift for a picture of that many tokens (16×16 pixels each) in so many steps.

    For :class:`Flux2Flow`; as in stable-diffusion.cpp and in diffusers' Flux2Pipeline (compute_empirical_mu).
    """
    of_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return of_200
    of_10 = 8.73809524e-05 * tokens + 1.89833333
    return of_200 + (of_200 - of_10) / 190 * (steps - 200)


def flux_shifted(t: f32, shift: Real) -> f32:
    """FLUX's time shift of ``t`` in (0, 1]: eˢ / (eˢ + 1/t - 1)."""
    weight = _exp(f32(shift))
    return f32(weight / (weight + (f32(1) / t - f32(1))))


def _log(value: Real) -> f32:
    return f32(libm.log(np.array([value], f32))[0])


def _exp(value: f32) -> f32:
    return f32(math.exp(value))
