"""A picture whose latents stay on the server: the same, step by step, and nobody waits for a step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from bench.proxy import CountingProxy
from sdrpc.client import connect
from sdrpc.device import Device
from sdrpc.diffusion.events import Event
from sdrpc.diffusion.request import Request
from sdrpc.diffusion.sampling import Sampling
from sdrpc.diffusion.session import Session
from sdrpc.engine import LocalDevice
from sdrpc.engine.precision import EXACT
from sdrpc.errors import Cancelled
from sdrpc.families.model import ModelFiles, open_model
from sdrpc.runtime.ahead import DeviceArray
from sdrpc.runtime.cache import Cache
from tests.support import pictures
from tests.support.pictures import Case, Checkpoints
from tests.support.process import ServerProcess
from tests.support.trouble import Passage, Trouble

QUEUES = (
    "from sdrpc.engine.device import LocalDevice; LocalDevice.queues = property(lambda _: True, lambda *_: None); "
    "from sdrpc.cli.rpc_server import main; main()"
)
"""An rpc-server that is treated as if its CPU were a GPU: what it is told is queued, if only in the socket."""
STEPS = 4


def request(sampler: str) -> Request:
    return Request("a cat", width=64, height=64, steps=STEPS, sampling_method=sampler, seed=1)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("--precision", "exact", python=(sys.executable, "-c", QUEUES)) as server:
        yield server


def here(tiny: Path, cache: Cache, sampler: str) -> NDArray[np.uint8]:
    """The picture with numpy's arithmetic, on a device of this process."""
    device = LocalDevice("CPU", torch.device("cpu"), EXACT, threads=1)
    with Session.open(tiny, device, cache) as session:
        (picture,) = session.generate(request(sampler))
    device.close()
    return picture.image


@pytest.mark.parametrize("sampler", ["euler", "euler_a", "dpm++2m", "heun"])
def test_the_picture_is_the_same(sampler: str, server: ServerProcess, tiny: Path, cache: Cache) -> None:
    events: list[Event] = []
    with Trouble(server.port) as trouble:
        (device,) = connect([trouble.endpoint])
        assert device.queues
        with Session.open(tiny, device, cache) as session:
            (picture,) = session.generate(request(sampler), events.append)
        device.close()
        requests = trouble.requests
    np.testing.assert_array_equal(picture.image, here(tiny, cache, sampler))
    assert [event.done for event in events if event.stage == "sample"] == list(range(STEPS + 1))
    assert requests.count("GRAPH_RECOMPUTE") >= STEPS - 1, "the model's graph is sent once, whatever runs in between"
    sampling = requests[requests.index("GRAPH_RECOMPUTE") :]
    assert sampling.count("GET_TENSOR") <= STEPS * (2 if sampler == "heun" else 1) + 4, (
        "looks, latents, texts, a picture"
    )


