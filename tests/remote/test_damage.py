"""What happens on the way where a key protects the connection, to a single bit, too: the picture is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from sdrpc.client import Keychain, Timeouts, connect
from sdrpc.client.connection import DEFAULT_TIMEOUTS
from sdrpc.diffusion.events import Event
from sdrpc.diffusion.request import Request
from sdrpc.diffusion.session import Session
from sdrpc.runtime.cache import Cache
from sdrpc.server.key_ring import KeyRing
from tests.support.trouble import Fault, Line, Restartable, Wire, cut, flip, stall

REQUEST = Request("a cat", width=64, height=64, steps=2, sampling_method="euler_a")
IMPATIENT = Timeouts(silent=4.0)
"""A server that says nothing is given up soon, so that a test need not wait for it: after two of its beats."""
UP, DOWN = True, False

PHASES: dict[str, Callable[[Event], bool]] = {
    "uploading a text encoder": lambda event: event.component == "clip_l" and _uploading(event),
    "encoding": lambda event: event.component == "clip_l" and _uploaded(event),
    "uploading the diffusion model": lambda event: event.component == "diffusion" and _uploading(event),
    "the first step": lambda event: event.component == "diffusion" and _uploaded(event),
    "a later step": lambda event: event.stage == "sample" and event.done == 1,
    "uploading the VAE": lambda event: event.component == "vae" and _uploading(event),
    "decoding": lambda event: event.component == "vae" and _uploaded(event),
}
"""Phase → the event after which what goes up belongs to it, and what comes down next is its result (uploads have
none)."""


def _uploading(event: Event) -> bool:
    return event.stage == "upload" and 0 < event.done < event.total


def _uploaded(event: Event) -> bool:
    return event.stage == "upload" and event.over


def kill(server: Restartable) -> Fault:
    def happens(line: Line, data: bytes) -> bytes:
        server.kill()
        server.start()
        return data

    return happens


def sleep(server: Restartable) -> Fault:
    def happens(line: Line, data: bytes) -> bytes:
        server.sleep(3.0)
        return data

    return happens


FAULTS: list[tuple[str, str, bool]] = [
    *(("cut", phase, UP) for phase in ("uploading a text encoder", "encoding", "a later step", "decoding")),
    *(("flip", phase, UP) for phase in ("uploading the diffusion model", "encoding", "a later step")),
    *(("flip", phase, DOWN) for phase in ("encoding", "a later step", "decoding")),
    *(("stall", phase, DOWN) for phase in ("the first step", "decoding")),
    ("stall", "uploading the VAE", UP),
    ("kill", "a later step", UP),
    ("sleep", "encoding", UP),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def keychain(folder: Path) -> Keychain:
    return Keychain([(None, KeyRing(folder / "keys.json").add("laptop").key)], folder / "client.json")


@pytest.fixture(scope="module")
def server(folder: Path, keychain: Keychain) -> Iterator[Restartable]:
    with Restartable("--precision", "exact", "--require-key", state=folder) as server:
        yield server


def draw(
    endpoint: str,
    keychain: Keychain,
    tiny: Path,
    folder: Path,
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
    is_now: Callable[[Event], bool] = lambda _: False,
    happens: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """A picture. ``happens`` is called once, when an event ``is_now``, and all that was sent before has come."""
    (device,) = connect([endpoint], timeouts, keychain=keychain)
    waits = True

    def on_event(event: Event) -> None:
        nonlocal waits
        if waits and is_now(event):
            waits = False
            device.memory()
            happens()

    with closing(device), Session.open(tiny, device, Cache(folder / "graphs")) as session:
        (picture,) = session.generate(REQUEST, on_event)
        return picture.image


@pytest.fixture(scope="module")
def undisturbed(server: Restartable, keychain: Keychain, tiny: Path, folder: Path) -> np.ndarray:
    return draw(f"127.0.0.1:{server.port}", keychain, tiny, folder)


@pytest.mark.parametrize(
    ("fault", "phase", "way"), FAULTS, ids=[f"{f}-{phase}-{'up' if way else 'down'}" for f, phase, way in FAULTS]
)
def test_the_picture_is_the_same(
    fault: str,
    phase: str,
    way: bool,
    server: Restartable,
    keychain: Keychain,
    undisturbed: np.ndarray,
    tiny: Path,
    folder: Path,
) -> None:
    faults = {"cut": cut, "flip": flip, "stall": stall, "kill": kill(server), "sleep": sleep(server)}
    timeouts = IMPATIENT if fault == "stall" else DEFAULT_TIMEOUTS
    with Wire(server.port) as wire:
        picture = draw(
            wire.endpoint, keychain, tiny, folder, timeouts, PHASES[phase], lambda: wire.disturb(faults[fault], way)
        )
    assert wire.happened
    assert (wire.connections > 1) == (fault != "sleep"), "whoever slept goes on, others come again"
    np.testing.assert_array_equal(picture, undisturbed)
