"""Uploads: what the server has is not sent, what it has not arrives, and names are remembered."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from sdrpc.client import RemoteDevice, connect, names, naming, upload
from sdrpc.client import server as servers
from sdrpc.client.names import Names
from sdrpc.content import FNV_START, PIECE, SMALLEST, digest, fnv1a
from sdrpc.device import Content
from sdrpc.engine.device import LocalDevice
from sdrpc.engine.precision import EXACT
from sdrpc.errors import CheckpointError, RemoteProtocolError
from sdrpc.ggml.dialect import dialects
from sdrpc.ggml.weight import Origin, Pieces, View, Whole
from sdrpc.server import Cache, CacheService, Limits, Server
from sdrpc.wire import messages as m
from sdrpc.wire.hello import Capability
from sdrpc.wire.messages import Command
from tests.interop.tap import Tap
from tests.support.scripted import Scripted

SIZES = (100_000, 10, 50_000, 1023, 1024)
"""Of contents: two of them are too small to be asked for."""
LARGE = (*SIZES, 33 << 20)
"""With one that has two names."""


class Model:
    """Contents for a buffer, as from a file; ``read`` counts how many were asked for their bytes."""

    def __init__(self, file: str = "model", sizes: tuple[int, ...] = SIZES, seed: int = 0) -> None:
        self.read = 0
        self.contents: list[Content] = []
        self.data = [np.random.default_rng((seed, i)).bytes(size) for i, size in enumerate(sizes)]
        offset = 0
        for i, data in enumerate(self.data):
            origin = Origin(file, f"{i}") if file else None
            self.contents.append(Content(offset, len(data), self._reader(data), origin))
            offset += -(-len(data) // 64) * 64
        self.size = offset

    def _reader(self, data: bytes) -> Pieces:
        def read() -> bytes:
            self.read += 1
            return data

        return Whole(read)

    def uploaded(self, device: RemoteDevice) -> None:
        """Upload, and see that all of it is there."""
        done: list[int] = []
        buffer = device.allocate(self.size)
        device.upload(buffer, self.contents, done.append)
        assert done == sorted(done)
        assert done[-1] == sum(map(len, self.data))
        for content, data in zip(self.contents, self.data, strict=True):
            assert bytes(device.read(buffer, content.offset, content.size)) == data
        device.free(buffer)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDRPC_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def cpu() -> Iterator[LocalDevice]:
    device = LocalDevice("CPU", torch.device("cpu"), EXACT, threads=1)
    yield device
    device.close()


class Scene:
    """A server of ours with a cache; each run is a new client."""

    def __init__(self, cpu: LocalDevice, folder: Path | None) -> None:
        self.cache_service = None if folder is None else CacheService(Cache(folder, 1 << 30))
        self.server = Server([cpu], cache_service=self.cache_service)

    def __enter__(self) -> Scene:
        self.server.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.__exit__(None, None, None)
        if self.cache_service:
            self.cache_service.close()

    def run(self, model: Model) -> Tap:
        """Upload once; what the wire saw."""
        with Tap(self.server.endpoint) as tap:
            (device,) = connect([tap.endpoint])
            model.uploaded(device)
            device.close()
        if self.cache_service:
            self.cache_service.flush()
        return tap


def test_a_second_run_sends_nothing_and_reads_nothing(cpu: LocalDevice, tmp_path: Path) -> None:
    total = sum(LARGE)
    with Scene(cpu, tmp_path / "weights") as scene:
        first = scene.run(Model(sizes=LARGE))
        assert total < first.bytes["SET_TENSOR"] < 1.01 * total
        again = Model(sizes=LARGE)
        second = scene.run(again)
        assert second.bytes["SET_TENSOR"] + second.bytes["SET_RANGES_DIGEST"] < 0.01 * total
        assert second.commands["SET_TENSOR"] == again.read == 2  # what is too small
    with Scene(cpu, tmp_path / "weights") as scene:  # started again
        assert scene.run(Model(sizes=LARGE)).commands["SET_TENSOR"] == 2
        assert scene.run(Model("renamed", LARGE)).commands["SET_TENSOR"] == 2
        assert scene.run(Model("", LARGE)).commands["SET_TENSOR"] == 2
        assert scene.run(Model("other", seed=1)).commands["SET_TENSOR"] == len(SIZES)


class Pieced(Model):
    """The same bytes in pieces, as of tensors that are made while they are sent. ``read``: bytes that were made."""

    def _reader(self, data: bytes) -> Pieces:
        def pieces(start: int = 0, stop: int | None = None, /) -> Iterator[memoryview]:
            view = memoryview(data)[start:stop]
            for at in range(0, len(view), 5_000_011):
                self.read += len(view[at : at + 5_000_011])
                yield view[at : at + 5_000_011]

        return pieces


def test_pieces_are_called_and_sent_as_if_they_were_one(cpu: LocalDevice, tmp_path: Path) -> None:
    """What a server has from a model in one piece it need not be sent from one in pieces, and each byte is made once,
    for its name and for sending."""
    total = sum(LARGE)
    with Scene(cpu, tmp_path / "weights") as scene:
        first = Pieced(sizes=LARGE)
        tap = scene.run(first)
        assert total < tap.bytes["SET_TENSOR"] < 1.01 * total
        assert tap.commands["SET_TENSOR"] == len(LARGE) + 1
        assert first.read == total
        again = Pieced(sizes=LARGE)
        assert scene.run(again).commands["SET_TENSOR"] == 2
        assert again.read == 10 + 1023  # what is too small to have a name
        assert scene.run(Model("renamed", LARGE)).commands["SET_TENSOR"] == 2


def test_only_the_part_that_the_server_lacks_is_made(cpu: LocalDevice, tmp_path: Path) -> None:
    size = 3 * upload.PART
    with Scene(cpu, tmp_path / "weights") as scene:
        model = Pieced(sizes=(size,))
        scene.run(model)
        names = json.loads((path := next(Names().folder.iterdir())).read_text())
        names = {part: bytes(32).hex() if f" {upload.PART}+" in part else name for part, name in names.items()}
        path.write_text(json.dumps(names))
        again = Pieced(sizes=(size,))
        tap = scene.run(again)
        assert (tap.commands["SET_TENSOR"], tap.bytes["carried"]) == (0, upload.PART)
        assert again.read == upload.PART


@given(st.lists(st.integers(0, 9 << 20), max_size=4))
@settings(max_examples=20)
def test_names_do_not_depend_on_pieces(sizes: list[int]) -> None:
    data = np.random.default_rng(0).bytes(sum(sizes))
    ends = [0, *accumulate(sizes)]
    views = [memoryview(data)[a:b] for a, b in pairwise(ends)]
    expected = blake3(b"".join(blake3(data[at : at + PIECE]).digest() for at in range(0, len(data), PIECE))).digest()
    assert digest(*views) == digest(data) == expected
    scheme = naming.by_hash()
    assert scheme is not None
    assert scheme.name(views) == scheme.name([memoryview(data)])


class Noted:
    """A device that has nothing, and notes how many contents come together."""

    together = True

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.sent: list[int] = []

    def offer(self, _: naming.Scheme, offered: Sequence[upload.Offered]) -> Callable[[], list[bool]]:
        self.asked.append(len(offered))
        return lambda: [False] * len(offered)

    def send(self, runs: Sequence[upload.Run], sent: Callable[[], None]) -> None:
        self.sent.append(len(runs))
        sent()

    def finish(self) -> None:
        pass


@pytest.mark.parametrize(("room", "groups"), [(1 << 20, [256, 256, 88]), (2 << 10, [2] * 300)])
def test_no_more_comes_together_than_one_message_names(
    monkeypatch: pytest.MonkeyPatch, room: int, groups: list[int]
) -> None:
    for most in ("GROUP_BYTES", "LOAD_BYTES"):
        monkeypatch.setattr(upload, most, room)
    contents = [Content(at << 10, 1 << 10, Whole(lambda: bytes(1 << 10))) for at in range(600)]
    device = Noted()
    upload.upload(naming.BY_DIGEST, contents, device, Names(), lambda _: None)
    assert device.asked == device.sent == groups
    device = Noted()
    upload.send_all(contents, device, lambda _: None)
    assert device.sent == groups


def test_the_thread_that_sends_does_not_make_a_large_tensor_for_its_short_rest() -> None:
    makers: list[str] = []

    def made() -> bytes:
        makers.append(threading.current_thread().name)
        return bytes(upload.PART + SMALLEST)

    contents = [Content(0, upload.PART + SMALLEST, Whole(made))]
    upload.upload(naming.BY_DIGEST, contents, Noted(), Names(), lambda _: None)
    assert [name.startswith("sdrpc-names") for name in makers] == [True, True]


def test_names_of_all_sizes_are_remembered() -> None:
    """Also of what is hashed at once."""
    model, known = Model(sizes=(SMALLEST - 1, SMALLEST, naming.SMALL, naming.SMALL + 1, PIECE + 1)), Names()
    upload.upload(naming.BY_DIGEST, model.contents, Noted(), known, lambda _: None)
    origins = [content.origin.made(f"0+{content.size} blake3") for content in model.contents if content.origin]
    assert [known.get(origin) for origin in origins] == [None, *map(digest, model.data[1:])]


def test_a_server_without_a_cache_is_asked_nothing(cpu: LocalDevice) -> None:
    with Scene(cpu, None) as scene:
        for _ in range(2):
            model = Model()
            tap = scene.run(model)
            assert tap.commands["SET_RANGES_DIGEST"] == tap.commands["SET_TENSOR_HASH"] == 0
            assert model.read == len(SIZES)
    assert not Names().folder.exists()


@pytest.mark.parametrize("cached", [False, True])
def test_large_uploads_come_over_several_connections(
    cpu: LocalDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    """Many small tensors, some of several pieces, and one that is made in pieces of its own, through carriers: all of
    it arrives, and what the server keeps of it is right."""
    monkeypatch.setattr(servers, "LEAST_BYTES", 1 << 20)
    monkeypatch.setattr(upload, "LOAD_BYTES", 8 << 20)
    monkeypatch.setattr(upload, "GROUP_BYTES", 8 << 20)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    sizes = (*[10_000] * 10, 9 << 20, 1, PIECE + 1, 1023, 5)
    with Scene(cpu, tmp_path / "weights" if cached else None) as scene:
        tap = scene.run(Pieced(sizes=sizes))
        assert tap.commands["SET_TENSOR"] == 0
        assert tap.commands["CARRY"] == 3
        assert tap.bytes["carried"] == sum(sizes)
        assert tap.commands["GET_CARRIERS"] == 2
        if cached:
            again = scene.run(Model(sizes=sizes))
            assert again.bytes["carried"] == 1 + 1023 + 5


def test_who_cancels_an_upload_keeps_the_connection(cpu: LocalDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on its way is sent before: the server was told of it."""
    monkeypatch.setattr(servers, "LEAST_BYTES", 1 << 20)
    monkeypatch.setattr(upload, "LOAD_BYTES", 1 << 20)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    size = 1 << 20
    data = np.random.default_rng(0).bytes(8 * size)

    def cancel(done: int) -> None:
        raise Cancelled(done)

    with Server([cpu]) as server:
        (device,) = connect([server.endpoint])
        buffer = device.allocate(len(data))
        contents = [Content(at, size, View(memoryview(data)[at : at + size])) for at in range(0, len(data), size)]
        with pytest.raises(Cancelled):
            device.upload(buffer, contents, cancel)
        assert bytes(device.read(buffer, 0, size)) == data[:size]
        device.upload(buffer, contents, lambda _: None)
        assert bytes(device.read(buffer, 0, len(data))) == data
        assert device.life == 0
        device.close()


