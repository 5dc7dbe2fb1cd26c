"""What clients may have: each, and all together; counted by key or address, whatever connections they come over."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sdrpc.client import Keychain, RemoteDevice, connect
from sdrpc.engine.worker import Task
from sdrpc.errors import OutOfMemory, OverQuota
from sdrpc.fair_queue import FairQueue
from sdrpc.fair_queue import Path as ClientPath
from sdrpc.ggml.dialect import dialects
from sdrpc.key import Key
from sdrpc.server import Door, Keys, Limits, Policy, Server
from sdrpc.server.key_ring import KeyRing, NamedKey
from sdrpc.server.quotas import REMEMBERED, Accounts, Spent
from sdrpc.server.visitor import Visitor
from sdrpc.wire import messages
from sdrpc.wire.hello import Capability
from tests.server.conftest import CountingDevice, eventually
from tests.support.client import Adder, RawClient, busy
from tests.support.null import NullDevice

MIB = 1 << 20


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    return KeyRing(tmp_path / "keys.json")


@pytest.fixture
def door(ring: KeyRing, tmp_path: Path) -> Door:
    return Door(Policy(local=False), Keys(ring, tmp_path / "server.pem"))


@pytest.fixture
def open_devices(tmp_path: Path) -> Iterator[list[RemoteDevice]]:
    devices: list[RemoteDevice] = []
    yield devices
    for device in devices:
        device.close()


def enter(server: Server, key: Key, tmp_path: Path) -> RemoteDevice:
    (device,) = connect([server.endpoint], keychain=Keychain([(None, key)], tmp_path / f"{key.id.hex()}.json"))
    return device


def test_what_a_client_has_is_counted_over_all_its_connections(
    ring: KeyRing, door: Door, tmp_path: Path, open_devices: list[RemoteDevice]
) -> None:
    """Memory: 90 of 100 MiB for one key, over two connections; another one gets what is left, and all when they go."""
    laptop, guest = ring.add("laptop").key, ring.add("guest").key
    with Server([NullDevice(100 * MIB)], door=door, limits=Limits(bytes_of_all=95 * MIB)) as server:
        first, second, other = (enter(server, key, tmp_path) for key in (laptop, laptop, guest))
        open_devices += [first, second, other]
        assert first.memory() == (90 * MIB, 90 * MIB)
        first.allocate(60 * MIB)
        assert second.memory() == (30 * MIB, 90 * MIB)
        with pytest.raises(OutOfMemory):
            second.allocate(31 * MIB)
        buffer = second.allocate(30 * MIB)
        assert other.memory() == (5 * MIB, 90 * MIB)
        with pytest.raises(OutOfMemory):
            other.allocate(6 * MIB)
        second.free(buffer)
        first.close()
        assert eventually(lambda: second.memory() == (90 * MIB, 90 * MIB))


def test_from_this_machine_each_connection_without_a_key_counts_for_itself() -> None:
    server = Server([NullDevice(100 * MIB)], limits=Limits(buffers=1))
    with server, RawClient(server.port) as one, RawClient(server.port) as other:
        one.buffer(16)
        other.buffer(16)


def test_what_is_counted_under_what() -> None:
    key = NamedKey("laptop", Key.new(), "2026-01-01")
    local, far = Visitor("127.0.0.1", "127.0.0.1:4"), Visitor("10.0.0.7", "10.0.0.7:5")
    assert (local.account, far.account) == ("127.0.0.1:4", "10.0.0.7")
    assert (local.owner, far.owner) == ("127.0.0.1", "10.0.0.7")
    named = {Visitor(address, f"{address}:1", key).account for address in ("127.0.0.1", "10.0.0.7", "fd00::1")}
    assert len(named) == 1
    assert key.key.code not in named.pop()


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(compute_seconds_of_client=0.5), "this client's 0.5 seconds of computing within 60 minutes are used up"),
        (Limits(compute_seconds_of_all=0.5), "all clients' 0.5 seconds of computing within 60 minutes are used up"),
    ],
    ids=["client", "all"],
)
def test_seconds_of_computing(device: CountingDevice, limits: Limits, reason: str) -> None:
    """Who has used them up is told when there are more; with seconds of their own, others go on."""
    with Server([device], limits=limits) as server, RawClient(server.port, capabilities=Capability.ERRORS) as client:
        Adder(client)()
        server._accounts.charge(server._accounts._accounts[client.name], 0.6)
        client.post(messages.GraphRecompute(0, 1))
        said = client.ended()
        assert reason in said
        assert "there are some again in 3," in said
        if limits.compute_seconds_of_all > 1:
            with RawClient(server.port) as other:
                Adder(other)()


def test_runs_are_charged(device: CountingDevice) -> None:
    with Server([device]) as server, RawClient(server.port) as client:
        busy(client, products=20, n=256)
        client.buffer(16)
        (account,) = server._accounts._accounts.values()
        assert eventually(lambda: account.spent.seconds() > 0)
        assert server._accounts.spent.seconds() == account.spent.seconds()


def test_graphs_that_wait_are_counted() -> None:
    accounts = Accounts(Limits(computing=3, computing_of_client=2))
    one, other = accounts.enter("one"), accounts.enter("other")
    assert one is not None
    assert other is not None
    with accounts.computing(one), accounts.computing(one):
        with pytest.raises(OverQuota, match="2 graphs of this client wait or run"):
            accounts.computing(one).__enter__()
        with accounts.computing(other), pytest.raises(OverQuota, match="3 graphs of all clients"):
            accounts.computing(other).__enter__()
    with accounts.computing(one), accounts.computing(other):
        pass


def test_seconds_within_a_window() -> None:
    now = [0.0]
    spent = Spent(3600.0, lambda: now[0])
    for minute in range(120):
        now[0] = 60.0 * minute
        spent.add(1.0)
    assert spent.seconds() == pytest.approx(60, abs=1)
    assert len(spent._parts) <= 61
    assert 0 < spent.wait(60) <= 120
    now[0] += 3600
    assert spent.seconds() == 0


def test_accounts_are_remembered_for_what_was_computed_and_not_for_ever() -> None:
    accounts = Accounts(Limits())
    for number in range(REMEMBERED + 50):
        account = accounts.enter(str(number))
        assert account is not None
        accounts.charge(account, 1.0)
        accounts.leave(account)
    assert len(accounts._accounts) == REMEMBERED
    assert accounts.enter(str(REMEMBERED + 49)).spent.seconds() == 1.0  # type: ignore[union-attr]
    idle = accounts.enter("idle")
    assert idle is not None
    accounts.leave(idle)
    assert "idle" not in accounts._accounts


class Charged(FairQueue[Task]):
    """A queue in which a run of the client ``small`` counts as a millisecond and others' as a second, however long they
    take here. ``waited`` has, for each of its runs, how many of others began between its coming and its beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.small = "nobody yet"
        self.waited: list[int] = []
        self.others = 0
        self._before = 0

    def put(self, client: ClientPath, task: Task) -> None:
        if client[0] == self.small:
            self._before = self.others
        super().put(client, task)

    def take(self) -> Task:
        task = super().take()
        if task.client.path[0] == self.small:
            self.waited.append(self.others - self._before)
        else:
            self.others += 1
        return task

    def spent(self, client: ClientPath, seconds: float) -> None:
        super().spent(client, 0.001 if client[0] == self.small else 1.0)


def test_who_computes_little_waits_for_nobody_but_who_computes_already() -> None:
    """Ten clients compute without a pause; no run of theirs begins while another one waits, which now and then wants a
    millisecond. By arrival it would be ten."""
    dialect = dialects()["7.0.0"]  # where a graph runs again without a number
    device = CountingDevice()
    queue = device._worker._queue.waiting = Charged()
    stop = threading.Event()

    def compute(client: RawClient) -> None:
        busy(client, products=30, n=192)
        while not stop.is_set():
            client.post(messages.GraphRecompute(0))
            client.ask(messages.BufferGetBase(handle[client]))

    with Server([device], dialect) as server, ExitStack() as clients:
        crowd = [clients.enter_context(RawClient(server.port, dialect)) for _ in range(10)]
        handle = {client: client.buffer(16)[0] for client in crowd}
        threads = [threading.Thread(target=compute, args=(client,)) for client in crowd]
        for thread in threads:
            thread.start()
        try:
            assert eventually(lambda: queue.others >= 3 * len(crowd))
            with RawClient(server.port, dialect) as client:
                queue.small = client.name
                add = Adder(client)
                for _ in range(20):
                    add()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    device.close()
    assert queue.waited == [0] * 20, "runs of others that began before it did"
