"""Learning a client's version over real sockets, and the file in which it stays."""

from __future__ import annotations

import os
import re
import socket
import stat
import struct
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from sdrpc.ggml import params
from sdrpc.ggml.dialect import Dialect, dialects, newest
from sdrpc.server import Learning, Limits, Server
from sdrpc.server.negotiation import MAX_BYTES, default_path
from sdrpc.server.version_memory import families
from sdrpc.wire import messages
from sdrpc.wire.hello import Capability
from tests.server.conftest import CountingDevice, eventually
from tests.support.client import Adder, RawClient

EVERY = list(dialects().values())
RESET = struct.pack("ii", 1, 0)


class Leaves(Exception):
    """A native client did not like the server's version."""


def native(port: int, dialect: Dialect, name_length: int = 64, reset: bool = False) -> RawClient:
    """A connection of a client that looks at the server's version as ggml's does. Raises :class:`Leaves`."""
    client = RawClient(port, dialect, name_length)
    (major, minor, _), told = dialect.triple, client.hello.version
    if told[0] != major or told[1] > minor:
        if reset:
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        client.close()
        raise Leaves(f"told {told}")
    return client


def starts(server: Server, dialect: Dialect, logged: Callable[[], int], reset: bool = False) -> int:
    """How often such a client has to be started until it computes; each time the server has seen it leave."""
    for times in range(1, 2 * len(families()) + 1):
        before = logged()
        try:
            with native(server.port, dialect, reset=reset) as client:
                Adder(client)()
                return times
        except Leaves:
            assert eventually(partial(_more, logged, before))
    raise AssertionError(f"{dialect.version} is never served")


def _more(logged: Callable[[], int], than: int) -> bool:
    return logged() > than


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], int]:
    """How many clients left right after the greeting so far."""
    return lambda: caplog.text.count("left right after the greeting")


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("dialect", EVERY, ids=lambda dialect: dialect.version)
def test_every_client_is_served_in_the_end_and_at_once_by_the_next_server(
    dialect: Dialect, reset: bool, device: CountingDevice, tmp_path: Path, logged: Callable[[], int]
) -> None:
    path = tmp_path / "state" / "clients.json"
    with Server([device], Learning(path)) as server:
        assert starts(server, dialect, logged, reset=reset) <= 5
        assert starts(server, dialect, logged) == 1
    with Server([device], Learning(path)) as server:
        assert starts(server, dialect, logged) == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [found.name for found in path.parent.iterdir()] == [path.name], "nothing half written stays"


def test_what_was_refused_is_kept_as_well(device: CountingDevice, tmp_path: Path, logged: Callable[[], int]) -> None:
    """The server is started again between the runs of one client."""
    for times, told in enumerate(((8, 0, 0), (7, 0, 0), (5, 0, 1))):
        with Server([device], Learning(tmp_path / "clients.json")) as server:
            with RawClient(server.port, dialects()["4.0.2"]) as client:
                assert client.hello.version == told
            assert eventually(partial(_more, logged, times))
    with Server([device], Learning(tmp_path / "clients.json")) as server:
        assert starts(server, dialects()["4.0.2"], logged) == 1


def test_the_log_says_what_to_do(device: CountingDevice, caplog: pytest.LogCaptureFixture) -> None:
    with Server([device], Learning()) as server:
        with RawClient(server.port) as client:
            pass
        said = f"{client.name}: left right after the greeting"
        assert eventually(lambda: said in caplog.text)
    assert re.search(
        r"another protocol version than 8\.0; the next one from 127\.0\.0\.1 is offered 7\.0: start the client "
        r"again \(--protocol with its version saves the search\)",
        caplog.text,
    )


def test_a_client_of_ours_is_told_at_once_and_teaches_nothing(
    device: CountingDevice, logged: Callable[[], int]
) -> None:
    with Server([device], Learning()) as server:
        assert starts(server, dialects()["4.0.2"], logged) == 4
        with RawClient(server.port, capabilities=Capability.ERRORS) as client:
            assert client.hello.version == newest().triple
            Adder(client)()
        with RawClient(server.port, capabilities=Capability.ERRORS):
            pass
        assert starts(server, dialects()["4.0.2"], logged) == 1


def test_what_says_nothing_about_versions(device: CountingDevice, tmp_path: Path, logged: Callable[[], int]) -> None:
    """Connections without a greeting, a first request that is none, a silence that is long, a server that stops."""
    path = tmp_path / "clients.json"
    with Server([device], Learning(path), limits=Limits(refusal_seconds=0.05)) as server:
        socket.create_connection(("127.0.0.1", server.port)).close()
        with RawClient(server.port, capabilities=None) as client:
            client.send(b"GET / HTTP/1.1\r\n\r\n")
            assert client.ended() == ""
        with RawClient(server.port) as client:
            client.command(99)
            assert client.ended() == ""
        with RawClient(server.port) as client:
            threading.Event().wait(0.1)
        assert eventually(lambda: server.clients == 0)
    with Server([device], Learning(path)) as server, RawClient(server.port) as client:
        server.stop()
        assert client.ended() == ""
    assert not logged()
    assert not path.exists()


