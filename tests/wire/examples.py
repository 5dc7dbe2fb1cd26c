"""A message of every kind, and its bytes written out by hand: nothing here comes from the code under test."""

from __future__ import annotations

from collections.abc import Callable
from struct import pack
from typing import NamedTuple

from sdrpc.ggml.dialect import Dialect, dialects
from sdrpc.wire import messages as m
from sdrpc.wire.messages import Command
from sdrpc.wire.records import Record

NAME_LENGTHS = (64, 128, 160)
DIALECTS = tuple(dialects().values())

TENSOR = Record(
    id=0x1122334455667788,
    type=0,
    buffer=0x99,
    ne=(4, 2, 1, 1),
    nb=(4, 16, 32, 32),
    op=0,
    op_params=bytes(range(64)),
    flags=-1,
    src=(1, 2, 3, 4, 5, 6, 7, 8, 9, 2**64 - 1),
    view_src=7,
    view_offs=2**40,
    data=0xABCDEF0000,
    name="gewichte.é".encode(),
)
DATA = bytes(range(32))
"""As many bytes as ``TENSOR`` has."""


def record(tensor: Record, name_length: int) -> bytes:
    """``rpc_tensor`` as PROTOCOL writes it down."""
    return (
        pack("<QIQ4I4I", tensor.id, tensor.type, tensor.buffer, *tensor.ne, *tensor.nb)
        + pack("<I64si", tensor.op, tensor.op_params, tensor.flags)
        + pack("<10QQQQ", *tensor.src, tensor.view_src, tensor.view_offs, tensor.data)
        + pack(f"<{name_length}si", tensor.name, tensor.use_count)
    )


class Example(NamedTuple):
    """``request`` and ``reply`` are the payloads, given a dialect and the bytes of ``TENSOR``."""

    message: NamedTuple
    request: Callable[[Dialect, bytes], bytes]
    answer: NamedTuple | None
    reply: bytes


UID = 2**63 + 1


def graph(dialect: Dialect) -> bytes:
    """A graph's head, before its one tensor."""
    return pack("<I", 3) + (pack("<Q", UID) if dialect.has_graph_uids else b"") + pack("<IQI", 1, TENSOR.id, 1)


