"""Samplers over arrays that two devices have, each with its own prediction: on both, the same numbers as numpy's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from sdrpc.device import Device, Later, There, first_of
from sdrpc.diffusion.denoising import Guess
from sdrpc.diffusion.rng import make_rng
from sdrpc.diffusion.samplers import SAMPLERS, sample
from sdrpc.engine import LocalDevice
from sdrpc.engine.precision import EXACT
from sdrpc.runtime.mirrors import Mirrored, Mirrors
from tests.diffusion.test_ahead import SIGMAS, noise

f32 = np.float32


@pytest.fixture
def devices() -> Iterator[list[Device]]:
    devices: list[Device] = [LocalDevice(f"CPU{i}", torch.device("cpu"), EXACT, threads=1) for i in range(2)]
    yield devices
    for device in devices:
        device.close()


@pytest.fixture(params=[False, True], ids=["copied", "through here"])
def mirrors(devices: list[Device], request: pytest.FixtureRequest) -> Iterator[Mirrors]:
    mirrors = Mirrors(devices)
    mirrors._travels = request.param
    yield mirrors
    mirrors.close()


def denoise(x: Any, sigma: f32) -> Guess:
    """Stands for the model, which predicts something else for each prompt; on a device each, where x is on several."""
    here, there = x.copies if isinstance(x, Mirrored) else (x, x)
    predicted = [here * f32(0.3) / (sigma + f32(1)), there * f32(0.7) - there * (sigma / f32(20))]
    negative, positive = x.mirrors.shared(predicted) if isinstance(x, Mirrored) else predicted
    return Guess(negative + f32(7) * (positive - negative), negative)


def draw(name: str, start: Any) -> Any:
    with np.errstate(all="ignore"):
        return sample(name, denoise, start, SIGMAS[False], make_rng("cuda", 3), flow=False)


@pytest.mark.parametrize("name", SAMPLERS)
def test_both_devices_have_what_numpy_has(name: str, mirrors: Mirrors) -> None:
    found = draw(name, mirrors.put(noise()))
    assert isinstance(found, Mirrored), "it never left the devices"
    wanted = draw(name, noise())
    np.testing.assert_array_equal(np.asarray(found), wanted)
    np.testing.assert_array_equal(np.asarray(found.copies[1]), wanted)


def test_what_no_device_computes_is_numpys(mirrors: Mirrors) -> None:
    x = mirrors.put(noise())
    np.testing.assert_array_equal(x * np.float64(0.1), noise() * np.float64(0.1))
    assert x[0:1] is not None
    np.testing.assert_array_equal(x[0, 1], noise()[0, 1])
    np.testing.assert_allclose(np.asarray(abs(x).mean()), np.abs(noise()).mean(), 1e-6)


def test_what_is_told_behind_something_that_comes_waits_for_it(devices: list[Device]) -> None:
    asked: list[str] = []

    class Late(Later):
        def wait(self) -> bytes:
            asked.append("waited for")
            return noise().tobytes()

    mirrors = Mirrors(devices)
    ahead, _ = mirrors._aheads
    with mirrors.turns:
        x = ahead.arriving(Late(), noise().shape)
        later = ahead.ask(x + x * f32(2))
    assert not asked
    with mirrors.turns:
        found = np.frombuffer(later.wait(), f32).reshape(x.shape)
    assert asked == ["waited for"]
    np.testing.assert_array_equal(found, noise() + noise() * f32(2))
    mirrors.close()


def test_the_first_that_comes() -> None:
    assert first_of([There(b"a"), There(b"b")]) == 0


def test_who_waits_for_several_goes_on_with_the_first() -> None:
    class Piped(Later):
        def __init__(self) -> None:
            self.read, self.write = os.pipe()

        def wait(self) -> bytes:
            return os.read(self.read, 1)

        def shows_at(self) -> int:
            return self.read

    pipes = [Piped(), Piped()]
    assert first_of(pipes, 0) == 0, "nothing came: it is time to look after the first"
    os.write(pipes[1].write, b"x")
    assert first_of(pipes) == 1
    for pipe in pipes:
        os.close(pipe.read)
        os.close(pipe.write)
