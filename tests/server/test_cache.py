"""Weights on disk: what comes again is not sent again, and nobody gets what is not his or not what it should be."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from sdrpc import content
from sdrpc.client import Keychain, connect
from sdrpc.client.names import Names
from sdrpc.content import DIGEST_BYTES, FNV_START, PIECE, SMALLEST, digest, fnv1a, pieces
from sdrpc.device import Content, ServedDevice
from sdrpc.errors import UsageError
from sdrpc.ggml.weight import Whole
from sdrpc.key import Key
from sdrpc.server import Cache, CacheService, Door, Keys, Limits, Server, client_cache, live
from sdrpc.server.cache import LEAST, STALE_SECONDS
from sdrpc.server.client_cache import SMALL
from sdrpc.server.key_ring import KeyRing
from sdrpc.wire import messages
from sdrpc.wire.hello import Capability
from sdrpc.wire.ranges import MOST_RANGES, Named, pack_named
from sdrpc.wire.records import Record
from tests.server.conftest import CountingDevice, eventually
from tests.support.client import RawClient
from tests.support.content import SIZE, fnv, noise

OURS = Capability.ERRORS | Capability.CACHE
BUDGET = 64 << 20


class Place:
    """A client of the server with a tensor of bytes."""

    def __init__(self, server: Server, ours: bool, size: int = SIZE, device: int = 0) -> None:
        self.client = RawClient(server.port, server.dialect, capabilities=OURS if ours else Capability(0))
        self.ours = ours
        self.tensor = self.client.record(self.client.buffer(size, device), (size,), type="I8")

    def has(self, data: bytes) -> bool:
        """Offer ``data`` by its name: whether the server sets the tensor to it."""
        return self.asks(digest(data) if self.ours else fnv(data))

    def asks(self, name: bytes | int, tensor: Record | None = None, offset: int = 0) -> bool:
        tensor = tensor or self.tensor
        if isinstance(name, bytes):
            at = tensor.data - self.tensor.data + offset
            return self.client.find(tensor.buffer, Named(at, tensor.ne[0] - offset, name)) == [True]
        return bool(self.client.ask(messages.SetTensorHash(tensor, offset, name)).result)

    def send(self, data: bytes, offset: int = 0) -> None:
        self.client.set(self.tensor, data, offset)

    def read(self) -> bytes:
        return self.client.get(self.tensor, self.tensor.ne[0])

    def puts(self, data: bytes) -> bool:
        """As clients do: ask, and send what is missing; whether it had to be sent. The tensor holds it then."""
        missing = not self.has(data)
        if missing:
            self.send(data)
        assert self.read() == data
        return missing


class Windowless(CountingDevice):
    """As an accelerator: its memory can't be touched."""

    receiving = ServedDevice.receiving


class Scene:
    """A server with a cache in ``folder``, which can be started again."""

    def __init__(self, folder: Path, budget: int = BUDGET) -> None:
        self.folder, self.budget = folder, budget
        self.devices = [CountingDevice(), Windowless("CPU1")]
        self.places: list[Place] = []
        self.start()

    def start(self) -> None:
        self.cache_service = CacheService(Cache(self.folder, self.budget))
        self.server = Server(self.devices, cache_service=self.cache_service)
        self.server.__enter__()

    def stop(self) -> None:
        for place in self.places:
            place.client.close()
        self.places.clear()
        self.server.__exit__(None, None, None)
        self.cache_service.close()

    def place(self, ours: bool, size: int = SIZE, device: int = 0) -> Place:
        """A new client. What others sent before is on disk."""
        self.cache_service.flush()
        self.places.append(Place(self.server, ours, size, device))
        return self.places[-1]

    def flushed(self) -> None:
        """All that clients sent is on disk."""
        for place in self.places:
            place.read()  # answered in order: all before has been received
        self.cache_service.flush()

    def files(self, suffix: str = ".blake3") -> list[Path]:
        return sorted(self.folder.glob(f"*{suffix}"))


