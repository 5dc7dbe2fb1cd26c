"""Samplers equal stable-diffusion.cpp's, and solve what can be solved by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sdrpc.diffusion.rng import make_rng
from sdrpc.diffusion.samplers import (
    ELSEWHERE,
    F32,
    SAMPLERS,
    SCALINGS,
    counted_steps,
    denoiser,
    find_sampler,
)
from sdrpc.diffusion.schedules import NoiseScale, f32, make_sigmas
from sdrpc.errors import UsageError

SCALE = NoiseScale()
ABSOLUTE = 5e-5
"""Of latents about 1; some samplers are written in another order here."""


def gaussian(x: F32, sigma: f32) -> F32:
    """The best guess for data that is normal around 0.25."""
    return x * (f32(1) / (f32(1) + sigma * sigma)) + f32(0.25)


def drawn(name: str, eta: float, steps: int = 6, denoise: Callable[[F32, f32], F32] = gaussian) -> F32:
    rng = make_rng("cuda", 3)
    sigmas = make_sigmas("karras", steps, SCALE)
    x = rng.normal(8) * sigmas[0]
    return SAMPLERS[name].run(denoise, x, counted_steps(sigmas), lambda: rng.normal(8), eta)


def test_samplers_are_those_of_sd_cpp(sdcpp: dict[str, Any]) -> None:
    assert {key.split()[0] for key in sdcpp["samplers"]} == set(SAMPLERS)
    for key, expected in sdcpp["samplers"].items():
        name, eta = key.split()
        result = drawn(name, float(eta))
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, expected, rtol=0, atol=ABSOLUTE, err_msg=key)


@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - {"tcd"}))  # tcd never quite reaches level 0
def test_a_certain_model_is_believed(name: str) -> None:
    certain = np.linspace(-1, 1, 8, dtype=f32)
    np.testing.assert_allclose(drawn(name, 0.0, denoise=lambda x, sigma: certain), certain, atol=ABSOLUTE)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm2", "dpm++2m"])
def test_more_steps_come_closer_to_the_exact_solution(name: str) -> None:
    """For data that is normal around 0 the flow is known: x · √(1 / (1 + σ²))."""

    def centred(x: F32, sigma: f32) -> F32:
        return x / (f32(1) + sigma * sigma)

    start = make_rng("cuda", 3).normal(8) * SCALE.largest
    exact = start / np.sqrt(f32(1) + SCALE.largest**2)
    errors = [float(np.abs(drawn(name, 0.0, steps, centred) - exact).max()) for steps in (10, 40)]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_calls_of_the_model_and_reported_steps(name: str) -> None:
    calls = 0

    def counted(x: F32, sigma: f32) -> F32:
        nonlocal calls
        calls += 1
        return gaussian(x, sigma)

    rng = make_rng("cuda", 3)
    reports: list[tuple[int, int]] = []
    steps = counted_steps(make_sigmas("karras", 5, SCALE), lambda done, total: reports.append((done, total)))
    sampler = SAMPLERS[name]
    sampler.run(counted, rng.normal(8), steps, lambda: rng.normal(8), sampler.eta)
    assert calls == 5 * sampler.evaluations - (sampler.evaluations - 1)
    assert reports == [(done, 5) for done in range(6)]


@pytest.mark.parametrize("prediction", SCALINGS)
def test_a_perfect_model_denoises_perfectly(prediction: str) -> None:
    """What the model is asked, and what its answer means: noise, or velocity."""
    clean, noise = np.linspace(-1, 1, 8, dtype=f32), make_rng("cpu", 1).normal(8)
    sigma = f32(2.5)

    def perfect(scaled: F32, timestep: f32) -> F32:
        assert timestep == SCALE.timestep(sigma)
        root = np.sqrt(sigma * sigma + f32(1))
        np.testing.assert_allclose(scaled, (clean + sigma * noise) / root, rtol=1e-5)
        return noise if prediction == "eps" else (noise - sigma * clean) / root

    denoised = denoiser(perfect, prediction, SCALE)(clean + sigma * noise, sigma)
    np.testing.assert_allclose(denoised, clean, atol=1e-6)


@pytest.mark.parametrize("name", ["fastest", *sorted(ELSEWHERE)])
def test_other_samplers_are_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match="--sampling-method"):
        find_sampler(name)


def test_every_samplers_schedule_exists() -> None:
    for sampler in SAMPLERS.values():
        assert len(make_sigmas(sampler.schedule, 4, SCALE)) == 5
