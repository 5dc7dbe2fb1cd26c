"""Levels of noise equal stable-diffusion.cpp's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sdrpc.diffusion.schedules import ALIASES, ELSEWHERE, SCHEDULES, NoiseScale, f32, make_sigmas
from sdrpc.errors import UsageError

SCALE = NoiseScale()
RELATIVE = 4e-6
"""A few units in the last place: libm's float functions there, numpy's here."""


def test_the_models_own_scale(sdcpp: dict[str, Any]) -> None:
    for timestep, sigma in sdcpp["scale"].items():
        assert SCALE.sigmas[int(timestep)] == f32(sigma)


def test_timesteps_of_levels(sdcpp: dict[str, Any]) -> None:
    for sigma, timestep in sdcpp["timesteps"].items():
        assert SCALE.timestep(float(sigma)) == pytest.approx(timestep, abs=1e-4)


def test_levels_and_timesteps_are_inverse() -> None:
    for timestep in (0, 0.5, 17.25, 500, 998.75, 999):
        assert SCALE.timestep(SCALE.sigma(timestep)) == pytest.approx(timestep, abs=2e-3)


def test_schedules_are_those_of_sd_cpp(sdcpp: dict[str, Any]) -> None:
    assert {key.split()[0] for key in sdcpp["schedules"]} == set(SCHEDULES)
    for key, expected in sdcpp["schedules"].items():
        name, steps = key.split()
        sigmas = make_sigmas(name, int(steps), SCALE)
        assert sigmas.dtype == np.float32
        np.testing.assert_allclose(sigmas, np.array(expected, f32), rtol=RELATIVE, atol=0, err_msg=key)


@pytest.mark.parametrize("name", [*SCHEDULES, *ALIASES])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 999])
def test_schedules_fall_to_zero(name: str, steps: int) -> None:
    sigmas = make_sigmas(name, steps, SCALE)
    assert sigmas.shape == (steps + 1,)
    assert np.isfinite(sigmas).all()
    assert (np.diff(sigmas) <= 0).all()
    assert sigmas[-1] == 0
    assert sigmas[0] > sigmas[-2] or steps == 1


@pytest.mark.parametrize("name", ["fast", *sorted(ELSEWHERE)])
def test_other_schedules_are_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        make_sigmas(name, 10, SCALE)


def test_no_steps_are_refused() -> None:
    with pytest.raises(UsageError, match="--steps 0"):
        make_sigmas("karras", 0, SCALE)
