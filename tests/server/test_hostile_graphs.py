"""T25 … T41 of the hostile inputs: graphs that mean nothing, ask for too much, or whose memory is gone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from struct import pack
from typing import Any, NamedTuple

import numpy as np
import pytest

from sdrpc.ggml import params
from sdrpc.server import Limits, Server
from sdrpc.wire import messages
from sdrpc.wire.hello import Capability
from sdrpc.wire.messages import Command
from sdrpc.wire.records import Record
from tests.server.conftest import CountingDevice, Scene
from tests.support.client import Adder, RawClient, busy

SIZE = 1 << 16
Buffer = tuple[int, int]


class Make:
    """Tensors of a graph in one buffer, each in its own place, ids counting from 1."""

    def __init__(self, client: RawClient, size: int = SIZE) -> None:
        self.client, self.buffer = client, client.buffer(size)
        self.records: list[Record] = []

    def __call__(self, ne: Sequence[int] = (4,), **fields: Any) -> int:
        """Add a tensor; its id."""
        at = fields.pop("at", 256 * len(self.records))
        number = len(self.records) + 1
        self.records.append(self.client.record(fields.pop("buffer", self.buffer), ne, at=at, id=number, **fields))
        return number

    def change(self, number: int, /, **fields: Any) -> None:
        """Set fields of a tensor, past all sense."""
        self.records[number - 1] = self.records[number - 1]._replace(**fields)

    def compute(self, *nodes: int, uid: int = 0) -> None:
        self.client.compute(nodes, self.records, uid=uid)


class Attack(NamedTuple):
    steps: Callable[[RawClient, Make], object]
    reason: str


def sum_of(make: Make, **fields: Any) -> int:
    """The node a + b, with ``fields`` of its own."""
    return make(**{"op": "ADD", "src": (make(), make()), **fields})


def compute(**fields: Any) -> Callable[[RawClient, Make], None]:
    """Computes a + b, where the sum's record has ``fields``."""
    return lambda client, make: make.compute(sum_of(make, **fields))


def with_operand(**fields: Any) -> Callable[[RawClient, Make], None]:
    """Computes a + b, where a's record has ``fields``."""

    def steps(client: RawClient, make: Make) -> None:
        node = sum_of(make)
        make.change(1, **fields)
        make.compute(node)

    return steps


def payload(head: bytes, tail: bytes = b"") -> Callable[[RawClient, Make], None]:
    return lambda client, make: client.command(Command.GRAPH_COMPUTE, head + tail)


def node(
    op: str, *sources: Sequence[int] | tuple[Sequence[int], str], ne: Sequence[int] = (4,), **fields: Any
) -> Callable[[RawClient, Make], None]:
    """Computes ``op`` of F32 operands of these shapes (or of (shape, type)); the result is said to be ``ne``."""

    def steps(client: RawClient, make: Make) -> None:
        ids = []
        for source in sources:
            shape, kind = source if isinstance(source[-1], str) else (source, "F32")
            ids.append(make(shape, type=kind))
        make.compute(make(ne, op=op, src=ids, **fields))

    return steps


def two_cycle(client: RawClient, make: Make) -> None:
    make(op="SCALE", src=(2,))
    make(op="SCALE", src=(1,))
    make.compute(1, 2)


def id_twice(client: RawClient, make: Make) -> None:
    node = sum_of(make)
    make.change(2, id=1)
    make.compute(node)


def rope(**fields: Any) -> params.Rope:
    """The parameters of a rotation, with ``fields`` of its own."""
    return params.Rope(0, 4, 0, 0, 0, 10000.0, 1.0, 0.0, 1.0, 32.0, 1.0)._replace(**fields)


