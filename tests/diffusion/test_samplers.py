"""Samplers equal stable-diffusion.cpp's, and solve what can be solved by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from sdrpc.diffusion.brownian import BrownianTree
from sdrpc.diffusion.denoising import Guess, denoiser
from sdrpc.diffusion.predictions import F32, PREDICTIONS, f32, prediction
from sdrpc.diffusion.rng import make_rng
from sdrpc.diffusion.samplers import SAMPLERS, find_sampler, sample
from sdrpc.diffusion.schedules import make_sigmas
from sdrpc.errors import InvalidValue
from tests.diffusion.test_predictions import named

ABSOLUTE = 5e-5
"""Of latents about 1; some samplers are written in another order here."""


def gaussian(x: F32, sigma: f32) -> Guess:
    """The best guess for data that is normal around 0.25, and around -0.1 for the negative prompt."""
    kept = x * (f32(1) / (f32(1) + sigma * sigma))
    return Guess(kept + f32(0.25), kept - f32(0.1))


def drawn(
    name: str,
    eta: float | None = None,
    steps: int = 6,
    denoise: Callable[[F32, f32], Guess] = gaussian,
    predicted: str = "eps",
    **options: Any,
) -> F32:
    rng, predicts = make_rng("cuda", 3), named(predicted)
    sigmas = make_sigmas("simple" if predicts.flow else "karras", steps, predicts)
    x = predicts.start(rng.normal(8), sigmas[0])
    return sample(name, denoise, x, sigmas, rng, flow=predicts.flow, eta=eta, **options)


def test_samplers_are_those_of_sd_cpp(sdcpp: dict[str, Any]) -> None:
    assert {key.split()[0] for key in sdcpp["samplers"]} == set(SAMPLERS)
    for key, expected in sdcpp["samplers"].items():
        name, eta, predicted = key.split()
        result = drawn(name, float(eta), predicted=predicted)
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, expected, rtol=0, atol=ABSOLUTE, err_msg=key)


@pytest.mark.parametrize("name", SAMPLERS)
def test_how_much_new_noise_there_is_can_be_told_where_it_says_so(name: str) -> None:
    less, more = drawn(name, 0.0), drawn(name, 0.7)
    assert np.array_equal(less, more) == (SAMPLERS[name].eta is None)


@pytest.mark.parametrize("predicted", ["eps", "sd3_flow"])
@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - {"tcd"}))  # tcd never quite reaches level 0
def test_a_certain_model_is_believed(name: str, predicted: str) -> None:
    certain = np.linspace(-1, 1, 8, dtype=f32)
    for eta in (0.0, 1.0):
        result = drawn(name, eta, denoise=lambda x, sigma: Guess(certain, certain), predicted=predicted)
        np.testing.assert_allclose(result, certain, atol=ABSOLUTE)


SOLVERS = ("euler", "heun", "dpm2", "dpm++2m", "ipndm", "ipndm_v", "res_multistep", "res_2s", "euler_ge", "dpm++2m_sde")
"""Without new noise these solve the differential equation. (er_sde then leaves it out, and lms is as
stable-diffusion.cpp has it, which does not converge.)"""


@pytest.mark.parametrize("name", SOLVERS)
def test_more_steps_come_closer_to_the_exact_solution(name: str) -> None:
    """For data that is normal around 0 the flow is known: x · √(1 / (1 + σ²))."""

    def centred(x: F32, sigma: f32) -> Guess:
        return Guess(x / (f32(1) + sigma * sigma))

    largest = prediction("eps").largest
    start = make_rng("cuda", 3).normal(8) * largest
    exact = start / np.sqrt(f32(1) + largest**2)
    errors = [float(np.abs(drawn(name, 0.0, steps, centred) - exact).max()) for steps in (10, 40)]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("predicted", ["eps", "flux_flow"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_calls_of_the_model_and_reported_steps(name: str, predicted: str) -> None:
    calls = 0

    def counted(x: F32, sigma: f32) -> Guess:
        nonlocal calls
        calls += 1
        return gaussian(x, sigma)

    reports: list[tuple[int, int]] = []
    drawn(name, steps=5, denoise=counted, predicted=predicted, on_step=lambda *report: reports.append(report))
    sampler = SAMPLERS[name]
    spared = predicted == "flux_flow" and name == "dpm++2s_a"  # at level 1 its two evaluations are one
    assert calls == 5 * sampler.evaluations - (sampler.evaluations - 1) - spared
    assert reports == [(done, 5) for done in range(6)]


@pytest.mark.parametrize("name", PREDICTIONS)
def test_the_model_gets_its_timestep_and_both_answers_are_denoised(name: str) -> None:
    predicted, sigma = prediction(name), f32(0.6)
    x, answer, other = np.random.default_rng(1).normal(size=(3, 8)).astype(f32)
    scaling = predicted.scaling(sigma)

    def predict(scaled: F32, timestep: f32) -> Guess:
        assert timestep == predicted.timestep(sigma)
        np.testing.assert_array_equal(scaled, x * scaling.into)
        return Guess(answer, other)

    guided, unconditional = denoiser(predict, predicted)(x, sigma)
    np.testing.assert_array_equal(guided, answer * scaling.out + x * scaling.skip)
    np.testing.assert_array_equal(unconditional, other * scaling.out + x * scaling.skip)
    assert denoiser(lambda *_: Guess(answer), predicted)(x, sigma).unconditional is None


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if sampler.unconditional])
def test_samplers_that_need_the_negative_prompt_say_so(name: str) -> None:
    with pytest.raises(InvalidValue, match="negative prompt") as caught:
        drawn(name, denoise=lambda x, sigma: Guess(x))
    assert caught.value.field == "cfg_scale"


def test_options_of_samplers() -> None:
    plain = drawn("euler_ge")
    np.testing.assert_array_equal(drawn("euler_ge", options={"gamma": 2.0}), plain)
    np.testing.assert_allclose(drawn("euler_ge", options={"gamma": 1.0}), drawn("euler"), atol=1e-6)
    assert np.abs(drawn("euler_ge", options={"gamma": 1.5}) - plain).max() > 1e-3


def test_noise_of_lcm_is_scaled_and_cut_off() -> None:
    """With a model that sees nothing the last noise is all that is added to its answer, at the last level."""
    answers: list[F32] = []

    def blind(x: F32, sigma: f32) -> Guess:
        answers.append(x)
        return Guess(np.zeros_like(x))

    def noise(**options: float) -> list[F32]:
        answers.clear()
        drawn("lcm", steps=3, denoise=blind, options=options)
        return answers[1:]

    plain = noise()
    scaled = noise(noise_scale_start=0.5, noise_scale_end=1.0)
    np.testing.assert_allclose(scaled[0], plain[0] * f32(0.5), rtol=1e-6)
    np.testing.assert_allclose(scaled[1], plain[1] * f32(0.75), rtol=1e-6)
    np.testing.assert_allclose(noise(noise_scale_start=0.5)[1], plain[1] * f32(0.5), rtol=1e-6)
    for cut, whole in zip(noise(noise_clip_std=1.0), plain, strict=True):
        most = whole.std() * f32(1 + 1e-5)
        assert np.abs(cut).max() <= most < np.abs(whole).max()


@pytest.mark.parametrize(("name", "option"), [("euler", "gamma"), ("euler_ge", "noise_clip_std")])
def test_options_of_other_samplers_are_refused(name: str, option: str) -> None:
    with pytest.raises(InvalidValue, match=name) as caught:
        drawn(name, options={option: 1.0})
    assert caught.value.field == option


@pytest.mark.parametrize("name", ["euler_a", "dpm++2s_a", "res_multistep", "res_2s", "euler_ge"])
def test_more_new_noise_than_all_counts_as_all_for_flow_models(name: str) -> None:
    np.testing.assert_array_equal(drawn(name, 1.5, predicted="sd3_flow"), drawn(name, 1.0, predicted="sd3_flow"))


def test_er_sde_survives_levels_that_it_cannot_tell_apart() -> None:
    """Shifted far, a flow model's first levels are all above what er_sde computes with."""
    assert np.isfinite(drawn("er_sde", steps=900, predicted="sd3_flow:12")).all()


def test_a_brownian_path_stays_the_same_with_more_steps() -> None:
    """The noise of a step is that of the steps that it is divided into, together."""
    tree = BrownianTree((3, 5), 0.03, 14.6, 1 << 63 | 7)
    whole = tree.noise(14.6, 0.03) * np.sqrt(14.6 - 0.03)
    levels = [14.6, 7.5, 7.315, 1.0, 0.03]  # 7.315 is the middle
    parts = [tree.noise(a, b) * np.sqrt(a - b) for a, b in pairwise(levels)]
    np.testing.assert_allclose(sum(parts), whole, atol=1e-5)


def test_brownian_noise_is_standard_normal() -> None:
    noise = BrownianTree((100_000,), 0.03, 14.6, 5).noise(3.0, 1.0)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_other_samplers_are_refused_by_name() -> None:
    with pytest.raises(InvalidValue, match="fastest") as caught:
        find_sampler("fastest")
    assert caught.value.field == "sampling_method"


def test_every_samplers_schedule_exists() -> None:
    for sampler in SAMPLERS.values():
        assert len(make_sigmas(sampler.schedule, 4, prediction("eps"))) == 5
