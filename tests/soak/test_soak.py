"""A little of the soak in every run of the tests: each kind of client once, and more clients than there are places."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sdrpc.server.live import KEPT_THREADS
from tests.server.conftest import eventually
from tests.soak.clients import KINDS, Scene
from tests.soak.crowd import crowd
from tests.soak.watch import Usage, quiet, usage
from tests.support.process import ServerProcess

PLACES = 20


@pytest.fixture(scope="module")
def opened(tiny: Path) -> Iterator[tuple[Scene, ServerProcess]]:
    with Scene.opened(tiny, 1, "--max-clients", str(PLACES)) as (scene, server):
        yield scene, server
        assert server.process.poll() is None
        assert "fault in this server" not in server.output


@pytest.fixture(scope="module")
def scene(opened: tuple[Scene, ServerProcess]) -> Scene:
    return opened[0]


@pytest.fixture(scope="module")
def server(opened: tuple[Scene, ServerProcess]) -> ServerProcess:
    return opened[1]


@pytest.fixture(scope="module")
def before(scene: Scene, server: ServerProcess) -> Usage:
    """What the server takes when its first client has gone."""
    return quiet(server.process.pid)


@pytest.mark.usefixtures("before")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_client_comes_and_goes(kind: Callable[[Scene], None], scene: Scene) -> None:
    kind(scene)


def test_the_server_is_as_it_was(before: Usage, server: ServerProcess) -> None:
    assert eventually(lambda: usage(server.process.pid).files <= before.files, 300)
    assert eventually(lambda: usage(server.process.pid).threads <= before.threads + KEPT_THREADS, 300)
    assert quiet(server.process.pid).memory < before.memory + 100


def test_more_clients_than_places(before: Usage, scene: Scene, server: ServerProcess) -> None:
    """Those that draw draw right; the others have a place or are told that there is none. Nobody waits for ever."""
    gathered = crowd(scene, 2 * PLACES, 3)
    assert gathered.right, gathered
    assert gathered.connected + gathered.refused == 2 * PLACES
    assert gathered.refused >= PLACES - 1
    # each of them would have left more than that
    assert eventually(lambda: usage(server.process.pid).threads <= before.threads + KEPT_THREADS, 300)
