"""One client's state: its buffers, its graphs, and what each command does. No sockets here.

A session belongs to one thread. What a client gets wrong raises :class:`RemoteProtocolError`,
:class:`GraphError` or :class:`DeviceError` with the reason; the session is of no use after that and has to be closed,
which gives back all that the client had.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from ..device import Bytes
from ..errors import GraphError, OutOfMemory, RemoteProtocolError
from ..ggml.dialect import Dialect, dialects
from ..ggml.tensor import contiguous_strides, extent
from ..ggml.types import Type
from ..wire import graphs, messages
from ..wire.records import Record, record_bytes
from .addresses import AddressSpace, Region
from .limits import Limits

if TYPE_CHECKING:
    from ..engine.device import LocalDevice, LocalProgram

CHUNK = 4 << 20
"""Bytes that are held at once on the way to a device that can't be written directly."""
_LARGEST = 1 << 62  # of tensors, in bytes; beyond, sums of sizes may not fit the protocol's own u64
_STRIDE_BITS = 32


class Place(NamedTuple):
    """``size`` bytes of a client's buffer."""

    region: Region
    offset: int
    size: int


class Ready(NamedTuple):
    """A compiled graph, and the buffers without which it means nothing."""

    device: int
    program: LocalProgram
    handles: frozenset[int]


