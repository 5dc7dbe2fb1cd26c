"""SET_TENSOR_2D, GET_TENSOR_2D and COMM_* of protocol 8.0: rows that are not where they say, sums that don't fit 64
bits, and a client that would have the server listen or connect somewhere."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from struct import pack

import numpy as np
import pytest

from sdrpc.device import Rows
from sdrpc.ggml.dialect import dialects
from sdrpc.server import Server
from sdrpc.wire import messages
from sdrpc.wire.hello import Capability
from sdrpc.wire.messages import Command
from tests.server.conftest import CountingDevice, Scene
from tests.support.client import RawClient

MOST = 2**64 - 1
SIZE = 1 << 16
ROWS: dict[str, tuple[tuple[int, int, int, int], str]] = {
    "no-rows": ((0, 4, 0, 8), "0 rows of 4 bytes"),
    "rows-of-nothing": ((0, 0, 4, 8), "4 rows of 0 bytes"),
    "one-row-too-many": ((0, 4, 5, 16), "not inside"),
    "behind-the-end": ((64, 1, 1, 0), "not inside"),
    "a-byte-behind-the-end": ((61, 4, 1, 0), "not inside"),
    "n-copies-overflows": ((0, 4, MOST, 16), "not inside"),
    "n-copies-times-stride-is-0": ((0, 4, 2**32 + 1, 2**32), "not inside"),
    "size-overflows": ((0, MOST, 2, MOST), "not inside"),
    "size-times-n-copies-is-0": ((0, 2**63, 2, 2**63), "not inside"),
    "stride-overflows": ((0, 4, 2, MOST), "not inside"),
    "offset-overflows": ((MOST, 4, 2, 16), "not inside"),
    "offset-and-rows-overflow": ((MOST - 15, 4, 2, 16), "not inside"),
    "stride-0": ((0, 4, 4, 0), "4 bytes, 0 apart, .* overlap"),
    "rows-overlap": ((0, 16, 3, 8), "16 bytes, 8 apart, .* overlap"),
}
"""(offset, size, n_copies, stride) of a tensor of 16 F32."""


@pytest.mark.parametrize("name", ROWS)
def test_rows_to_get(scene: Scene, flavour: Capability, name: str) -> None:
    rows, reason = ROWS[name]
    client = scene.client(flavour)
    client.post(messages.GetTensor2d(client.record(client.buffer(SIZE), (16,)), *rows))
    scene.ends(client, reason)


@pytest.mark.parametrize("name", ROWS)
def test_rows_to_set(scene: Scene, flavour: Capability, name: str) -> None:
    """With as much data as there would be, where that can be sent; else with some."""
    rows, reason = ROWS[name]
    client = scene.client(flavour)
    tensor = client.record(client.buffer(SIZE), (16,))
    client.get(tensor, 4)  # the length of its names is known
    total = rows[1] * rows[2]
    client.post(messages.SetTensor2d(tensor, *rows, bytes(total if 0 < total < SIZE else 64)))
    scene.ends(client, reason)


@pytest.mark.parametrize("sent", [0, 15, 17, 64])
def test_another_number_of_bytes_than_the_rows_have(scene: Scene, flavour: Capability, sent: int) -> None:
    client = scene.client(flavour)
    tensor = client.record(client.buffer(SIZE), (16,))
    client.get(tensor, 4)
    client.post(messages.SetTensor2d(tensor, 0, 4, 4, 16, bytes(sent)))
    scene.ends(client, f"{sent} bytes for 4 rows of 4")


def test_a_payload_of_2_63_bytes(scene: Scene, flavour: Capability) -> None:
    client = scene.client(flavour)
    client.command(Command.SET_TENSOR_2D, b"", 2**63)
    scene.ends(client, "SET_TENSOR_2D: 9223372036854775808 bytes instead of")


@pytest.mark.parametrize("command", [Command.SET_TENSOR_2D, Command.GET_TENSOR_2D])
@pytest.mark.parametrize("handle", [0, 99])
def test_rows_in_no_buffer(scene: Scene, flavour: Capability, command: Command, handle: int) -> None:
    client = scene.client(flavour)
    tensor = client.record((handle, 1 << 32), (16,))
    client.get(client.record(client.buffer(SIZE)), 4)
    ask = messages.GetTensor2d(tensor, 0, 4, 2, 16)
    client.post(ask if command is Command.GET_TENSOR_2D else messages.SetTensor2d(*ask, bytes(8)))
    scene.ends(client, "does not exist|is in no buffer")


def test_rows_that_stop_coming(scene: Scene) -> None:
    with scene.client() as client:
        tensor = client.record(client.buffer(SIZE), (1024,))
        client.get(tensor, 4)
        head = b"".join(
            map(bytes, messages.encode(messages.SetTensor2d(tensor, 0, 4, 512, 8, b""), client.dialect, 64))
        )
        client.command(Command.SET_TENSOR_2D, head, len(head) + 2048)
        client.send(bytes(100))
    scene.goes_on()


RIGHT = [(0, 4, 16, 16), (12, 1, 200, 3), (0, 256, 1, 0), (0, 256, 4, 256), (5, 7, 1, MOST), (1000, 1, 24, 1)]


@pytest.mark.parametrize("rows", RIGHT)
def test_rows_are_set_and_got(scene: Scene, rows: tuple[int, int, int, int]) -> None:
    offset, size, count, stride = rows
    data = np.random.default_rng(1).bytes(size * count)
    expected = np.zeros(1024, np.uint8)
    for i in range(count):
        expected[offset + i * stride :][:size] = np.frombuffer(data, np.uint8)[i * size :][:size]
    with scene.client() as client:
        tensor = client.record(client.buffer(SIZE), (256,))
        client.post(messages.SetTensor2d(tensor, *rows, data))
        assert client.get(tensor, 1024) == expected.tobytes()
        client.ask(messages.GetTensor2d(tensor, *rows), bulk=len(data))
        assert client.receive(len(data)) == data
    scene.goes_on()


@pytest.mark.parametrize("rows", [Rows(0, 6 << 20, 2, 7 << 20), Rows(3, 3, 1 << 20, 8), Rows(1, 5 << 20, 1, 0)])
def test_large_rows_go_in_pieces(scene: Scene, rows: Rows) -> None:
    """Rows that are larger than a piece, and so many small ones that they make several."""
    assert len(list(rows.parts(4 << 20))) > 1 or rows.copies > 1
    size = rows.offset + rows.extent
    data = np.random.default_rng(2).integers(0, 256, rows.size * rows.copies, np.uint8)
    with scene.client() as client:
        tensor = client.record(client.buffer(size), (size,), type="I8")
        client.post(messages.SetTensor2d(tensor, *rows, data.tobytes()))
        got = np.frombuffer(client.get(tensor, size), np.uint8)
        view = np.lib.stride_tricks.as_strided(got[rows.offset :], (rows.copies, rows.size), (rows.stride, 1))
        assert np.array_equal(view.ravel(), data)
        assert int(got.sum(dtype=np.int64)) == int(data.sum(dtype=np.int64)), "nothing else was written"
        client.ask(messages.GetTensor2d(tensor, *rows), bulk=data.size)
        assert client.receive(data.size) == data.tobytes()


def test_weights_that_are_kept_converted_are_made_anew(device: CountingDevice) -> None:
    """As after any other write."""
    buffer = device.allocate(256)
    device.write_rows(buffer, Rows(0, 4, 8, 16), b"\1" * 32)
    dropped: list[tuple[int, ...]] = []
    real, device._weights.drop = device._weights.drop, lambda *place: dropped.append(place)  # type: ignore[method-assign]
    device.write_rows(buffer, Rows(8, 4, 8, 16), b"\2" * 32)
    device._weights.drop = real  # type: ignore[method-assign]
    assert dropped == [(buffer.storage.key, 8, 8 + 7 * 16 + 4)]
    device.free(buffer)


def listening() -> set[str]:
    """The ports on which this process listens, as the system names them. (Other tests' servers come and go.)"""
    own = set()
    for handle in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # it was that of the folder, or is closed by another thread
            own.add(os.readlink(handle))
    with open("/proc/net/tcp") as table:
        rows = [line.split() for line in table]
    return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own}


