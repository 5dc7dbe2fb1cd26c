"""What a client has in memory, another one of the same owner need not send: it gets the same memory, and each goes on
as if it were alone."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdrpc.client import Keychain, connect
from sdrpc.client.names import Names
from sdrpc.content import PIECE, SMALLEST, digest
from sdrpc.device import Buffer, Content, Frozen, Mark
from sdrpc.engine import pages
from sdrpc.engine.device import LocalDevice
from sdrpc.engine.memory import HUGE, host_storage
from sdrpc.engine.precision import Precision
from sdrpc.ggml.weight import Whole
from sdrpc.key import Key
from sdrpc.server import Cache, CacheService, Door, Keys, Limits, Server, finder, live
from sdrpc.server.addresses import Region
from sdrpc.server.finder import Finder
from sdrpc.server.incoming import HASHED
from sdrpc.server.key_ring import KeyRing
from sdrpc.wire import messages
from sdrpc.wire.hello import Capability
from sdrpc.wire.ranges import Named, pack_named
from tests.server.conftest import CountingDevice, eventually
from tests.support.accelerator import Untouchable
from tests.support.client import RawClient
from tests.support.content import SIZE, fnv, noise

OURS = Capability.ERRORS | Capability.CACHE
AT = 12_352
"""Where :data:`SIZE` bytes are in their buffer: three pages and 64 bytes, as tensors lie at multiples of 64. So there
are odd bytes before and behind whole pages."""
ROOM = AT + SIZE + 500_000

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
shares_memory = pytest.mark.skipif(
    sys.platform != "linux"
    or (HUGE_PAGES.exists() and not {"[never]", "[deny]"} & set(HUGE_PAGES.read_text().split())),
    reason="buffers share memory on Linux only; in huge pages the two edges are larger than what is shared here",
)


class Accelerator(Untouchable, CountingDevice):
    """Of which whole buffers have one memory, or none of them."""


class Place:
    """A client with a tensor of bytes in the middle of a buffer."""

    def __init__(self, server: Server, ours: bool = True, at: int = AT, device: int = 0) -> None:
        self.client = RawClient(server.port, server.dialect, capabilities=OURS if ours else Capability(0))
        self.ours, self.device = ours, device
        self.buffer = self.client.buffer(ROOM, device)
        self.tensor = self.client.record(self.buffer, (SIZE,), at=at, type="I8")

    @property
    def offered(self) -> bool:
        """Whether the server said that it pays to ask."""
        return Capability.CACHE in self.client.hello.capabilities

    def has(self, data: bytes) -> bool:
        """Ask for ``data`` by its name: whether the tensor is that now."""
        if self.ours:
            at = self.tensor.data - self.buffer[1]
            return self.client.find(self.buffer[0], Named(at, SIZE, digest(data))) == [True]
        return bool(self.client.ask(messages.SetTensorHash(self.tensor, 0, fnv(data))).result)

    def send(self, data: bytes, offset: int = 0) -> Place:
        self.client.set(self.tensor, data, offset)
        self.client.ask(messages.GetAlignment(0))  # answered in order: it has all been received
        return self

    def read(self) -> bytes:
        return self.client.get(self.tensor, SIZE)

    def compute(self) -> None:
        """Run a graph that reads the tensor: it is about to be used."""
        result = self.client.record(self.client.buffer(4000, self.device), (1000,), id=2, op="ADD", src=(1, 1), flags=2)
        self.client.compute([2], [self.client.record(self.buffer, (1000,), at=AT, id=1), result], self.device, uid=7)

    def close(self) -> None:
        self.client.close()


@pytest.fixture(scope="module")
def devices() -> Iterator[list[CountingDevice]]:
    made = [CountingDevice(), Accelerator("CPU1")]
    yield made
    for device in made:
        device.close()


@pytest.fixture
def scene(devices: list[CountingDevice]) -> Iterator[Callable[..., Place]]:
    """Makes clients of a server."""
    places: list[Place] = []
    with Server(devices) as server:

        def place(**options: object) -> Place:
            places.append(Place(server, **options))  # type: ignore[arg-type]
            return places[-1]

        yield place
        for each in places:
            each.close()
    assert eventually(lambda: sum(device.held for device in devices) == 0)


def shared_memory() -> int:
    """Bytes that this process has for buffers, each page counted once however often it is mapped."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss_Shmem:"))


