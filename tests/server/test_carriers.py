"""Connections that carry data for another one: whose they may be, and what remains when one of them ends."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from sdrpc.client import Keychain, connect
from sdrpc.client import server as servers
from sdrpc.content import PIECE, digest
from sdrpc.device import Content
from sdrpc.errors import ConnectionLost, DeviceError, RemoteProtocolError, SdrpcError
from sdrpc.ggml.weight import Whole
from sdrpc.server import Door, Keys, Limits, Policy, Server, listener
from sdrpc.server.cache import Cache
from sdrpc.server.carriers import Carriers, Expected
from sdrpc.server.client_cache import CacheService
from sdrpc.server.key_ring import KeyRing
from sdrpc.server.stream import Stream
from sdrpc.wire import messages as m
from sdrpc.wire.framing import REPLY_HEADER
from sdrpc.wire.hello import Capability
from sdrpc.wire.ranges import MOST_BYTES, Named, Range, pack, pack_named
from tests.server.conftest import CountingDevice, Scene, eventually
from tests.support.client import RawClient
from tests.support.null import NullDevice

OURS = Capability.ERRORS | Capability.CARRIERS
DATA = np.random.default_rng(0).bytes(3 * PIECE)


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)


@pytest.fixture
def scene(caplog: pytest.LogCaptureFixture) -> Iterator[Scene]:
    limits = Limits(linger_seconds=0.1)
    with Server([CountingDevice()], limits=limits) as server, Scene(server, caplog) as scene:
        yield scene


def joined(scene: Scene, count: int = 2) -> tuple[RawClient, list[RawClient]]:
    """A client and its carriers."""
    client = scene.client(OURS)
    reply = client.ask(m.GetCarriers(count))
    assert reply.carriers == count
    carriers = [scene.client(OURS) for _ in range(count)]
    assert [carrier.ask(m.Carry(reply.token)).number for carrier in carriers] == list(range(count))
    return client, carriers


def test_data_comes_over_carriers_and_is_there_for_what_comes_next(scene: Scene) -> None:
    client, (first, second) = joined(scene)
    handle, base = client.buffer(len(DATA) + 100)
    client.post(m.SetRanges(handle, 2, pack([Range(64, len(DATA)), Range(0, 64), Range(len(DATA) + 64, 36)])))
    second.send(DATA[PIECE : 2 * PIECE], bytes(range(64)), bytes(range(36)))
    first.send(DATA[:PIECE], DATA[2 * PIECE :])
    got = client.get(client.record((handle, base), (len(DATA) + 100,), type="I8"), len(DATA) + 100)
    assert got == bytes(range(64)) + DATA + bytes(range(36))


def test_what_is_sent_later_to_the_same_place_stays(scene: Scene) -> None:
    """Though the carrier that gets it has nothing else to do, while another one still waits for what was to come
    before."""
    client, (first, second) = joined(scene)
    place = client.buffer(2 * PIECE)
    one, two, three, four = (bytes([value]) * PIECE for value in (1, 2, 3, 4))
    client.post(m.SetRanges(place[0], 2, pack([Range(0, PIECE), Range(PIECE, PIECE)])))
    client.post(m.SetRanges(place[0], 2, pack([Range(PIECE, PIECE), Range(0, PIECE)])))
    second.send(two, three)
    assert eventually(lambda: any(is_done_with(stream, PIECE) for stream in streams(scene)))
    first.send(one, four)
    assert client.get(client.record(place, (2 * PIECE,), type="I8"), 2 * PIECE) == three + four


def test_the_server_looks_for_other_bytes_while_data_comes(tmp_path: Path) -> None:
    """What belongs to the same place waits until all of the data is there."""
    service = CacheService(Cache(tmp_path, 1 << 20))
    with Server([CountingDevice()], cache_service=service) as server:

        def connected() -> RawClient:
            return RawClient(server.port, capabilities=OURS | Capability.CACHE)

        with connected() as client, connected() as carrier:
            place, other = client.buffer(4096), client.buffer(4096)
            carrier.ask(m.Carry(client.ask(m.GetCarriers(1)).token))
            client.post(m.SetRanges(place[0], 1, pack([Range(0, 2048)])))
            assert client.find(place[0], Named(2048, 2048, bytes(32))) == [False]
            assert client.find(other[0], Named(0, 4096, bytes(32))) == [False]
            client.post(m.SetRangesDigest(place[0], pack_named([Named(0, 2048, digest(DATA[:2048]))])))
            client.socket.settimeout(0.2)
            with pytest.raises(TimeoutError):
                client.socket.recv(1)
            client.socket.settimeout(60)
            carrier.send(DATA[:2048])
            assert client.receive(9) == REPLY_HEADER.pack(1) + b"\0"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (m.SetRanges(1, 2, pack([Range(0, 65)])), "65 bytes at 0 are not inside buffer 1 of 64"),
        (m.SetRanges(1, 2, pack([Range(2**64 - 1, 2)])), "are not inside buffer 1"),
        (m.SetRanges(1, 2, pack([Range(0, 64), Range(64, 1)])), "1 bytes at 64 are not inside buffer 1"),
        (m.SetRanges(1, 2, pack([Range(32, 32), Range(0, 33)])), "ranges of buffer 1 overlap"),
        (m.SetRanges(1, 2, pack([Range(0, 64)] * 256)), "ranges of buffer 1 overlap"),
        (m.SetRanges(1, 2, b"12345"), "ranges of 5 bytes"),
        (m.SetRanges(1, 2, b""), "ranges of 0 bytes"),
        (m.SetRanges(1, 3, pack([Range(0, 64)])), "3 carriers where there are 2"),
        (m.SetRanges(1, 255, pack([Range(0, 64)])), "255 carriers where there are 2"),
        (m.SetRanges(1, 0, pack([Range(0, 64)])), "there are no carriers"),
        (m.SetRanges(7, 2, pack([Range(0, 64)])), "buffer 0x7 does not exist"),
        (m.SetRanges(1, 2, bytes(MOST_BYTES + 16)), f"SET_RANGES: {MOST_BYTES + 25} bytes instead of"),
        (m.Carry(bytes(32)), "this connection has a session of its own"),
    ],
)
def test_what_makes_no_sense_is_refused_on_the_first_connection(scene: Scene, message: object, reason: str) -> None:
    client, carriers = joined(scene)
    client.buffer(64)
    client.post(message)
    assert reason in client.ended()
    assert [carrier.ended() for carrier in carriers] == ["", ""]


def test_nobody_else_becomes_a_carrier(scene: Scene) -> None:
    client, _ = joined(scene)
    token = client.ask(m.GetCarriers(1)).token
    for shown in (bytes(32), token[:-1] + bytes([token[-1] ^ 1])):
        stranger = scene.client(OURS)
        stranger.post(m.Carry(shown))
        assert "nobody waits for this connection" in stranger.ended()
    busy = scene.client(OURS)
    busy.ask(m.DeviceCount())
    busy.post(m.Carry(token))
    assert "has a session of its own" in busy.ended()
    carrier, late = scene.client(OURS), scene.client(OURS)
    assert carrier.ask(m.Carry(token)).number == 0
    late.post(m.Carry(token))
    assert "nobody waits for this connection" in late.ended()


def test_a_token_is_of_no_use_to_another_owner_and_after_its_session() -> None:
    expected, carriers = Expected(), Carriers("key 1", 1)
    expected.add(carriers)
    assert expected.find(carriers.token, "key 1") is carriers
    for token, owner in ((carriers.token, "key 2"), (carriers.token, "127.0.0.1"), (bytes(32), "key 1")):
        with pytest.raises(RemoteProtocolError, match="nobody waits"):
            expected.find(token, owner)
    expected.remove(carriers)
    with pytest.raises(RemoteProtocolError, match="nobody waits"):
        expected.find(carriers.token, "key 1")


def test_nobody_waits_for_a_carrier_that_has_left() -> None:
    """It may have gone before it began to work; what was asked of it by then is over, too."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        stream = Stream(listener.accept()[0], "somebody", "127.0.0.1", Limits())
        carriers = Carriers("127.0.0.1", 1)
        _, carrier = carriers.join(stream)
        before = carrier.ask(lambda _: None)
        carrier.leave()
        with pytest.raises(ConnectionLost, match="somebody"):
            before.result(0)
        with pytest.raises(ConnectionLost, match="somebody"):
            carriers.finish(carriers.begin([lambda _: None]))
        with pytest.raises(RemoteProtocolError, match="nobody waits"):
            carriers.join(stream)
        stream.close()