@pytest.fixture(autouse=True)
def nothing_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other clients have is not looked at: it is the disk that is asked here."""
    monkeypatch.setattr(live, "RANGES", 0)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path / "weights")
    yield made
    made.stop()
    assert made.files(".part") == []
    assert (made.cache_service.room._inside, made.cache_service.room._free) == (0, [])
    for device in made.devices:
        assert eventually(lambda device=device: device.held == 0)
        device.close()


both = pytest.mark.parametrize("ours", [False, True], ids=["native", "sdrpc"])


def test_what_does_not_fit_into_memory_is_not_kept_and_comes_all_the_same(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy for the disk took a client's upload with it."""

    def no_memory(*_: object) -> None:
        raise MemoryError

    data = noise(1)
    place = scene.place(True)
    monkeypatch.setattr(client_cache.Room, "copy", no_memory)
    assert place.puts(data)
    scene.flushed()
    assert scene.files() == []


def test_a_numba_that_can_not_be_loaded_is_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each client that asked was thrown out for a fault in the server."""

    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "numba":
                raise OSError("libllvmlite.so: failed to map segment from shared object")

    for name in [name for name in sys.modules if name.partition(".")[0] == "numba"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    content._compiled.cache_clear()
    for _ in range(2):
        assert fnv1a() is None
    assert caplog.text.count("failed to map segment") == 1
    monkeypatch.undo()
    assert fnv1a() is not None, "it was for that time"


def test_fnv1a_is_the_protocol_s() -> None:
    assert [fnv(data) for data in (b"", b"a", b"foobar")] == [FNV_START, 0xAF63DC4C8601EC8C, 0x85944171F73967E8]
    compiled, data, state = fnv1a(), noise(1, 10_001), FNV_START
    assert compiled is not None
    for start in range(0, len(data), 97):
        state = compiled(data[start : start + 97], state)
    assert state == fnv(data)


@both
@pytest.mark.parametrize("device", [0, 1], ids=["host", "accelerator"])
@pytest.mark.parametrize("size", [1024, PIECE, SIZE])
def test_a_tensor_is_sent_once(scene: Scene, ours: bool, device: int, size: int) -> None:
    data = noise(1, size)
    assert scene.place(ours, size, device).puts(data)
    scene.flushed()
    assert not scene.place(ours, size, device).puts(data)
    assert scene.place(ours, size, device).puts(noise(2, size))
    scene.flushed()
    scene.stop()
    scene.start()
    assert not scene.place(ours, size, 1 - device).puts(data)
    assert [path.stat().st_size for path in scene.files()] == [size, size]


def test_contents_are_shared_by_digest_and_kept_once(scene: Scene) -> None:
    data = noise(1)
    assert scene.place(False).puts(data)
    scene.flushed()
    assert not scene.place(True).puts(data)
    assert len(scene.files()) == 1


def test_what_is_kept_belongs_to_a_key_and_not_to_an_address(tmp_path: Path) -> None:
    """From one address: who has the key finds what it sent, over another connection; who has another key sends it, too,
    and then finds it. It is on disk once."""
    ring = KeyRing(tmp_path / "keys.json")
    laptop, guest = ring.add("laptop").key, ring.add("guest").key
    door = Door(keys=Keys(ring, tmp_path / "server.pem"))
    cache_service = CacheService(Cache(tmp_path / "weights", BUDGET))
    data = noise(1)
    device = CountingDevice()

    def sends(key: Key | None) -> bool:
        given = [(None, key)] if key else []
        (remote,) = connect([server.endpoint], keychain=Keychain(given, tmp_path / f"{id(key)}.json"))
        remote._server.names = Names(tmp_path / f"names {id(key)}")
        buffer = remote.allocate(SIZE)
        remote.upload(buffer, [Content(0, SIZE, Whole(lambda: data))], lambda _: None)
        assert bytes(remote.read(buffer, 0, SIZE)) == data
        remote.close()
        cache_service.flush()
        return remote.sent >= SIZE

    with Server([device], cache_service=cache_service, door=door) as server:
        assert [sends(key) for key in (laptop, laptop, guest, guest, laptop)] == [True, False, True, False, False]
        assert [sends(None), sends(None)] == [True, False]
    cache_service.close()
    device.close()
    assert len(list((tmp_path / "weights").glob("*.blake3"))) == 1
    assert len(list((tmp_path / "weights").glob("*.owner"))) == 3


def test_owners_go_with_their_tensors(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1 << 20)
    for number in (1, 2):
        cache.add_owner(digest(noise(number)), "somebody")
    file, part = cache.create()
    with file:
        file.write(noise(1, 100))
    cache.commit(part, digest(noise(1)), 100)
    cache.shrink()
    assert [cache.owned(digest(noise(number)), "somebody") for number in (1, 2)] == [True, False]
    assert not cache.owned(digest(noise(1)), "somebody else")


def test_what_was_kept_under_other_digests_is_thrown_out(scene: Scene) -> None:
    """A native client's name for it must not seem to stand for two contents when it comes again."""
    data, other = noise(1), sha256(noise(1)).hexdigest()
    owner = scene.cache_service.client_cache("127.0.0.1").owner
    scene.stop()
    (scene.folder / f"{other}.tensor").write_bytes(data)
    (scene.folder / f"{other}-{owner}.owner").write_bytes(b"")
    (scene.folder / f"{fnv(data):016x}-{SIZE:x}-{owner}.name").write_text(other)
    scene.start()
    assert scene.place(False).puts(data)
    scene.flushed()
    assert not scene.place(False).puts(data)
    assert {path.suffix for path in scene.folder.iterdir()} == {".blake3", ".fnv1a", ".owner"}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not show which files are open")
