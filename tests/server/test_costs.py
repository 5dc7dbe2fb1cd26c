"""What valid messages may cost: no single client takes the process, its memory or its time from the others.

Servers are processes of their own, which may die. Numbers of cases are those of the project's list of hostile inputs.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from struct import pack

import psutil
import pytest

from sdrpc.ggml import params
from sdrpc.wire import messages
from sdrpc.wire.hello import Capability
from sdrpc.wire.messages import Command
from tests.server.conftest import eventually
from tests.support.client import Adder, RawClient
from tests.support.process import ServerProcess

MIB = 1 << 20
FLOOD = 2000
"""Requests that a connection takes at once, so that their client can leave before they are computed."""
Dims = Sequence[int]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("-v", "--protocol", "8.0") as process:
        yield process
        assert process.process.poll() is None


@pytest.fixture
def works(server: ServerProcess) -> Iterator[Adder]:
    """Another client, which must get right results afterwards."""
    with RawClient(server.port) as client:
        adder = Adder(client)
        adder()
        yield adder
        adder()


def in_time(condition: Callable[[], object]) -> bool:
    """Whether ``condition`` becomes true before a busy machine would have done it several times."""
    return eventually(condition, 100.0)


def memory(server: ServerProcess, kind: str) -> int:
    """MiB of memory of one kind: VmRSS, VmHWM (its peak), RssShmem."""
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith(kind))


def forget_peak(server: ServerProcess) -> int:
    """Let VmHWM count anew; what it is now."""
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")
    return memory(server, "VmHWM")


def one(
    client: RawClient, op: str, operands: Sequence[tuple[str, Dims]], ne: Dims, made: str = "F32", **fields: object
) -> int:
    """Have one operation computed on operands full of zeros; bytes of its buffer."""
    records, at = [], 0
    shapes = [*operands, (made, ne)]
    sizes = []
    for kind, shape in shapes:
        sizes.append(client_bytes(client, kind, shape))
    buffer = client.buffer(sum(sizes) + 64 * len(sizes))
    for i, (kind, shape) in enumerate(shapes):
        extra = {"op": op, "src": range(1, len(shapes)), **fields} if i == len(operands) else {}
        records.append(client.record(buffer, shape, type=kind, at=at, id=i + 1, **extra))
        at += -(-sizes[i] // 64) * 64
    client.compute([len(records)], records)
    return at


def client_bytes(client: RawClient, kind: str, shape: Dims) -> int:
    record = client.record(ne=shape, type=kind)
    return int(client.ask(messages.GetAllocSize(0, record, (client.record(ne=(1,), id=0),) * 10)).alloc_size)


def outcome(client: RawClient) -> str:
    """Nothing, when all that was sent has been computed; else the reason why it was not."""
    try:
        client.ask(messages.DeviceCount())
    except (EOFError, ConnectionError, AssertionError) as error:
        return str(error) or "hung up"
    return ""


# 01: parameters that torch's kernels can't stand


STRIDES = (1, 2, 255, 8192, 16384, 65536, 2**31 - 1)


@pytest.mark.parametrize("stride", STRIDES)
def test_01_transposed_convolutions_of_any_stride(server: ServerProcess, works: Adder, stride: int) -> None:
    with RawClient(server.port, capabilities=Capability.ERRORS) as client:
        fields = {"params": params.ConvTranspose2D(stride)}
        one(client, "CONV_TRANSPOSE_2D", [("F32", (3, 3, 8, 3)), ("F16", (1, 1, 3, 2))], (3, 3, 8, 2), **fields)
        assert outcome(client) == ""


EDGES = (0, 1, 7, 4096, 1 << 20, 2**31 - 1)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("which", ["stride", "padding", "dilation"])
def test_01_windows_at_the_edges(server: ServerProcess, works: Adder, which: str, edge: int) -> None:
    """Each is computed or refused; the process lives, and nobody else notices."""
    s, p, d = (edge if which == name else default for name, default in
               (("stride", 1), ("padding", 0), ("dilation", 1)))  # fmt: skip
    n, k = 5, 1 if which == "dilation" else 3
    out = (n + 2 * p - d * (k - 1) - 1) // s + 1 if s else 1
    if out < 1 or out * out * 4 > 64 * MIB:
        s = min(max(s, n + 2 * p), 2**31 - 1)
        out = (n + 2 * p - d * (k - 1) - 1) // s + 1
        out = out if out > 0 else 1
    for op, parameters, kernel, shape in (
        ("CONV_2D", params.Conv2D(s, s, p, p, d, d), (k, k, 2, 8), (out, out, 8, 1)),
        ("CONV_2D", params.Conv2D(s, s, p, p, d, d), (k, k, 2, 600), (out, out, 600, 1)),
        ("CONV_2D_DW", params.Conv2D(s, s, p, p, d, d), (k, k, 1, 2), (out, out, 2, 1)),
        ("CONV_3D", params.Window3D(s, s, s, p, p, p, d, d, d, 2, 1, 3), (k, k, k, 6), (out, out, out, 3)),
        ("IM2COL", params.Im2Col(s, s, p, p, d, d, 1), (k, k, 2, 8), (k * k * 2, out, out, 1)),
        ("IM2COL", params.Im2Col(s, 0, p, 0, d, 0, 0), (k, 2, 1, 1), (k * 2, out, 1, 1)),
    ):
        row = op == "IM2COL" and not parameters[-1]
        image = (n, 2, 1, 1) if row else (n, n, n, 2) if op == "CONV_3D" else (n, n, 2, 1)
        for kind in ("F32", "F16"):
            with RawClient(server.port, capabilities=Capability.ERRORS) as client:
                one(client, op, [(kind, kernel), ("F32", image)], shape, params=parameters)
                outcome(client)
            assert server.process.poll() is None, (op, kind, parameters)


def test_01_pools_at_the_edges(server: ServerProcess, works: Adder) -> None:
    for k, s, p in ((1, 2**31 - 1, 0), (2**31 - 1, 1, 2**30), (5, 70000, 2), (3, 1, 2**31 - 1), (4096, 4096, 2048)):
        for op in (0, 1):
            out = max((5 + 2 * p - k) // s + 1, 1)
            with RawClient(server.port, capabilities=Capability.ERRORS) as client:
                if out < 4096:
                    one(
                        client,
                        "POOL_2D",
                        [("F32", (5, 5, 2))],
                        (out, out, 2),
                        params=params.Pool2D(op, k, k, s, s, p, p),
                    )
                outcome(client)
            assert server.process.poll() is None, (k, s, p)


# 02: working memory

AMPLIFIERS: dict[str, tuple[str, list[tuple[str, Dims]], Dims, dict[str, object]]] = {
    "MUL_MAT, repeated": ("MUL_MAT", [("F32", (1000, 1000, 2)), ("F32", (1000, 1, 2, 500))], (1000, 1, 2, 500), {}),
    "MUL_MAT_ID, few rows often": (
        "MUL_MAT_ID", [("F32", (100000, 1, 1)), ("F32", (100000, 1, 8)), ("I32", (1000, 8))], (1, 1000, 8), {},
    ),
    "IM2COL, padded": (
        "IM2COL", [("F32", (1, 1, 1, 1)), ("F32", (4, 4))], (1, 3, 3, 1),
        {"params": params.Im2Col(16000, 16000, 16000, 16000, 1, 1, 1)},
    ),
    "CONV_2D, padded": (
        "CONV_2D", [("F32", (2, 2, 1, 128)), ("F32", (4, 4))], (3, 3, 128, 1),
        {"params": params.Conv2D(16000, 16000, 16000, 16000, 1, 1)},
    ),
    "FLASH_ATTN_EXT, heads that share keys": (
        "FLASH_ATTN_EXT", [("F32", (64, 1, 512)), ("F16", (64, 20000, 1)), ("F16", (64, 20000, 1))], (64, 512, 1, 1),
        {"params": params.FlashAttn(0.125)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AMPLIFIERS)
def test_02_little_memory_stays_little(server: ServerProcess, works: Adder, name: str) -> None:
    """These took 4 to 6 GiB of working memory, of a few MiB that they declare."""
    op, operands, ne, fields = AMPLIFIERS[name]
    base = forget_peak(server)
    with RawClient(server.port, capabilities=Capability.ERRORS) as client:
        one(client, op, operands, ne, **fields)
        assert outcome(client) == ""
    assert memory(server, "VmHWM") - base < 512


def test_02_working_memory_is_part_of_a_clients_share() -> None:
    """A SCALE of 48 MiB in place takes as much again, of 64 MiB that a client may have; one of 16 MiB runs."""
    with ServerProcess("--max-memory-per-client", "64M") as server, RawClient(server.port) as other:
        works = Adder(other)
        for size, reason in ((16, ""), (48, "MiB are one client's share")):
            with RawClient(server.port, capabilities=Capability.ERRORS) as client:
                buffer = client.buffer(size * MIB)
                shape = (1 << 18, size)
                leaf = client.record(buffer, shape, id=1)
                scaled = client.record(buffer, shape, id=2, op="SCALE", src=(1,), params=params.Scale(2.0, 1.0))
                client.compute([2], [leaf, scaled])
                said = outcome(client)
                assert reason in said
                assert bool(reason) == bool(said)
        works()


# 03, 11, 12: many buffers, and more than there is


def test_03_many_tiny_buffers(server: ServerProcess, works: Adder) -> None:
    request = pack("<BQIQ", Command.ALLOC_BUFFER, 12, 0, 1)
    refused = 0
    with ExitStack() as clients:
        for _ in range(24):
            client = clients.enter_context(RawClient(server.port))
            client.send(request * 1023)
            replies = [client.receive(24) for _ in range(1023)]
            refused += sum(reply[8:16] == bytes(8) for reply in replies)
        assert refused == 24 * 1023 - ((1 << 14) - 1), "all but what all clients may have together, one of the other's"
        works()


def test_11_no_more_is_promised_than_there_is(server: ServerProcess, works: Adder) -> None:
    with RawClient(server.port) as first, RawClient(server.port) as second:
        free, total = first.ask(messages.GetDeviceMemory(0))
        machine = psutil.virtual_memory().total
        assert total <= 0.91 * machine
        first.buffer(free - (256 << 20))
        left = second.ask(messages.GetDeviceMemory(0)).free
        assert left < machine // 4
        assert second.ask(messages.AllocBuffer(0, machine // 3)).remote_ptr == 0


def test_12_no_memory_is_an_answer_and_no_end() -> None:
    with ServerProcess("--protocol", "8.0") as server:
        assert server.port
        limit = memory(server, "VmSize:") * MIB + (3 << 30)  # a build of torch for GPUs has gigabytes of addresses
        resource.prlimit(server.process.pid, resource.RLIMIT_AS, (limit, limit))
        with RawClient(server.port) as client:
            assert client.ask(messages.AllocBuffer(0, 4 << 30)).remote_ptr == 0
            Adder(client)()


# 04, 10: memory that outlives its client


def test_04_the_memory_of_failed_runs_comes_back(server: ServerProcess, works: Adder) -> None:
    before = memory(server, "RssShmem")
    for _ in range(3):
        with RawClient(server.port, capabilities=Capability.ERRORS) as client:
            buffer = client.buffer(128 * MIB)
            client.ask(messages.BufferClear(buffer[0], 7))
            table = client.record(buffer, (4, 3), id=1)
            rows = client.record(buffer, (2,), type="I32", at=4096, id=2)
            client.set(rows, pack("<2i", 99, 0))
            client.compute([3], [table, rows, client.record(buffer, (4, 2), at=8192, id=3, op="GET_ROWS", src=(1, 2))])
            assert "rows" in client.ended()
        assert in_time(lambda: memory(server, "RssShmem") <= before + 1)


def test_10_the_scratch_memory_of_graphs_goes_with_their_client(server: ServerProcess, works: Adder) -> None:
    before = memory(server, "VmRSS")
    with RawClient(server.port) as client:
        for i in range(3):
            n, m = 1024, 32768 - i
            numbers = client.record(ne=(n,), id=1, op="ARANGE", params=params.Arange(0.0, float(n), 1.0))
            strides = (4 * m, 4, 4 * n * m, 4 * n * m)
            repeated = client.record(ne=(n, m), nb=strides, id=2, op="REPEAT", src=(1,))
            client.compute([1, 2], [numbers, repeated])
        assert outcome(client) == ""
        assert memory(server, "VmRSS") > before + 300
    assert in_time(lambda: memory(server, "VmRSS") < before + 100)


# 05, 06, 08: time


def long_convolution(client: RawClient) -> None:
    """Minutes of work in one operation of a graph of 908 bytes."""
    one(client, "CONV_2D", [("F32", (512, 512, 1, 1)), ("F32", (1024, 1024, 1, 1))], (513, 513, 1, 1),
        params=params.Conv2D(1, 1, 0, 0, 1, 1))  # fmt: skip


def long_conversion(client: RawClient) -> None:
    one(client, "CPY", [("F32", (1 << 20, 8))], (1 << 20, 8), made="Q6_K")


@pytest.mark.parametrize("work", [long_convolution, long_conversion])
def test_05_one_operation_ends_when_its_client_leaves(server: ServerProcess, works: Adder, work: object) -> None:
    with RawClient(server.port) as client:
        work(client)  # type: ignore[operator]
        name = client.name
    works()
    assert in_time(lambda: any(f"{name}:" in line and "its client is gone" in line for line in server.lines))


def test_05_a_server_stops_in_seconds_whatever_it_computes() -> None:
    with ServerProcess() as server, RawClient(server.port) as client:
        long_convolution(client)
        with suppress(TimeoutError):  # it has begun by then
            client.socket.settimeout(0.5)
            client.receive(1)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(100.0) == 0


def test_06_a_flood_of_recomputes_ends_with_its_client(server: ServerProcess, works: Adder) -> None:
    with RawClient(server.port) as client:
        n = 512
        buffer = client.buffer(3 * 4 * n * n)
        a, b = (client.record(buffer, (n, n), at=4 * n * n * i, id=i + 1) for i in (0, 1))
        product = client.record(buffer, (n, n), at=8 * n * n, id=3, op="MUL_MAT", src=(1, 2))
        client.compute([3], [a, b, product], uid=1)
        client.get(product, 4)
        client.send(pack("<BQIQ", Command.GRAPH_RECOMPUTE, 12, 0, 1) * FLOOD)
        name = client.name
    assert in_time(lambda: any(f"{name}:" in line and "its client is gone" in line for line in server.lines))
    line = next(line for line in server.lines if f"{name}:" in line and "its client is gone" in line)
    assert int(line.partition("; ")[2].split()[0]) < FLOOD


def test_08_compiling_ends_with_its_client(server: ServerProcess, works: Adder) -> None:
    """Sixteen thousand nodes, each of which reads what a later one overwrites."""
    with RawClient(server.port) as client:
        half = 8000
        buffer = client.buffer(64 * (4 * half + 2))
        leaves = [client.record(buffer, at=64 * i, id=i + 1) for i in range(half)]
        reads = [
            client.record(buffer, at=64 * (2 * half + 1 + i), id=half + i + 1, op="SQR", src=(i + 1,))
            for i in range(half)
        ]
        zero = client.record(buffer, at=64 * 4 * half, id=2 * half + 1)
        writes = [
            client.record(buffer, at=64 * i, id=2 * half + 2 + i, op="SQR", src=(2 * half + 1,)) for i in range(half)
        ]
        client.compute([record.id for record in (*reads, *writes)], [*leaves, *reads, zero, *writes])
        name = client.name
        works()
    assert in_time(lambda: any(f"{name}:" in line and "its client is gone" in line for line in server.lines))


# 07, 09: places and payloads


def test_07_idle_connections_lock_nobody_out(server: ServerProcess, works: Adder) -> None:
    with ExitStack() as idle:
        served = 0
        for i in range(300):
            connection = idle.enter_context(socket.create_connection(("127.0.0.1", server.port), 120))
            if i % 2:
                connection.sendall(pack("<BQ", Command.HELLO, 24) + bytes(24))

        def newcomer() -> bool:
            nonlocal served
            with suppress(EOFError, ConnectionError), RawClient(server.port) as client:
                Adder(client)()
                served += 1
            return served >= 3

        assert in_time(newcomer)


def test_09_unfinished_graphs_are_counted(server: ServerProcess, works: Adder) -> None:
    base = forget_peak(server)
    with ExitStack() as clients:
        for _ in range(12):
            client = clients.enter_context(RawClient(server.port))
            with suppress(ConnectionError):
                client.send(pack("<BQ", Command.GRAPH_COMPUTE, 64 * MIB))
                for _ in range(62):
                    client.send(bytes(MIB))
        works()
        assert memory(server, "VmHWM") - base < 400
    assert in_time(lambda: any("too many large graphs" in line for line in server.lines))


def test_a_graph_of_an_honest_size_is_taken_when_others_are_on_their_way(server: ServerProcess, works: Adder) -> None:
    with ExitStack() as clients:
        for _ in range(3):
            client = clients.enter_context(RawClient(server.port))
            with suppress(ConnectionError):
                client.send(pack("<BQ", Command.GRAPH_COMPUTE, 64 * MIB), *(bytes(MIB) for _ in range(62)))
        with RawClient(server.port) as client:
            Adder(client)()


# 14: small ones


def test_14_a_folder_called_like_a_tensor_costs_no_file_descriptor(tmp_path: Path) -> None:
    from sdrpc.content import digest

    data = os.urandom(5000)
    folder = tmp_path / "weights"
    (folder / f"{digest(data).hex()}.blake3").mkdir(parents=True)
    folder.chmod(0o700)
    from sdrpc.server import Cache

    cache = Cache(folder, 1 << 30)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        assert cache.open(digest(data), len(data)) is None
    assert len(os.listdir("/proc/self/fd")) == before
