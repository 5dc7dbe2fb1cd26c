"""What becomes of several predictions, steps that are left out, levels of noise of one's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sdrpc.diffusion.caching import find_options
from sdrpc.diffusion.dbcache import DBCache
from sdrpc.diffusion.dbcache import Options as Blocks
from sdrpc.diffusion.denoising import Guess, denoiser
from sdrpc.diffusion.easycache import EasyCache, Options
from sdrpc.diffusion.guidance import Guide, LeftOut, Told
from sdrpc.diffusion.predictions import F32, Eps, Flow, prediction
from sdrpc.diffusion.request import Request
from sdrpc.errors import InvalidValue
from sdrpc.families.base import Defaults

f32 = np.float32
X = np.ones((1, 1, 1, 2), f32)


class Asked:
    """A model that predicts a number that it is told, times its input; what it was asked stays."""

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []
        self.batches: list[int] = []
        self.lanes: list[tuple[int, float]] = []

    def __call__(self, latents: F32, timestep: F32, conditions: Any, *, lane: int = 0, **options: Any) -> F32:
        self.options.append(options)
        self.batches.append(len(conditions["number"]))
        self.lanes.append((lane, conditions["number"][0]))
        return latents * conditions["number"].reshape(-1, 1, 1, 1) * f32(0.5 if options else 1)


def number(value: float) -> dict[str, F32]:
    return {"number": np.array([value], f32)}


def guide(told: Told, **options: Any) -> tuple[Guide, Asked]:
    asked = Asked()
    given = {"cfg_scale": 3.0, "img_cfg_scale": 2.0, **options}
    return Guide(asked, told, np.array([4, 3, 2, 1, 0], f32), **given), asked


@pytest.mark.parametrize(
    ("told", "guided", "unconditional"),
    [(Told(number(5)), 5, None), (Told(number(5), number(1)), 1 + 3 * 4, 1),
     (Told(number(5), number(1), number(2)), 1 + 2 * 1 + 3 * 3, 1)],
)  # fmt: skip
def test_guidance_is_a_sum_of_differences(told: Told, guided: float, unconditional: float | None) -> None:
    follow, asked = guide(told)
    guess = follow(X, f32(1))
    np.testing.assert_allclose(guess.guided, guided)
    assert (guess.unconditional is None) == (unconditional is None)
    if guess.unconditional is not None:
        np.testing.assert_allclose(guess.unconditional, unconditional)
    assert asked.batches == [len(told.by_name)]


@pytest.mark.parametrize(
    ("lanes", "where"), [((4, 7), {(4, 1), (7, 2), (4, 5)}), ((1, 2, 3, 4), {(1, 1), (2, 2), (3, 5)})]
)
def test_lanes_share_what_is_asked(lanes: tuple[int, ...], where: set[tuple[int, float]]) -> None:
    told = Told(number(5), number(1), number(2))
    follow, asked = guide(told, lanes=lanes)
    np.testing.assert_allclose(follow(X, f32(1)).guided, guide(told)[0](X, f32(1)).guided)
    assert asked.batches == [1, 1, 1]
    assert set(asked.lanes) == where


def test_layers_are_left_out_in_some_steps_only() -> None:
    follow, asked = guide(Told(number(5), number(1)), left_out=LeftOut(2.0, (1, 2), 0.3, 0.7))
    guesses = []
    for done in range(4):
        follow.step_done(done)
        guesses.append(float(follow(X, f32(1)).guided[0, 0, 0, 0]))
    assert guesses == [13, 13 + 2 * 2.5, 13, 13], "int(0.3 · 5) < 2 < int(0.7 · 5)"
    assert [each for each in asked.options if each] == [{"skip_layers": [1, 2]}]


# easycache ------------------------------------------------------------------------------------------------------------


def followed(threshold: float, start: float = 0.0, end: float = 1.0) -> tuple[list[float], EasyCache, Asked]:
    """What is guessed over eight steps whose input falls evenly from 2, and what for."""
    cache = EasyCache(Options(threshold, start, end), Eps())
    follow, asked = guide(Told(number(3)), cache=cache)
    follow._sigmas = np.geomspace(14, 0.03, 9).astype(f32)
    guesses = []
    for done in range(8):
        follow.step_done(done)
        guesses.append(float(follow(X * f32(2 - done / 10), f32(1)).guided[0, 0, 0, 0]))
    return guesses, cache, asked


def test_easycache_follows_its_formula() -> None:
    """The output changes three times as much as the input, by 0.3 of about 5.5 in a step. The first two steps are
    computed, for nothing is known of the rate; then 0.3 / 5.7 is added up until it is 0.12, and again from there."""
    guesses, cache, asked = followed(0.12)
    inputs = [2 - done / 10 for done in range(8)]
    expected, last, total = [], 0, 0.0
    for step, x in enumerate(inputs):
        total += 3 * (inputs[last] - x) / (3 * inputs[last])
        if step < 2 or total >= 0.12:
            last, total = step, 0.0
            expected.append(3 * x)
        else:
            expected.append(x + 2 * inputs[last])
    np.testing.assert_allclose(guesses, expected, rtol=1e-6)
    assert cache.reused == 8 - len(asked.batches) == 3


def test_easycache_leaves_alone_what_it_is_told_to() -> None:
    assert followed(0.0)[1].reused == 0
    assert followed(1e9)[1].reused == 6
    assert followed(1e9, start=0.5)[1].reused < 6
    assert followed(1e9, end=0.5)[1].reused < 6
    assert not EasyCache(Options(0.2, 0.15, 0.95), Flow(shift=1.0)).covers(f32(0.9))
    assert EasyCache(Options(0.2, 0.15, 0.95), Flow(shift=1.0)).covers(f32(0.5))


def test_easycache_asks_for_both_prompts_or_none() -> None:
    follow, asked = guide(Told(number(3), number(1)), cache=EasyCache(Options(1e9, 0, 1), Eps()))
    for done in range(4):
        follow.step_done(done)
        guess = follow(X * f32(2 - done / 10), f32(1))
        follow(X * f32(2 - done / 10), f32(1))  # a second evaluation in a step is always computed
    assert guess.unconditional is not None
    assert asked.batches == [2] * 6


@pytest.mark.parametrize(
    ("mode", "text", "options"),
    [("disabled", "", None), ("easycache", "", Options()), ("easycache", "threshold=0.3", Options(0.3)),
     ("easycache", " start = 0, end=1 ,", Options(0.2, 0, 1)), ("dbcache", "", Blocks()),
     ("dbcache", "Fn=1,Bn=2,threshold=0.1,warmup=3,max_cached_steps=4,max_continuous_cached_steps=5",
      Blocks(1, 2, 0.1, 3, 4, 5))],
)  # fmt: skip
def test_options_of_a_cache(mode: str, text: str, options: Options | Blocks | None) -> None:
    assert find_options(mode, text) == options


def test_a_mask_of_steps() -> None:
    assert find_options("dbcache", "Fn=1", "1, 0,1") == Blocks(1, mask=(1, 0, 1))
    assert find_options("dbcache", "", "1,0", "static") == Blocks(mask=(1, 0), always=True)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("cache_mode", ("ucache", "")), ("cache_mode", ("x", "")), ("cache_option", ("disabled", "threshold=1")),
     *(("cache_option", ("easycache", text)) for text in (
         "x=1", "threshold", "threshold=a", "start=2", "start=0.5,end=0.4", "threshold=-1", "threshold=nan", "Fn=1")),
     *(("cache_option", ("dbcache", text)) for text in (
         "Fn=0", "Fn=1.5", "Bn=-1", "warmup=-1", "threshold=nan", "start=0", "mask=1", "always=1")),
     ("scm_mask", ("easycache", "", "1,0")), ("scm_mask", ("dbcache", "", "1,2")), ("scm_mask", ("dbcache", "", "1,")),
     ("scm_policy", ("dbcache", "", "1,0", "x")), ("scm_policy", ("dbcache", "", "", "static"))],
)  # fmt: skip
def test_options_of_a_cache_that_make_no_sense(wrong: str, said: tuple[str, ...]) -> None:
    with pytest.raises(InvalidValue, match=f"^{wrong} "):
        find_options(*said)


# dbcache --------------------------------------------------------------------------------------------------------------


class InBlocks:
    """A model of ten blocks that each add something to what they get; ``ran`` says which did, evaluation by
    evaluation."""

    def __init__(self) -> None:
        self.ran: list[list[int]] = []

    def __call__(self, options: Any, inputs: Any) -> tuple[Any, ...]:
        first, mark = options["blocks"]
        if not first:
            self.ran.append([*range(mark)])
            return inputs["x"] + f32(mark) * inputs["x"], f32(mark) * inputs["x"]
        self.ran[-1] += range(first, 10)
        state = inputs["state"]
        predicted = state + f32(10 - first) * inputs["x"]
        return (predicted,) if mark == first else (predicted, f32(mark - first) * inputs["x"])


def in_blocks(steps: list[float], **options: Any) -> tuple[list[float], DBCache, list[list[int]]]:
    """What is predicted in steps with these inputs, and of how many blocks."""
    model, cache = InBlocks(), DBCache(Blocks(**options), 10)
    found = []
    for done, x in enumerate(steps):
        cache.step = done
        found.append(float(cache.predict(model, {"x": np.full((1, 2, 3), x, f32)})[0, 0, 0]))
    return found, cache, model.ran


def test_blocks_are_left_out_while_the_first_ones_change_little() -> None:
    """By less than a tenth since all blocks were computed last: what those between the first two and the last three
    added then is added again."""
    steps, computed = [1, 1.05, 1.09, 1.2, 1.25, 2], [1, 1, 1, 1.2, 1.2, 2]
    found, cache, ran = in_blocks(steps, Fn=2, Bn=3, threshold=0.1, warmup=0)
    np.testing.assert_allclose(found, [6 * x + 5 * last for x, last in zip(steps, computed, strict=True)], 1e-6)
    whole, ends = [*range(10)], [0, 1, 7, 8, 9]
    assert ran == [whole, ends, ends, whole, ends, whole]
    assert (cache.asked, cache.reused) == (6, 3)
    assert cache.saved is not None


@pytest.mark.parametrize(
    ("options", "reused"),
    [({}, "011111"), ({"warmup": 3}, "000111"), ({"max_cached_steps": 2}, "011000"),
     ({"max_continuous_cached_steps": 2}, "011011"), ({"threshold": 0.0}, "000000"), ({"mask": (1, 1, 0, 1)}, "001011"),
     ({"threshold": 0.0, "mask": (0, 0, 1, 0), "always": True}, "010100")],
)  # fmt: skip
def test_steps_in_which_blocks_may_be_left_out(options: dict[str, Any], reused: str) -> None:
    _, _, ran = in_blocks([1.0, 1.01, 1.02, 1.01, 1.0, 1.01], **{"Fn": 1, "threshold": 0.5, "warmup": 0, **options})
    assert "".join("01"[len(blocks) == 1] for blocks in ran) == reused


def test_each_of_what_is_asked_apart_has_its_own_cache() -> None:
    longer = {"number": np.array([2], f32), "more": X}
    for told, caches in ((Told(number(5), number(1)), 1), (Told(number(5), longer), 2)):
        follow, asked = guide(told, blocks=lambda: DBCache(Blocks(), 20))
        follow.step_done(3)
        follow(X, f32(1))
        given = [options.pop("blocks") for options in asked.options]
        assert given == follow.caches
        assert [cache.step for cache in given] == [3] * caches


# Levels and timesteps of one's own ------------------------------------------------------------------------------------


def test_levels_of_ones_own_are_as_many_as_they_are() -> None:
    settings = Request("", sigmas=(14.6, 7.8, 3.5, 0.0), steps=50).resolved(Defaults(512), (512, 512), 64)
    assert (settings.steps, settings.sigmas) == (3, (14.6, 7.8, 3.5, 0.0))


@pytest.mark.parametrize(
    ("field", "value"),
    [("sigmas", (1.0,)), ("sigmas", (1.0, 2.0, 0.0)), ("sigmas", (2.0, 2.0, 0.0)), ("sigmas", (2.0, 1.0)),
     ("sigmas", (float("nan"), 0.0)), ("sigmas", (float("inf"), 0.0)), ("sigmas", (1.0, -1.0)),
     ("timestep_shift", -1), ("timestep_shift", 1001), ("slg_scale", float("nan")), ("skip_layer_start", -0.1),
     ("skip_layer_end", 1.5), ("img_cfg_scale", float("inf")), ("cache_mode", "taylorseer")],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidValue) as caught:
        Request("", **{field: value}).resolved(Defaults(512), (512, 512), 64)
    assert caught.value.field == field


def test_a_shifted_timestep_means_what_it_means_there() -> None:
    """NitroFusion: told timestep · 250 / 1000, and the answer taken at that one's level, in the input's scale."""
    eps, told = prediction("eps"), []

    def predict(x: F32, timestep: f32) -> Guess:
        told.append(float(timestep))
        return Guess(x * f32(0.3))

    sigma = eps.sigma(f32(800.4))
    guess = denoiser(predict, eps, 250)(X, sigma).guided
    there = eps.sigma(f32(200))
    assert told == [200]
    scaled = X / np.sqrt(sigma**2 + 1)
    np.testing.assert_allclose(
        guess, (scaled - there / np.sqrt(there**2 + 1) * scaled * 0.3) * np.sqrt(there**2 + 1), 1e-5
    )
    np.testing.assert_allclose(denoiser(predict, eps)(X, sigma).guided, X - sigma * scaled * 0.3, 1e-5)
    assert told[1] == pytest.approx(800.4, abs=0.01)
