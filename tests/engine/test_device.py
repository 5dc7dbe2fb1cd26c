"""The device itself: bytes, limits, caches, threads, errors."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import gguf
import numpy as np
import pytest
import torch

from sdrpc.content import PIECE
from sdrpc.device import Bytes
from sdrpc.engine import LocalDevice, devices
from sdrpc.engine.digest import content
from sdrpc.engine.precision import EXACT, GGML, choose
from sdrpc.engine.staging import LARGE_PIECES
from sdrpc.errors import ComputeError, ConnectionLost, DeviceError, GraphError, OutOfMemory, UsageError
from sdrpc.ggml import build as b
from sdrpc.ggml.tensor import Graph, Tensor
from sdrpc.ggml.types import F16, F32, I32, TYPES
from tests.engine.compare import at
from tests.engine.scene import receive


def doubled(key: int, n: int = 64, type: object = F32) -> Graph:
    """x at 0, w at 4096: w · x to 8192."""
    w = b.leaf(TYPES[str(type)], n, n, buffer=key, offset=16384)
    x = b.leaf(F32, n, buffer=key)
    return Graph((at(b.mul_mat(w, x), key, 8192),))


def floats(device: LocalDevice, buffer: object, offset: int, n: int) -> np.ndarray:
    return np.frombuffer(bytes(device.read(buffer, offset, 4 * n)), np.float32)


def test_the_cpu_is_always_there() -> None:
    *_, cpu = devices("exact")
    try:
        assert cpu.name == "CPU"
        assert cpu.description
        free, total = cpu.memory()
        assert 0 < free <= total
        assert cpu.target.managed
    finally:
        cpu.close()


def test_a_copy_within_a_buffer_takes_no_memory_of_its_own(exact: LocalDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody counts that: a client could have as much again as it may."""
    buffer = exact.allocate(100)
    exact.write(buffer, 0, bytes(range(100)))
    monkeypatch.setattr(torch.Tensor, "clone", None)
    exact.copy(buffer, 0, buffer, 50, 50)
    assert bytes(exact.read(buffer, 0, 100)) == bytes(range(50)) * 2
    exact.free(buffer)


@pytest.mark.parametrize("size", [1, 1 << 20, PIECE - 1, PIECE])
def test_what_is_received_is_there(exact: LocalDevice, size: int) -> None:
    """Also from several threads at once, while the device still reads what came before."""
    count = 20
    data = [np.random.default_rng(seed).bytes(size) for seed in range(count)]
    buffer = exact.allocate(count * size)

    def come(number: int) -> None:
        def fill(memory: memoryview) -> None:
            assert len(memory) == size
            memory[:] = data[number]

        receive(exact, buffer, number * size, size, fill)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(come, range(count)))
    assert bytes(exact.read(buffer, 0, count * size)) == b"".join(data)

    def broken(_: memoryview) -> None:
        raise ConnectionLost("somebody", "sending")

    with pytest.raises(ConnectionLost):
        receive(exact, buffer, 0, size, broken)
    receive(exact, buffer, 0, size, lambda memory: memory.__setitem__(slice(None), data[1]))
    assert bytes(exact.read(buffer, 0, size)) == data[1]
    exact.free(buffer)


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1])
def test_what_is_looked_at_is_what_is_there(exact: LocalDevice, size: int) -> None:
    """By more threads than there is memory to look through, and after somebody could not go on."""
    data = np.random.default_rng(size).bytes(size + 24)
    buffer = exact.allocate(size + 24)
    exact.write(buffer, 0, data)

    def broken(_: Bytes) -> None:
        raise ConnectionLost("somebody", "looking")

    for _ in range(LARGE_PIECES + 1):
        with pytest.raises(ConnectionLost):
            exact.look(buffer, 0, size, broken)
    together = threading.Barrier(LARGE_PIECES + 1)

    def see(seen: Bytes) -> bytes:
        together.wait(60)
        return bytes(seen)

    with ThreadPoolExecutor(LARGE_PIECES + 1) as pool:
        seen = pool.map(lambda at: exact.look(buffer, at, size, see), range(LARGE_PIECES + 1))
        assert list(seen) == [data[at : at + size] for at in range(LARGE_PIECES + 1)]
    with pytest.raises(DeviceError, match=r"bytes 25 … \d+ of a buffer"):
        exact.look(buffer, 25, size, see)
    exact.free(buffer)