def test_small_tensors_that_wait_for_their_names_have_no_file_open(tmp_path: Path) -> None:
    def is_open(path: Path) -> bool:
        return any(path.samefile(each) for each in Path("/proc/self/fd").iterdir() if each.exists())

    service = CacheService(Cache(tmp_path, BUDGET))
    may = threading.Event()
    try:
        service.line.submit(may.wait)
        for seed in range(100):
            writer = service.client_cache("somebody").writer(1024, None)
            assert writer is not None
            writer.feed(0, memoryview(noise(seed, 1024)))
            writer.finish(True)
            wait(writer._digests.values())
        parts = list(tmp_path.glob("*.part"))
        assert len(parts) == 100
        assert not any(map(is_open, parts[::10]))
    finally:
        may.set()
        service.flush()
        service.close()
    assert len(list(tmp_path.glob("*.blake3"))) == 100


def test_a_machine_without_memory_leaves_the_room_that_there_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise MemoryError

    room = client_cache.Room(1)
    with monkeypatch.context() as patch:
        patch.setattr(client_cache.np, "empty", none_left)
        with pytest.raises(MemoryError):
            room.copy(memoryview(b"abc"))
    assert room._left.acquire(blocking=False)


@both
def test_who_leaves_in_the_middle_leaves_nothing_behind(scene: Scene, ours: bool) -> None:
    data = np.random.default_rng(0).bytes(2 * PIECE)
    place, room = scene.place(ours, len(data)), scene.cache_service.room
    assert not place.has(data)
    place.client.begin_set(place.tensor, len(data))
    place.client.send(data[: PIECE + 1])
    assert eventually(lambda: room._inside == 1)
    place.client.close()
    assert eventually(lambda: room._inside == 0)
    assert room._free == []
    scene.places.remove(place)
    assert scene.place(ours, len(data)).puts(data)


