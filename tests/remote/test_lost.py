"""A run survives its workers: whatever happens to a server, at whatever point of a picture, it comes out the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sdrpc.client import Timeouts, connect
from sdrpc.client.connection import DEFAULT_TIMEOUTS
from sdrpc.diffusion.device_model import QUIET_SECONDS
from sdrpc.diffusion.events import Event
from sdrpc.diffusion.request import Request
from sdrpc.diffusion.session import Session
from sdrpc.runtime.cache import Cache
from tests.support.trouble import Passage, Restartable, Trouble

REQUEST = Request("a cat", width=64, height=64, steps=3, sampling_method="euler_a")
IMPATIENT = Timeouts(silent=4.0)
"""A server that says nothing is given up soon, so that a test need not wait for it: after two of its beats."""

Pictures = list[NDArray[np.uint8]]


@pytest.fixture(scope="module")
def server() -> Iterator[Restartable]:
    with Restartable("--precision", "exact") as server:
        yield server


def draw(
    endpoint: str,
    tiny: Path,
    cache: Cache,
    request: Request = REQUEST,
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
    on_event: Callable[[Event], None] = lambda _: None,
) -> Pictures:
    (device,) = connect([endpoint], timeouts)
    try:
        with Session.open(tiny, device, cache) as session:
            return [picture.image for picture in session.generate(request, on_event)]
    finally:
        device.close()


@pytest.fixture(scope="module")
def undisturbed(server: Restartable, tiny: Path, cache: Cache) -> tuple[Pictures, list[str]]:
    """The picture, and the requests that it takes."""
    with Trouble(server.port) as trouble:
        return draw(trouble.endpoint, tiny, cache), trouble.requests


def points(requests: list[str]) -> dict[str, int]:
    """A request of each phase of a picture, by number."""
    encoder, unet, vae = (i for i, name in enumerate(requests) if name == "GRAPH_COMPUTE")
    runs = [i for i, name in enumerate(requests) if name == "GRAPH_RECOMPUTE" and i > unet]
    return {
        "uploading a text encoder": encoder // 2,
        "encoding": encoder,
        "reading a text": encoder + 1,
        "uploading the diffusion model": unet - 20,
        "the first step": unet,
        "reading a prediction": unet + 1,
        "a later step": runs[0],
        "reading a later prediction": runs[-1] + 1,
        "uploading the VAE": vae - 20,
        "decoding": vae,
        "reading a picture": vae + 1,
    }


PHASES = (
    "uploading a text encoder", "encoding", "reading a text", "uploading the diffusion model", "the first step",
    "reading a prediction", "a later step", "reading a later prediction", "uploading the VAE", "decoding",
    "reading a picture",
)  # fmt: skip


def kill(passage: Passage, server: Restartable) -> None:
    server.kill()
    server.start()


def sleep(passage: Passage, server: Restartable) -> None:
    server.sleep(3.0)


def cut(passage: Passage, server: Restartable) -> None:
    passage.cut()


def cut_the_answer(passage: Passage, server: Restartable) -> None:
    passage.halves_answer = True


def stall(passage: Passage, server: Restartable) -> None:
    passage.stalls.set()


FAULTS: list[tuple[Callable[[Passage, Restartable], None], str]] = [
    *((cut, phase) for phase in PHASES if not phase.startswith("reading")),
    *((cut_the_answer, phase) for phase in PHASES if phase.startswith("reading")),
    *((stall, phase) for phase in ("uploading the diffusion model", "encoding", "reading a prediction", "decoding")),
    *(
        (kill, phase)
        for phase in ("encoding", "uploading the diffusion model", "reading a later prediction", "decoding")
    ),
    *((sleep, phase) for phase in ("reading a text", "the first step", "uploading the VAE", "decoding")),
]


@pytest.mark.parametrize(("fault", "phase"), FAULTS, ids=[f"{fault.__name__}-{phase}" for fault, phase in FAULTS])
def test_the_picture_is_the_same(
    fault: Callable[[Passage, Restartable], None],
    phase: str,
    server: Restartable,
    undisturbed: tuple[Pictures, list[str]],
    tiny: Path,
    cache: Cache,
) -> None:
    pictures, requests = undisturbed
    at = points(requests)
    assert tuple(at) == PHASES
    events: list[Event] = []
    happened: list[Passage] = []

    def happens(passage: Passage) -> None:
        happened.append(passage)
        fault(passage, server)

    timeouts = IMPATIENT if fault is stall else DEFAULT_TIMEOUTS
    with Trouble(server.port, at[phase], happens) as trouble:
        drawn = draw(trouble.endpoint, tiny, cache, timeouts=timeouts, on_event=events.append)
    assert happened
    np.testing.assert_array_equal(drawn, pictures)
    steps = [(event.done, event.total) for event in events if event.stage == "sample"]
    assert steps == [(done, REQUEST.steps) for done in range(REQUEST.steps + 1)], "no step is done twice"
    back = [event for event in events if event.stage == "reconnected"]
    if fault is sleep:
        assert trouble.connections == 1, "whoever slept goes on"
    else:
        assert trouble.connections > 1
        assert {(event.device, event.over) for event in back} == {("RPC0", True)}
        assert len(back) == 1 or fault is stall, "only who is impatient may lose a server again"


def test_a_server_that_stands_still_until_the_user_is_told(
    server: Restartable, undisturbed: tuple[Pictures, list[str]], tiny: Path, cache: Cache
) -> None:
    """In the middle of a step, as a machine does whose lid was closed: the user is told, then it goes on."""
    pictures, requests = undisturbed
    events: list[Event] = []

    def told(event: Event) -> None:
        events.append(event)
        if [each.stage for each in events].count("waiting") == 2:
            server.go_on()

    with Trouble(server.port, points(requests)["a later step"], lambda _: server.stop()) as trouble:
        drawn = draw(trouble.endpoint, tiny, cache, on_event=told)
    np.testing.assert_array_equal(drawn, pictures)
    assert trouble.connections == 1
    waiting = [event.seconds for event in events if event.stage == "waiting"]
    assert waiting[0] >= QUIET_SECONDS
    assert waiting == sorted(waiting)
    (back,) = (event for event in events if event.stage == "reconnected")
    assert back.seconds == waiting[-1]
    steps = [event.done for event in events if event.stage == "sample"]
    assert steps == list(range(REQUEST.steps + 1)), "no step is done twice"
