"""A diffusion model as what says how latents would be without noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .predictions import F32, TIMESTEPS, Prediction, Scaling, f32


class Guess(NamedTuple):
    """What a model makes of latents: with guidance, and for the negative prompt alone where that was computed."""

    guided: F32
    unconditional: F32 | None = None


Denoise = Callable[[F32, f32], Guess]
"""(latents, their level of noise) → the model's guesses of the latents without noise."""

Predict = Callable[[F32, f32], Guess]
"""(scaled latents, timestep) → what the diffusion model itself predicts."""


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