class Cancelled(Exception):
    pass


def test_an_upload_goes_over_one_connection_where_there_is_no_place_for_more(
    cpu: LocalDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(servers, "LEAST_BYTES", 1 << 20)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    caplog.set_level("INFO", "sdrpc.client")
    with Server([cpu], limits=Limits(connections=3)) as server:
        (device,) = connect([server.endpoint])
        for _ in range(2):
            Model(sizes=(2 << 20, 5)).uploaded(device)
        device.close()
    assert caplog.text.count("data goes over one connection") == 2
    assert "3 clients are connected already" in caplog.text


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"0 0+100000 blake3": 5}', '{"0 0+100000 blake3": "zz"}'])
def test_damaged_names_are_computed_again(cpu: LocalDevice, tmp_path: Path, damage: str) -> None:
    with Scene(cpu, tmp_path / "weights") as scene:
        scene.run(Model())
        (path,) = Names().folder.iterdir()
        path.write_text(damage)
        assert scene.run(Model()).commands["SET_TENSOR"] == 2
        assert scene.run(again := Model()).commands["SET_TENSOR"] == again.read == 2


def test_names_that_are_wrong_cost_time_only(cpu: LocalDevice, tmp_path: Path) -> None:
    """A file of names that somebody mixed up: the server has no such thing, or checks what it has."""
    with Scene(cpu, tmp_path / "weights") as scene:
        (path,) = [scene.run(Model())] and Names().folder.iterdir()
        mixed = {part: digest(part.encode()).hex() for part in json.loads(path.read_text())}
        path.write_text(json.dumps(mixed))
        scene.run(Model())