EXAMPLES: dict[Command, Example] = {
    Command.ALLOC_BUFFER: Example(
        m.AllocBuffer(3, 2**40), lambda d, t: pack("<IQ", 3, 2**40), m.AllocBufferReply(5, 6), pack("<QQ", 5, 6)
    ),
    Command.GET_ALIGNMENT: Example(
        m.GetAlignment(3), lambda d, t: pack("<I", 3), m.GetAlignmentReply(128), pack("<Q", 128)
    ),
    Command.GET_MAX_SIZE: Example(
        m.GetMaxSize(3), lambda d, t: pack("<I", 3), m.GetMaxSizeReply(2**64 - 1), pack("<Q", 2**64 - 1)
    ),
    Command.BUFFER_GET_BASE: Example(
        m.BufferGetBase(9), lambda d, t: pack("<Q", 9), m.BufferGetBaseReply(4096), pack("<Q", 4096)
    ),
    Command.FREE_BUFFER: Example(m.FreeBuffer(9), lambda d, t: pack("<Q", 9), m.Ack(), b""),
    Command.BUFFER_CLEAR: Example(m.BufferClear(9, 255), lambda d, t: pack("<QB", 9, 255), m.Ack(), b""),
    Command.SET_TENSOR: Example(
        m.SetTensor(TENSOR, 0, 0, DATA),
        lambda d, t: t + (b"\0" if d.set_tensor_has_cache_flag else b"") + pack("<Q", 0) + DATA,
        None,
        b"",
    ),
    Command.SET_TENSOR_HASH: Example(
        m.SetTensorHash(TENSOR, 8, 2**63), lambda d, t: t + pack("<QQ", 8, 2**63), m.SetTensorHashReply(1), b"\1"
    ),
    Command.GET_TENSOR: Example(
        m.GetTensor(TENSOR, 8, 24), lambda d, t: t + pack("<QQ", 8, 24), m.GetTensorReply(DATA[:24]), DATA[:24]
    ),
    Command.COPY_TENSOR: Example(m.CopyTensor(TENSOR, TENSOR), lambda d, t: t + t, m.CopyTensorReply(0), b"\0"),
    Command.GRAPH_COMPUTE: Example(m.GraphCompute(b""), lambda d, t: graph(d) + t, None, b""),
    Command.GET_DEVICE_MEMORY: Example(
        m.GetDeviceMemory(3), lambda d, t: pack("<I", 3), m.GetDeviceMemoryReply(1, 2), pack("<QQ", 1, 2)
    ),
    Command.INIT_TENSOR: Example(m.InitTensor(TENSOR), lambda d, t: t, m.Ack(), b""),
    Command.GET_ALLOC_SIZE: Example(
        m.GetAllocSize(3, TENSOR, (TENSOR,) * 10),
        lambda d, t: pack("<I", 3) + t * 11,
        m.GetAllocSizeReply(77),
        pack("<Q", 77),
    ),
    Command.DEVICE_COUNT: Example(m.DeviceCount(), lambda d, t: b"", m.DeviceCountReply(2), pack("<I", 2)),
    Command.GRAPH_RECOMPUTE: Example(
        m.GraphRecompute(3, UID), lambda d, t: pack("<I", 3) + (pack("<Q", UID) if d.has_graph_uids else b""), None, b""
    ),
    Command.MEMSET_TENSOR: Example(
        m.MemsetTensor(TENSOR, 4, 8, 7), lambda d, t: t + pack("<QQB", 4, 8, 7), m.Ack(), b""
    ),
    Command.SET_TENSOR_2D: Example(
        m.SetTensor2d(TENSOR, 4, 8, 2, 16, DATA[:16]),
        lambda d, t: t + pack("<QQQQ", 4, 8, 2, 16) + DATA[:16],
        None,
        b"",
    ),
    Command.GET_TENSOR_2D: Example(
        m.GetTensor2d(TENSOR, 4, 8, 2, 16),
        lambda d, t: t + pack("<QQQQ", 4, 8, 2, 16),
        m.GetTensorReply(DATA[:16]),
        DATA[:16],
    ),
    Command.COMM_INIT: Example(
        m.CommInit(3, 1, 2, 51052, b"10.0.0.7".ljust(64, b"\0")),
        lambda d, t: pack("<IIII64s", 3, 1, 2, 51052, b"10.0.0.7"),
        m.CommInitReply(0),
        b"\0",
    ),
    Command.COMM_ALLREDUCE: Example(m.CommAllreduce(3, TENSOR), lambda d, t: pack("<I", 3) + t, None, b""),
    Command.COMM_FREE: Example(m.CommFree(3), lambda d, t: pack("<I", 3), None, b""),
    Command.SET_RANGES_DIGEST: Example(
        m.SetRangesDigest(9, pack("<QQ32sQQ32s", 0, 100, bytes(range(32)), 2**40, 7, bytes(32))),
        lambda d, t: pack("<QQQ32sQQ32s", 9, 0, 100, bytes(range(32)), 2**40, 7, bytes(32)),
        m.SetRangesDigestReply(b"\1\0"),
        b"\1\0",
    ),
    Command.GET_CARRIERS: Example(
        m.GetCarriers(4), lambda d, t: b"\4", m.GetCarriersReply(3, bytes(range(32))), b"\3" + bytes(range(32))
    ),
    Command.CARRY: Example(m.Carry(bytes(range(32))), lambda d, t: bytes(range(32)), m.CarryReply(2), b"\2"),
    Command.SET_RANGES: Example(
        m.SetRanges(9, 3, pack("<4Q", 0, 100, 2**40, 7)),
        lambda d, t: pack("<QB4Q", 9, 3, 0, 100, 2**40, 7),
        None,
        b"",
    ),
}


SINCE = {
    (5, 0, 0): {Command.MEMSET_TENSOR},
    (8, 0, 0): {
        Command.SET_TENSOR_2D, Command.GET_TENSOR_2D, Command.COMM_INIT, Command.COMM_ALLREDUCE, Command.COMM_FREE
    },
}  # fmt: skip
"""Commands that came with a version."""


def commands(dialect: Dialect) -> list[Command]:
    later = {command for version, new in SINCE.items() if dialect.triple < version for command in new}
    return [command for command in EXAMPLES if command not in later]


def message(command: Command, dialect: Dialect, name_length: int) -> NamedTuple:
    """The example's message; a graph's payload contains a record."""
    if command is Command.GRAPH_COMPUTE:
        return m.GraphCompute(graph(dialect) + record(TENSOR, name_length))
    if command is Command.GRAPH_RECOMPUTE and not dialect.has_graph_uids:
        return m.GraphRecompute(3)
    return EXAMPLES[command].message


def payload(command: Command, dialect: Dialect, name_length: int) -> bytes:
    return EXAMPLES[command].request(dialect, record(TENSOR, name_length))


def frame(command: Command, dialect: Dialect, name_length: int) -> bytes:
    data = payload(command, dialect, name_length)
    return pack("<BQ", command, len(data)) + data
