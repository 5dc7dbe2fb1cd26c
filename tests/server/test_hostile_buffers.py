"""T12 … T24 of the hostile inputs: handles, devices and tensors that are not there, or not where they say."""

from __future__ import annotations

import threading
from collections.abc import Callable
from struct import pack
from typing import Any, NamedTuple

import numpy as np
import pytest

import sdrpc.device
from sdrpc.server import Limits, Server
from sdrpc.wire import messages
from sdrpc.wire.hello import Capability
from sdrpc.wire.messages import Command
from sdrpc.wire.records import Record
from tests.server.conftest import CountingDevice, Scene, eventually
from tests.support.client import Adder, RawClient

SIZE = 4096
Buffer = tuple[int, int]
BY_HANDLE: dict[str, Callable[[RawClient, int], Any]] = {
    "base": lambda c, handle: messages.BufferGetBase(handle),
    "free": lambda c, handle: messages.FreeBuffer(handle),
    "clear": lambda c, handle: messages.BufferClear(handle, 0),
    "set": lambda c, handle: messages.SetTensor(c.record((handle, 1 << 32)), 0, 0, bytes(16)),
    "set-hash": lambda c, handle: messages.SetTensorHash(c.record((handle, 1 << 32)), 0, 0),
    "get": lambda c, handle: messages.GetTensor(c.record((handle, 1 << 32)), 0, 16),
    "init": lambda c, handle: messages.InitTensor(c.record((handle, 1 << 32))),
    "memset": lambda c, handle: messages.MemsetTensor(c.record((handle, 1 << 32)), 0, 16, 1),
    "copy-from": lambda c, handle: messages.CopyTensor(c.record((handle, 1 << 32)), c.record(c.buffer(SIZE))),
    "copy-to": lambda c, handle: messages.CopyTensor(c.record(c.buffer(SIZE)), c.record((handle, 1 << 32))),
}
"""All commands that name a buffer (GRAPH_COMPUTE has its own tests), by handle."""


def freed(client: RawClient) -> int:
    handle, _ = client.buffer(SIZE)
    client.ask(messages.FreeBuffer(handle))
    return handle


HANDLES: dict[str, tuple[Callable[[RawClient], int], str]] = {
    "T12-zero": (lambda c: 0, "does not exist|is in no buffer"),
    "T12-random": (lambda c: 0x7F3A_1234_5678, "buffer 0x7f3a12345678 does not exist"),
    "T12-freed": (freed, "buffer 0x1 has been freed"),
    "T13-of-another-client": (lambda c: 1, "buffer 0x1 does not exist"),
}


@pytest.mark.parametrize("handle", HANDLES)
@pytest.mark.parametrize("command", BY_HANDLE)
def test_handles_that_are_not_there(scene: Scene, flavour: Capability, command: str, handle: str) -> None:
    """(The client at work has handle 1, and keeps it. Buffers of our own, for copies, come behind that.)"""
    find, reason = HANDLES[handle]
    if handle == "T13-of-another-client" and command.startswith("copy"):
        pytest.skip("the buffer that is the copy's other end has that handle")
    client = scene.client(flavour)
    client.post(BY_HANDLE[command](client, find(client)))
    scene.ends(client, reason)


def test_t13_handles_and_addresses_of_two_clients_are_the_same_and_mean_different_memory(scene: Scene) -> None:
    with scene.client() as a, scene.client() as b:
        one, other = a.buffer(SIZE), b.buffer(SIZE)
        assert one == other
        a.set(a.record(one), b"a" * 16)
        b.set(b.record(other), b"b" * 16)
        assert a.get(a.record(one), 16) == b"a" * 16
        assert b.get(b.record(other), 16) == b"b" * 16


def test_t13_new_memory_holds_nothing_of_its_last_owner(scene: Scene) -> None:
    with scene.client() as a:
        a.ask(messages.BufferClear(a.buffer(1 << 16)[0], 0x5A))
        a.ask(messages.DeviceCount())
    scene.goes_on()
    with scene.client() as b:
        assert b.get(b.record(b.buffer(1 << 16), (1 << 14,)), 1 << 16) == bytes(1 << 16)


