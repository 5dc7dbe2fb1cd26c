"""The prompt on one device and the negative prompt on another, both of which have the latents: numbers are those of
numpy's arithmetic here, and nobody waits but for predictions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sdrpc.client import connect
from sdrpc.device import Device
from sdrpc.diffusion.events import Event
from sdrpc.diffusion.request import Request
from sdrpc.diffusion.session import Session
from sdrpc.engine import LocalDevice
from sdrpc.engine.precision import EXACT
from sdrpc.errors import Cancelled
from sdrpc.runtime.cache import Cache
from sdrpc.runtime.chain import Chain, Lanes
from tests.support.process import ServerProcess
from tests.support.trouble import Passage, Trouble

QUEUES = (
    "from sdrpc.engine import device, discovery; find = discovery.found; "
    "discovery.found = lambda: [cpu._replace(name=f'CPU{i}') for i, cpu in enumerate(find()[-1:] * 2)]; "
    "device.LocalDevice.queues = property(lambda _: True, lambda *_: None); "
    "from sdrpc.cli.rpc_server import main; main()"
)
"""An rpc-server with two devices that are treated as if each were a GPU: what it is told is queued, if only in the
socket."""
STEPS = 3


def request(sampler: str) -> Request:
    return Request("a cat", "a dog", width=64, height=64, steps=STEPS, sampling_method=sampler, seed=1)


def beside(devices: list[Device]) -> dict[str, Lanes | Device]:
    return {"diffusion": Lanes(tuple(Chain((device,)) for device in devices)), "all": devices[0]}


@pytest.fixture(scope="module")
def servers() -> Iterator[list[ServerProcess]]:
    with ExitStack() as stack:
        words = ("--precision", "exact", "-t", "1", "--device", "CPU0,CPU1")
        yield [stack.enter_context(ServerProcess(*words, python=(sys.executable, "-c", QUEUES))) for _ in range(2)]


Here = Callable[[str], NDArray[np.uint8]]


@pytest.fixture(scope="module")
def here(tiny: Path, graphs: Path) -> Iterator[Here]:
    """The picture of a sampler, with numpy's arithmetic, on devices of this process."""
    devices: list[Device] = [LocalDevice(f"CPU{i}", torch.device("cpu"), EXACT, threads=1) for i in range(2)]
    with Session.open(tiny, beside(devices), Cache(graphs)) as session:
        yield lru_cache(lambda sampler: next(session.generate(request(sampler))).image)
    for device in devices:
        device.close()


@pytest.mark.parametrize("sampler", ["euler_a", "heun"])
def test_two_servers_draw_the_same(
    sampler: str, servers: list[ServerProcess], here: Here, tiny: Path, graphs: Path
) -> None:
    events: list[Event] = []
    with Trouble(servers[0].port) as first, Trouble(servers[1].port) as second:
        found = connect([first.endpoint, second.endpoint])
        with Session.open(tiny, beside([found[0], found[2]]), Cache(graphs)) as session:
            (picture,) = session.generate(request(sampler), events.append)
        for device in found:
            device.close()
        evaluations = STEPS * 2 - 1 if sampler == "heun" else STEPS
        assert second.requests.count("GRAPH_COMPUTE") > 1, "the second device does the sampler's arithmetic, too"
        assert evaluations <= second.requests.count("GET_TENSOR") <= 2 * evaluations, "predictions, and looks"
        assert "COPY_TENSOR" not in first.requests + second.requests
    np.testing.assert_array_equal(picture.image, here(sampler))
    assert [event.done for event in events if event.stage == "sample"] == list(range(STEPS + 1))


def test_devices_of_one_server_copy_by_themselves(
    servers: list[ServerProcess], here: Here, tiny: Path, graphs: Path
) -> None:
    with Trouble(servers[0].port) as trouble:
        found = connect([trouble.endpoint])
        with Session.open(tiny, beside(list(found)), Cache(graphs)) as session:
            (picture,) = session.generate(request("euler_a"))
        for device in found:
            device.close()
        asked = trouble.requests
    assert asked.count("COPY_TENSOR") == 2 * (STEPS - 1), "all predictions but the first ones, which upload the model"
    sampling = asked[asked.index("COPY_TENSOR") :]
    assert sampling.count("GET_TENSOR") <= 2 * STEPS + 2, "looks, latents, a picture"
    np.testing.assert_array_equal(picture.image, here("euler_a"))


def test_what_crosses_between_layers_on_devices_of_one_server_does_not_come_here(
    servers: list[ServerProcess], tiny: Path, graphs: Path
) -> None:
    asked = replace(request("euler"), steps=1)
    with Trouble(servers[0].port) as trouble:
        first, second = connect([trouble.endpoint])
        with Session.open(tiny, first, Cache(graphs)) as session:
            (whole,) = session.generate(asked)
        assert "COPY_TENSOR" not in trouble.requests
        with Session.open(tiny, {"diffusion": Chain((first, second)), "all": first}, Cache(graphs)) as session:
            before = len(trouble.requests)
            (cut,) = session.generate(asked)
        requests = trouble.requests[before:]
        for device in (first, second):
            device.close()
    assert "COPY_TENSOR" in requests
    assert requests.count("GET_TENSOR") <= 5, "texts, a prediction, a picture, the latents and a look"
    np.testing.assert_array_equal(cut.image, whole.image)


def test_one_of_two_servers_that_dies_costs_a_new_beginning(
    servers: list[ServerProcess], here: Here, tiny: Path, graphs: Path
) -> None:
    """In the middle of a picture, when each device has a part of the next step before it."""
    asked = request("euler_a")
    events: list[Event] = []

    def drawn(trouble: Trouble) -> NDArray[np.uint8]:
        found = connect([f"127.0.0.1:{servers[0].port}", trouble.endpoint])
        with Session.open(tiny, beside([found[0], found[2]]), Cache(graphs)) as session:
            (picture,) = session.generate(asked, events.append)
            (again,) = session.generate(asked)
        for device in found:
            device.close()
        np.testing.assert_array_equal(again.image, picture.image)
        return picture.image

    with Trouble(servers[1].port) as trouble:
        drawn(trouble)
        runs = [i for i, name in enumerate(trouble.requests) if name == "GRAPH_RECOMPUTE"]
    events.clear()
    with Trouble(servers[1].port, runs[len(runs) // 2 - 3], Passage.cut) as trouble:
        image = drawn(trouble)
        assert trouble.connections == 2
    np.testing.assert_array_equal(image, here("euler_a"))
    assert [event.done for event in events if event.stage == "sample"] == list(range(STEPS + 1)), "none is told twice"


def test_cancelling_leaves_nothing_behind(servers: list[ServerProcess], here: Here, tiny: Path, graphs: Path) -> None:
    done: list[int] = []
    found = connect([f"127.0.0.1:{server.port}" for server in servers])
    with Session.open(tiny, beside([found[0], found[2]]), Cache(graphs)) as session:
        drawing = session.generate(
            replace(request("euler_a"), steps=200),
            lambda event: done.append(event.done) if event.stage == "sample" else None,
            lambda: len(done) > 5,
        )
        with pytest.raises(Cancelled):
            next(drawing)
        assert len(done) < 100
        (picture,) = session.generate(request("euler_a"))
    for device in found:
        device.close()
    np.testing.assert_array_equal(picture.image, here("euler_a"))
