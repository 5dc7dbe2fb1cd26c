"""What models predict, as stable-diffusion.cpp and diffusers have it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from hypothesis import given
from hypothesis import strategies as st

from sdrpc.diffusion.predictions import (
    ELSEWHERE,
    PREDICTIONS,
    NoiseScale,
    Prediction,
    f32,
    flux2_shift,
    flux_shift_by_size,
    flux_shifted,
    prediction,
)
from sdrpc.errors import InvalidValue

RELATIVE = 4e-6
"""A few units in the last place: libm's float functions there, numpy's or rounded double ones here."""

LEVELS = (0.02, 0.0291671585, 0.5, 0.73, 1.0, 7.5, 14.6000004, 20.0)
TIMESTEPS = (0.0, 1.0, 10.5, 500.0, 998.75, 999.0)
"""What tools/sdcpp_reference asks for."""

LATENTS = np.array([-1.5, -0.25, 0.0, 0.7, 3.0], f32)
NOISE = np.array([0.3, -1.1, 2.0, 0.01, -0.6], f32)


def named(key: str) -> Prediction:
    """``sd3_flow:3``: a name and a shift."""
    name, _, shift = key.partition(":")
    return prediction(name, shift=float(shift) if shift else None)


def test_levels_timesteps_and_scalings_are_those_of_sd_cpp(sdcpp: dict[str, Any]) -> None:
    assert {key.partition(":")[0] for key in sdcpp["predictions"]} == set(PREDICTIONS) - {"flux2_flow"}
    for key, expected in sdcpp["predictions"].items():
        made = named(key)
        row = [made.smallest, made.largest]
        for level in LEVELS:
            scaling = made.scaling(f32(level))
            row += [made.timestep(f32(level)), scaling.skip, scaling.out, scaling.into]
        row += [made.sigma(timestep) for timestep in TIMESTEPS]
        assert all(isinstance(value, f32) for value in row)
        np.testing.assert_allclose(row, expected, rtol=RELATIVE, atol=1e-7, err_msg=key)


def test_flux2_differs_from_flux1_in_its_shift_alone() -> None:
    """As there, where it is a class of its own that sets the shift; the shift is that of diffusers."""
    ones, twos = (prediction(name, shift=0.9) for name in ("flux_flow", "flux2_flow"))
    for level in LEVELS:
        assert (twos.timestep(level), twos.scaling(f32(level))) == (ones.timestep(level), ones.scaling(f32(level)))
    assert [twos.sigma(timestep) for timestep in TIMESTEPS] == [ones.sigma(timestep) for timestep in TIMESTEPS]
    for tokens in (1, 256, 4096, 4300, 4301, 16384):
        for steps in (1, 4, 28, 50):
            assert flux2_shift(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-12)


def test_latents_with_noise_are_those_of_sd_cpp(sdcpp: dict[str, Any]) -> None:
    for key, expected in sdcpp["starts"].items():
        name, level = key.split()
        started = named(name).start(NOISE, float(level), LATENTS)
        assert started.dtype == np.float32
        np.testing.assert_array_equal(started, np.array(expected, f32), err_msg=key)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_without_latents_there_is_noise_alone(name: str) -> None:
    made = prediction(name)
    np.testing.assert_array_equal(made.start(NOISE, 0.5), made.start(NOISE, 0.5, np.zeros_like(NOISE)))


@pytest.mark.parametrize("name", PREDICTIONS)
@given(level=st.floats(0.03, 0.99), seed=st.integers(0, 1 << 32))
def test_a_perfect_models_answer_gives_back_the_latents(name: str, level: float, seed: int) -> None:
    """What each model predicts, written down from its paper; what it sees has its scale."""
    made, sigma = prediction(name), f32(level)
    clean, noise = np.random.default_rng(seed).normal(size=(2, 8)).astype(f32)
    x = made.start(noise, sigma, clean)
    root = np.sqrt(sigma * sigma + f32(1))
    perfect = noise - clean if made.flow else noise if name == "eps" else (noise - sigma * clean) / root
    scaling = made.scaling(sigma)
    np.testing.assert_allclose(x * scaling.into, x if made.flow else x / root, rtol=1e-6)
    np.testing.assert_allclose(perfect * scaling.out + x * scaling.skip, clean, atol=2e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.5])
def test_levels_of_flow_models_are_those_of_diffusers(shift: float) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift).sigmas.flip(0).numpy()
    ours = [prediction("sd3_flow", shift=shift).sigma(timestep) for timestep in range(1000)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("mu", [0.5, 1.15, -0.3])
def test_fluxs_time_shift_is_diffusers(mu: float) -> None:
    t = np.linspace(0.01, 1, 50, dtype=f32)
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).time_shift(mu, 1.0, t.astype(np.float64))
    np.testing.assert_allclose([flux_shifted(value, mu) for value in t], theirs, rtol=1e-6)


@pytest.mark.parametrize("tokens", [16, 256, 1000, 4096, 16384])
def test_the_shift_by_size_is_diffusers(tokens: int) -> None:
    assert flux_shift_by_size(tokens) == pytest.approx(calculate_shift(tokens), rel=1e-12)


def test_the_scale_is_sd_cpps_to_the_bit(sdcpp: dict[str, Any]) -> None:
    scale = NoiseScale()
    for timestep, (sigma, log_sigma) in sdcpp["scale"].items():
        assert scale.sigmas[int(timestep)] == f32(sigma)
        assert scale.log_sigmas[int(timestep)] == f32(log_sigma)


@pytest.mark.parametrize("name", ["eps", "v"])
def test_levels_and_timesteps_are_inverse(name: str) -> None:
    made = prediction(name)
    for timestep in (0, 0.5, 17.25, 500, 998.75, 999):
        assert made.timestep(made.sigma(timestep)) == pytest.approx(timestep, abs=2e-3)


@pytest.mark.parametrize(
    ("name", "shift", "reason"),
    [("noise", None, "does not exist"), *((name, None, "not supported yet") for name in ELSEWHERE),
     ("eps", 3.0, "only flow models"), ("sd3_flow", 0.0, "it can be"), ("sd3_flow", -1.0, "it can be"),
     ("flux_flow", 1e3, "it can be"), ("flux_flow", float("nan"), "it can be")],
)  # fmt: skip
def test_what_can_not_be_predicted(name: str, shift: float | None, reason: str) -> None:
    with pytest.raises(InvalidValue, match=reason) as caught:
        prediction(name, shift=shift)
    assert caught.value.field == ("prediction" if shift is None else "flow_shift")