COUNTS = {
    "T25-n-nodes-2^32-1": Attack(payload(pack("<IQIQ", 0, 0, 2**32 - 1, 1)), "4294967295 nodes in 24 bytes"),
    "T25-n-nodes-over-payload": Attack(payload(pack("<IQIQI", 0, 0, 3, 1, 0)), "3 nodes in 28 bytes"),
    "T25-nodes-but-no-tensors": Attack(payload(pack("<IQIQI", 0, 0, 1, 1, 0)), "1 nodes but no tensor"),
    "T26-n-tensors-2^32-1": Attack(payload(pack("<IQII", 0, 0, 0, 2**32 - 1), bytes(296)), "4294967295 tensors in 296"),
    "T26-n-tensors-short": Attack(payload(pack("<IQII", 0, 0, 0, 3), bytes(2 * 296)), "3 tensors in 592 bytes"),
    "T26-bytes-left": Attack(payload(pack("<IQII", 0, 0, 0, 0), bytes(296)), "0 tensors in 296 bytes"),
    "T27-node-0": Attack(lambda c, m: (sum_of(m), m.compute(0)), "unknown id 0"),
    "T27-tensor-0": Attack(lambda c, m: (sum_of(m), m.change(1, id=0), m.compute(3)), "id 0"),
    "T28-tensor-twice": Attack(id_twice, "second tensor with the same id"),
    "T28-node-twice": Attack(lambda c, m: (sum_of(m), m.compute(3, 3)), "is a node twice"),
    "T29-unknown-node": Attack(lambda c, m: (sum_of(m), m.compute(77)), "unknown id 77"),
    "T29-unknown-source": Attack(compute(src=(1, 77)), "source 1 has the unknown id 77"),
    "T29-unknown-view-source": Attack(compute(view_src=77), "view_src has the unknown id 77"),
    "T30-self-cycle": Attack(compute(src=(1, 3)), "is computed later, or is the node itself"),
    "T30-2-cycle": Attack(two_cycle, "is computed later"),
    "T30-view-of-itself": Attack(compute(view_src=3), "is computed later, or is the node itself"),
}
MEMORY = {
    "T12-unknown-buffer": Attack(compute(buffer=(99, 1 << 32)), "buffer 0x63 does not exist"),
    "T17-type": Attack(with_operand(type=5), "type 5 does not exist"),
    "T18-ne-0": Attack(with_operand(ne=(4, 0, 1, 1)), r"the result is \[4, 0, 1, 1\]"),
    "T18-ne-overflow": Attack(with_operand(ne=(2**31,) * 4, nb=(4, 16, 16, 16)), "bytes .* of a buffer of|elements in"),
    "T18-half-a-block": Attack(with_operand(type=8, ne=(33, 1, 1, 1)), "whole number of blocks"),
    "T19-nb-0": Attack(with_operand(nb=(0, 0, 0, 0)), r"strides \[0, 0, 0, 0\]"),
    "T19-nb-huge": Attack(with_operand(nb=(2**31, 2**31, 2**31, 2**31)), "of a buffer of"),
    "T19-nb-odd": Attack(with_operand(nb=(6, 24, 24, 24)), "strides"),
    "T19-result-overlaps-itself": Attack(
        node("ADD", (2, 2), (2, 2), ne=(2, 2), nb=(4, 4, 16, 16)), "strides .* overlap"
    ),
    "T20-below-base": Attack(compute(at=-4), "are not inside buffer"),
    "T20-past-end": Attack(compute(at=SIZE + 4), "are not inside buffer"),
    "T20-over-end": Attack(compute(at=SIZE - 12), f"bytes {SIZE - 12} to {SIZE + 4} of a buffer of {SIZE}"),
    "T20-wraps": Attack(compute(data=2**64 - 8), "are not inside buffer"),
    "T20-misaligned": Attack(compute(at=6), "elements of 4 bytes at offset 6"),
    "T21-view-past-source": Attack(
        node("VIEW", (4,), ne=(4,), view_src=1, view_offs=8, at=8, params=params.View(8)), "bytes 8 to 24 of"
    ),
    "T21-view-offs-2^63": Attack(
        node("VIEW", (4,), ne=(4,), view_src=1, view_offs=2**63, at=0, params=params.View(0)),
        "bytes 9223372036854775808",
    ),
    "T21-view-elsewhere": Attack(
        node("VIEW", (4,), ne=(2,), view_src=1, view_offs=8, at=4096, params=params.View(8)), "is not where its source"
    ),
    "T35-data-without-buffer": Attack(with_operand(buffer=0), "an address in no buffer"),
    "T35-leaf-without-memory": Attack(with_operand(buffer=0, data=0), "lives in no buffer"),
}
OPERATIONS = {
    "T32-op-count": Attack(compute(op=101), r"operation 101: an operation of stable-diffusion\.cpp's own"),
    "T32-op-2^31": Attack(compute(op=2**31), r"operations \[2147483648\] do not exist"),
    "T32-custom": Attack(compute(op="CUSTOM"), "CUSTOM.*not supported"),
    "T32-map-custom": Attack(compute(op="MAP_CUSTOM2", words=(1, 2, 3)), "MAP_CUSTOM2.*not supported"),
    "T32-not-here": Attack(compute(op="FLASH_ATTN_BACK", name=b"back"), "FLASH_ATTN_BACK.*not supported.*'back'"),
    "T32-unary-99": Attack(node("UNARY", (4,), words=(99,)), "UNARY number 99 does not exist"),
    "T32-glu--1": Attack(node("GLU", (4,), ne=(2,), words=(-1,)), "GLU number -1 does not exist"),
    "shape-of-sum": Attack(node("ADD", (4,), (3,)), "ADD"),
    "shape-of-product": Attack(node("MUL_MAT", (4, 2), (5, 3), ne=(2, 3)), "MUL_MAT"),
    "shape-of-result": Attack(node("MUL_MAT", (4, 2), (4, 3), ne=(3, 3)), "MUL_MAT"),
    "missing-operand": Attack(node("ADD", (4,)), "ADD"),
    "too-many-operands": Attack(node("ADD", (4,), (4,), (4,)), "ADD"),
    "type-of-operand": Attack(node("NORM", ((4,), "I32"), params=params.Eps(1e-5)), "NORM"),
    "type-of-result": Attack(node("ADD", (4,), (4,), type="I32"), "ADD"),
    "permute-twice-the-same": Attack(node("PERMUTE", (4,), params=params.Permute(0, 0, 1, 2)), "PERMUTE"),
    "T33-acc-negative": Attack(
        node("ACC", (16,), (4,), ne=(16,), params=params.SetView(-4, -4, -4, -64, 0)), "ACC"
    ),
    "T33-set-negative-offset": Attack(
        node("SET", (16,), (4,), ne=(16,), params=params.SetView(64, 64, 64, -16, 0)), "SET"
    ),
    "T33-set-past-end": Attack(node("SET", (16,), (4,), ne=(16,), params=params.SetView(64, 64, 64, 56, 0)), "SET"),
    "T33-pool-0": Attack(
        node("POOL_2D", (4, 4, 1), ne=(4, 4, 1), params=params.Pool2D(0, 0, 0, 0, 0, 0, 0)), "POOL_2D"
    ),
    "T33-conv-stride-0": Attack(
        node("CONV_2D", (1, 1, 1, 1), (4, 4, 1), ne=(4, 4, 1), params=params.Conv2D(0, 0, 0, 0, 1, 1)), "CONV_2D"
    ),
    "T33-conv-negative-padding": Attack(
        node("CONV_2D", (1, 1, 1, 1), (4, 4, 1), ne=(4, 4, 1), params=params.Conv2D(1, 1, -9, -9, 1, 1)), "CONV_2D"
    ),
    "T33-pad-negative": Attack(
        node("PAD", (4,), ne=(2,), params=params.Pad(-1, -1, 0, 0, 0, 0, 0, 0)), "PAD"
    ),
    "T33-upscale-of-nothing": Attack(node("UPSCALE", (4, 0), ne=(8, 8), params=params.Upscale(0)), "UPSCALE.*makes"),
    "T33-upscale-mode-99": Attack(node("UPSCALE", (4, 4), ne=(8, 8), params=params.Upscale(99)), "UPSCALE"),
    "T33-im2col-10^12": Attack(
        node(
            "IM2COL", (1, 1, 1, 1), (4, 4, 1), ne=(1, 1 << 20, 1 << 20), buffer=(0, 0), at=0,
            params=params.Im2Col(1, 1, (1 << 19) - 2, (1 << 19) - 2, 1, 1, 1),
        ),
        "IM2COL",
    ),
    "T33-group-norm-0-groups": Attack(
        node("GROUP_NORM", (4, 4, 4), ne=(4, 4, 4), params=params.GroupNorm(0, 1e-5)), "GROUP_NORM"
    ),
    "T33-concat-dim-7": Attack(node("CONCAT", (4,), (4,), ne=(8,), params=params.Concat(7)), "CONCAT"),
    "T33-arange-nan": Attack(node("ARANGE", ne=(4,), params=params.Arange(0.0, float("nan"), 1.0)), "ARANGE"),
    "T33-arange-endless": Attack(node("ARANGE", ne=(4,), params=params.Arange(0.0, 1e30, 1e-30)), "ARANGE"),
    "T33-rope-odd": Attack(node("ROPE", (4, 2, 1), ((1,), "I32"), ne=(4, 2, 1), params=rope(n_dims=3)), "3 rotated"),
    "T33-rope-too-wide": Attack(node("ROPE", (4, 2), ((1,), "I32"), ne=(4, 2), params=rope(n_dims=6)), "6 rotated"),
    "T33-rope-negative": Attack(node("ROPE", (4, 2), ((1,), "I32"), ne=(4, 2), params=rope(n_offset=-2)), "from -2 on"),
    "T33-rope-mode": Attack(node("ROPE", (4, 2), ((1,), "I32"), ne=(4, 2), params=rope(mode=99)), "rotary mode 99"),
    "T33-rope-nan": Attack(
        node("ROPE", (4, 2), ((1,), "I32"), ne=(4, 2), params=rope(freq_base=float("nan"))), "a parameter is nan"
    ),
    "T33-rope-inf": Attack(
        node("ROPE", (4, 2), ((1,), "I32"), ne=(4, 2), params=rope(freq_scale=float("inf"))), "a parameter is inf"
    ),
    "T34-set-rows-shape": Attack(
        node("SET_ROWS", (4, 2), ((3,), "I64"), (4, 8), ne=(4, 8), type="F32"), "SET_ROWS"
    ),
    "T34-set-rows-width": Attack(
        node("SET_ROWS", (4, 2), ((2,), "I64"), (5, 8), ne=(5, 8), type="F32"), "SET_ROWS"
    ),
    "T34-get-rows-shape": Attack(node("GET_ROWS", (4, 3), ((2, 2), "I32"), ne=(4, 9)), "GET_ROWS"),
    "T34-get-rows-of-floats": Attack(node("GET_ROWS", (4, 3), (2,), ne=(4, 2)), "GET_ROWS"),
}  # fmt: skip
ATTACKS = {**COUNTS, **MEMORY, **OPERATIONS}