def test_precisions() -> None:
    cpu = torch.device("cpu")
    assert choose("exact", cpu) is EXACT
    assert choose("ggml", cpu) is GGML
    assert choose("fast", cpu).narrow is torch.bfloat16
    assert choose("auto", cpu).name in ("exact", "fast")
    with pytest.raises(UsageError, match="there are auto, exact, fast, ggml"):
        choose("sloppy", cpu)


def test_bytes(exact: LocalDevice) -> None:
    buffer = exact.allocate(100)
    assert bytes(exact.read(buffer, 0, 100)) == bytes(100)
    exact.write(buffer, 10, b"abcdef")
    assert bytes(exact.read(buffer, 9, 8)) == b"\0abcdef\0"
    exact.fill(buffer, 11, 2, 0x7A)
    assert bytes(exact.read(buffer, 10, 6)) == b"azzdef"
    exact.copy(buffer, 10, buffer, 12, 6)  # overlapping
    assert bytes(exact.read(buffer, 10, 8)) == b"azazzdef"
    came = BytesIO(b"uvwxyz")
    with exact.receiving(buffer, [(0, 8), (20, 4)]) as receive:
        receive([(2, 4), (20, 2)], came.readinto)
    assert bytes(exact.read(buffer, 0, 8)) == b"\0\0uvwx\0\0"
    assert bytes(exact.read(buffer, 20, 4)) == b"yz\0\0"
    exact.clear(buffer, 1)
    assert bytes(exact.read(buffer, 0, 100)) == bytes([1]) * 100
    exact.free(buffer)
    with pytest.raises(DeviceError, match="does not have"):
        exact.read(buffer, 0, 1)


