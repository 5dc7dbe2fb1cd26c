"""Levels of noise equal stable-diffusion.cpp's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sdrpc.diffusion.predictions import PREDICTIONS, f32, prediction
from sdrpc.diffusion.schedules import ALIASES, SCHEDULES, make_sigmas
from sdrpc.errors import InvalidValue
from tests.diffusion.test_predictions import named

RELATIVE = 4e-6
"""A few units in the last place: libm's float functions there, numpy's here."""

NEAR_ONE = 3e-7
"""Absolute, for levels that are computed as 1 - something."""


def test_schedules_are_those_of_sd_cpp(sdcpp: dict[str, Any]) -> None:
    assert {key.split()[0] for key in sdcpp["schedules"]} == set(SCHEDULES)
    for key, expected in sdcpp["schedules"].items():
        name, steps, predicted, aligned, tokens = key.split()
        sigmas = make_sigmas(name, int(steps), named(predicted), tokens=int(tokens), aligned=aligned)
        assert sigmas.dtype == np.float32
        absolute = NEAR_ONE if name == "ltx2" else 0
        np.testing.assert_allclose(sigmas, np.array(expected, f32), rtol=RELATIVE, atol=absolute, err_msg=key)


@pytest.mark.parametrize("predicted", PREDICTIONS)
@pytest.mark.parametrize("name", [*SCHEDULES, *ALIASES])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 999])
def test_schedules_fall_to_zero(name: str, steps: int, predicted: str) -> None:
    sigmas = make_sigmas(name, steps, prediction(predicted))
    assert sigmas.shape == (steps + 1,) or (name == "beta" and steps == 999)
    assert np.isfinite(sigmas).all()
    assert (np.diff(sigmas) <= 0).all()
    assert sigmas[-1] == 0
    assert sigmas[0] > sigmas[-2] or steps == 1


def test_beta_takes_no_timestep_twice() -> None:
    sigmas = make_sigmas("beta", 999, prediction("eps"))
    assert len(sigmas) < 1000
    assert (np.diff(sigmas) < 0).all()


@pytest.mark.parametrize(
    ("name", "steps", "options", "field"),
    [("fast", 10, {}, "scheduler"), ("karras", 0, {}, "steps"), ("flux", 4, {"tokens": 0}, "tokens"),
     ("ays", 10, {"aligned": None}, "scheduler"), ("ays", 10, {"aligned": "sd2"}, "scheduler")],
)  # fmt: skip
def test_what_can_not_be_scheduled(name: str, steps: int, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        make_sigmas(name, steps, prediction("eps"), **options)
    assert caught.value.field == field