@pytest.mark.parametrize("name", ATTACKS)
def test_graphs_that_mean_nothing(scene: Scene, flavour: Capability, name: str) -> None:
    client = scene.client(flavour)
    ATTACKS[name].steps(client, Make(client))
    scene.ends(client, ATTACKS[name].reason)


def test_t25_an_empty_graph_is_a_graph(scene: Scene) -> None:
    with scene.client() as client:
        client.compute([], [], uid=1)
        client.post(messages.GraphRecompute(0, 1))
        Adder(client)()
    scene.goes_on()


def test_t32_all_unknown_operations_are_named_at_once(scene: Scene) -> None:
    client = scene.client(Capability.ERRORS)
    make = Make(client)
    for op in ("MAP_CUSTOM3", "MAP_CUSTOM1", "FLASH_ATTN_BACK"):
        make(op=op)
    make.compute(1, 2, 3)
    scene.ends(client, "MAP_CUSTOM3.*MAP_CUSTOM1.*FLASH_ATTN_BACK")


NOT_HERE: dict[str, tuple[Callable[[Make], int], str]] = {
    "FLASH_ATTN_BACK": (lambda make: sum_of(make, op="FLASH_ATTN_BACK", name=b"layer 3"), "operation not supported"),
    "SQR": (lambda make: make(op="SQR", src=(make(type="I32"),), type="I32", name=b"layer 3"), "source of type I32"),
    "MUL_MAT": (
        lambda make: make((1,), op="MUL_MAT", src=(make(type="I8"), make()), name=b"layer 3"),
        "source of type I8",
    ),
}