def test_memory_is_used_again_until_the_last_has_left() -> None:
    room = client_cache.Room(2)
    room.enter()
    first = room.copy(memoryview(b"abc"))
    memory = weakref.ref(first.base)
    room.enter()
    room.give_back(first)
    room.leave()
    del first
    again = room.copy(memoryview(b"defg"))
    assert again.base is memory()
    assert again.tobytes() == b"defg"
    late = room.copy(memoryview(b"h"))
    room.give_back(again)
    room.leave()
    del again
    assert memory() is None
    memory = weakref.ref(late.base)
    room.give_back(late)  # whose writer was told first that it is written
    del late
    assert memory() is None


def test_names_that_can_be_aimed_at_are_the_sender_s_own(scene: Scene) -> None:
    """Who plants weights under another's hash gets them back himself; nobody else does."""
    data, evil = noise(1), noise(2)
    cache = scene.cache_service.cache
    scene.place(False).puts(evil)
    scene.flushed()
    known = scene.cache_service.client_cache("127.0.0.1").lookup(fnv(evil), SIZE)
    assert known == digest(evil)
    assert scene.cache_service.client_cache("192.168.1.9").lookup(fnv(evil), SIZE) is None
    cache.add_alias(digest(evil), fnv(data), SIZE, scene.cache_service.client_cache("192.168.1.9").owner)
    assert scene.place(False).puts(data)
    assert scene.place(True).puts(noise(3))


@pytest.mark.parametrize("lie", [0, 1, 2**64 - 1])
def test_a_hash_that_is_not_the_data_s_is_no_name_of_it(scene: Scene, lie: int) -> None:
    liar = scene.place(False)
    assert not liar.asks(lie)
    liar.send(noise(1))
    scene.flushed()
    assert not scene.place(False).asks(lie)
    assert scene.files() == scene.files(".fnv1a") == []


def test_a_digest_that_is_not_the_data_s_is_no_name_of_it(scene: Scene) -> None:
    liar = scene.place(True)
    assert not liar.asks(digest(noise(1)))
    liar.send(noise(2))
    scene.flushed()
    assert scene.place(True).puts(noise(1))
    assert not scene.place(True).puts(noise(2))


def test_t43_two_contents_of_one_hash_are_found_by_neither(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client_cache, "fnv1a", lambda: lambda data, state: 7)  # all collide
    first = scene.place(False)
    assert not first.asks(7)
    first.send(noise(1))
    scene.flushed()
    second = scene.place(False)
    assert second.asks(7)  # the protocol has no way to say that other bytes are meant
    scene.cache_service.cache.add_alias(digest(noise(2)), 7, SIZE, scene.cache_service.client_cache("127.0.0.1").owner)
    assert not scene.place(False).asks(7)
    assert not first.asks(7)
    first.send(noise(1))
    scene.flushed()
    assert not first.asks(7)
    assert "two tensors of 5000000 bytes have the FNV-1a hash 0000000000000007" in caplog.text
    assert not scene.place(True).puts(noise(1))  # a digest still finds its content