@pytest.mark.parametrize("rank", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("number", [0, 77])
def test_nobody_makes_the_server_listen_or_connect(scene: Scene, rank: int, number: int) -> None:
    """COMM_INIT is answered with no, at once; the connection goes on."""
    with socket.create_server(("127.0.0.1", 0)) as trap, scene.client() as client:
        trap.settimeout(0.2)
        before, port = listening(), trap.getsockname()[1]
        answer = client.ask(messages.CommInit(number, rank, 2, port if rank else port + 1, b"127.0.0.1"))
        assert answer.ok == 0
        assert listening() <= before
        with pytest.raises(TimeoutError):
            trap.accept()
        client.ask(messages.CommFree(0))
        assert client.ask(messages.DeviceCount()).device_count == 2


COMM: dict[str, tuple[Callable[[RawClient], object], str]] = {
    "allreduce": (
        lambda c: c.post(messages.CommAllreduce(0, c.record(c.buffer(64), (4,)))), "device 0 was joined with no other"
    ),
    "allreduce-elsewhere": (lambda c: c.post(messages.CommAllreduce(9, c.record())), "device 9 does not exist"),
    "free-elsewhere": (lambda c: c.post(messages.CommFree(2**32 - 1)), "device 4294967295 does not exist"),
    "init-too-short": (lambda c: c.command(Command.COMM_INIT, bytes(79)), "COMM_INIT: 79 bytes instead of 80"),
    "init-too-long": (lambda c: c.command(Command.COMM_INIT, bytes(81)), "COMM_INIT: 81 bytes instead of 80"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMM)
def test_comm(scene: Scene, flavour: Capability, name: str) -> None:
    steps, reason = COMM[name]
    client = scene.client(flavour)
    steps(client)
    scene.ends(client, reason)


@pytest.mark.parametrize("number", [18, 19, 20, 21, 22])
def test_before_8_0_there_are_no_such_commands(scene: Scene, number: int) -> None:
    old = dialects()["7.0.0"]
    with Server(scene.devices, old) as server, RawClient(server.port, old) as client:
        client.send(pack("<BQ", number, 4), bytes(4))
        assert client.ended() == ""
