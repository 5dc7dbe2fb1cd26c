"""Every message of the protocol: one registry command → (request, response), each a frozen value with a field table.

A message class is its own field table: the annotation of a field says how it lies on the wire (``U8``, ``U32``, ``U64``
or a ``Record``), in the order of the fields, packed and little endian. Bulk data (a tensor's bytes, a graph) comes last
and has no length of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import IntEnum
from functools import cache
from struct import Struct
from struct import error as struct_error
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from ..device import Bytes
from ..errors import LocalProtocolError, RemoteProtocolError
from ..ggml.dialect import Dialect
from ..ggml.tensor import MAX_SRC
from .records import Record, decode_records, encode_records, is_name_length, record_bytes

U8 = Annotated[int, "B"]
U32 = Annotated[int, "I"]
U64 = Annotated[int, "Q"]
Token = Annotated[bytes, "32s"]
"""Random bytes that nobody else knows."""
Host = Annotated[bytes, "64s"]
"""A name that ends at its first zero byte."""
Sources = Annotated[tuple[Record, ...], MAX_SRC]
CacheFlag = Annotated[int, "B", "set_tensor_has_cache_flag"]
Uid = Annotated[int, "Q", "has_graph_uids"]
"""As :data:`CacheFlag` on the wire only where the dialect has that switch; elsewhere it is 0."""
Bulk = Annotated[Bytes, "bulk"]
"""All remaining bytes of the payload, by reference."""


class Command(IntEnum):
    ALLOC_BUFFER = 0
    GET_ALIGNMENT = 1
    GET_MAX_SIZE = 2
    BUFFER_GET_BASE = 3
    FREE_BUFFER = 4
    BUFFER_CLEAR = 5
    SET_TENSOR = 6
    SET_TENSOR_HASH = 7
    GET_TENSOR = 8
    COPY_TENSOR = 9
    GRAPH_COMPUTE = 10
    GET_DEVICE_MEMORY = 11
    INIT_TENSOR = 12
    GET_ALLOC_SIZE = 13
    HELLO = 14
    DEVICE_COUNT = 15
    GRAPH_RECOMPUTE = 16
    MEMSET_TENSOR = 17
    SET_TENSOR_2D = 18
    GET_TENSOR_2D = 19
    COMM_INIT = 20
    COMM_ALLREDUCE = 21
    COMM_FREE = 22
    SET_RANGES_DIGEST = 240
    GET_CARRIERS = 241
    CARRY = 242
    SET_RANGES = 243


OURS = {
    Command.SET_RANGES_DIGEST: "CACHE",
    Command.GET_CARRIERS: "CARRIERS",
    Command.CARRY: "CARRIERS",
    Command.SET_RANGES: "CARRIERS",
}
"""Commands between our own peers, far from where ggml will get with its own, and the
:class:`~sdrpc.wire.hello.Capability` on which both must have agreed."""

NEWER = {
    Command.MEMSET_TENSOR: "has_memset_tensor",
    Command.SET_TENSOR_2D: "has_tensor_2d",
    Command.GET_TENSOR_2D: "has_tensor_2d",
    Command.COMM_INIT: "has_comm",
    Command.COMM_ALLREDUCE: "has_comm",
    Command.COMM_FREE: "has_comm",
}
"""Commands that only some dialects have, and the switch that says so."""


class AllocBuffer(NamedTuple):
    device: U32
    size: U64


class AllocBufferReply(NamedTuple):
    """(0, 0) when there is no room."""

    remote_ptr: U64
    remote_size: U64


class GetAlignment(NamedTuple):
    device: U32


class GetAlignmentReply(NamedTuple):
    alignment: U64


class GetMaxSize(NamedTuple):
    device: U32


class GetMaxSizeReply(NamedTuple):
    max_size: U64


class BufferGetBase(NamedTuple):
    remote_ptr: U64


class BufferGetBaseReply(NamedTuple):
    base_ptr: U64


class FreeBuffer(NamedTuple):
    remote_ptr: U64


class BufferClear(NamedTuple):
    remote_ptr: U64
    value: U8


class SetTensor(NamedTuple):
    """``offset`` is in bytes from the tensor's start. ``data`` to send may be several buffers, which are not joined.

    ``data`` of a message that was received is what of it had to be read to find the name's length (mostly nothing):
    see :class:`sdrpc.wire.framing.Received`.
    """

    tensor: Record
    cache_flag: CacheFlag
    offset: U64
    data: Annotated[Bytes | Sequence[Bytes], "bulk"]


class SetTensorHash(NamedTuple):
    """``hash``: FNV-1a 64 of the data."""

    tensor: Record
    offset: U64
    hash: U64


class SetTensorHashReply(NamedTuple):
    """1: the server had the data and has set it."""

    result: U8


class SetRangesDigest(NamedTuple):
    """As :class:`SetTensorHash` for parts of a buffer that do not overlap, under names that nobody can forge.
    ``ranges``: offset, size and digest of each part (:func:`~sdrpc.wire.ranges.pack_named`)."""

    remote_ptr: U64
    ranges: Bulk


class SetRangesDigestReply(NamedTuple):
    """A byte for each part, as :class:`SetTensorHashReply` has it."""

    results: Bulk


class GetTensor(NamedTuple):
    tensor: Record
    offset: U64
    size: U64


class GetTensorReply(NamedTuple):
    data: Bulk


class CopyTensor(NamedTuple):
    src: Record
    dst: Record


class CopyTensorReply(NamedTuple):
    result: U8


class GraphCompute(NamedTuple):
    """``payload`` begins with the device; :mod:`sdrpc.wire.graphs` knows the rest."""

    payload: Bulk


class GetDeviceMemory(NamedTuple):
    device: U32


class GetDeviceMemoryReply(NamedTuple):
    free: U64
    total: U64


class InitTensor(NamedTuple):
    tensor: Record


class GetAllocSize(NamedTuple):
    device: U32
    tensor: Record
    sources: Sources


class GetAllocSizeReply(NamedTuple):
    alloc_size: U64


class DeviceCount(NamedTuple):
    pass


class DeviceCountReply(NamedTuple):
    device_count: U32


class GraphRecompute(NamedTuple):
    """Run the graph of ``device`` again that came with this ``uid``: the last one, where graphs have none."""

    device: U32
    uid: Uid = 0


class MemsetTensor(NamedTuple):
    tensor: Record
    offset: U64
    size: U64
    value: U8


class SetTensor2d(NamedTuple):
    """``n_copies`` times ``size`` bytes, which lie one behind the other in ``data`` and ``stride`` bytes apart in the
    tensor, from ``offset`` on. ``data`` is as that of :class:`SetTensor`."""

    tensor: Record
    offset: U64
    size: U64
    n_copies: U64
    stride: U64
    data: Annotated[Bytes | Sequence[Bytes], "bulk"]


class GetTensor2d(NamedTuple):
    """The opposite of :class:`SetTensor2d`."""

    tensor: Record
    offset: U64
    size: U64
    n_copies: U64
    stride: U64


class CommInit(NamedTuple):
    """Join device ``device`` with others, of which there are ``world`` in all: rank 0 listens at ``port``, the others
    connect to it at ``host``."""

    device: U32
    rank: U32
    world: U32
    port: U32
    host: Host


class CommInitReply(NamedTuple):
    """0: there is no such connection, and the client does its sums itself."""

    ok: U8


class CommAllreduce(NamedTuple):
    """Add up ``tensor`` over the devices that were joined."""

    device: U32
    tensor: Record


class CommFree(NamedTuple):
    device: U32


class GetCarriers(NamedTuple):
    """Let so many further connections of this client carry data for this one. Those that did so far end."""

    carriers: U8


class GetCarriersReply(NamedTuple):
    """How many may come, up to as many as were asked for, and what each has to show."""

    carriers: U8
    token: Token


class Carry(NamedTuple):
    """The first and last request of a connection that carries data for the one that was given ``token``."""

    token: Token


class CarryReply(NamedTuple):
    """Which of the carriers it is, from 0 on."""

    number: U8


class SetRanges(NamedTuple):
    """Data for parts of a buffer that do not overlap, which comes over the first ``carriers`` carriers
    (:func:`sdrpc.wire.carrying.dealt`). ``ranges``: offset and size of each part (:func:`~sdrpc.wire.ranges.pack`).
    """

    remote_ptr: U64
    carriers: U8
    ranges: Bulk


class Ack(NamedTuple):
    """The empty answer to commands that change a buffer, up to protocol 5.x (``Dialect.acks_buffer_commands``)."""


class Exchange(NamedTuple):
    """What is sent for a command and what comes back (None: nothing does)."""

    request: type
    response: type | None


EXCHANGES: dict[Command, Exchange] = {
    Command.ALLOC_BUFFER: Exchange(AllocBuffer, AllocBufferReply),
    Command.GET_ALIGNMENT: Exchange(GetAlignment, GetAlignmentReply),
    Command.GET_MAX_SIZE: Exchange(GetMaxSize, GetMaxSizeReply),
    Command.BUFFER_GET_BASE: Exchange(BufferGetBase, BufferGetBaseReply),
    Command.FREE_BUFFER: Exchange(FreeBuffer, Ack),
    Command.BUFFER_CLEAR: Exchange(BufferClear, Ack),
    Command.SET_TENSOR: Exchange(SetTensor, None),
    Command.SET_TENSOR_HASH: Exchange(SetTensorHash, SetTensorHashReply),
    Command.GET_TENSOR: Exchange(GetTensor, GetTensorReply),
    Command.COPY_TENSOR: Exchange(CopyTensor, CopyTensorReply),
    Command.GRAPH_COMPUTE: Exchange(GraphCompute, None),
    Command.GET_DEVICE_MEMORY: Exchange(GetDeviceMemory, GetDeviceMemoryReply),
    Command.INIT_TENSOR: Exchange(InitTensor, Ack),
    Command.GET_ALLOC_SIZE: Exchange(GetAllocSize, GetAllocSizeReply),
    Command.DEVICE_COUNT: Exchange(DeviceCount, DeviceCountReply),
    Command.GRAPH_RECOMPUTE: Exchange(GraphRecompute, None),
    Command.MEMSET_TENSOR: Exchange(MemsetTensor, Ack),
    Command.SET_TENSOR_2D: Exchange(SetTensor2d, None),
    Command.GET_TENSOR_2D: Exchange(GetTensor2d, GetTensorReply),
    Command.COMM_INIT: Exchange(CommInit, CommInitReply),
    Command.COMM_ALLREDUCE: Exchange(CommAllreduce, None),
    Command.COMM_FREE: Exchange(CommFree, None),
    Command.SET_RANGES_DIGEST: Exchange(SetRangesDigest, SetRangesDigestReply),
    Command.GET_CARRIERS: Exchange(GetCarriers, GetCarriersReply),
    Command.CARRY: Exchange(Carry, CarryReply),
    Command.SET_RANGES: Exchange(SetRanges, None),
}
"""All commands but HELLO, which comes before there is a dialect (:mod:`sdrpc.wire.hello`)."""

_NUMBERS = frozenset(Command)

COMMANDS: dict[type, Command] = {exchange.request: command for command, exchange in EXCHANGES.items()}
"""Request class → its command."""


def command_known(command: int, dialect: Dialect, ours: Collection[Command] = ()) -> bool:
    """Whether ``command`` exists in ``dialect``, HELLO included; ``ours``: commands of our own that were agreed on."""
    if command in NEWER:
        return NEWER[Command(command)] in dialect.switches
    return command in _NUMBERS and (command in ours or command not in OURS)


def response_class(command: Command, dialect: Dialect) -> type | None:
    """What answers ``command`` in ``dialect``: None when nothing does."""
    response = EXCHANGES[command].response
    return None if response is Ack and not dialect.acks_buffer_commands else response


class Layout(NamedTuple):
    """How a message class lies on the wire: runs of fields, each packed by a struct or made of records."""

    runs: tuple[Struct | int, ...]  # a struct of numbers, or how many records; in the order of the fields
    number_bytes: int
    records: int
    bulk: bool

    def size(self, name_length: int) -> int:
        """Bytes before the bulk data."""
        return self.number_bytes + self.records * (record_bytes(name_length) if self.records else 0)


@cache
def layout(cls: type, switches: frozenset[str] = frozenset()) -> Layout:
    """The layout of a message class in a dialect that has ``switches``."""
    codes: list[str | int] = []
    marks = [_mark(hint) for hint in _hints(cls)]
    left_out = _left_out(cls, switches)
    for at, mark in enumerate(marks):
        if mark == "bulk" or at in left_out:
            continue
        if isinstance(mark, str) and codes and isinstance(codes[-1], str):
            codes[-1] += mark
        else:
            codes.append(mark)
    runs = tuple(Struct("<" + code) if isinstance(code, str) else code for code in codes)
    return Layout(
        runs=runs,
        number_bytes=sum(run.size for run in runs if isinstance(run, Struct)),
        records=sum(run for run in runs if isinstance(run, int)),
        bulk="bulk" in marks,
    )


def _mark(hint: Any) -> str | int:
    if hint is Record:
        return 1
    if get_origin(hint) is not Annotated:
        raise TypeError(f"{hint} is no field of a message")
    mark: str | int = get_args(hint)[1]
    return mark


def _hints(cls: type) -> list[Any]:
    hints = get_type_hints(cls, include_extras=True)
    return [hints[field] for field in cls._fields]  # type: ignore[attr-defined]


@cache
def _left_out(cls: type, switches: frozenset[str]) -> tuple[int, ...]:
    """Positions of the fields that are not on the wire in a dialect that has ``switches``."""
    marks = [get_args(hint)[2:] for hint in _hints(cls)]
    return tuple(at for at, needs in enumerate(marks) if needs and needs[0] not in switches)


def message_layout(cls: type, dialect: Dialect) -> Layout:
    return layout(cls, dialect.switches)


def encode(message: Any, dialect: Dialect, name_length: int) -> list[Bytes]:
    """The payload of ``message`` as buffers to be sent one after the other; bulk data is the caller's own object.

    Raises :class:`LocalProtocolError` for a number that does not fit its field.
    """
    cls: type = type(message)
    shape = message_layout(cls, dialect)
    left_out = _left_out(cls, dialect.switches)
    values = [value for at, value in enumerate(message) if at not in left_out]
    bulk = _buffers(values.pop()) if shape.bulk else []
    parts: list[bytes] = []
    for run in shape.runs:
        if isinstance(run, Struct):
            count = sum(map(str.isalpha, run.format))
            parts.append(_packed(run, cls, values[:count]))
            del values[:count]
        else:
            value = values.pop(0)
            records = value if run > 1 else (value,)
            if len(records) != run:
                raise LocalProtocolError(f"{cls.__name__}: {len(records)} tensors instead of {run}")
            parts.append(encode_records(records, name_length))
    head = b"".join(parts)
    return [head, *bulk] if head else bulk


def _buffers(data: Bytes | Sequence[Bytes]) -> list[Bytes]:
    return [data] if isinstance(data, bytes | bytearray | memoryview) else list(data)


def _packed(numbers: Struct, cls: type, values: list[Any]) -> bytes:
    try:
        return numbers.pack(*values)
    except struct_error as reason:
        raise LocalProtocolError(f"{cls.__name__}: {reason}") from reason


def decode(cls: type, payload: Bytes, dialect: Dialect, name_length: int) -> Any:
    """The message of class ``cls`` in ``payload``, whose bulk data becomes a view of ``payload``.

    Raises :class:`RemoteProtocolError` when the payload is shorter than the fields, or longer and has no bulk data.
    """
    shape = message_layout(cls, dialect)
    size = shape.size(name_length)
    if len(payload) < size or (len(payload) > size and not shape.bulk):
        raise RemoteProtocolError(f"{cls.__name__}: {len(payload)} bytes instead of {size}")
    view = memoryview(payload)
    values: list[Any] = []
    at = 0
    for run in shape.runs:
        if isinstance(run, Struct):
            values.extend(run.unpack_from(view, at))
            at += run.size
        else:
            end = at + run * record_bytes(name_length)
            records = decode_records(view[at:end], name_length)
            values.append(tuple(records) if run > 1 else records[0])
            at = end
    for position in _left_out(cls, dialect.switches):
        values.insert(position, 0)
    if shape.bulk:
        values.append(view[at:])
    return cls(*values)


def name_length_of(cls: type, size: int, dialect: Dialect) -> int | None:
    """The name length that makes ``cls`` exactly ``size`` bytes long; None when none does."""
    shape = message_layout(cls, dialect)
    length, rest = divmod(size - shape.size(0), shape.records)
    return length if not rest and is_name_length(length) else None