both = pytest.mark.parametrize("ours", [True, False], ids=["sdrpc", "native"])
each_device = pytest.mark.parametrize("device", [0, 1], ids=["pages", "whole"])


def asked(place: Place, *questions: tuple[int, bytes]) -> list[bool]:
    """What the client hears to questions for several places at once: offset in its buffer, and what shall be there."""
    client = place.client
    for at, data in questions:
        client.post(messages.SetRangesDigest(place.buffer[0], pack_named([Named(at, len(data), digest(data))])))
    return [client.receive(9)[8] == 1 for _ in questions]


def two_look_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a thread that looks for something waits for another one that does."""
    together, find = threading.Barrier(2), live.Live.find

    def meeting(*arguments: Any) -> bool:
        together.wait(60)
        return find(*arguments)

    monkeypatch.setattr(live.Live, "find", meeting)


@each_device
def test_several_are_looked_for_at_the_same_time(
    scene: Callable[..., Place], monkeypatch: pytest.MonkeyPatch, device: int
) -> None:
    first = scene(device=device).send(noise(1))
    second = scene(device=device)
    two_look_or_none(monkeypatch)
    assert asked(second, (AT, noise(1)), (AT + SIZE, noise(2, 5000))) == [True, False]
    assert second.read() == first.read()


def test_one_question_for_much_is_worked_on_by_several(
    scene: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene().send(noise(1))
    two_look_or_none(monkeypatch)
    monkeypatch.setattr(finder, "TOGETHER", SIZE)
    second = scene()
    wanted = Named(AT + SIZE, 5000, digest(b"")), Named(AT, SIZE, digest(noise(1)))
    assert second.client.find(second.buffer[0], *wanted) == [False, True]


def test_nothing_else_is_done_before_it_is_answered(
    scene: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what is found could come to its place behind what was sent for it later."""
    scene().send(noise(1))
    second = scene()
    order: list[str] = []
    find, receiving = live.Live.find, CountingDevice.receiving

    def slowly(*arguments: Any) -> bool:
        time.sleep(0.2)
        found = find(*arguments)
        order.append("found")
        return found

    def noted(*arguments: Any) -> Any:
        order.append("received")
        return receiving(*arguments)

    monkeypatch.setattr(live.Live, "find", slowly)
    monkeypatch.setattr(CountingDevice, "receiving", noted)
    second.client.post(messages.SetRangesDigest(second.buffer[0], pack_named([Named(AT, SIZE, digest(noise(1)))])))
    second.client.set(second.tensor, noise(2))
    assert second.client.receive(9)[8] == 1
    assert second.read() == noise(2)
    assert order == ["found", "received"]