def test_connections_of_one_client_one_after_the_other(device: CountingDevice, logged: Callable[[], int]) -> None:
    """As native clients begin: a question on each."""
    dialect = dialects()["5.0.0"]
    with Server([device], Learning()) as server:
        assert starts(server, dialect, logged) == 3
        for question in (messages.DeviceCount(), messages.GetAlignment(0), messages.GetMaxSize(0)) * 3:
            with native(server.port, dialect) as client:
                client.ask(question)
    assert logged() == 2


def test_many_connections_that_hang_up_at_once_move_on_by_one(
    device: CountingDevice, logged: Callable[[], int]
) -> None:
    with Server([device], Learning()) as server:
        clients = [RawClient(server.port, dialects()["7.0.0"]) for _ in range(8)]
        for client in clients:
            client.close()
        assert eventually(lambda: logged() == len(clients))
        assert starts(server, dialects()["7.0.0"], logged) == 1


def test_clients_of_different_versions_and_name_lengths_at_once(
    device: CountingDevice, logged: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    """One of each version, all from this address; then one of them asks for what nobody has."""
    with Server([device], Learning()) as server:
        works = []
        for dialect, name_length in zip(EVERY, (64, 128, 160, 96) * 3, strict=False):
            starts(server, dialect, logged)
            works.append(Adder(native(server.port, dialect, name_length)))
        for _ in range(2):
            for add in works:
                add()
        odd = works.pop(EVERY.index(dialects()["5.0.1"]))
        client = odd.client
        rotation = {"op": "QUANTIZE_I8_CONVROT", "params": params.Rotation(1024)}
        record = client.record(odd.buffer, (8,), id=9, src=(1,), name=b"here", **rotation)
        client.compute([9], [odd.a, record])
        assert client.ended() == ""
        assert eventually(lambda: "disconnected" in caplog.text)
        line = next(line for line in caplog.messages if line.startswith(client.name))
        assert re.search(r"protocol 5\.\d\.\d: disconnected: .*'here': operation 101: .*QUANTIZE_I8_CONVROT", line)
        for add in works:
            add()
            add.client.close()
        client.close()


def test_without_a_file_it_learns_for_its_own_life(device: CountingDevice, logged: Callable[[], int]) -> None:
    with Server([device], Learning()) as server:
        assert starts(server, dialects()["5.1.0"], logged) == 3
        assert starts(server, dialects()["5.1.0"], logged) == 1


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link(path: Path) -> None:
    path.symlink_to("/dev/zero")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no text": lambda path: path.write_bytes(b"\xff\xfe\0"),
    "half of it": lambda path: path.write_text('{"format": 1, "every'),
    "huge": lambda path: path.write_text(" " * (MAX_BYTES + 1)),
    "a folder": Path.mkdir,
    "a pipe": pipe,
    "a link": link,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_costs_what_it_knew(
    damage: str, device: CountingDevice, tmp_path: Path, logged: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "clients.json"
    DAMAGE[damage](path)
    with Server([device], Learning(path)) as server:
        assert f"{path}: not used, what it knew about clients is learnt again" in caplog.text
        assert starts(server, dialects()["5.0.1"], logged) == 3
        assert starts(server, dialects()["5.0.1"], logged) == 1
    with Server([device], Learning(path)) as server:
        assert starts(server, dialects()["5.0.1"], logged) == (3 if path.is_dir() else 1)


def test_a_disk_that_refuses_is_said_once(
    device: CountingDevice, tmp_path: Path, logged: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with Server([device], Learning(tmp_path / "file" / "clients.json")) as server:
        assert starts(server, dialects()["4.0.3"], logged) == 4
        assert starts(server, dialects()["4.0.3"], logged) == 1
    assert caplog.text.count("is not kept") == 1


def test_two_servers_share_the_file(device: CountingDevice, tmp_path: Path, logged: Callable[[], int]) -> None:
    """What one learns, the other does not overwrite."""
    path = tmp_path / "clients.json"
    with Server([device], Learning(path)) as one, Server([device], Learning(path)) as other:
        assert starts(one, dialects()["4.0.3"], logged) == 4
        assert starts(other, dialects()["8.0.0"], logged) == 1
    kept = path.read_text()
    assert "4.0.3" in kept
    assert "8.0.0" in kept


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SDRPC_STATE", str(tmp_path))
    assert default_path() == tmp_path / "clients.json"
    monkeypatch.delenv("SDRPC_STATE")
    assert default_path().parts[-2:] == ("sdrpc", "clients.json")