@pytest.mark.parametrize("op", NOT_HERE)
def test_what_nobody_computes_ends_one_connection(scene: Scene, flavour: Capability, op: str) -> None:
    """One line says which operation or type of which node, and in which protocol; a second client notices nothing."""
    node, reason = NOT_HERE[op]
    scene.works()
    client = scene.client(flavour)
    make = Make(client)
    make.compute(node(make))
    scene.works()
    version = re.escape(client.dialect.version)
    scene.ends(client, rf"protocol {version}: disconnected: {op}: {reason} \(node 0 \({op} 'layer 3'\)\)$")


@pytest.mark.parametrize("index", [3, -1, 2**31 - 1, -(2**31)])
def test_t34_row_numbers_out_of_range(scene: Scene, flavour: Capability, index: int) -> None:
    client = scene.client(flavour)
    make = Make(client)
    table, rows = make((4, 3)), make((2,), type="I32")
    client.set(make.records[rows - 1], np.array([0, index], "<i4"))
    make.compute(make((4, 2), op="GET_ROWS", src=(table, rows)))
    scene.ends(client, "GET_ROWS.*(index|row)")


def test_t34_row_numbers_out_of_range_when_writing(scene: Scene) -> None:
    client = scene.client(Capability.ERRORS)
    make = Make(client)
    source, rows, table = make((4, 2)), make((2,), type="I64"), make((4, 3))
    client.set(make.records[rows - 1], np.array([0, 1 << 40], "<i8"))
    make.compute(make((4, 3), op="SET_ROWS", src=(source, rows, table), view_src=table, at=256 * (table - 1)))
    scene.ends(client, "SET_ROWS.*(index|row)")


