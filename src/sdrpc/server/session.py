"""One client's state: its buffers, its graphs, and what each command does. No sockets here.

A session belongs to one thread. What a client gets wrong raises :class:`RemoteProtocolError`,
:class:`GraphError` or :class:`DeviceError` with the reason; the session is of no use after that and has to be closed,
which gives back all that the client had.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from ..content import pieces
from ..device import NOBODY, Buffer, Client, Later, Memory, Rows, ServedDevice, Span, Watch
from ..errors import OutOfMemory, OverQuota, RemoteProtocolError, Stopped
from ..ggml.dialect import Dialect
from ..wire import messages
from ..wire.records import Record
from .addresses import AddressSpace, Region
from .carriers import TOKEN_BYTES, Carriers, Expected
from .client_cache import CacheService
from .client_graphs import ClientGraphs, Ready
from .finder import Finder, Looking, Question
from .limits import Limits
from .live import Live, Spot
from .places import Place, device_at, named, named_places, nbytes_of, range_places, rows_place, tensor_place
from .quotas import Account, Accounts, Buffers
from .version_memory import Versions
from .visitor import Visitor


class Session:
    """What one client has on ``devices``, which it knows by their position. ``watch`` returns a reason to stop what is
    computed for it. ``cache_service``: where the server keeps tensors, if it does. ``live``: what all clients have in
    memory. ``finder`` finds there what this one asks for. ``expected``: connections that may come to carry data for
    others; ``carriers`` are this client's. ``buffers`` and ``accounts`` count what all clients have. ``requests`` were
    answered so far; ``most_held`` is the most bytes that its buffers and a running graph took. ``visitor`` is who it
    is, None until it is let in."""

    def __init__(
        self,
        devices: Sequence[ServedDevice],
        limits: Limits,
        watch: Watch,
        cache_service: CacheService | None = None,
        buffers: Buffers | None = None,
        accounts: Accounts | None = None,
        live: Live | None = None,
        expected: Expected | None = None,
    ) -> None:
        self.devices, self.limits = devices, limits
        self.requests = self.most_held = 0
        self.visitor: Visitor | None = None
        self.carriers: Carriers | None = None
        self._cache_service, self._live, self._expected = cache_service, live or Live(), expected
        self._buffers, self._accounts = buffers or Buffers(limits), accounts or Accounts(limits)
        self._account = Account("", limits)
        self._client = NOBODY
        self._watch = watch
        self._space = AddressSpace()
        self._graphs = ClientGraphs(devices, self._space, limits, watch, self._hold, self._give_up)
        self._shares: dict[int, int] = {}
        self.finder = self._finder(NOBODY, "")

    @property
    def versions(self) -> Versions:
        """What the client may speak, the likeliest first: set after HELLO, before any request. Graphs tell more."""
        return self._graphs.versions

    @versions.setter
    def versions(self, versions: Versions) -> None:
        self._graphs.versions = versions

    @property
    def dialect(self) -> Dialect:
        """What the client speaks, as far as that shows."""
        return self._graphs.dialect

    @property
    def framing(self) -> Dialect:
        """What messages are read as."""
        return self._graphs.framing

    def admit(self, visitor: Visitor) -> None:
        """From now on the client is ``visitor``. Raises :class:`OverQuota` where there are too many of it."""
        account = self._accounts.enter(visitor.account)
        if account is None:
            most = self.limits.connections_of_address
            raise OverQuota(f"{most} clients like this one ({visitor}) are connected already")
        self.visitor, self._account = visitor, account
        self._client = self._graphs.client = Client((account.name, id(self)), partial(self._accounts.charge, account))
        self.finder = self._finder(self._client, visitor.owner)

    def _finder(self, client: Client, owner: str) -> Finder:
        cache = None if self._cache_service is None else self._cache_service.client_cache(owner)
        hold, most = self._hold_for_good, self.limits.tensors
        return Finder(self.devices, self._live, cache, owner, client.path, hold, most)

    def answer(self, message: Any) -> Any:
        """Do what ``message`` asks; the reply's value, None where it has no fields. Data of SET_TENSOR, GET_TENSOR
        and their 2D forms goes past the session: :meth:`destination`, :meth:`source` and :meth:`rows` say where."""
        return _COMMANDS[type(message)](self, message)

    def destination(self, message: messages.SetTensor, size: int) -> Place:
        """Where the ``size`` bytes of data of a SET_TENSOR belong."""
        return self._place(message.tensor, message.offset, size)

    def source(self, message: messages.GetTensor) -> Place:
        """Where the bytes are that a GET_TENSOR asks for."""
        return self._place(message.tensor, message.offset, message.size)

    def close(self) -> None:
        """Free everything, once nobody writes to it any more."""
        with ExitStack() as end:  # in the opposite order; what goes wrong with one keeps none of the others
            end.callback(self._trim)
            if self.visitor is not None:
                end.callback(self._accounts.leave, self._account)
            for region in self._space:
                end.callback(self._free, region.handle)
            end.callback(self._graphs.close)
            end.callback(self.finder.finish)
            end.callback(self._end_carriers)

    def _trim(self) -> None:
        if self.most_held >= self.limits.trimmed_bytes:
            for device in self.devices:
                device.trim()

    # --- connections that carry data for this one

    def _get_carriers(self, asked: messages.GetCarriers) -> messages.GetCarriersReply:
        self._end_carriers()
        places = self.limits.connections_of_address - self._account.connections
        count = max(min(asked.carriers, self.limits.carriers, os.cpu_count() or 1, places), 0)
        if self._expected is None or self.visitor is None or not count:
            return messages.GetCarriersReply(0, bytes(TOKEN_BYTES))
        self.carriers = Carriers(self.visitor.owner, count)
        self._expected.add(self.carriers)
        return messages.GetCarriersReply(count, self.carriers.token)

    def carries_for(self, asked: messages.Carry) -> Carriers:
        """The carriers of another session of the same owner, one of which this connection is to be. Raises
        :class:`RemoteProtocolError` where it may not."""
        if self.requests or self._expected is None or self.visitor is None:
            raise RemoteProtocolError("CARRY: this connection has a session of its own")
        return self._expected.find(asked.token, self.visitor.owner)

    def _end_carriers(self) -> None:
        if self.carriers is not None and self._expected is not None:
            self._expected.remove(self.carriers)
            self.carriers.close()
            self.carriers = None

    @property
    def holds_buffers(self) -> bool:
        return len(self._space) > 0

    # --- devices

    def _device(self, number: int) -> ServedDevice:
        return device_at(self.devices, number)

    def _device_count(self, _: messages.DeviceCount) -> messages.DeviceCountReply:
        return messages.DeviceCountReply(len(self.devices))

    def _get_alignment(self, asked: messages.GetAlignment) -> messages.GetAlignmentReply:
        return messages.GetAlignmentReply(self._device(asked.device).alignment)

    def _get_max_size(self, asked: messages.GetMaxSize) -> messages.GetMaxSizeReply:
        return messages.GetMaxSizeReply(self._memory(asked.device).total)

    def _get_device_memory(self, asked: messages.GetDeviceMemory) -> messages.GetDeviceMemoryReply:
        return messages.GetDeviceMemoryReply(*self._memory(asked.device))

    def _share(self, number: int) -> int:
        """What this client may have of a device's memory at all. To ask a GPU takes long, beside a run."""
        if number not in self._shares:
            self._shares[number] = self._memory(number).total
        return self._shares[number]

    def _memory(self, number: int) -> Memory:
        """What this client may have of a device's memory, and what is left of that."""
        free, total = self._device(number).memory()
        held = self._held_on(number)
        share = min(int(self.limits.share * total), self.limits.buffer_bytes, self.limits.bytes_of_all)
        # of what others, and other programs, have left there is a rest for those who come as well
        free = int(self.limits.share * (free + held)) - held
        rest = min(share - held, self.limits.bytes_of_all - self._buffers.held)
        return Memory(max(min(free, rest), 0), share)

    def _held_on(self, number: int) -> int:
        return self._account.held(number)

    def _holds(self, working: int = 0) -> None:
        """Note what the client has now."""
        self.most_held = max(self.most_held, self._space.held + self._graphs.held + working)

    def _hold(self, size: int) -> bool:
        """Count ``size`` bytes of graphs that are kept for the client, if they may be had."""
        if not self._account.hold(size):
            return False
        if self._buffers.hold(size):
            return True
        self._account.give_up(size)
        return False

    def _hold_for_good(self, size: int) -> Callable[[], None] | None:
        """Count ``size`` bytes that may stay after the client left, if they may be had; what gives them up."""
        return partial(_give_up, self._account, self._buffers, size) if self._hold(size) else None

    def _give_up(self, size: int) -> None:
        _give_up(self._account, self._buffers, size)

    # --- buffers

    def _alloc_buffer(self, asked: messages.AllocBuffer) -> messages.AllocBufferReply:
        """Raises :class:`OutOfMemory` and :class:`OverQuota`, after which the session is as it was before."""
        device, size = self._device(asked.device), asked.size
        if self._account.full:  # nothing is cheaper to say: to ask for the memory reads files
            raise OverQuota(f"{device.name}: one client may have {self.limits.buffers:,} buffers")
        memory = self._memory(asked.device)
        share = f"{memory.total / 2**20:,.1f} MiB are one client's share"
        if size > memory.free:
            raise OutOfMemory(device.name, size, share, memory.free, self._others())
        if not self._space.has_room(size) or not self._account.take(asked.device, size, memory.total):
            raise OverQuota(f"{device.name}: one client may have {self.limits.buffers:,} buffers; {share}")
        given: list[Buffer] = []
        try:
            if not self._buffers.take(size, lambda: given.append(device.allocate(size))):
                raise OverQuota(f"{device.name}: all clients together have as much as they may have")
        except OutOfMemory as error:
            raise OutOfMemory(device.name, size, error.hint, error.free, self._others()) from error
        finally:
            if not given:
                self._account.give_back(asked.device, size)
        try:
            region = self._space.add(asked.device, size, given[0])
        except MemoryError:
            self._give_back(asked.device, given[0])
            raise
        self._holds()
        return messages.AllocBufferReply(region.handle, region.size)

    def _others(self) -> int:
        """Bytes that other clients hold."""
        own = sum(map(self._held_on, range(len(self.devices))))
        return max(self._buffers.held - own, 0)

    def _buffer_get_base(self, asked: messages.BufferGetBase) -> messages.BufferGetBaseReply:
        return messages.BufferGetBaseReply(self._space[asked.remote_ptr].base)

    def _free_buffer(self, asked: messages.FreeBuffer) -> None:
        self._free(asked.remote_ptr)

    def _free(self, handle: int) -> None:
        region = self._space.remove(handle)
        try:
            self.finder.forget(handle)
            self._graphs.freed(handle)
            self._live.forget(region.buffer)
        finally:
            self._give_back(region.device, region.buffer)

    def _give_back(self, device: int, buffer: Buffer) -> None:
        try:
            self.devices[device].free(buffer)
        finally:
            self._buffers.give_back(buffer.size)
            self._account.give_back(device, buffer.size)

    def _buffer_clear(self, asked: messages.BufferClear) -> None:
        region = self._space[asked.remote_ptr]
        self._fill(Place(region, 0, region.size), asked.value)

    # --- tensors

    def _place(self, tensor: Record, offset: int, size: int) -> Place:
        return tensor_place(self._space, self.framing, tensor, offset, size)

    def _nbytes(self, tensor: Record) -> int:
        return nbytes_of(self.framing, tensor)

    def ranges(self, asked: messages.SetRanges) -> list[Place]:
        """Where the data of a SET_RANGES belongs."""
        return range_places(self._space, asked)

    def rows(self, asked: messages.SetTensor2d | messages.GetTensor2d) -> tuple[Region, Rows]:
        """Where the rows of a 2D message are in a buffer."""
        return rows_place(self._space, self.framing, asked)

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
        """Who asks for bytes by their name does not say how many: the rest of the tensor, or it is told that there are
        none."""
        start = self._place(asked.tensor, asked.offset, 0)
        place = start._replace(size=self._nbytes(asked.tensor) - asked.offset)
        return messages.SetTensorHashReply(*self.finder.find([self.finder.name(place, asked.hash)]))

    def asked_for(self, asked: messages.SetRangesDigest) -> list[Place]:
        """Where the bytes of a SET_RANGES_DIGEST belong."""
        return [place for place, _ in named_places(self._space, asked)]

    def look_for(self, asked: messages.SetRangesDigest) -> Looking:
        """Begin with the answer to a SET_RANGES_DIGEST (:meth:`sdrpc.server.finder.Finder.begin`)."""
        return self.finder.begin([Question(*each) for each in named_places(self._space, asked)])

    def _spot(self, place: Place) -> Spot:
        return Spot(self.devices[place.region.device], place.region.buffer, place.offset, place.size)

    def read_soon(self, asked: messages.GetTensor) -> Later | None:
        """As GET_TENSOR, from a device that has other work before it; None where there is nothing to wait for."""
        region, offset, size = self.source(asked)
        return self.devices[region.device].read_soon(region.buffer, offset, size)

    def _memset_tensor(self, asked: messages.MemsetTensor) -> None:
        self._fill(self._place(asked.tensor, asked.offset, asked.size), asked.value)

    def _fill(self, place: Place, value: int) -> None:
        self.devices[place.region.device].fill(place.region.buffer, place.offset, place.size, value)

    def _copy_tensor(self, asked: messages.CopyTensor) -> messages.CopyTensorReply:
        src, dst = asked
        if (src.type, src.ne, src.nb) != (dst.type, dst.ne, dst.nb):
            raise RemoteProtocolError(f"{named(src)} and {named(dst)} are not alike: one can't be copied to the other")
        size = self._nbytes(src)
        source, target = self._place(src, 0, size), self._place(dst, 0, size)
        if source.region is target.region and abs(source.offset - target.offset) < size:
            return messages.CopyTensorReply(0)  # the client reads and writes it then
        self._copy(source, target)
        return messages.CopyTensorReply(1)

    def _copy(self, source: Place, target: Place) -> None:
        reader, writer = self.devices[source.region.device], self.devices[target.region.device]
        if reader is writer:
            reader.copy(source.region.buffer, source.offset, target.region.buffer, target.offset, source.size)
            return
        if reader.copy_to(Span(*self._spot(source)), Span(*self._spot(target))):
            return
        for at, size in pieces(source.size):
            data = reader.read(source.region.buffer, source.offset + at, size)
            writer.write(target.region.buffer, target.offset + at, data)

    # --- devices of several servers

    def _comm_init(self, _: messages.CommInit) -> messages.CommInitReply:
        """No: a client would choose where this server listens, or what it connects to. It can do without."""
        return messages.CommInitReply(0)

    def _comm_allreduce(self, asked: messages.CommAllreduce) -> None:
        self._device(asked.device)
        raise RemoteProtocolError(f"COMM_ALLREDUCE: device {asked.device} was joined with no other")

    def _comm_free(self, asked: messages.CommFree) -> None:
        self._device(asked.device)

    # --- graphs

    def _graph_compute(self, asked: messages.GraphCompute) -> None:
        self._run(self._graphs.sent(asked.payload))

    def _graph_recompute(self, asked: messages.GraphRecompute) -> None:
        self._device(asked.device)
        self._run(self._graphs.again(asked.device, asked.uid))

    def _run(self, ready: Ready) -> None:
        """Run a graph, for a client that is still there: the requests of one that is gone may lie in the socket."""
        if reason := self._watch():
            raise Stopped(f"nothing more is computed: {reason}", reason)
        working, held = ready.program.peak, self._held_on(ready.device)
        share = self._share(ready.device)
        if held + working > share:
            raise OutOfMemory(
                self.devices[ready.device].name,
                working,
                f"the graph takes so much while it runs, and {share / 2**20:,.1f} MiB are one client's share, of which "
                f"{held / 2**20:,.1f} MiB are in use",
                max(share - held, 0),
                self._others(),
            )
        self._holds(working)
        with self._accounts.computing(self._account):
            ready.program.run(self._watch, self._client)


def _give_up(account: Account, buffers: Buffers, size: int) -> None:
    account.give_up(size)
    buffers.give_up(size)


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
    messages.MemsetTensor: Session._memset_tensor,
    messages.CopyTensor: Session._copy_tensor,
    messages.GetCarriers: Session._get_carriers,
    messages.CommInit: Session._comm_init,
    messages.CommAllreduce: Session._comm_allreduce,
    messages.CommFree: Session._comm_free,
    messages.GraphCompute: Session._graph_compute,
    messages.GraphRecompute: Session._graph_recompute,
}
"""Request → method: all commands but HELLO, which comes before a session, CARRY, which ends it, those whose data goes
past it, and those that are answered later."""