def test_a_question_that_fails_keeps_no_memory(
    scene: Callable[..., Place], devices: list[CountingDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Least of all where there was none left."""
    scene().send(noise(1))
    second = scene()
    memory = weakref.ref(list(devices[0]._buffers.values())[-1])

    def fails(*_: object) -> bool:
        raise MemoryError

    monkeypatch.setattr(live.Live, "find", fails)
    gc.collect()
    gc.disable()
    try:
        second.client.post(messages.SetRangesDigest(second.buffer[0], pack_named([Named(AT, SIZE, bytes(32))])))
        assert "no memory left" in second.client.ended()
        assert eventually(lambda: memory() is None)
    finally:
        gc.enable()


def test_what_has_begun_is_waited_for_where_not_all_of_a_question_can(
    devices: list[CountingDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its memory would be freed while somebody writes to it."""
    under_way: list[Future[Any]] = []

    def ask(*_: object) -> Future[Any]:
        if under_way:
            raise MemoryError
        under_way.append(Future())
        return under_way[0]

    everything = live.Live()
    monkeypatch.setattr(everything.questions, "ask", ask)
    monkeypatch.setattr(finder, "TOGETHER", 32)
    one = Finder(devices, everything, None, "", ("", ""), lambda _: None, 1)
    buffer = devices[0].allocate(64)
    places = [finder.Place(Region(1, 0, 64, 0, buffer), at, 32) for at in (0, 32)]
    with pytest.raises(MemoryError):
        one.begin([finder.Question(place, bytes(32)) for place in places])
    devices[0].free(buffer)
    threading.Timer(0.1, under_way[0].set_result, [[False]]).start()
    one.finish()
    assert under_way[0].done()


def test_what_is_looked_for_at_one_place_is_looked_for_in_turn(
    scene: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it could be noted that a place holds what another question has just replaced."""
    scene().send(noise(1))
    second = scene()
    waits = threading.Event()
    order: list[str] = []
    find, finish = live.Live.find, Finder.finish

    def slowly(*arguments: Any) -> bool:
        order.append("began")
        assert waits.wait(60), "the second one is not begun before"
        found = find(*arguments)
        order.append("ended")
        return found

    def waiting(finder: Finder) -> None:
        waits.set()
        finish(finder)

    monkeypatch.setattr(live.Live, "find", slowly)
    monkeypatch.setattr(Finder, "finish", waiting)
    assert asked(second, (AT, noise(1)), (AT + SIZE - 1, noise(2, 5000))) == [True, False]
    assert order == ["began", "ended"] * 2
    assert second.read()[: SIZE - 1] == noise(1)[: SIZE - 1]


@both
@each_device
def test_a_second_client_sends_nothing(scene: Callable[..., Place], ours: bool, device: int) -> None:
    data = noise(1)
    first = scene(ours=ours, device=device)
    assert not first.offered
    assert not first.has(data) if not ours else True
    first.send(data)
    second = scene(ours=ours, device=device)
    assert second.offered == ours
    assert not second.has(noise(2))
    assert second.has(data)
    assert second.read() == first.read() == data
    third = scene(ours=ours, device=device, at=AT + 192)  # elsewhere in its page
    assert third.has(data)
    assert third.read() == data


@each_device
@pytest.mark.parametrize(
    ("size", "looks"), [(SMALLEST, False), (HASHED, False), (HASHED + 1, True), (PIECE + SMALLEST, True)]
)
def test_what_is_small_is_known_when_it_comes(
    scene: Callable[..., Place], monkeypatch: pytest.MonkeyPatch, device: int, size: int, looks: bool
) -> None:
    """As a whole: not a small rest of what is large."""
    monkeypatch.setattr(live, "WORTH_ASKING", 1)
    looked_at: list[int] = []
    look_at = live.Live._look_at

    def looking(all_: live.Live, owner: str, held: live.Held, *how: Any) -> None:
        looked_at.append(held.spot.size)
        look_at(all_, owner, held, *how)

    monkeypatch.setattr(live.Live, "_look_at", looking)
    data, first = noise(1, size), scene(device=device)
    first.client.set(first.client.record(first.buffer, (size,), at=64, type="I8"), data)
    first.client.ask(messages.GetAlignment(0))
    second = scene(device=device)
    assert second.client.find(second.buffer[0], Named(128, size, digest(data))) == [True]
    assert looked_at == [size] * looks
    assert second.client.get(second.client.record(second.buffer, (size,), at=128, type="I8"), size) == data


def test_one_question_looks_at_so_much_and_no_more(
    scene: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MOST", 1)
    for seed in range(3):
        scene().send(noise(seed))
    last = scene()
    assert [last.has(noise(2)) for _ in range(3)] == [False, False, True]


def test_so_does_one_that_asks_for_many_tensors(scene: Callable[..., Place], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each of 256 small ones could take a thread as long as a gigabyte does."""
    monkeypatch.setattr(live, "MOST", 1)
    monkeypatch.setattr(live, "WORTH_ASKING", 1)
    first, size = scene(), HASHED + 1
    wanted = [Named(at, size, digest(noise(at, size))) for at in (64, 64_000)]
    for at, _, _ in wanted:
        first.client.set(first.client.record(first.buffer, (size,), at=at, type="I8"), noise(at, size))
    first.client.ask(messages.GetAlignment(0))
    second = scene()
    assert second.client.find(second.buffer[0], *wanted) == [True, False]
    assert second.client.find(second.buffer[0], *wanted) == [True, True]


@pytest.mark.parametrize("known", [False, True])
def test_what_is_written_to_while_it_is_copied_is_not_given(
    scene: Callable[..., Place], monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Also where its digest is known, so that nobody looks at the copy."""
    data = noise(1)
    scene(device=1).send(data)
    if known:
        assert scene(device=1).has(data)
    copy = CountingDevice.copy

    def late(device: CountingDevice, source: Buffer, at: int, target: Buffer, there: int, size: int) -> None:
        device.write(source, at + size - 1, bytes([data[-1] ^ 1]))
        copy(device, source, at, target, there, size)

    monkeypatch.setattr(CountingDevice, "copy", late)
    third = scene(device=1)
    assert not third.has(data)
    monkeypatch.setattr(CountingDevice, "copy", copy)
    assert not third.has(data), "nobody has it any more"


@shares_memory
def test_both_have_one_copy_until_both_are_gone(scene: Callable[..., Place], devices: list[CountingDevice]) -> None:
    data = noise(1)
    before = shared_memory()
    first = scene().send(data)
    one = shared_memory() - before
    assert one >= SIZE
    second = scene()
    assert second.has(data)
    assert second.read() == data
    assert shared_memory() - before < one + 100_000, "two edges, of a page each"
    first.close()
    assert eventually(lambda: devices[0].held == ROOM), "its buffer is freed"
    assert second.read() == data
    third = scene()
    assert third.has(data), "from the second"
    assert third.read() == data
    assert shared_memory() - before < one + 200_000
    second.close()
    third.close()
    assert eventually(lambda: shared_memory() - before < 100_000)


@shares_memory
@pytest.mark.parametrize("late", [False, True])
def test_what_came_from_the_cache_is_had_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    """Its digest is known before anybody asks for it. That may be true no longer when it is frozen."""
    data, device = noise(1), CountingDevice()
    cache = CacheService(Cache(tmp_path / "weights", 1 << 30))
    with Server([device], cache_service=cache) as server:
        first = Place(server)
        assert not first.has(data)
        first.send(data).close()
        assert eventually(lambda: device.held == 0)
        cache.flush()
        before = shared_memory()
        second, third = Place(server), Place(server)
        assert second.has(data)
        one = shared_memory() - before
        cache.cache.drop(digest(data))
        freeze = CountingDevice.freeze

        def freeze_late(device: CountingDevice, buffer: Buffer, at: int, size: int) -> Frozen | None:
            device.write(buffer, at + size // 2, b"late")
            return freeze(device, buffer, at, size)

        if late:
            monkeypatch.setattr(CountingDevice, "freeze", freeze_late)
        assert third.has(data) != late
        if not late:
            assert third.read() == second.read() == data
            assert shared_memory() - before < one + 100_000
            marks = [mark for buffer in device._buffers.values() for mark in buffer.marks._marks]
            assert [mark.name for mark in marks] == [marks[0].name] * 2, "what is made of it does for both"
            assert marks[0].name
        for place in (second, third):
            place.close()
        assert eventually(lambda: device.held == 0)
    cache.close()
    device.close()


@shares_memory
def test_bytes_that_were_not_shared_are_given_back(scene: Callable[..., Place]) -> None:
    """Of a buffer whose client has left only what another one has stays."""
    before = shared_memory()
    first = scene().send(noise(1))
    rest = first.client.record(first.buffer, (ROOM - AT - SIZE,), at=AT + SIZE, type="I8")
    first.client.set(rest, noise(2, ROOM - AT - SIZE))
    second = scene()
    assert second.has(noise(1))
    first.close()
    assert eventually(lambda: shared_memory() - before < SIZE + 100_000)
    assert second.read() == noise(1)


def _sets(place: Place) -> None:
    place.send(b"\1" * 100_000, 2_000_000)


def _fills(place: Place) -> None:
    place.client.post(messages.MemsetTensor(place.tensor, 2_000_000, 100_000, 1))


def _clears(place: Place) -> None:
    place.client.post(messages.BufferClear(place.buffer[0], 1))


def _copies(place: Place) -> None:
    part = place.client.record(place.buffer, (100_000,), at=AT + 2_000_000, type="I8")
    other = place.client.record(place.client.buffer(100_000, place.device), (100_000,), type="I8")
    assert place.client.ask(messages.CopyTensor(other, part)).result


def _computes(place: Place) -> None:
    elements = 1_000_000
    x = place.client.record(place.buffer, (elements,), at=AT, id=1)
    doubled = place.client.record(place.buffer, (elements,), at=AT, id=2, op="ADD", src=(1, 1), flags=2)
    place.client.compute([2], [x, doubled], place.device, uid=1)


WRITES = {"set": _sets, "fill": _fills, "clear": _clears, "copy": _copies, "compute": _computes}


@pytest.mark.parametrize("by_first", [True, False], ids=["first", "second"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@each_device
def test_what_one_writes_is_its_own(
    scene: Callable[..., Place],
    devices: list[CountingDevice],
    device: int,
    write: Callable[[Place], None],
    by_first: bool,
) -> None:
    data = np.random.default_rng(1).normal(size=SIZE // 4).astype("f4").tobytes()
    first, second = scene(device=device).send(data), scene(device=device)
    assert second.has(data)
    first.compute()
    second.compute()
    assert second.read() == data
    assert devices[1]._storages.spared == (ROOM if device else 0)
    writer, other = (first, second) if by_first else (second, first)
    write(writer)
    changed = writer.read()
    assert changed != data
    assert other.read() == data
    assert devices[1]._storages.spared == 0
    third = scene(device=device)
    assert third.has(data)
    assert third.read() == data
    fourth = scene(device=device)
    assert not fourth.has(changed) or fourth.read() == changed


def test_a_write_that_has_begun_is_nobody_else_s(scene: Callable[..., Place]) -> None:
    """Half of a tensor's new bytes have come when others ask for the old ones, and for the new."""
    old, new = noise(1), noise(2)
    first, second = scene().send(old), scene()
    assert second.has(old)
    first.client.begin_set(first.tensor, SIZE)
    first.client.send(new[: SIZE // 2])
    third = scene()
    assert third.has(old), "of the second"
    assert not third.has(new)
    assert second.read() == old
    first.client.send(new[SIZE // 2 :])
    assert first.read() == new
    assert second.read() == old
    assert third.has(new)
    assert third.read() == new


@each_device
def test_what_was_written_over_is_found_no_more(scene: Callable[..., Place], device: int) -> None:
    first = scene(device=device).send(noise(1)).send(noise(2))
    second = scene(device=device)
    assert not second.has(noise(1))
    assert second.has(noise(2))
    first.send(noise(3))
    third = scene(device=device)
    assert third.has(noise(3))
    assert third.read() == noise(3)


def test_a_hash_says_which_bytes_are_meant_and_never_that_these_are_they(scene: Callable[..., Place]) -> None:
    """Who sends other bytes than it asked for plants nothing: names are computed of what is there."""
    first = scene(ours=False)
    assert not first.has(noise(1))
    first.send(noise(2))
    second = scene(ours=False)
    assert not second.has(noise(1))
    assert second.has(noise(2))
    assert second.read() == noise(2)


def test_memory_beyond_what_clients_may_have_is_not_shared_but_copied(devices: list[CountingDevice]) -> None:
    """Two buffers are all that there may be: a third copy, which is what writing to both could make of one that is
    shared, is not promised."""
    data = noise(1)
    with Server(devices, limits=Limits(bytes_of_all=2 * ROOM + 1000)) as server:
        first, second = Place(server).send(data), Place(server)
        assert second.has(data)
        first.send(noise(2))
        assert second.read() == data
        assert first.read() == noise(2)
        for place in (first, second):
            place.close()


def test_what_is_too_small_to_be_asked_for_is_not_noted(
    scene: Callable[..., Place], devices: list[CountingDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that come one by one would each take a hundred of our memory."""
    noted: list[int] = []

    def mark(buffer: Buffer, offset: int, size: int) -> Mark:
        noted.append(size)
        return Mark(offset, offset + size)

    monkeypatch.setattr(devices[0], "mark", mark)
    place = scene()
    for offset in range(0, 200, 2):
        place.send(b"x", offset)
    assert not noted
    place.send(noise(1))
    assert noted == [SIZE]


@shares_memory
def test_a_descriptor_that_is_not_left_costs_the_sharing_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python keeps one of its own for each mapping; whoever asked for memory was thrown out."""
    mapped, before = mmap.mmap, pages._files.count

    def none_is_left(descriptor: int, size: int) -> mmap.mmap:
        if descriptor >= 0:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return mapped(descriptor, size)

    monkeypatch.setattr(mmap, "mmap", none_is_left)
    storage = host_storage(HUGE)
    assert storage.pages is None
    assert storage.host is not None
    assert len(storage.host) == HUGE
    assert pages._files.count == before


@shares_memory
def test_memory_to_share_leaves_descriptors_for_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each such buffer takes two. Without them, memory is what it always was."""
    gc.collect()
    most = pages._files.count + 2
    monkeypatch.setattr(pages, "_most_files", lambda: most)
    made = [host_storage(HUGE) for _ in range(4)]
    assert [storage.pages is not None for storage in made] == [True, True, False, False]
    del made
    assert pages._files.count == most - 2
    assert host_storage(HUGE).pages is not None


@each_device
def test_nobody_else_s_are_found(tmp_path: Path, devices: list[CountingDevice], device: int) -> None:
    """Nor is a buffer ever compared with a stranger's."""
    ring = KeyRing(tmp_path / "keys.json")
    laptop, guest = ring.add("laptop").key, ring.add("guest").key
    door = Door(keys=Keys(ring, tmp_path / "server.pem"))
    data = noise(1)
    there = []

    def sends(key: Key | None) -> bool:
        """Whether a client with ``key`` has to send the data. It stays."""
        given = [(None, key)] if key else []
        remotes = connect([server.endpoint], keychain=Keychain(given, tmp_path / f"{id(key)}.json"))
        there.extend(remotes)
        remote = remotes[device]
        remote._server.names = Names(tmp_path / f"names {id(key)}")
        buffer = remote.allocate(SIZE)
        remote.upload(buffer, [Content(0, SIZE, Whole(lambda: data))], lambda _: None)
        assert bytes(remote.read(buffer, 0, SIZE)) == data
        return remote.sent >= SIZE

    with Server(devices, door=door) as server:
        assert [sends(key) for key in (laptop, laptop, guest, guest, laptop)] == [True, False, True, False, False]
        assert [sends(None), sends(None)] == [True, False]
        if device:
            one, two, other, others, three, nobody, nobody_s = devices[1]._buffers.values()
            assert [each.twin for each in (one, other, nobody)] == [None] * 3
            assert [each.twin and each.twin() for each in (others, nobody_s)] == [other, nobody]
            assert {each.twin and each.twin() for each in (two, three)} <= {one, two}
        for remote in there:
            remote.close()


@pytest.mark.parametrize("type", ["F32", "F16"])
def test_kernels_are_made_once_for_both(type: str) -> None:
    """What is computed with weights in another dtype is kept once for all clients that have them, until they write to
    theirs; and results stay right. One client alone has none beside float16: the bytes that came are changed, and come
    back for the second client."""
    rng = np.random.default_rng(1)
    n, batch = 1024, 64
    weights = rng.normal(size=(2, n, n)).astype("f2" if type == "F16" else "f4")
    size = weights[0].nbytes
    x = rng.normal(size=(batch, n)).astype("f4")
    device = LocalDevice(
        "CPU", torch.device("cpu"), Precision("fast", torch.bfloat16), threads=1, dequant_cache=1 << 24
    )

    class Multiplies:
        def __init__(self, server: Server) -> None:
            self.client = RawClient(server.port, server.dialect, capabilities=OURS)
            self.buffer = self.client.buffer(10 << 20)
            self.weight = self.client.record(self.buffer, (n, n), at=64, type=type, id=1)
            self.bytes = self.client.record(self.buffer, (size,), at=64, type="I8")
            self.x = self.client.record(self.buffer, (n, batch), at=8 << 20, id=2)
            at = (8 << 20) + x.nbytes
            self.y = self.client.record(self.buffer, (n, batch), at=at, id=3, op="MUL_MAT", src=(1, 2), flags=2)

        def __call__(self, expected: np.ndarray) -> None:
            self.client.set(self.x, x)
            self.client.compute([3], [self.weight, self.x, self.y], uid=1)
            got = np.frombuffer(self.client.get(self.y, 4 * n * batch), "f4").reshape(batch, n)
            wanted = x @ expected.astype("f4").T
            assert np.linalg.norm(got - wanted) < 2**-7 * np.linalg.norm(wanted), "bfloat16 has eight bits"

    with Server([device]) as server:
        first = Multiplies(server)
        first.client.set(first.bytes, weights[0].tobytes())
        for _ in range(2):
            first(weights[0])
        copy, most = 2 * n * n, n * n // 2
        assert device._weights.used < (copy + most if type == "F32" else 2 * most)
        second = Multiplies(server)
        same = Named(second.bytes.data - second.buffer[1], weights[0].nbytes, digest(weights[0].tobytes()))
        assert second.client.find(second.buffer[0], same) == [True]
        for each in (second, first):
            each(weights[0])
        one = device._weights.used
        assert copy <= one < copy + most, "the inputs are small"
        first.client.set(first.bytes, weights[1].tobytes())
        first(weights[1])
        second(weights[0])
        second.client.close()
        first(weights[1])
        assert eventually(lambda: device._weights.used <= one)
        first.client.close()
        assert eventually(lambda: device._weights.used == 0)
    device.close()
