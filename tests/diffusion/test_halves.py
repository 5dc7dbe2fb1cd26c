"""Which model draws which steps, and how the one for high noise draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sdrpc.diffusion.halves import HIGH_NOISE, halves
from sdrpc.diffusion.predictions import prediction
from sdrpc.diffusion.request import Request, Settings
from sdrpc.diffusion.samplers import find_sampler
from sdrpc.errors import InvalidValue
from sdrpc.families.base import Defaults

LEVELS = np.array([1.0, 0.95, 0.875, 0.5, 0.0], np.float32)


@pytest.mark.parametrize(
    ("steps", "boundary", "high", "low"),
    [
        (None, 0.875, [1.0, 0.95, 0.875, 0.5], [0.5, 0.0]),
        (None, 0.9, [1.0, 0.95, 0.875], [0.875, 0.5, 0.0]),
        (1, 0.875, [1.0, 0.95], [0.95, 0.875, 0.5, 0.0]),
        (None, 0.0, [1.0, 0.95, 0.875, 0.5, 0.0], []),
        (4, 0.875, [1.0, 0.95, 0.875, 0.5, 0.0], []),
        (0, 0.875, [], [1.0, 0.95, 0.875, 0.5, 0.0]),
    ],
)
def test_levels_are_shared(steps: int | None, boundary: float, high: list[float], low: list[float]) -> None:
    found = {half.component: half.sigmas.tolist() for half in halves(LEVELS, steps, boundary, prediction("sd3_flow"))}
    wanted = {HIGH_NOISE: high, "diffusion": low}
    for name, levels in wanted.items():
        assert found.get(name, []) == pytest.approx(levels)


def settings(**said: Any) -> Settings:
    return Request("a cat", steps=8, cfg_scale=3.0, **said).resolved(
        Defaults(64, "euler", flow_shift=5.0), (64, 64), 16
    )


def test_what_is_not_said_is_as_for_the_other_model() -> None:
    plain = settings()
    assert plain.of(HIGH_NOISE) == plain.of("diffusion") == plain
    assert (plain.high_noise, plain.all_steps) == (None, 8)


def test_the_model_for_high_noise_has_its_own() -> None:
    asked = settings(high_noise_steps=4, high_noise_cfg_scale=1.5, high_noise_sampling_method="euler_a")
    high, low = asked.of(HIGH_NOISE), asked.of("diffusion")
    assert asked.all_steps == 12
    assert (high.cfg_scale, high.img_cfg_scale, high.sampling_method) == (1.5, 1.5, "euler_a")
    assert high.eta == find_sampler("euler_a").eta
    assert (low.cfg_scale, low.sampling_method, low.eta) == (3.0, "euler", find_sampler("euler").told(None))
    assert settings(high_noise_eta=0.3).of(HIGH_NOISE).eta == 0.3


@pytest.mark.parametrize(
    "said",
    [
        {"high_noise_steps": -1},
        {"high_noise_steps": 10000},
        {"high_noise_steps": 3, "sigmas": (1.0, 0.5, 0.0)},
        {"high_noise_cfg_scale": float("nan")},
        {"high_noise_eta": 1e9},
        {"high_noise_sampling_method": "eulers"},
    ],
)
def test_what_makes_no_sense_is_refused(said: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue):
        settings(**said)