BY_DEVICE: dict[str, Callable[[RawClient, int], Any]] = {
    "alloc": lambda c, device: messages.AllocBuffer(device, 16),
    "alignment": lambda c, device: messages.GetAlignment(device),
    "max-size": lambda c, device: messages.GetMaxSize(device),
    "memory": lambda c, device: messages.GetDeviceMemory(device),
    "alloc-size": lambda c, device: messages.GetAllocSize(device, c.record(), (Record(),) * 10),
    "recompute": lambda c, device: messages.GraphRecompute(device),
    "compute": lambda c, device: messages.GraphCompute(c.graph([], [], device)),
}


@pytest.mark.parametrize("number", [2, 2**32 - 1])
@pytest.mark.parametrize("command", BY_DEVICE)
def test_t15_devices_that_are_not_there(scene: Scene, flavour: Capability, command: str, number: int) -> None:
    client = scene.client(flavour)
    client.post(BY_DEVICE[command](client, number))
    scene.ends(client, f"device {number} does not exist; there are 2")


def test_t14_a_graph_on_one_device_with_memory_of_another(scene: Scene, flavour: Capability) -> None:
    client = scene.client(flavour)
    near, far = client.buffer(SIZE, device=0), client.buffer(SIZE, device=1)
    a, b = client.record(near, id=1), client.record(far, id=2)
    client.compute([3], [a, b, client.record(near, at=64, id=3, op="ADD", src=(1, 2))])
    scene.ends(client, "buffer 2 is on device 1, the graph on 0")


def test_t16_an_empty_buffer(scene: Scene) -> None:
    with scene.client() as client:
        handle, _ = client.buffer(0)
        client.ask(messages.BufferClear(handle, 1))
        client.ask(messages.FreeBuffer(handle))
        client.ask(messages.DeviceCount())
    scene.goes_on()


@pytest.mark.parametrize("size", [2**40, 2**63, 2**64 - 1])
def test_t16_more_memory_than_there_is(scene: Scene, size: int) -> None:
    with scene.client() as client:
        assert client.ask(messages.AllocBuffer(0, size)) == (0, 0)
        Adder(client)()
    scene.goes_on()


def test_t16_many_small_buffers(device: CountingDevice, caplog: pytest.LogCaptureFixture) -> None:
    """The limit is one client's own, and over when it goes."""
    limits = Limits(buffers=100)
    with Server([device], limits=limits) as server, Scene(server, caplog) as scene:
        for _ in range(2):
            with scene.client() as client:
                given = [client.ask(messages.AllocBuffer(0, 16)) for _ in range(limits.buffers + 10)]
                assert [bool(handle) for handle, _ in given] == [True] * limits.buffers + [False] * 10
                scene.works()
                client.ask(messages.FreeBuffer(given[0].remote_ptr))
                assert client.ask(messages.AllocBuffer(0, 16)).remote_ptr == limits.buffers + 1
            scene.goes_on()


def test_t16_a_limit_for_all_buffers_of_a_client_together(device: CountingDevice) -> None:
    with Server([device], limits=Limits(buffer_bytes=1000)) as server, Scene(server) as scene:
        with scene.client() as client:
            first = client.ask(messages.AllocBuffer(0, 600))
            assert client.ask(messages.AllocBuffer(0, 401)) == (0, 0)
            assert client.ask(messages.AllocBuffer(0, 400)).remote_size == 400
            client.ask(messages.FreeBuffer(first.remote_ptr))
            assert client.ask(messages.AllocBuffer(0, 600)).remote_size == 600
        scene.goes_on()