@pytest.mark.parametrize(("offset", "size"), [(0, 101), (100, 1), (-1, 2), (2**63, 1), (0, -1)])
def test_bytes_outside_of_a_buffer(exact: LocalDevice, offset: int, size: int) -> None:
    buffer = exact.allocate(100)
    with pytest.raises(DeviceError, match="bytes"):
        exact.read(buffer, offset, size)
    with pytest.raises(DeviceError, match="bytes"):
        exact.fill(buffer, offset, size, 0)
    exact.free(buffer)


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_what_nobody_has_any_more_is_given_back_by_every_accelerator(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    monkeypatch.setattr(getattr(torch, kind), "empty_cache", lambda: given.append(kind))
    device = LocalDevice(kind, torch.device(kind, 0), EXACT)
    device.trim()
    device.close()
    assert given == [kind]


def test_an_empty_buffer(exact: LocalDevice) -> None:
    buffer = exact.allocate(0)
    exact.write(buffer, 0, b"")
    assert bytes(exact.read(buffer, 0, 0)) == b""
    exact.free(buffer)


def test_more_than_there_is(exact: LocalDevice) -> None:
    total = exact.memory().total
    with pytest.raises(OutOfMemory, match="no room"):
        exact.allocate(2**62)
    held = exact.allocate(exact.memory().free // 2)  # untouched, so it costs nothing; but it is promised
    try:
        assert exact.memory().free <= total - held.size
        with pytest.raises(OutOfMemory):
            exact.allocate(total - held.size + 1)
    finally:
        exact.free(held)


@pytest.mark.parametrize("type", ["F16", "Q8_0"])
def test_a_weight_that_is_written_again_is_converted_again(exact: LocalDevice, type: str) -> None:
    buffer = exact.allocate(65536)
    program = exact.compile(doubled(buffer.key, type=type), {buffer.key: buffer})
    x = np.ones(64, np.float32)
    exact.write(buffer, 0, x.tobytes())

    def weigh(factor: float) -> bytes:
        w = np.full((64, 64), factor, np.float32)
        return (
            gguf.quants.quantize(w, gguf.GGMLQuantizationType[type]).tobytes()
            if type != "F16"
            else w.astype("<f2").tobytes()
        )

    for factor in (1.0, 2.0, 4.0):
        exact.write(buffer, 16384, weigh(factor))
        for _ in range(2):
            program.run()
            np.testing.assert_allclose(floats(exact, buffer, 8192, 64), 64 * factor, rtol=1e-3)
    exact.free(buffer)


def test_without_room_weights_are_converted_at_each_run() -> None:
    cpu = torch.device("cpu")
    device = LocalDevice("CPU", cpu, EXACT, threads=1, dequant_cache=0)
    buffer = device.allocate(65536)
    device.write(buffer, 0, np.ones(64, np.float32).tobytes())
    device.write(buffer, 16384, np.ones((64, 64), "<f2").tobytes())
    program = device.compile(doubled(buffer.key, type=F16), {buffer.key: buffer})
    for _ in range(2):
        program.run()
        np.testing.assert_array_equal(floats(device, buffer, 8192, 64), 64)
    assert device._weights.used == 0
    device.close()


def test_equal_graphs_on_other_buffers_share_one_program(exact: LocalDevice) -> None:
    first, second = exact.allocate(65536), exact.allocate(65536)
    programs = [exact.compile(doubled(buffer.key), {buffer.key: buffer}) for buffer in (first, second)]
    assert programs[0].bound.compiled is programs[1].bound.compiled
    assert exact.compile(doubled(first.key), {first.key: first}).bound is programs[0].bound
    for factor, buffer, program in ((1, first, programs[0]), (3, second, programs[1])):
        exact.write(buffer, 0, np.ones(64, np.float32).tobytes())
        exact.write(buffer, 16384, np.full((64, 64), factor, np.float32).tobytes())
        program.run()
        np.testing.assert_array_equal(floats(exact, buffer, 8192, 64), 64 * factor)
        exact.free(buffer)


def test_the_digest_tells_graphs_apart() -> None:
    def digest(graph: Graph, size: int = 65536) -> bytes:
        return content(graph, {node.buffer: size for node in graph.tensors})[0]

    assert digest(doubled(1)) == digest(doubled(7))
    assert digest(doubled(1)) != digest(doubled(1), 65537)
    assert digest(doubled(1)) != digest(doubled(1, 32))
    assert digest(doubled(1)) != digest(doubled(1, type=F16))


def test_many_threads(exact: LocalDevice) -> None:
    wrong: list[object] = []

    def session(factor: int) -> None:
        buffer = exact.allocate(65536)
        exact.write(buffer, 0, np.ones(64, np.float32).tobytes())
        exact.write(buffer, 16384, np.full((64, 64), factor, np.float32).tobytes())
        for _ in range(20):
            exact.compile(doubled(buffer.key), {buffer.key: buffer}).run()
            if not (floats(exact, buffer, 8192, 64) == 64 * factor).all():
                wrong.append(factor)
        exact.free(buffer)

    threads = [threading.Thread(target=session, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_run_that_takes_too_long() -> None:
    device = LocalDevice("CPU", torch.device("cpu"), EXACT, threads=1, compute_limit=0.0)
    buffer = device.allocate(65536)
    program = device.compile(doubled(buffer.key), {buffer.key: buffer})
    with pytest.raises(ComputeError, match="node 0"):
        program.run()
    device.close()


def test_a_row_that_does_not_exist(exact: LocalDevice) -> None:
    """The CPU says so; an accelerator, whose context an assertion would end, takes the nearest row."""
    if exact.torch_device.type != "cpu":
        return
    buffer = exact.allocate(65536)
    rows = b.node("GET_ROWS", b.leaf(F32, 4, 8, buffer=buffer.key), b.leaf(I32, 2, buffer=buffer.key, offset=4096))
    program = exact.compile(Graph((at(rows, buffer.key, 8192),)), {buffer.key: buffer})
    exact.write(buffer, 4096, np.array([3, 8], np.int32).tobytes())
    with pytest.raises(ComputeError, match=r"node 0 \(GET_ROWS\).*rows"):
        program.run()
    exact.write(buffer, 4096, np.array([-1, 0], np.int32).tobytes())
    with pytest.raises(ComputeError, match="rows"):
        program.run()
    exact.free(buffer)


def test_a_graph_beyond_its_buffer(exact: LocalDevice) -> None:
    buffer = exact.allocate(4096)
    with pytest.raises(GraphError):
        exact.compile(doubled(buffer.key), {buffer.key: buffer})
    exact.free(buffer)


def test_values_are_not_stored_without_need(exact: LocalDevice) -> None:
    """A node in no buffer leaves nothing behind; one in a buffer does."""
    buffer = exact.allocate(4096)
    x = b.leaf(F32, 8, buffer=buffer.key)
    inner: Tensor = b.node("SIN", x)
    program = exact.compile(Graph((inner, at(b.node("SQR", inner), buffer.key, 1024))), {buffer.key: buffer})
    assert len(program.bound.compiled.roots) == 1
    exact.free(buffer)
