"""Samplers over arrays that stay on a device: the same numbers as numpy's, bit for bit, and nobody waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from sdrpc.diffusion.denoising import Guess, kept_outside
from sdrpc.diffusion.rng import make_rng
from sdrpc.diffusion.samplers import SAMPLERS, sample
from sdrpc.engine import LocalDevice
from sdrpc.engine.precision import EXACT
from sdrpc.errors import DeviceLost
from sdrpc.runtime.ahead import Ahead, DeviceArray

f32 = np.float32
SHAPE = (1, 4, 8, 8)
SIGMAS = {
    False: np.array([14.6, 6.5, 2.9, 1.1, 0.4, 0], f32),
    True: np.array([1, 0.85, 0.6, 0.31, 0.1, 0], f32),
}


@pytest.fixture
def device() -> Iterator[LocalDevice]:
    device = LocalDevice("CPU", torch.device("cpu"), EXACT, threads=1)
    yield device
    device.close()


@pytest.fixture
def ahead(device: LocalDevice) -> Iterator[Ahead]:
    ahead = Ahead(device)
    yield ahead
    ahead.close()


def denoise(x: Any, sigma: f32) -> Guess:
    """Stands for the model: any arithmetic will do."""
    negative, positive = x * f32(0.3) / (sigma + f32(1)), x * f32(0.7) - x * (sigma / f32(20))
    return Guess(negative + f32(7) * (positive - negative), negative)


def draw(name: str, flow: bool, start: Any, model: Callable[[Any, f32], Guess] = denoise) -> Any:
    with np.errstate(all="ignore"):
        return sample(name, model, start, SIGMAS[flow], make_rng("cuda", 3), flow=flow)


def noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SHAPE).astype(f32)


@pytest.mark.parametrize("flow", [False, True], ids=["eps", "flow"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_gives_what_it_gives_in_numpy(name: str, flow: bool, ahead: Ahead) -> None:
    found = draw(name, flow, ahead.put(noise()))
    assert isinstance(found, DeviceArray), "it never left the device"
    np.testing.assert_array_equal(np.asarray(found), draw(name, flow, noise()))


def test_what_is_kept_around_a_mask(ahead: Ahead) -> None:
    mask = (np.arange(64).reshape(1, 1, 8, 8) % 3 > 0).astype(f32)
    model = kept_outside(denoise, noise() + f32(1), mask)
    found = draw("dpm++2m", False, ahead.put(noise()), model)
    assert isinstance(found, DeviceArray)
    np.testing.assert_array_equal(np.asarray(found), draw("dpm++2m", False, noise(), model))


def test_steps_are_few_graphs_and_few_places(device: LocalDevice, ahead: Ahead) -> None:
    x = ahead.put(noise())
    wanted = noise()
    for step in range(20):
        x, wanted = x * f32(step) + x, wanted * f32(step) + wanted
        np.testing.assert_array_equal(np.asarray(x), wanted)
    assert len(ahead._programs) <= 3
    assert len(ahead._buffers) <= 4


def test_pictures_of_other_sizes_leave_no_memory_behind(device: LocalDevice, ahead: Ahead) -> None:
    """Two sizes in turn keep their places, as two passes of one picture do; a third one takes the first one's."""
    kept, buffers = [], list[set[int]]()
    for side in (8, 16, 8, 16, 24, 32, 8):
        ahead.begin()
        start = np.random.default_rng(side).standard_normal((1, 4, side, side)).astype(f32)
        found = draw("dpm++2m", False, ahead.put(start))
        np.testing.assert_array_equal(np.asarray(found), draw("dpm++2m", False, start))
        del found
        kept.append(sum(bool(places) for places in ahead._free.values()))
        buffers.append(set(device._buffers))
    assert kept == [1, 2, 2, 2, 2, 2, 2]
    assert buffers[3] == buffers[2] == buffers[1], "a size that comes again takes the places that it had"


def test_what_is_no_operation_of_a_device_is_numpys(ahead: Ahead) -> None:
    x, wide = ahead.put(noise()), np.float64(1) / 3
    assert (x * wide).dtype == np.float64
    np.testing.assert_array_equal(x * wide, noise() * wide)
    np.testing.assert_array_equal(1 / x, 1 / noise())
    np.testing.assert_array_equal(x[0, 1], noise()[0, 1])
    np.testing.assert_array_equal(np.asarray(noise() - x * 2), noise() - noise() * 2)
    other = ahead.put(noise()[:, :1])
    np.testing.assert_array_equal(x + other, noise() + noise()[:, :1])


def test_a_mean_of_differences(ahead: Ahead) -> None:
    x, before = ahead.put(noise()), ahead.put(noise() + f32(1))
    ratio = abs(x * 2 - before).mean() / abs(before).mean()
    assert isinstance(ratio, DeviceArray)
    wanted = np.abs(noise() * 2 - (noise() + f32(1))).mean() / np.abs(noise() + f32(1)).mean()
    np.testing.assert_allclose(np.asarray(ratio), wanted, 1e-6)
    assert np.asarray(ratio).shape == ()


def test_rows_are_part_of_what_is_there(ahead: Ahead) -> None:
    both = ahead.put(np.concatenate([noise(), noise() + f32(1)]))
    negative, positive = both[0:1], both[1:2]
    assert isinstance(positive, DeviceArray)
    found = negative + f32(2) * (positive - negative)
    np.testing.assert_array_equal(np.asarray(found), noise() + f32(2) * ((noise() + f32(1)) - noise()))


def test_what_was_on_a_device_that_somebody_had_again_is_lost(ahead: Ahead, monkeypatch: pytest.MonkeyPatch) -> None:
    x = ahead.put(noise())
    monkeypatch.setattr(LocalDevice, "life", 1)
    for work in (lambda: ahead.put(noise()), lambda: np.asarray(x), lambda: np.asarray(x + x), ahead.finish):
        with pytest.raises(DeviceLost, match="CPU was lost meanwhile"):
            work()


def test_who_was_cancelled_is_not_told(ahead: Ahead) -> None:
    told: list[int] = []
    ahead.then(lambda: told.append(1))
    ahead.begin()
    ahead.then(lambda: told.append(2))
    ahead.finish()
    assert told == [2]


def test_what_is_done_is_told_when_it_is_done(ahead: Ahead) -> None:
    told: list[int] = []
    ahead.then(lambda: told.append(1))
    assert not told
    ahead.finish()
    assert told == [1]