def test_what_can_not_be_given_back_keeps_nothing_else(
    device: CountingDevice, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault in one thing that a client had left its place taken, and all else that it had."""
    with Server([device]) as server, Scene(server, caplog) as scene:
        client = scene.client()
        for _ in range(3):
            client.buffer(4096)
        free, failed = device.free, list[int]()

        def fails_once(buffer: sdrpc.device.Buffer) -> None:
            free(buffer)
            if not failed:
                failed.append(buffer.key)
                raise MemoryError

        monkeypatch.setattr(device, "free", fails_once)
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        client.close()
        assert eventually(lambda: server.clients == 1 and failed)
        scene.goes_on()
        assert server._buffers.count == 1


def test_t16_a_hundred_thousand_buffers(scene: Scene) -> None:
    with scene.client() as client:
        batch, request = 1000, pack("<BQIQ", Command.ALLOC_BUFFER, 12, 0, 16)
        refused = 0
        for _ in range(100):
            client.send(request * batch)
            answers = np.frombuffer(client.receive(24 * batch), "<u8").reshape(batch, 3)
            refused += int((answers[:, 1] == 0).sum())
        assert refused == 100_000 - Limits().buffers
    scene.goes_on()


class Tensor(NamedTuple):
    """Fields of a tensor that is otherwise four floats at the start of a buffer of SIZE bytes, and what is said."""

    fields: dict[str, Any]
    reason: str


TENSORS = {
    "T17-type--1": Tensor({"type": 2**32 - 1}, "type 4294967295 does not exist"),
    "T17-type-4": Tensor({"type": 4}, "type 4 does not exist"),
    "T17-type-5": Tensor({"type": 5}, "type 5 does not exist"),
    "T17-type-count": Tensor({"type": 43}, "type 43 does not exist"),
    "T17-type-2^31": Tensor({"type": 2**31}, "type 2147483648 does not exist"),
    "T18-ne-overflow": Tensor({"ne": (2**31, 2**31, 2**31, 2**31), "nb": (4, 16, 16, 16)}, "are too many"),
    "T18-ne-overflow-to-0": Tensor({"ne": (2**16, 2**16, 2**16, 2**16), "nb": (4, 16, 16, 16)}, "are too many"),
    "T18-half-a-block": Tensor({"type": "Q8_0", "ne": (33,), "nb": (34, 34, 34, 34)}, "is no shape for Q8_0"),
    "T19-nb-huge": Tensor({"ne": (2, 2), "nb": (4, 2**32 - 4, 8, 8)}, "are not inside buffer"),
    "T20-below-base": Tensor({"at": -4}, "are not inside buffer"),
    "T20-far-below-base": Tensor({"at": -(1 << 32)}, "are not inside buffer"),
    "T20-at-end": Tensor({"at": SIZE}, "are not inside buffer"),
    "T20-over-end": Tensor({"at": SIZE - 12}, "are not inside buffer"),
    "T20-wraps": Tensor({"data": 2**64 - 8}, "are not inside buffer"),
}
BY_TENSOR: dict[str, Callable[[RawClient, Record], Any]] = {
    "set": lambda c, tensor: messages.SetTensor(tensor, 0, 0, bytes(16)),
    "set-hash": lambda c, tensor: messages.SetTensorHash(tensor, 0, 0),
    "get": lambda c, tensor: messages.GetTensor(tensor, 0, 16),
    "init": lambda c, tensor: messages.InitTensor(tensor),
    "memset": lambda c, tensor: messages.MemsetTensor(tensor, 0, 16, 1),
    "copy": lambda c, tensor: messages.CopyTensor(tensor, tensor),
    "alloc-size": lambda c, tensor: messages.GetAllocSize(0, tensor, (Record(),) * 10),
    "alloc-size-source": lambda c, tensor: messages.GetAllocSize(0, c.record(), (tensor._replace(id=1),) * 10),
}
PLACELESS = ("alloc-size", "alloc-size-source")
"""Commands that ask about a shape: where the tensor lies does not matter to them."""


@pytest.mark.parametrize(
    ("command", "tensor"),
    [(c, t) for c in BY_TENSOR for t in TENSORS if c not in PLACELESS or t.startswith(("T17", "T18"))],
)
def test_tensors_that_make_no_sense(scene: Scene, flavour: Capability, command: str, tensor: str) -> None:
    fields, reason = TENSORS[tensor]
    client = scene.client(flavour)
    buffer = client.buffer(SIZE)
    client.ask(messages.GetAllocSize(0, client.record(), (Record(),) * 10))  # so that names' length is known
    client.post(BY_TENSOR[command](client, client.record(buffer, **{"ne": (4,), **fields})))
    scene.ends(client, reason)


RANGES = {
    "T22-offset-wraps": (2**64 - 8, 16),
    "T22-size-wraps": (8, 2**64 - 4),
    "T23-outside-tensor": (16, 4),
    "T23-half-outside-tensor": (8, 12),
    "T23-whole-buffer": (0, SIZE),
}


@pytest.mark.parametrize("range", RANGES)
@pytest.mark.parametrize("command", ["set", "get", "memset"])
def test_ranges_outside_the_tensor(scene: Scene, flavour: Capability, command: str, range: str) -> None:
    offset, size = RANGES[range]
    client = scene.client(flavour)
    tensor = client.record(client.buffer(SIZE))
    client.ask(messages.GetAllocSize(0, tensor, (Record(),) * 10))
    if command == "set":
        client.post(messages.SetTensor(tensor, 0, offset, bytes(min(size, 64))))
    elif command == "get":
        client.post(messages.GetTensor(tensor, offset, size))
    else:
        client.post(messages.MemsetTensor(tensor, offset, size, 1))
    scene.ends(client, "are not inside tensor 't' of 16 bytes|bytes instead of")


COPIES: dict[str, tuple[Callable[[RawClient, Buffer], tuple[Record, Record]], str]] = {
    "T24-other-shape": (lambda c, b: (c.record(b, (4,)), c.record(b, (5,), at=64)), "are not alike"),
    "T24-other-order": (lambda c, b: (c.record(b, (2, 3)), c.record(b, (3, 2), at=64)), "are not alike"),
    "T24-other-type": (lambda c, b: (c.record(b, (4,)), c.record(b, (4,), at=64, type="I32")), "are not alike"),
    "T24-other-strides": (lambda c, b: (c.record(b, (2, 2)), c.record(b, (2, 2), at=64, nb=(8, 4, 16, 16))), "alike"),
    "T24-larger-than-target": (lambda c, b: (c.record(b, (32,)), c.record(b, (32,), at=SIZE - 64)), "not inside"),
}


@pytest.mark.parametrize("at", [0, 4])
def test_t24_copies_that_overlap_are_left_to_the_client(scene: Scene, at: int) -> None:
    """It is told that there was none, and reads and writes: to be refused would be its end."""
    with scene.client() as client:
        buffer = client.buffer(SIZE)
        source = client.record(buffer, (4,))
        client.set(source, bytes(range(16)))
        assert client.ask(messages.CopyTensor(source, client.record(buffer, (4,), at=at))).result == 0
        assert client.get(source, 16) == bytes(range(16))
    scene.goes_on()


@pytest.mark.parametrize("name", COPIES)
def test_copies_that_make_no_sense(scene: Scene, flavour: Capability, name: str) -> None:
    pair, reason = COPIES[name]
    client = scene.client(flavour)
    client.post(messages.CopyTensor(*pair(client, client.buffer(SIZE))))
    scene.ends(client, reason)


@pytest.mark.parametrize("devices", [(0, 0), (0, 1), (1, 0)])
def test_t24_copies_that_do_within_and_across_devices(scene: Scene, devices: tuple[int, int]) -> None:
    data = bytes(range(256)) * 16
    with scene.client() as client:
        source, target = (client.record(client.buffer(SIZE, device), (1024,)) for device in devices)
        client.set(source, data)
        assert client.ask(messages.CopyTensor(source, target)).result == 1
        assert client.get(target, SIZE) == data
    scene.goes_on()


@pytest.mark.parametrize("nb", [(0, 0, 0, 0), (8, 4, 16, 16), (4, 4, 4, 4), (4, 8, 3, 7)], ids=str)
def test_t19_strange_strides_move_bytes_all_the_same(scene: Scene, nb: tuple[int, int, int, int]) -> None:
    """SET and GET move bytes of a range; in what order its elements lie is no concern of theirs."""
    with scene.client() as client:
        tensor = client.record(client.buffer(SIZE), (2, 2), nb=nb)
        client.ask(messages.GetAllocSize(0, tensor, (Record(),) * 10))
        client.set(tensor, b"abcd")
        assert client.get(tensor, 4) == b"abcd"
    scene.goes_on()


def test_commands_on_buffers_and_tensors_do_what_they_say(scene: Scene) -> None:
    with scene.client() as client:
        buffer = client.buffer(SIZE)
        tensor = client.record(buffer, (16,), at=64)
        client.ask(messages.InitTensor(tensor))
        client.ask(messages.BufferClear(buffer[0], 7))
        client.set(tensor, b"x" * 8, offset=4)
        client.ask(messages.MemsetTensor(tensor, 8, 2, 9))
        assert client.get(tensor, 16) == b"\7" * 4 + b"x" * 4 + b"\t\t" + b"xx" + b"\7" * 4
        assert client.get(tensor, 4, offset=60) == b"\7" * 4
        assert client.ask(messages.SetTensorHash(tensor, 0, 1)).result == 0
        assert client.ask(messages.GetAllocSize(1, client.record(ne=(64, 3), type="Q8_0"), (Record(),) * 10)) == (204,)
        assert client.ask(messages.GetAlignment(1)).alignment >= 16
        free, total = client.ask(messages.GetDeviceMemory(0))
        assert 0 < free <= total <= client.ask(messages.GetMaxSize(0)).max_size
    scene.goes_on()