def test_a_disk_that_refuses_names(
    cpu: LocalDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SDRPC_CACHE", str(tmp_path / "file"))
    with Scene(cpu, tmp_path / "weights") as scene:
        scene.run(Model())
        assert "digests of weights are not kept" in caplog.text
        assert scene.run(Model()).commands["SET_TENSOR"] == 2


def test_only_so_many_models_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "FILES", 3)
    for file in "abcde":
        known = Names()
        known.put(Origin(file, "0"), bytes(32))
        known.save()
    assert len(list(known.folder.iterdir())) == 3
    assert Names().get(Origin("e", "0")) == bytes(32)
    assert Names().get(Origin("a", "0")) is None


def test_what_can_not_be_read_is_the_caller_s_error(cpu: LocalDevice, tmp_path: Path) -> None:
    def broken() -> bytes:
        raise CheckpointError("model", "is gone", "x")

    with Scene(cpu, tmp_path / "weights") as scene:
        (device,) = connect([scene.server.endpoint])
        buffer = device.allocate(4096)
        with pytest.raises(CheckpointError, match="is gone"):
            device.upload(buffer, [Content(0, 4096, Whole(broken))], lambda _: None)
        device.write(buffer, 0, bytes(4096))
        assert bytes(device.read(buffer, 0, 4096)) == bytes(4096)
        device.close()