def chain(client: RawClient, depth: int) -> Record:
    """Send a graph in which each node adds 1 to the one before it, in place; where the result is."""
    buffer = client.buffer(SIZE)
    leaf, one = client.record(buffer, id=1), client.record(buffer, id=2, at=64)
    client.set(leaf, np.zeros(4, "f4"))
    client.set(one, np.ones(4, "f4"))
    first = client.record(buffer, id=3, op="ADD", src=(1, 2), view_src=1)
    nodes = [first._replace(id=i, src=(i - 1, 2) + (0,) * 8) for i in range(4, depth + 3)]
    client.compute(range(3, depth + 3), [leaf, one, first, *nodes])
    return leaf


def test_t31_a_chain_deeper_than_any_stack(scene: Scene) -> None:
    depth = 3000
    with scene.client() as client:
        result = chain(client, depth)
        assert np.frombuffer(client.get(result, 16), "f4").tolist() == [depth] * 4
    scene.goes_on()


def test_t31_a_chain_of_a_hundred_thousand_nodes(scene: Scene, flavour: Capability) -> None:
    client = scene.client(flavour)
    chain(client, 100_000)
    scene.ends(client, "100002 tensors; 65536 are allowed")


def test_a_graph_with_too_many_tensors(device: CountingDevice, caplog: pytest.LogCaptureFixture) -> None:
    with Server([device], limits=Limits(tensors=100)) as server, Scene(server, caplog) as scene:
        client = scene.client(Capability.ERRORS)
        make = Make(client)
        for _ in range(101):
            make(at=0)
        make.compute(1)
        scene.ends(client, "101 tensors; 100 are allowed")