DAMAGE: dict[str, Callable[[bytearray], object]] = {
    "truncated": lambda data: data.pop(),
    "emptied": lambda data: data.clear(),
    "extended": lambda data: data.append(0),
    "flipped": lambda data: data.__setitem__(SIZE // 2, data[SIZE // 2] ^ 1),
    "zeroed": lambda data: data.__setitem__(slice(PIECE, None), bytes(SIZE - PIECE)),
}


@both
@pytest.mark.parametrize("device", [0, 1], ids=["host", "accelerator"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_t42_a_damaged_file_is_a_miss(
    scene: Scene, ours: bool, device: int, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = noise(1)
    scene.place(ours).puts(data)
    scene.flushed()
    (path,) = scene.files()
    changed = bytearray(data)
    DAMAGE[damage](changed)
    path.write_bytes(changed)
    again = scene.place(ours, device=device)
    assert again.puts(data)
    assert ("damaged, and so thrown out" in caplog.text) == (len(changed) == SIZE)
    scene.flushed()
    assert not scene.place(ours, device=device).puts(data)  # it has been kept anew


@both
def test_only_what_was_asked_for_whole_is_kept(scene: Scene, ours: bool) -> None:
    data = noise(1)
    client = scene.place(ours)
    client.send(data)  # nobody asked
    client.has(data)
    client.send(data[:-1])
    client.send(data[1:], 1)
    scene.flushed()
    assert scene.files() == []
    client.send(data)
    scene.flushed()
    assert len(scene.files()) == 1


@both
def test_other_sizes_are_other_contents(scene: Scene, ours: bool) -> None:
    data = noise(1)
    scene.place(ours).puts(data)
    scene.flushed()
    name = digest(data) if ours else fnv(data)
    assert not scene.place(ours, SIZE + 1).asks(name)
    assert not scene.place(ours, SIZE - 1).asks(name)
    place = scene.place(ours, SIZE)
    assert not place.asks(name, offset=1)
    assert place.asks(name)


@both
def test_what_is_changed_right_after_is_kept_as_it_was_sent(scene: Scene, ours: bool) -> None:
    client = scene.place(ours)
    client.has(noise(1))
    client.send(noise(1))
    client.send(noise(2))
    client.client.ask(messages.FreeBuffer(client.tensor.buffer))
    scene.cache_service.flush()
    assert eventually(lambda: scene.files())
    assert not scene.place(ours).puts(noise(1))


@both
def test_a_client_that_leaves_in_the_middle_leaves_nothing(scene: Scene, ours: bool) -> None:
    client = scene.place(ours)
    client.has(noise(1))
    whole = messages.encode(messages.SetTensor(client.tensor, 0, 0, noise(1)), client.client.dialect, 64)
    body = b"".join(map(bytes, whole))
    client.client.command(messages.Command.SET_TENSOR, body[: PIECE + 100], len(body))
    client.client.close()
    assert eventually(lambda: scene.devices[0].held == 0)
    scene.cache_service.flush()
    assert list(scene.folder.iterdir()) == []


@pytest.mark.parametrize("fails", ["create", "write", "replace"])
def test_t44_a_full_disk_is_one_line(
    scene: Scene, fails: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = {"create": (Cache, "create"), "write": (client_cache, "_write_all"), "replace": (os, "replace")}[fails]
    with monkeypatch.context() as patch:
        patch.setattr(*target, full)
        client = scene.place(True)
        for seed in range(3):
            assert client.puts(noise(seed))
        scene.flushed()
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == [f"{scene.folder}: weights are not kept: No space left on device"]
    assert list(scene.folder.iterdir()) == []
    assert client.puts(noise(0))
    scene.flushed()
    assert not client.puts(noise(0))


def test_t45_links_and_pipes_are_no_files(scene: Scene, tmp_path: Path) -> None:
    data = noise(1)
    scene.place(True).puts(data)
    scene.flushed()
    (path,) = scene.files()
    outside = tmp_path / "outside"
    outside.write_bytes(data)
    path.unlink()
    path.symlink_to(outside)
    assert scene.place(True).puts(data)  # the link is replaced, what it leads to is not touched
    scene.flushed()
    assert not path.is_symlink()
    assert outside.read_bytes() == data
    path.unlink()
    os.mkfifo(path)
    assert scene.place(True).puts(data)
    scene.flushed()
    assert path.read_bytes() == data
    assert not scene.place(True).asks(b"../../../../../../../etc/passwd\0")
    assert path.stat().st_mode & 0o077 == 0


def test_t45_other_people_s_files_are_not_read(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    data = noise(1)
    scene.place(True).puts(data)
    scene.place(False).puts(data)
    scene.flushed()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: 12345)
        assert not scene.place(True).has(data)
        assert not scene.place(False).has(data)


def test_t45_the_folder_must_be_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a" / "weights"
    Cache(folder, BUDGET)
    assert folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(UsageError, match="is a symbolic link"):
        Cache(tmp_path / "link", BUDGET)
    folder.chmod(0o770)
    with pytest.raises(UsageError, match=r"others can write to .*chmod 700"):
        Cache(folder, BUDGET)
    folder.chmod(0o755)
    Cache(folder, BUDGET)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(UsageError, match="yours alone"):
        Cache(folder, BUDGET)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=re.escape(str(tmp_path / "file"))):
        Cache(tmp_path / "file", BUDGET)


def test_t46_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    size = 100_000
    scene = Scene(tmp_path / "weights", 10 * size)
    for seed in range(30):
        assert scene.place(seed % 2 == 0, size).puts(noise(seed, size))
        scene.flushed()
        assert sum(path.stat().st_size for path in scene.files()) <= 10 * size
        if seed:
            assert not scene.place(True, size).puts(noise(0, size))  # always in use
    assert not scene.place(True, size).puts(noise(29, size))
    assert scene.place(True, size).puts(noise(1, size))
    scene.flushed()
    assert len(scene.files(".fnv1a")) <= len(scene.files())
    assert scene.place(True, 10 * size + 1).puts(noise(1, 10 * size + 1))  # larger than all of it
    scene.flushed()
    assert not scene.place(True, size).puts(noise(0, size))
    scene.stop()


def test_a_full_folder_is_looked_through_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With thousands of files each look takes as long as writing a hundred."""
    cache = Cache(tmp_path, 256 * LEAST)
    looks: list[int] = []
    shrink = cache.shrink

    def look() -> None:
        looks.append(number)
        shrink()

    monkeypatch.setattr(cache, "shrink", look)
    for number in range(256 + 64):
        file, part = cache.create()
        with file:
            file.write(bytes(LEAST))
        cache.commit(part, digest(b"%d" % number), LEAST)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 256 * LEAST
    assert 2 <= sum(look >= 256 for look in looks) <= 6


def test_t46_two_servers_share_a_folder(scene: Scene) -> None:
    other = Scene(scene.folder, 2 * SIZE)
    assert scene.place(True).puts(noise(1))
    scene.flushed()
    assert not other.place(True).puts(noise(1))
    held = scene.cache_service.cache.open(digest(noise(1)), SIZE)
    assert held is not None
    for seed in range(2, 6):
        other.place(True).puts(noise(seed))
        other.flushed()
    assert sum(path.stat().st_size for path in scene.files()) <= 2 * SIZE
    assert scene.place(True).puts(noise(1))  # thrown out by the other one
    assert held.read() == noise(1)  # and yet whole for who was reading it
    held.close()
    other.stop()


def test_what_a_crash_left_is_cleared_away(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    Cache(folder, BUDGET)
    old, new = folder / "a.part", folder / "b.part"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, time.time() - STALE_SECONDS - 60))
    (folder / f"{7:016x}-10-owner.name").write_text("cafe" * 16)  # stands for a tensor that is gone
    (folder / f"{8:016x}-10-owner.name").write_text("nonsense")
    cache_service = CacheService(Cache(folder, BUDGET))
    cache_service.flush()
    cache_service.close()
    assert [path.name for path in folder.iterdir()] == ["b.part"]


def test_cache_folder_deleted_while_a_server_runs(scene: Scene) -> None:
    """As people do who want the room back: weights are kept again."""
    scene.place(True).puts(noise(1))
    scene.flushed()
    shutil.rmtree(scene.folder)
    assert [scene.place(True).puts(noise(1)) for _ in range(2)] == [True, False]
    assert len(scene.files()) == 1


def test_many_clients_at_once(scene: Scene) -> None:
    """More uploads than pieces may wait, side by side."""
    places = [scene.place(index % 2 == 0) for index in range(24)]
    for index, place in enumerate(places):
        place.has(noise(index % 4))
    for index, place in enumerate(places):
        place.send(noise(index % 4))
    scene.flushed()
    assert [not scene.place(True).puts(noise(seed)) for seed in range(4)] == [True] * 4


WRONG: dict[str, Callable[[Place], Record]] = {
    "no-buffer": lambda place: place.tensor._replace(buffer=0),
    "another-s-buffer": lambda place: place.tensor._replace(buffer=place.tensor.buffer + 1),
    "before": lambda place: place.tensor._replace(data=place.tensor.data - 1),
    "behind": lambda place: place.tensor._replace(data=place.tensor.data + 1),
    "too-large": lambda place: place.tensor._replace(ne=(SIZE + 1, 1, 1, 1)),
    "huge": lambda place: place.tensor._replace(ne=(2**32 - 1,) * 4),
    "no-type": lambda place: place.tensor._replace(type=4),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_questions_about_what_is_not_there(scene: Scene, wrong: str) -> None:
    """They end the client that asks them; another one goes on."""
    data = noise(1, 5000)
    works = scene.place(False, 5000)
    works.puts(data)
    scene.flushed()
    client = scene.place(False)
    client.client.post(messages.SetTensorHash(WRONG[wrong](client), 0, fnv(data)))
    assert client.client.ended() == ""
    assert not works.puts(data)


@pytest.mark.parametrize("offset", [SIZE, SIZE + 1, 2**64 - 1])
def test_questions_about_what_is_behind_the_end(scene: Scene, offset: int) -> None:
    client = scene.place(False)
    client.client.post(messages.SetTensorHash(client.tensor, offset, 0))
    if offset == SIZE:  # nothing is left of the tensor: nobody has that
        assert client.client.receive(9) == b"\1" + bytes(7) + b"\0"
    else:
        assert client.client.ended() == ""


NOTHING = bytes(DIGEST_BYTES)


@pytest.mark.parametrize(
    ("handle", "ranges", "reason"),
    [
        (1, pack_named([Named(0, SIZE + 1, NOTHING)]), f"{SIZE + 1} bytes at 0 are not inside buffer 1 of {SIZE}"),
        (1, pack_named([Named(SIZE, 1, NOTHING)]), f"1 bytes at {SIZE} are not inside buffer 1"),
        (1, pack_named([Named(2**64 - 1, 1, NOTHING)]), "are not inside buffer 1"),
        (1, pack_named([Named(0, 2**64 - 1, NOTHING)]), "are not inside buffer 1"),
        (1, pack_named([Named(9, 9, NOTHING), Named(0, 10, NOTHING)]), "ranges of buffer 1 overlap"),
        (1, pack_named([Named(0, 64, NOTHING)] * MOST_RANGES), "ranges of buffer 1 overlap"),
        (0, pack_named([Named(0, 64, NOTHING)]), "buffer 0x0 does not exist"),
        (2, pack_named([Named(0, 64, NOTHING)]), "buffer 0x2 does not exist"),
        (1, b"", "ranges of 0 bytes"),
        (1, bytes(47), "ranges of 47 bytes"),
        (1, bytes(48 * MOST_RANGES + 48), "SET_RANGES_DIGEST: 12344 bytes instead of 8 to 12296"),
    ],
)
def test_questions_about_ranges_that_are_not_there(scene: Scene, handle: int, ranges: bytes, reason: str) -> None:
    """They end the client that asks them, which is told why; another one goes on."""
    data = noise(1, 5000)
    works = scene.place(True, 5000)
    works.puts(data)
    scene.flushed()
    client = scene.place(True).client
    client.post(messages.SetRangesDigest(handle, ranges))
    assert reason in client.ended()
    assert not works.puts(data)


@pytest.mark.parametrize("device", [0, 1], ids=["host", "accelerator"])
def test_many_ranges_of_any_size_are_asked_for_at_once(scene: Scene, device: int) -> None:
    """What is there comes to its place, and what is not is kept when it comes; answers are in the order of the
    questions, which is not that of the places."""
    rng = np.random.default_rng(3)
    sizes = [0, 1, 1023, 1024, 1025, SMALL, SMALL + 1, PIECE, PIECE + 1, 9_000_001, *rng.integers(1024, 70_000, 40)]
    places = [Named(0, 0, b"")]
    for size in rng.permutation(sizes).tolist():
        places.append(Named(places[-1].offset + places[-1].size + 64, size, digest(noise(len(places), size))))
    asked = [places[at] for at in rng.permutation(range(1, len(places)))]
    data = {each: noise(places.index(each), each.size) for each in asked}
    half = {each for each in asked[::2] if each.size}
    total = places[-1].offset + places[-1].size
    first = scene.place(True, total).client
    handle, base = scene.places[-1].tensor.buffer, scene.places[-1].tensor.data
    assert first.find(handle, *half) == [False] * len(half)
    for each in half:
        first.set(first.record((handle, base), (each.size,), at=each.offset, type="I8"), data[each])
    scene.flushed()
    scene.stop()
    scene.start()
    for known in (half, set(asked)):
        client = scene.place(True, total, device).client
        handle, base = scene.places[-1].tensor.buffer, scene.places[-1].tensor.data
        kept = {each for each in known if each.size >= SMALLEST}
        assert client.find(handle, *asked) == [each in kept for each in asked]
        for each in asked:
            place = client.record((handle, base), (max(each.size, 1),), at=each.offset, type="I8")
            if each not in kept and each.size:
                client.set(place, data[each])
            assert client.get(place, each.size) == data[each]
        scene.flushed()
        scene.stop()
        scene.start()


def test_so_many_answers_of_no_are_remembered_for_as_long_as_there_is_their_buffer(scene: Scene) -> None:
    """A client may ask for as much as it likes."""
    with Server(scene.devices, limits=Limits(tensors=2), cache_service=scene.cache_service) as server:
        client = RawClient(server.port, server.dialect, capabilities=OURS)
        for files in (2, 4):
            handle, base = client.buffer(10 * SMALLEST)
            data = [noise(10 * files + at, SMALLEST) for at in range(10)]
            asked = [Named(at * SMALLEST, SMALLEST, digest(each)) for at, each in enumerate(data)]
            assert not any(client.find(handle, *asked))
            whole = client.record((handle, base), (10 * SMALLEST,), type="I8")
            for at, each in enumerate(data):
                client.set(client.record((handle, base), (SMALLEST,), at=at * SMALLEST, type="I8"), each)
            assert client.get(whole, 10 * SMALLEST) == b"".join(data)
            scene.cache_service.flush()
            assert len(scene.files()) == files
            assert not any(client.find(handle, *(each._replace(digest=bytes(DIGEST_BYTES)) for each in asked)))
            client.ask(messages.FreeBuffer(handle))
        client.close()


@pytest.mark.parametrize("size", [SMALL, SMALL + 1])
def test_a_file_that_the_disk_does_not_give_is_a_miss(scene: Scene, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    data = noise(1, size)
    assert scene.place(True, size).puts(data)
    scene.flushed()

    class Broken(io.BytesIO):
        def read(self, _: int | None = -1) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        readinto = fileno = read  # type: ignore[assignment]

    with monkeypatch.context() as patched:
        patched.setattr(Cache, "open", lambda *_: Broken())
        assert scene.place(True, size).puts(data)
    scene.flushed()
    assert not scene.place(True, size).puts(data)


def test_without_numba_native_clients_send(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_cache, "fnv1a", lambda: None)
    assert scene.place(False).puts(noise(1))
    scene.flushed()
    assert scene.files() == []
    assert scene.place(True).puts(noise(1))
    scene.flushed()
    assert not scene.place(True).puts(noise(1))


def test_our_command_is_for_clients_of_ours(scene: Scene) -> None:
    client = scene.place(False).client
    client.command(messages.Command.SET_RANGES_DIGEST, size=0)
    assert client.ended() == ""
    assert len(list(pieces(SIZE))) == 2