def test_a_carrier_that_is_done_first_is_not_idle(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that stops lets its client finish: it would end with one of its carriers."""
    looks = 0

    def at_work() -> bool:
        nonlocal looks
        looks += 1
        return Server._at_work(scene.server)

    monkeypatch.setattr(listener, "_QUIET_SECONDS", 0.0)
    monkeypatch.setattr(scene.server, "_at_work", at_work)
    client, (first, second) = joined(scene)
    place = client.buffer(len(DATA))
    client.post(m.SetRanges(place[0], 2, pack([Range(0, len(DATA))])))
    client.post(m.GetTensor(client.record(place, (len(DATA),), type="I8"), 0, len(DATA)))
    first.send(DATA[:PIECE], DATA[2 * PIECE :])
    assert eventually(lambda: any(is_done_with(stream, 2 * PIECE) for stream in streams(scene)))
    scene.server.stop(grace=600)
    assert eventually(lambda: looks > 2)
    monkeypatch.setattr(listener, "_QUIET_SECONDS", 1e9)  # the client has nothing to do for a moment
    second.send(DATA[PIECE : 2 * PIECE])
    assert client.receive(8 + len(DATA)) == REPLY_HEADER.pack(len(DATA)) + DATA
    monkeypatch.setattr(listener, "_QUIET_SECONDS", 0.0)
    assert eventually(lambda: not scene.server.clients), "when it has nothing to do any more, all of them are told"


def streams(scene: Scene) -> list[Stream]:
    return [client.stream for client in list(scene.server._clients.values())]


def is_done_with(stream: Stream, size: int) -> bool:
    """Whether a carrier has received so many bytes and waits for more to do."""
    return stream.received > size and stream.doing == "waiting for data to carry"


def test_a_client_without_the_capability_has_no_such_commands(scene: Scene) -> None:
    client = scene.client(Capability.ERRORS)
    client.post(m.GetCarriers(2))
    assert "has no command 241" in client.ended()


def test_carriers_end_with_their_client_and_when_it_asks_for_others(scene: Scene) -> None:
    before = scene.server.clients
    client, carriers = joined(scene)
    assert client.ask(m.GetCarriers(0)) == m.GetCarriersReply(0, bytes(32))
    assert [carrier.ended() for carrier in carriers] == ["", ""]
    assert eventually(lambda: scene.server.clients == before + 1)
    reply = client.ask(m.GetCarriers(255))
    assert reply.carriers == scene.server.limits.carriers
    carrier = scene.client(OURS)
    carrier.ask(m.Carry(reply.token))
    client.socket.close()
    assert carrier.ended() == ""
    assert eventually(lambda: scene.server.clients == before)


@pytest.mark.parametrize("gone", ["a carrier", "the client"])
def test_who_vanishes_in_the_middle_takes_all_with_it(scene: Scene, gone: str) -> None:
    """One of the connections ends while data is under way: all others of the client end, and its memory comes back."""
    before = scene.server.clients
    client, carriers = joined(scene)
    handle, _ = client.buffer(len(DATA))
    client.post(m.SetRanges(handle, 2, pack([Range(0, len(DATA))])))
    carriers[0].send(DATA[:1000])
    carriers[1].send(DATA[PIECE : 2 * PIECE - 1])
    carriers[1].socket.close()
    if gone == "the client":
        client.socket.close()
    else:
        assert client.ended() == ""
    assert carriers[0].ended() == ""
    assert eventually(lambda: scene.server.clients == before)
    assert eventually(lambda: scene.devices[0].held == scene.held)


def test_a_carrier_that_ended_before_is_noticed(scene: Scene) -> None:
    client, carriers = joined(scene)
    handle, _ = client.buffer(64)
    carriers[1].socket.close()
    client.post(m.SetRanges(handle, 2, pack([Range(0, 32), Range(32, 32)])))
    carriers[0].send(bytes(32))
    assert client.ended() == ""


def test_carriers_have_their_client_s_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encrypted upload over several connections, each of which shows the key. With another key, or none, nobody can
    be a carrier of this client, not even by its token."""
    monkeypatch.setattr(servers, "LEAST_BYTES", 1)
    ring = KeyRing(tmp_path / "keys.json")
    laptop = ring.add("laptop").key
    door = Door(Policy(), Keys(ring, tmp_path / "server.pem"))
    tokens: list[bytes] = []
    opened = servers.opened
    monkeypatch.setattr(servers, "opened", lambda reply, another: tokens.append(reply.token) or opened(reply, another))
    with Server([CountingDevice()], door=door) as server:
        (device,) = connect([server.endpoint], keychain=Keychain([(None, laptop)], tmp_path / "known.json"))
        buffer = device.allocate(len(DATA))

        def stranger(_: int) -> None:
            if not tokens:
                return
            client = RawClient(server.port, capabilities=OURS)
            client.post(m.Carry(tokens.pop()))
            assert "nobody waits for this connection" in client.ended()
            client.socket.close()

        device.upload(buffer, [Content(0, len(DATA), Whole(lambda: memoryview(DATA)))], stranger)
        assert bytes(device.read(buffer, 0, len(DATA))) == DATA
        assert not tokens
        device.close()
        assert eventually(lambda: server.clients == 0)


def test_what_goes_wrong_with_a_carrier_s_data_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is in the middle of sending then, and learns the reason from its first connection."""
    monkeypatch.setattr(servers, "LEAST_BYTES", 1)
    device = NullDevice()

    def write(*_: object) -> None:
        raise DeviceError("NULL: the tape is full")

    monkeypatch.setattr(device, "write", write)
    size = 64 << 20
    with Server([device]) as server:
        (client,) = connect([server.endpoint])
        buffer = client.allocate(size)
        with pytest.raises(SdrpcError, match="the tape is full"):
            client.upload(buffer, [Content(0, size, Whole(lambda: bytes(size)))], lambda _: None)
        client.close()
        assert eventually(lambda: server.clients == 0)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_what_went_wrong_first_is_told(behind: bool, first: bool) -> None:
    """A client that loses a carrier ends the others: that one was lost was told as the reason."""
    lost, full, done = Future[None](), Future[None](), Future[None]()
    lost.set_exception(ConnectionLost("peer", "carrying data"))
    full.set_exception(DeviceError("NULL: the tape is full"))
    done.set_result(None)
    one, other = ([lost, done], [full]) if behind else ([done, *((full, lost) if first else (lost, full))], [])
    with pytest.raises(DeviceError, match="the tape is full"):
        Carriers("", 2).finish(one, other)


def test_carriers_are_as_patient_as_their_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server takes nothing for longer than connecting may last, as one that sleeps: who watches is told."""
    monkeypatch.setattr(servers, "LEAST_BYTES", 1)
    device, told, size = NullDevice(), Event(), 64 << 20
    write = device.write
    monkeypatch.setattr(device, "write", lambda *arguments: told.wait(60) and write(*arguments))
    with Server([device]) as server:
        (client,) = connect([server.endpoint])
        with client.watched(lambda _: told.set()):
            client.upload(client.allocate(size), [Content(0, size, Whole(lambda: bytes(size)))], lambda _: None)
        assert client.sent == size
        assert told.is_set()
        client.close()
        assert eventually(lambda: server.clients == 0)


def test_carriers_that_are_called_otherwise_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each piece goes to the carrier of a number: over others it would get to another place."""
    monkeypatch.setattr(servers, "LEAST_BYTES", 1)
    caplog.set_level("INFO", "sdrpc.client")
    join = Carriers.join
    monkeypatch.setattr(Carriers, "join", lambda self, stream: (1, join(self, stream)[1]))
    with Server([CountingDevice()]) as server:
        (device,) = connect([server.endpoint])
        buffer = device.allocate(len(DATA))
        device.upload(buffer, [Content(0, len(DATA), Whole(lambda: memoryview(DATA)))], lambda _: None)
        assert bytes(device.read(buffer, 0, len(DATA))) == DATA
        device.close()
    assert "data goes over one connection: carrier 0 is called 1" in caplog.text