def asked(server: Scripted, command: Command) -> list[m.SetTensorHash]:
    return [message for number, message in server.log if number == command]


@pytest.mark.parametrize("version", ["3.6.1", "5.0.1", "7.0.0"])
def test_native_servers_are_asked_by_hash_from_the_second_run_on(version: str) -> None:
    fnv = fnv1a()
    assert fnv is not None
    sizes = (1000, 33 << 20, 10 << 20)
    with Scripted(dialect=dialects()[version]).listening() as server:
        for run in range(2):
            (device,) = connect([server.endpoint])
            Model(sizes=sizes).uploaded(device)
            device.close()
            assert len(asked(server, Command.SET_TENSOR_HASH)) == run
        (question,) = asked(server, Command.SET_TENSOR_HASH)
        part = Model(sizes=sizes).data[1][: upload.PART]
        assert question.hash == fnv(part, FNV_START)
        assert question.tensor.ne[0] == len(part)
        if version == "7.0.0":
            flags = [message.cache_flag for message in asked(server, Command.SET_TENSOR)]
            assert flags == [0, 1, 0, 0] * 2


def test_what_a_native_server_has_is_not_sent() -> None:
    model = Model(sizes=(33 << 20,))
    with Scripted().listening() as server:
        for expected in (2, 1):  # the second part is below what native servers keep
            server.log.clear()
            (device,) = connect([server.endpoint])
            buffer = device.allocate(model.size)
            server.answers[Command.SET_TENSOR_HASH] = m.SetTensorHashReply(1)
            device.upload(buffer, model.contents, lambda _: None)
            device.memory()
            device.close()
            assert len(asked(server, Command.SET_TENSOR)) == expected


@pytest.mark.parametrize("answer", [2, 255])
def test_an_answer_of_a_native_server_that_is_neither_is_not_believed(answer: int) -> None:
    model = Model(sizes=(33 << 20,))
    with Scripted().listening() as server:
        (device,) = connect([server.endpoint])
        model.uploaded(device)
        device.close()
        server.log.clear()
        server.answers[Command.SET_TENSOR_HASH] = m.SetTensorHashReply(answer)
        (device,) = connect([server.endpoint])
        with pytest.raises(RemoteProtocolError, match=rf"{server.endpoint}: {answer} is neither yes nor no"):
            model.uploaded(device)
        device.close()
        assert asked(server, Command.SET_TENSOR) == []


@pytest.mark.parametrize("answer", [b"\2\0", b"\0\xff"])
def test_an_answer_that_is_neither_yes_nor_no_is_not_believed(answer: bytes) -> None:
    """A tensor that is not sent because of it would be zeros in every picture."""
    answers: Any = {Command.SET_RANGES_DIGEST: m.SetRangesDigestReply(answer)}
    with Scripted(name_length=None, capabilities=Capability.CACHE, answers=answers).listening() as server:
        (device,) = connect([server.endpoint])
        with pytest.raises(RemoteProtocolError, match=rf"{server.endpoint}: {max(answer)} is neither yes nor no"):
            Model(sizes=(SMALLEST, SMALLEST)).uploaded(device)
        device.close()
        assert asked(server, Command.SET_TENSOR) == []


def test_without_numba_native_servers_get_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming, "fnv1a", lambda: None)
    with Scripted().listening() as server:
        for _ in range(2):
            (device,) = connect([server.endpoint])
            Model(sizes=(33 << 20,)).uploaded(device)
            device.close()
        assert asked(server, Command.SET_TENSOR_HASH) == []
