"""A device of a server, behind a connection that it shares with the server's other devices.

Commands that have no answer are only sent: a write and :meth:`Program.run` return when the bytes are on their way, and
the server works while the client goes on. Everything is done in order, so a read sees what came before; a failure shows
at the next answer, as :class:`ComputeError` when a graph was under way, and ends the connection for all its devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import count
from typing import Any

import numpy as np

from ..device import Buffer, Bytes, Content, Device, Later, Memory, Program, Silence, Span, Target, Traffic, Turns
from ..errors import DeviceLost, LocalProtocolError, OutOfMemory, UnsupportedOperation
from ..ggml import validate
from ..ggml.dialect import Dialect
from ..ggml.tensor import Graph
from ..targets import PORTABLE, SDRPC
from ..wire import messages
from ..wire.framing import byte_length
from ..wire.graphs import encode_graph
from ..wire.hello import Capability
from ..wire.ranges import Named, Range, pack, pack_named
from ..wire.records import Record
from .carriers import Carriers
from .endpoint import Endpoint
from .naming import BY_DIGEST, Scheme
from .server import Answer, RemoteBuffer, Server
from .upload import PART, Offered, Run, send_all, upload

MAX_ALIGNMENT = 1 << 20
"""Larger than any page: a larger alignment is a broken or malicious server."""
ADDRESSES = 1 << 64

LAST = 0
"""The uid of all graphs in protocols that have none: the server keeps the last one."""

_keys = count(1)
_uids = count(LAST + 1)


class RemoteDevice(Device):
    """Device ``index`` of a server, as :func:`connect` makes it. Not thread-safe, together with all devices of the same
    server."""

    def __init__(self, name: str, server: Server, index: int) -> None:
        self.name = name
        self._server, self.index = server, index
        self.meet()
        server.devices.append(self)
        self.sent: int = 0

    def meet(self) -> None:
        """Find out what the device is like, which may be another one after the connection was made anew."""
        server, connection = self._server, self._server.connection
        kind = "sdrpc" if server.ours else "ggml"
        self.description = f"{connection.endpoint}, device {self.index} ({kind}, RPC protocol {connection.version})"
        # graphs that take turns have to have numbers, or each would be sent again
        self.queues = Capability.AHEAD in connection.capabilities and connection.dialect.has_graph_uids
        self._alignment = self._ask(messages.GetAlignment(self.index), "asking for the alignment").alignment
        self.max_size = self._ask(messages.GetMaxSize(self.index), "asking for the largest buffer").max_size
        if not 0 < self._alignment <= MAX_ALIGNMENT or self._alignment & (self._alignment - 1):
            raise server.accuse(f"an alignment of {self._alignment} bytes; it must be a power of two")
        if not self.max_size:
            raise server.accuse("a largest buffer of 0 bytes")

    @property
    def endpoint(self) -> Endpoint:
        """Where its server is."""
        return self._server.connection.endpoint

    @property
    def life(self) -> int:
        return self._server.life

    def reopen(self) -> None:
        """Connect to the server anew if the connection was lost: all of its devices have another life then."""
        if self not in self._server.devices:
            raise LocalProtocolError(f"{self.name} was closed")
        self._server.reopen()

    @contextmanager
    def watched(self, watch: Silence) -> Iterator[None]:
        connection = self._server.connection
        connection.watch = watch
        try:
            yield
        finally:
            connection.watch = lambda _: None

    @property
    def traffic(self) -> Traffic:
        return self._server.connection.traffic

    @property
    def turns(self) -> Turns:
        return self._server.turns

    @property
    def target(self) -> Target:
        connection = self._server.connection
        return _target(connection.capabilities, connection.dialect)

    @property
    def alignment(self) -> int:
        return int(self._alignment)

    def memory(self) -> Memory:
        reply = self._ask(messages.GetDeviceMemory(self.index), "asking for its memory")
        return Memory(reply.free, reply.total)

    def allocate(self, size: int) -> RemoteBuffer:
        """Raises :class:`OutOfMemory` when the server has no room, or gives no buffer as large."""
        if size < 0:
            raise LocalProtocolError(f"{self.name}: a buffer of {size} bytes")
        if size > self.max_size:
            raise OutOfMemory(self.name, size, f"the server's buffers are limited to {self.max_size / 2**20:,.1f} MiB")
        asked = max(size, 1)  # servers have no buffers of 0 bytes
        handle, given = self._ask(messages.AllocBuffer(self.index, asked), f"allocating {size:,} bytes")
        if not handle:
            raise OutOfMemory(self.name, size, f"the server at {self._server.connection.endpoint} has none left")
        if given < asked:
            raise self._server.accuse(f"a buffer of {given:,} bytes where {asked:,} were asked for")
        base = self._ask(messages.BufferGetBase(handle), "asking for a buffer's address").base_ptr
        self._check_place(handle, base, given)
        buffer = RemoteBuffer(next(_keys), size, handle, base, self.life)
        self._server.buffers.append(buffer)
        return buffer

    def _check_place(self, handle: int, base: int, size: int) -> None:
        if not base or base + size > ADDRESSES:
            raise self._server.accuse(f"a buffer of {size:,} bytes at address {base:#x}")
        for other in self._server.buffers:
            if other.handle == handle:
                raise self._server.accuse(f"handle {handle:#x} for a second buffer")
            # Some native backends (Vulkan, WebGPU) give all buffers the same address; ours never do.
            if self._server.ours and base < other.base + other.size and other.base < base + size:
                raise self._server.accuse(f"two buffers at address {base:#x}")

    def free(self, buffer: Buffer) -> None:
        """A lost connection is no error here: the server has freed what it held, and mostly this is called because of
        the error that says so. Whatever else is asked raises it. Nor are buffers of an earlier life."""
        if isinstance(buffer, RemoteBuffer) and buffer.life != self.life:
            return
        remote = self._own(buffer)
        remote.alive = False
        self._server.buffers.remove(remote)
        self._server.graphs.drop(lambda _: True)
        with suppress(DeviceLost):
            self._ask(messages.FreeBuffer(remote.handle), "freeing a buffer")

    def write(self, buffer: Buffer, offset: int, data: Bytes) -> None:
        """The bytes go from ``data`` to the socket without a copy; it may be changed when this returns."""
        if not byte_length(data):
            return
        view = memoryview(data).cast("B")
        remote = self._range(buffer, offset, len(view))
        for start in range(0, len(view), PART):
            self.send(remote, offset + start, [view[start : start + PART]])

    def upload(self, buffer: Buffer, contents: Sequence[Content], progress: Callable[[int], None]) -> None:
        """Only what the server does not have crosses the wire, where that can be found out."""
        scheme = self._server.scheme(contents)
        for content in contents:
            self._range(buffer, content.offset, content.size)
        with self._server.carriers(self.name, sum(content.size for content in contents)) as carriers:
            sender = _Sender(self, self._own(buffer), carriers)
            if scheme is not None:
                upload(scheme, contents, sender, self._server.names, progress)
            elif carriers is not None:
                send_all(contents, sender, progress)
            else:
                super().upload(buffer, contents, progress)

    def send(self, buffer: RemoteBuffer, offset: int, data: Sequence[memoryview], keep: bool = False) -> None:
        """A single SET_TENSOR of views that are not joined; ``keep``: the server may keep the data for another time."""
        size = sum(map(len, data))
        record = self._bytes_at(buffer, offset, size)
        self._server.make_room(size)
        self._ask(messages.SetTensor(record, int(keep), 0, data), f"writing {size:,} bytes")
        self.sent += size

    def send_over(
        self, carriers: Carriers, buffer: RemoteBuffer, runs: Sequence[Run], sent: Callable[[], None]
    ) -> None:
        """Send ``runs`` over ``carriers``; ``sent`` is called when they are, mostly in a later call."""
        sizes = [sum(map(len, run.data)) for run in runs]
        ranges = [Range(run.offset, size) for run, size in zip(runs, sizes, strict=True)]
        message = messages.SetRanges(buffer.handle, len(carriers), pack(ranges))
        doing = f"writing {sum(sizes):,} bytes"
        self.sent += sum(sizes)
        self._server.send_over(self.name, carriers, message, [run.data for run in runs], sent, doing)

    def finish_over(self, carriers: Carriers) -> None:
        """Wait until all is sent that is on its way over ``carriers``."""
        self._server.finish_over(self.name, carriers)

    def offer(self, buffer: RemoteBuffer, scheme: Scheme, offered: Sequence[Offered]) -> Callable[[], list[bool]]:
        """Ask for bytes by their names. What this gives waits for the answers: whether the server has them, which are
        in the buffer then."""
        if not offered:
            return list
        ask = self._offer_ranges if scheme is BY_DIGEST else self._offer_tensors
        return ask(buffer, offered, f"offering {len(offered)} tensors on device {self.index}")

    def _offer_ranges(self, buffer: RemoteBuffer, offered: Sequence[Offered], doing: str) -> Callable[[], list[bool]]:
        message = messages.SetRangesDigest(buffer.handle, pack_named([Named(*each) for each in offered]))
        asked = self._server.ask_later(self.name, message, doing, len(offered))

        def answers() -> list[bool]:
            self._server.answers_up_to(asked)
            return self._yes_or_no(asked.into, doing)

        return answers

    def _offer_tensors(self, buffer: RemoteBuffer, offered: Sequence[Offered], doing: str) -> Callable[[], list[bool]]:
        questions = [
            messages.SetTensorHash(self._bytes_at(buffer, at, size), 0, int.from_bytes(name, "little"))
            for at, size, name in offered
        ]
        asked = self._server.ask_all_later(self.name, questions, doing)

        def answers() -> list[bool]:
            self._server.answers_up_to(asked[-1])
            return self._yes_or_no([each.answer.result for each in asked], doing)

        return answers

    def _yes_or_no(self, answers: Sequence[int], doing: str) -> list[bool]:
        """What a server means by ``answers``. Of what is taken for a yes nothing is sent, so it must be one."""
        if (most := max(answers)) > 1:
            raise self._server.accuse(f"{most} is neither yes nor no (while {doing})")
        return list(map(bool, answers))

    def read(self, buffer: Buffer, offset: int, size: int) -> memoryview:
        remote = self._range(buffer, offset, size)
        result = np.empty(size, np.uint8).data
        for start in range(0, size, PART):
            part = result[start : start + PART]
            record = self._bytes_at(remote, offset + start, len(part))
            self._ask(messages.GetTensor(record, 0, len(part)), f"reading {size:,} bytes", part)
        return result

    def read_later(self, buffer: Buffer, offset: int, size: int) -> Later:
        """Nothing is waited for: the question is sent, and the server answers it in its turn."""
        record = self._bytes_at(self._range(buffer, offset, size), offset, size)
        doing = f"reading {size:,} bytes later"
        return Answer(self._server, self._server.ask_later(self.name, messages.GetTensor(record, 0, size), doing, size))

    def copy_to(self, source: Span, target: Span) -> bool:
        """Where both are of one server it may do that. It is asked once whether it does, later ones are only sent."""
        server, (_, buffer, offset, size) = self._server, source
        other, there, at, _ = target
        if not isinstance(other, RemoteDevice) or other._server is not server:
            return False
        between = self.index, other.index
        if server.copies.get(between) is False:
            return False
        read = self._bytes_at(self._range(buffer, offset, size), offset, size)
        message = messages.CopyTensor(read, self._bytes_at(other._range(there, at, size), at, size))
        doing = f"copying {size:,} bytes to {other.name}"
        if between in server.copies:
            server.ask_later(self.name, message, doing)
        else:
            server.copies[between] = bool(self._ask(message, doing).result)
        return server.copies[between]

    def compile(self, graph: Graph, buffers: Mapping[int, Buffer]) -> RemoteProgram:
        """Check and encode ``graph`` once, for all runs. What the server thinks of it shows when it runs.

        Raises :class:`GraphError` for a graph that means nothing (:mod:`sdrpc.ggml.validate`), and
        :class:`UnsupportedOperation` for what we or the server's protocol version don't have.
        """
        used = {key: self._own(buffer) for key, buffer in buffers.items()}
        target = self.target
        validate.check(graph, {key: buffer.size for key, buffer in used.items()}, managed=target.managed)
        if strange := {tensor.type.name for tensor in graph.tensors} - target.types:
            raise UnsupportedOperation(f"{self.name} has no type {', '.join(sorted(strange))}")

        def locate(key: int, offset: int) -> tuple[int, int]:
            return used[key].handle, used[key].base + offset

        connection = self._server.connection
        uid = next(_uids) if connection.dialect.has_graph_uids else LAST
        payload = encode_graph(graph, self.index, connection.dialect, connection.name_length, locate, uid)
        return RemoteProgram(self, payload, uid, tuple(used.values()))

    def run(self, program: RemoteProgram) -> None:
        """Start a program of this device; see :meth:`RemoteProgram.run`."""
        if any(not buffer.alive for buffer in program.buffers):
            raise LocalProtocolError(f"{self.name}: a buffer of the program was freed")
        server = self._server
        if server.graphs.get(self.index, program.uid) == program.digest:
            self._ask(messages.GraphRecompute(self.index, program.uid), "running a graph again")
        else:
            server.make_room(len(program.payload))
            self._ask(messages.GraphCompute(program.payload), "sending a graph")
            server.graphs.put(self.index, program.uid, program.digest)
        server.computing = self.name

    def close(self) -> None:
        """The connection ends with the last open device of its server, and with it all buffers there."""
        if self in self._server.devices:
            self._server.devices.remove(self)
            if not self._server.devices:
                self._server.connection.close()

    def _ask(self, message: Any, doing: str, into: memoryview | None = None) -> Any:
        return self._server.ask(self.name, message, f"{doing} on device {self.index}", into)

    def _own(self, buffer: Buffer) -> RemoteBuffer:
        if not isinstance(buffer, RemoteBuffer) or buffer not in self._server.buffers:
            raise LocalProtocolError(f"{self.name}: {buffer} is no buffer of this server, or was freed")
        return buffer

    def _range(self, buffer: Buffer, offset: int, size: int) -> RemoteBuffer:
        if offset < 0 or size < 0 or offset + size > buffer.size:
            raise LocalProtocolError(f"{self.name}: bytes {offset:,} to {offset + size:,} of {buffer.size:,}")
        return self._own(buffer)

    def _bytes_at(self, buffer: RemoteBuffer, offset: int, size: int) -> Record:
        """A part of a buffer as a tensor of bytes: servers move data of tensors only, and check them against their
        buffer. All of the tensor is moved, so that a server can tell the length of its name
        (:mod:`sdrpc.wire.name_length`).
        """
        return Record(
            id=1,
            type=self._server.connection.dialect.type_numbers["I8"],
            buffer=buffer.handle,
            ne=(size, 1, 1, 1),
            nb=(1, size, size, size),
            data=buffer.base + offset,
        )


def _target(capabilities: Capability, dialect: Dialect) -> Target:
    """What a server with these capabilities, speaking ``dialect``, takes."""
    target = SDRPC if Capability.MANAGED in capabilities else PORTABLE
    ours = target.managed and Capability.FORMATS in capabilities
    return target if ours else replace(target, types=frozenset(dialect.type_numbers))


@dataclass(frozen=True)
class _Sender:
    """A buffer as :func:`sdrpc.client.upload.upload` sees it."""

    device: RemoteDevice
    buffer: RemoteBuffer
    carriers: Carriers | None

    @property
    def together(self) -> bool:
        return self.carriers is not None

    def offer(self, scheme: Scheme, offered: Sequence[Offered]) -> Callable[[], list[bool]]:
        return self.device.offer(self.buffer, scheme, offered)

    def send(self, runs: Sequence[Run], sent: Callable[[], None]) -> None:
        if self.carriers is not None and runs:
            self.device.send_over(self.carriers, self.buffer, runs, sent)
            return
        for run in runs:
            self.device.send(self.buffer, *run)
        sent()

    def finish(self) -> None:
        if self.carriers is not None:
            self.device.finish_over(self.carriers)


class RemoteProgram(Program):
    """A graph as the bytes that a server gets, with the number under which it keeps them."""

    def __init__(self, device: RemoteDevice, payload: bytes, uid: int, buffers: tuple[RemoteBuffer, ...]) -> None:
        self.device, self.payload, self.uid, self.buffers = device, payload, uid, buffers
        self.digest = blake2b(payload, digest_size=32).digest()

    def run(self) -> None:
        """Start the computation and return: the protocol has no word for its end. A read waits for it.

        The graph is sent only if the server does not keep it (before protocol 8.0: the last one that the device ran). A
        failure is raised by whatever is answered next (mostly a read): :class:`ComputeError` with the reason from our
        own servers, :class:`ConnectionLost` from native ones, which hang up or die.
        """
        self.device.run(self)