def test_t36_recompute_after_a_free(scene: Scene, flavour: Capability) -> None:
    client = scene.client(flavour)
    add = Adder(client)
    add()
    client.ask(messages.FreeBuffer(add.buffer[0]))
    client.post(messages.GraphRecompute(0, 1))
    scene.ends(client, "device 0 has no graph 1, or not its buffers any more")


def test_t36_recompute_after_a_free_of_other_memory(scene: Scene) -> None:
    with scene.client() as client:
        add = Adder(client)
        other, _ = client.buffer(SIZE)
        add()
        client.ask(messages.FreeBuffer(other))
        add()
    scene.goes_on()


def test_t37_recompute_first(scene: Scene, flavour: Capability) -> None:
    client = scene.client(flavour)
    client.post(messages.GraphRecompute(0, 1))
    scene.ends(client, "device 0 has no graph 1")


def test_t37_recompute_on_another_device(scene: Scene, flavour: Capability) -> None:
    client = scene.client(flavour)
    Adder(client)()
    client.post(messages.GraphRecompute(1, 1))
    scene.ends(client, "device 1 has no graph 1")


def test_t38_memory_of_an_operand_is_freed_between_two_graphs(scene: Scene, flavour: Capability) -> None:
    """The second graph is the same bytes, which the server has compiled before."""
    client = scene.client(flavour)
    far = client.buffer(SIZE)
    make = Make(client)
    node = sum_of(make)
    make.records[0] = client.record(far, id=1)
    make.compute(node)
    client.ask(messages.FreeBuffer(far[0]))
    make.compute(node)
    scene.ends(client, f"buffer {far[0]:#x} has been freed")


def test_t39_a_result_in_the_place_of_its_operand(scene: Scene) -> None:
    with scene.client() as client:
        make = Make(client)
        node = sum_of(make, at=0, view_src=1)
        a, b = make.records[:2]
        client.set(a, np.arange(4, dtype="f4"))
        client.set(b, np.ones(4, "f4"))
        make.compute(node, uid=9)
        client.post(messages.GraphRecompute(0, 9))
        assert np.frombuffer(client.get(a, 16), "f4").tolist() == [2, 3, 4, 5]
    scene.goes_on()


def test_t39_a_result_that_half_overlaps_its_operand(scene: Scene) -> None:
    """Operands are read before anything is written."""
    with scene.client() as client:
        make = Make(client)
        node = sum_of(make, at=8)
        a, b = make.records[:2]
        client.set(a, np.arange(4, dtype="f4"))
        client.set(b, np.ones(4, "f4"))
        make.compute(node)
        assert np.frombuffer(client.get(a, 16), "f4").tolist() == [0, 1, 1, 2]
        assert np.frombuffer(client.get(make.records[node - 1], 16), "f4").tolist() == [1, 2, 3, 4]
    scene.goes_on()


@pytest.mark.parametrize("use_count", [-1, 2**31 - 1])
def test_t40_use_counts_are_not_believed(scene: Scene, use_count: int) -> None:
    with scene.client() as client:
        add = Adder(client)
        add.sum = add.sum._replace(use_count=use_count)
        add.a = add.a._replace(use_count=use_count)
        add()
    scene.goes_on()


def test_t41_a_graph_that_computes_for_too_long(caplog: pytest.LogCaptureFixture) -> None:
    device = CountingDevice(compute_limit=0.3)
    with Server([device]) as server, Scene(server, caplog) as scene:
        for capabilities in (Capability.ERRORS, Capability(0)):
            client = scene.client(capabilities)
            busy(client)
            scene.ends(client, "stopped at node .* it took longer than 0.3 seconds")
    device.close()