def test_a_film_stays_there_too(
    server: ServerProcess, checkpoints: Checkpoints, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("wan", "safetensors")
    wanted = replace(pictures.request(case), steps=STEPS, sampling_method="euler")
    stayed: list[bool] = []
    predict = Sampling.predict

    def watched(self: Sampling, latents: Any, *others: Any, **named: Any) -> Any:
        predicted = predict(self, latents, *others, **named)
        stayed.append(isinstance(latents, DeviceArray) and isinstance(predicted, DeviceArray))
        return predicted

    def drawn(device: Device) -> np.ndarray:
        with Session.open(checkpoints.files(case), device, cache) as session:
            (film,) = session.generate_video(wanted)
            return np.stack(list(film.frames))

    monkeypatch.setattr(Sampling, "predict", watched)
    (device,) = connect([f"127.0.0.1:{server.port}"])
    found = drawn(device)
    device.close()
    assert len(stayed) >= STEPS
    assert all(stayed)
    local = LocalDevice("CPU", torch.device("cpu"), EXACT, threads=1)
    np.testing.assert_array_equal(found, drawn(local))
    local.close()


def test_what_a_controlnet_gives_stays_there(server: ServerProcess, tiny: Path, cache: Cache, tmp_path: Path) -> None:
    shown = np.random.default_rng(4).integers(0, 256, (64, 64, 3), np.uint8)
    asked = replace(request("euler"), control_image=shown)
    files = ModelFiles(tiny, control_net=controlnet(tiny, tmp_path / "control.safetensors"))
    with CountingProxy(server.port) as proxy:
        (device,) = connect([f"127.0.0.1:{proxy.port}"])
        with Session.open(files, device, cache) as session:
            (first,) = session.generate(replace(asked, steps=2))
            before = proxy.sent + proxy.received
            (picture,) = session.generate(asked)
            crossed = proxy.sent + proxy.received - before
            (without,) = session.generate(request("euler"))
        device.close()
    device = LocalDevice("CPU", torch.device("cpu"), EXACT, threads=1)
    with Session.open(files, device, cache) as session:
        (wanted,) = session.generate(asked)
    device.close()
    np.testing.assert_array_equal(picture.image, wanted.image)
    assert (picture.image != without.image).any()
    assert (picture.image != first.image).any()
    finest = 4 * 64 * 8 * 8  # float32, of the first of its outputs
    assert crossed < shown.size * 4 + picture.image.size * 4 + STEPS * finest, (
        "two pictures, and nothing of it per step"
    )


def controlnet(tiny: Path, path: Path) -> Path:
    """A ControlNet of random numbers for the UNet of the model in ``tiny``."""
    kind: Any = diffusers.ControlNetModel
    torch.manual_seed(3)
    control = kind.from_unet(open_model(ModelFiles(tiny))["diffusion"].module().build()[0])
    for name, parameter in control.named_parameters():
        if "controlnet_" in name:  # which begin as zeros
            torch.nn.init.normal_(parameter, 0, 0.05)
    save_file({name: tensor.contiguous() for name, tensor in control.state_dict().items()}, path)
    return path


def test_a_server_that_dies_costs_a_new_beginning(server: ServerProcess, tiny: Path, cache: Cache) -> None:
    events: list[Event] = []

    def cut(passage: Passage) -> None:
        passage.cut()

    with Trouble(server.port) as trouble:
        (device,) = connect([trouble.endpoint])
        with Session.open(tiny, device, cache) as session:
            list(session.generate(request("euler_a")))
        device.close()
        at = [i for i, name in enumerate(trouble.requests) if name == "GRAPH_RECOMPUTE"][-1]
    with Trouble(server.port, at, cut) as trouble:
        (device,) = connect([trouble.endpoint])
        with Session.open(tiny, device, cache) as session:
            (picture,) = session.generate(request("euler_a"), events.append)
        device.close()
        assert trouble.connections == 2
    np.testing.assert_array_equal(picture.image, here(tiny, cache, "euler_a"))
    assert [event.done for event in events if event.stage == "sample"] == list(range(STEPS + 1)), "none is told twice"


def test_cancelling_ends_within_two_steps(server: ServerProcess, tiny: Path, cache: Cache) -> None:
    done: list[int] = []
    (device,) = connect([f"127.0.0.1:{server.port}"])
    with Session.open(tiny, device, cache) as session:
        drawing = session.generate(
            Request("a cat", width=64, height=64, steps=200, sampling_method="euler"),
            lambda event: done.append(event.done) if event.stage == "sample" else None,
            lambda: len(done) > 5,
        )
        with pytest.raises(Cancelled):
            next(drawing)
        assert len(done) < 100
        told = len(done)
        (picture,) = session.generate(request("euler"))
        assert len(done) == told, "nobody hears of the cancelled picture's steps any more"
    device.close()
    np.testing.assert_array_equal(picture.image, here(tiny, cache, "euler"))
