"""Which of two diffusion models draws which steps: Wan 2.2's A14B has one for much noise and one for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..families.base import F32
from .predictions import Prediction

HIGH_NOISE = "high_noise_diffusion"
"""The component that predicts instead of the diffusion model while there is much noise."""


@dataclass(frozen=True)
class HighNoise:
    """How the model for high noise draws. ``steps``: how many, before those of the other one; None: those at levels
    from a boundary on."""

    steps: int | None
    cfg_scale: float
    sampling_method: str
    eta: float


class Half(NamedTuple):
    """Steps that one model draws: the levels of noise that it goes through."""

    component: str
    sigmas: F32


def halves(sigmas: F32, steps: int | None, boundary: float, predicts: Prediction) -> list[Half]:
    """A schedule as that of the model for high noise, which draws the first ``steps`` or, if that is None, what begins
    at the level ``boundary`` (0 … 1) or above it; and that of the other one. Either may draw nothing. As in
    stable-diffusion.cpp."""
    if steps is None:
        there = predicts.timestep(np.float32(boundary))
        steps = sum(bool(predicts.timestep(sigma) >= there) for sigma in sigmas[:-1])
    found = Half(HIGH_NOISE, sigmas[: steps + 1]), Half("diffusion", sigmas[steps:])
    return [half for half in found if len(half.sigmas) > 1]