class Session:
    """What one client has on ``devices``, which it knows by their position. ``watch`` says why what is computed for it
    shall stop, or nothing."""

    def __init__(
        self, devices: Sequence[LocalDevice], dialect: Dialect, limits: Limits, watch: Callable[[], str]
    ) -> None:
        self.devices, self.dialect, self.limits = devices, dialect, limits
        self._watch = watch
        self._space = AddressSpace()
        self._graphs: OrderedDict[bytes, Ready] = OrderedDict()
        self._last: dict[int, Ready] = {}

    def answer(self, message: Any) -> Any:
        """Do what ``message`` (any request but SET_TENSOR) asks; the reply's value, None where it has no fields."""
        return _COMMANDS[type(message)](self, message)

    def destination(self, message: messages.SetTensor, size: int) -> Place:
        """Where the ``size`` bytes of data of a SET_TENSOR belong."""
        return self._place(message.tensor, message.offset, size)

    def close(self) -> None:
        """Free everything."""
        self._graphs.clear()
        self._last.clear()
        for handle in [region.handle for region in self._space]:
            self._free(handle)

    # --- devices

    def _device(self, number: int) -> LocalDevice:
        if number >= len(self.devices):
            raise RemoteProtocolError(f"device {number} does not exist; there are {len(self.devices)}")
        return self.devices[number]

    def _device_count(self, _: messages.DeviceCount) -> messages.DeviceCountReply:
        return messages.DeviceCountReply(len(self.devices))

    def _get_alignment(self, asked: messages.GetAlignment) -> messages.GetAlignmentReply:
        return messages.GetAlignmentReply(self._device(asked.device).alignment)

    def _get_max_size(self, asked: messages.GetMaxSize) -> messages.GetMaxSizeReply:
        return messages.GetMaxSizeReply(self._device(asked.device).memory().total)

    def _get_device_memory(self, asked: messages.GetDeviceMemory) -> messages.GetDeviceMemoryReply:
        memory = self._device(asked.device).memory()
        return messages.GetDeviceMemoryReply(memory.free, memory.total)

    # --- buffers

    def _alloc_buffer(self, asked: messages.AllocBuffer) -> messages.AllocBufferReply:
        device = self._device(asked.device)
        room = self.limits.buffer_bytes - self._space.held
        if len(self._space) >= self.limits.buffers or asked.size > room or not self._space.has_room(asked.size):
            return messages.AllocBufferReply(0, 0)
        try:
            buffer = device.allocate(asked.size)
        except OutOfMemory:
            return messages.AllocBufferReply(0, 0)
        region = self._space.add(asked.device, asked.size, buffer)
        return messages.AllocBufferReply(region.handle, region.size)

    def _buffer_get_base(self, asked: messages.BufferGetBase) -> messages.BufferGetBaseReply:
        return messages.BufferGetBaseReply(self._space[asked.remote_ptr].base)

    def _free_buffer(self, asked: messages.FreeBuffer) -> None:
        self._free(asked.remote_ptr)

    def _free(self, handle: int) -> None:
        region = self._space.remove(handle)
        for table in (self._graphs, self._last):
            for key in [key for key, ready in table.items() if handle in ready.handles]:
                del table[key]  # type: ignore[arg-type]
        self.devices[region.device].free(region.buffer)

    def _buffer_clear(self, asked: messages.BufferClear) -> None:
        region = self._space[asked.remote_ptr]
        self._fill(Place(region, 0, region.size), asked.value)

    # --- tensors

    def _place(self, tensor: Record, offset: int, size: int) -> Place:
        """``size`` bytes from ``offset`` in ``tensor``, which must be inside it, and it inside its buffer."""
        nbytes = self._nbytes(tensor)
        if offset + size > nbytes:
            raise RemoteProtocolError(f"{size} bytes at {offset} are not inside {_named(tensor)} of {nbytes} bytes")
        if not tensor.buffer:
            raise RemoteProtocolError(f"{_named(tensor)} is in no buffer")
        region = self._space[tensor.buffer]
        return Place(region, region.offset(tensor.data, nbytes) + offset, size)

    def _type(self, tensor: Record) -> Type:
        try:
            return self.dialect.types[tensor.type]
        except KeyError:
            raise RemoteProtocolError(
                f"{_named(tensor)}: type {tensor.type} does not exist in protocol {self.dialect.version}"
            ) from None

    def _nbytes(self, tensor: Record) -> int:
        """Bytes from the first to behind the last element of a tensor whose numbers make sense."""
        kind = self._type(tensor)
        if not all(tensor.ne) or tensor.ne[0] % kind.block:
            raise RemoteProtocolError(f"{_named(tensor)}: {list(tensor.ne)} is no shape for {kind}")
        if prod(tensor.ne) * kind.size > _LARGEST:
            raise RemoteProtocolError(f"{_named(tensor)}: {list(tensor.ne)} elements are too many")
        dense = contiguous_strides(kind, tensor.ne)
        cut = all(d % (1 << _STRIDE_BITS) == n for d, n in zip(dense, tensor.nb, strict=True))
        return extent(kind, tensor.ne, dense if cut else tensor.nb)

    def _init_tensor(self, asked: messages.InitTensor) -> None:
        self._place(asked.tensor, 0, 0)

    def _get_alloc_size(self, asked: messages.GetAllocSize) -> messages.GetAllocSizeReply:
        # Neither the tensor nor its sources need to be in a buffer yet, nor their buffers be ours.
        self._device(asked.device)
        for source in asked.sources:
            if source.id:
                self._nbytes(source)
        return messages.GetAllocSizeReply(self._nbytes(asked.tensor))

    def _set_tensor_hash(self, asked: messages.SetTensorHash) -> messages.SetTensorHashReply:
        self._place(asked.tensor, asked.offset, 0)
        return messages.SetTensorHashReply(0)  # we have it not: the client sends the data

    def _get_tensor(self, asked: messages.GetTensor) -> messages.GetTensorReply:
        region, offset, size = self._place(asked.tensor, asked.offset, asked.size)
        return messages.GetTensorReply(self.devices[region.device].read(region.buffer, offset, size))

    def _memset_tensor(self, asked: messages.MemsetTensor) -> None:
        self._fill(self._place(asked.tensor, asked.offset, asked.size), asked.value)

    def _fill(self, place: Place, value: int) -> None:
        self.devices[place.region.device].fill(place.region.buffer, place.offset, place.size, value)

    def _copy_tensor(self, asked: messages.CopyTensor) -> messages.CopyTensorReply:
        src, dst = asked
        if (src.type, src.ne, src.nb) != (dst.type, dst.ne, dst.nb):
            raise RemoteProtocolError(
                f"{_named(src)} and {_named(dst)} are not alike: one can't be copied to the other"
            )
        size = self._nbytes(src)
        source, target = self._place(src, 0, size), self._place(dst, 0, size)
        if source.region is target.region and abs(source.offset - target.offset) < size:
            raise RemoteProtocolError(f"{_named(src)} and {_named(dst)} overlap: one can't be copied to the other")
        self._copy(source, target)
        return messages.CopyTensorReply(1)

    def _copy(self, source: Place, target: Place) -> None:
        reader, writer = self.devices[source.region.device], self.devices[target.region.device]
        if reader is writer:
            reader.copy(source.region.buffer, source.offset, target.region.buffer, target.offset, source.size)
            return
        for at, size in chunks(0, source.size):
            data = reader.read(source.region.buffer, source.offset + at, size)
            writer.write(target.region.buffer, target.offset + at, data)

    # --- graphs

    def _graph_compute(self, asked: messages.GraphCompute) -> None:
        digest = blake2b(asked.payload, digest_size=32).digest()
        ready = self._graphs.pop(digest, None) or self._compile(asked.payload)
        self._graphs[digest] = self._last[ready.device] = ready
        if len(self._graphs) > self.limits.graphs:
            self._graphs.popitem(last=False)
        ready.program.run(self._watch)

    def _graph_recompute(self, asked: messages.GraphRecompute) -> None:
        self._device(asked.device)
        if asked.device not in self._last:
            raise RemoteProtocolError(
                f"GRAPH_RECOMPUTE: device {asked.device} has no graph, or not its buffers any more"
            )
        self._last[asked.device].program.run(self._watch)

    def _compile(self, payload: Bytes) -> Ready:
        """The graph in ``payload``, in this session's dialect or, since no client tells the patch of its version, in
        one of the same family that numbers operations otherwise: then that is the session's dialect from here on."""
        try:
            return self._compile_as(payload, self.dialect)
        except (RemoteProtocolError, GraphError) as error:
            for dialect in family(self.dialect):
                with contextlib.suppress(RemoteProtocolError, GraphError):
                    ready = self._compile_as(payload, dialect)
                    self.dialect = dialect
                    return ready
            raise error

    def _compile_as(self, payload: Bytes, dialect: Dialect) -> Ready:
        parts = graphs.split(payload)
        device = self._device(parts.device)
        count = len(parts.tensors) // record_bytes(parts.name_length) if parts.name_length else 0
        if count > self.limits.tensors or len(parts.node_ids) > self.limits.tensors:
            raise RemoteProtocolError(f"GRAPH_COMPUTE: {count} tensors; {self.limits.tensors} are allowed")
        used: dict[int, Region] = {}

        def resolve(handle: int, address: int) -> tuple[int, int]:
            region = used[handle] = self._space[handle]
            if region.device != parts.device:
                raise RemoteProtocolError(
                    f"GRAPH_COMPUTE: buffer {handle} is on device {region.device}, the graph on {parts.device}"
                )
            return region.buffer.key, region.offset(address, 0)

        graph = graphs.decode_graph(payload, dialect, resolve).graph
        program = device.compile(graph, {region.buffer.key: region.buffer for region in used.values()})
        return Ready(parts.device, program, frozenset(used))


def family(dialect: Dialect) -> list[Dialect]:
    """The other patches of the same protocol version, newest first."""
    same = [other for other in dialects().values() if other.triple[:2] == dialect.triple[:2] and other is not dialect]
    return same[::-1]


def chunks(start: int, size: int) -> Iterator[tuple[int, int]]:
    """``size`` bytes from ``start`` on as (offset, size) of pieces that may be held in memory."""
    for offset in range(start, start + size, CHUNK):
        yield offset, min(CHUNK, start + size - offset)


def _named(tensor: Record) -> str:
    return f"tensor {tensor.name.decode('utf-8', 'replace')!r}"


_COMMANDS: dict[type, Callable[[Session, Any], Any]] = {
    messages.DeviceCount: Session._device_count,
    messages.GetAlignment: Session._get_alignment,
    messages.GetMaxSize: Session._get_max_size,
    messages.GetDeviceMemory: Session._get_device_memory,
    messages.AllocBuffer: Session._alloc_buffer,
    messages.BufferGetBase: Session._buffer_get_base,
    messages.FreeBuffer: Session._free_buffer,
    messages.BufferClear: Session._buffer_clear,
    messages.InitTensor: Session._init_tensor,
    messages.GetAllocSize: Session._get_alloc_size,
    messages.SetTensorHash: Session._set_tensor_hash,
    messages.GetTensor: Session._get_tensor,
    messages.MemsetTensor: Session._memset_tensor,
    messages.CopyTensor: Session._copy_tensor,
    messages.GraphCompute: Session._graph_compute,
    messages.GraphRecompute: Session._graph_recompute,
}
"""Request → method: all commands but HELLO, which comes before a session, and SET_TENSOR, whose data is on the way."""
