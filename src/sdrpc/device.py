"""The Device: where tensor bytes live and graphs run.

Two implementations: in this process (:mod:`sdrpc.engine`) and behind a socket (:mod:`sdrpc.client`). Everything above
sees this interface only; ``CPU``, ``CUDA0`` and ``RPC0`` are just names. A device that a server can offer to clients
has some more methods (:class:`ServedDevice`).
"""

from __future__ import annotations

import os
import selectors
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple, Protocol, TypeVar

from .errors import UsageError
from .ggml.tensor import Graph
from .ggml.weight import Origin, Pieces

T = TypeVar("T")

Bytes = bytes | bytearray | memoryview
"""Anything with a C-contiguous buffer of bytes; never copied on the way when it can be helped."""

PRECISIONS = ("auto", "exact", "fast", "ggml")
"""How a device of this process may compute: as float32; in narrow types where that is faster; with ggml's own rounding;
auto is fast where the hardware is made for it, else exact."""


def parts(data: memoryview, sizes: Iterable[int]) -> Iterator[memoryview]:
    """Views of ``data`` of so many bytes each, one behind the other."""
    at = 0
    for size in sizes:
        yield data[at : at + size]
        at += size


class Memory(NamedTuple):
    """Bytes of a device's memory."""

    free: int
    total: int


@dataclass
class Traffic:
    """Bytes of requests that were sent to a ``server`` and of its answers, over all connections to it one after the
    other; without what it takes to connect, and without what TLS adds. For any thread to read."""

    server: str
    sent: int = 0
    received: int = 0


class Buffer(Protocol):
    """A range of a device's memory. ``key`` is what :attr:`sdrpc.ggml.tensor.Tensor.buffer` refers to (never 0)."""

    @property
    def key(self) -> int: ...

    @property
    def size(self) -> int: ...


class Span(NamedTuple):
    """``size`` bytes of a device's buffer from ``offset`` on."""

    device: Device
    buffer: Buffer
    offset: int
    size: int


@dataclass(frozen=True)
class Target:
    """Which graphs a device takes: what lowering has to know about it.

    ``ops``: operations that may be used. ``managed``: nodes may live in no buffer (the device finds room for them), and
    only what is flagged OUTPUT is stored. ``types``: names of types that tensors may have.
    """

    name: str
    ops: frozenset[str]
    managed: bool
    types: frozenset[str]


@dataclass(frozen=True)
class Content:
    """``size`` bytes for ``offset`` of a buffer. ``pieces`` give them, or raise what is wrong with them; they are not
    asked for what the device has already. ``origin`` names them for good, where something does."""

    offset: int
    size: int
    pieces: Pieces
    origin: Origin | None = None


class Program(ABC):
    """A graph that a device has accepted, bound to the buffers that it names."""

    @abstractmethod
    def run(self) -> None:
        """Compute all nodes; when it returns, outputs can be read. Raises :class:`sdrpc.errors.ComputeError`."""


class Turns:
    """Who uses a device that several threads share: one at a time. ``with turns:`` waits for one's turn."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process = os.getpid()
        self._later: deque[Callable[[], None]] = deque()

    def __enter__(self) -> None:
        if self._process != os.getpid():
            raise UsageError(
                "a device of another process: what was forked has none of its threads, and shares its connections; "
                "open devices there (sdrpc.devices), or start processes by 'spawn'"
            )
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        self._catch_up()

    def later(self, action: Callable[[], None]) -> None:
        """Do ``action`` between two turns: now, if it is nobody's. A garbage collector may call this at any time, also
        in the middle of the same thread's turn."""
        if self._process == os.getpid():  # a forked one leaves the device alone
            self._later.append(action)
            self._catch_up()

    def _catch_up(self) -> None:
        while self._later and self._lock.acquire(blocking=False):
            try:
                while self._later:
                    self._later.popleft()()
            finally:
                self._lock.release()


class Later(ABC):
    """Bytes that a device was asked for: as they are when it has done what it was told before."""

    @abstractmethod
    def wait(self) -> Bytes:
        """The bytes, once they are there. Those of one device are waited for in the order of the questions."""

    def ready(self) -> bool:
        """Whether they are there; also where only :meth:`wait` tells."""
        return True

    def shows_at(self) -> int | None:
        """A file descriptor that can be read from when they come; None where that does not tell: then :meth:`wait`
        does."""
        return None


@dataclass(frozen=True)
class There(Later):
    """Bytes that were there when they were asked for."""

    data: Bytes

    def wait(self) -> Bytes:
        return self.data


def first_of(awaited: Sequence[Later], seconds: float = 1.0) -> int:
    """The position of what comes first; of the first where none comes within so many ``seconds`` (then it is time to
    see how its device is), and of one that is not to be watched."""
    shown: dict[int, int] = {}
    for position, each in enumerate(awaited):
        descriptor = each.shows_at()
        if descriptor is None:
            return position
        shown.setdefault(descriptor, position)
    with selectors.DefaultSelector() as selector:
        for descriptor, position in shown.items():
            selector.register(descriptor, selectors.EVENT_READ, position)
        there = selector.select(seconds)
    return int(there[0][0].data) if there else 0


_MAKING_TURNS = Lock()


class Device(ABC):
    """A place that holds bytes and runs graphs. Not thread-safe unless a subclass says so: see :attr:`turns`."""

    name: str
    """What users call it: ``CPU``, ``CUDA0``, ``RPC0``."""
    description: str
    """The hardware's name, or the endpoint and what it says of itself."""
    max_size: int = sys.maxsize
    """Bytes of the largest buffer that it gives, however much memory is free."""
    queues: bool = False
    """Whether it goes on by itself with what it was told to do, so that it pays to be ahead of it
    (:mod:`sdrpc.runtime.ahead`)."""
    sent: int | None = None
    """Bytes of tensors that were sent to it over a network; None where there is none."""

    @property
    def traffic(self) -> Traffic | None:
        """With its server, which other devices may share; None where it is this machine's own."""
        return None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {self.description}>"

    @property
    def turns(self) -> Turns:
        """For programs that use the device from several threads; devices of one connection have the same."""
        with _MAKING_TURNS:
            found: Turns = self.__dict__.setdefault("_turns", Turns())
            return found

    @property
    @abstractmethod
    def target(self) -> Target: ...

    @property
    @abstractmethod
    def alignment(self) -> int:
        """Tensors of a graph must start at multiples of this many bytes."""

    @abstractmethod
    def memory(self) -> Memory: ...

    @abstractmethod
    def allocate(self, size: int) -> Buffer:
        """A new buffer of ``size`` bytes, contents undefined. Raises :class:`sdrpc.errors.OutOfMemory`."""

    @abstractmethod
    def free(self, buffer: Buffer) -> None: ...

    @abstractmethod
    def write(self, buffer: Buffer, offset: int, data: Bytes) -> None: ...

    def upload(self, buffer: Buffer, contents: Sequence[Content], progress: Callable[[int], None]) -> None:
        """Write ``contents`` in order, as far as the device does not have them already. ``progress`` is called with the
        bytes that are done, now and then."""
        done = 0
        for content in contents:
            at = content.offset
            for piece in content.pieces():
                self.write(buffer, at, piece)
                at += len(piece)
            done += content.size
            progress(done)

    @abstractmethod
    def read(self, buffer: Buffer, offset: int, size: int) -> Bytes: ...

    def read_later(self, buffer: Buffer, offset: int, size: int) -> Later:
        """Ask for ``size`` bytes as they are after all that the device was told to do so far."""
        return There(bytes(self.read(buffer, offset, size)))

    def copy_to(self, source: Span, target: Span) -> bool:  # noqa: ARG002
        """Copy ``source``, which is here, to as many bytes of another device, when both have done what they were told
        so far; this program waits for nothing and has no part in it. Whether that can be."""
        return False

    @abstractmethod
    def compile(self, graph: Graph, buffers: Mapping[int, Buffer]) -> Program:
        """Check ``graph`` and get it ready to run, many times, on ``buffers`` (by key). Raises
        :class:`sdrpc.errors.GraphError`."""

    def close(self) -> None:
        """Give everything back."""

    # devices that can be lost

    @property
    def life(self) -> int:
        """How often it was had again after it was lost: what was there in an earlier life is nowhere."""
        return 0

    def reopen(self) -> None:
        """Have the device again if it was lost: then its :attr:`life` is another one, and it is empty. Raises
        :class:`sdrpc.errors.ConnectionFailed` and its like while it can't be had."""

    @contextmanager
    def watched(self, watch: Silence) -> Iterator[None]:  # noqa: ARG002 (what can't be lost is never silent)
        """Within it ``watch`` is called about every second with the seconds that the device has said nothing, where it
        is known to say something all the time. What ``watch`` raises ends what was being done; the device is lost
        then."""
        yield


Silence = Callable[[float], None]

Watch = Callable[[], str]
"""Returns a reason to stop what is being done, or an empty string."""


@dataclass(frozen=True)
class Client:
    """For whom something is computed. ``path``: its owner, then which of its owner's it is: turns are shared among
    owners, and what an owner gets among its own. ``spent`` is told how many seconds each run had the device."""

    path: tuple[Hashable, Hashable] = ("", "")
    spent: Callable[[float], None] = lambda _: None


NOBODY = Client()
"""Nobody else's concern."""


class ServedProgram(Program):
    """A program that may run for a client. ``peak``: bytes that a run takes at most at one time, besides buffers."""

    peak: int = 0

    @abstractmethod
    def run(self, watch: Watch | None = None, client: Client = NOBODY) -> None:
        """As :meth:`Program.run`. ``watch`` is asked now and then. Clients take turns. Raises
        :class:`sdrpc.errors.Stopped` for what ``watch`` says, and :class:`sdrpc.errors.OutOfMemory`."""


class Rows(NamedTuple):
    """``copies`` times ``size`` bytes of a buffer, from ``offset`` on, ``stride`` bytes apart; they don't overlap."""

    offset: int
    size: int
    copies: int
    stride: int

    @property
    def extent(self) -> int:
        """Bytes from the first to behind the last."""
        return (self.copies - 1) * self.stride + self.size

    def parts(self, most: int) -> Iterator[Rows]:
        """The same bytes in the same order, up to ``most`` at a time."""
        if self.size > most:
            for row in range(self.copies):
                for at in range(0, self.size, most):
                    size = min(most, self.size - at)
                    yield Rows(self.offset + row * self.stride + at, size, 1, size)
            return
        together = max(1, most // max(self.size, 1))
        for row in range(0, self.copies, together):
            yield self._replace(offset=self.offset + row * self.stride, copies=min(together, self.copies - row))


@dataclass(eq=False, slots=True)
class Mark:
    """Bytes ``[start, end)`` of a buffer as they were when they were marked, until they are ``written``. ``name`` says
    what they are, once that is known: bytes of the same name are the same. ``moved``: who looked at them may have seen
    them change places, so they get no name."""

    start: int
    end: int
    written: bool = False
    moved: bool = False
    name: Hashable | None = None


class Frozen(Protocol):
    """``size`` bytes that nobody can change, and that buffers may have together."""

    @property
    def size(self) -> int: ...

    def read(self, at: int, size: int) -> Sequence[Bytes]:
        """``size`` of the bytes from ``at`` on, in parts."""


Receive = Callable[[Sequence[tuple[int, int]], Callable[[memoryview], None]], None]
"""Writes to places (offset, size), one after the other, what a function puts into memory that it is given: the device's
own, for each place in its turn, or one for all of them from which it gets to the device fastest. At most
:data:`sdrpc.content.PIECE` bytes in all."""


class ServedDevice(Device):
    """A device as a server needs it: for several clients, from several threads at once."""

    def begin_serving(self) -> None:
        """Clients will come: have what must be there before many of them are."""

    def serve_here(self) -> None:
        """The calling thread serves a client from now on: what it does with the device itself must take no further
        threads, for there are many like it."""

    @contextmanager
    def receiving(
        self,
        buffer: Buffer,
        places: Sequence[tuple[int, int]],  # noqa: ARG002
        ahead: bool = False,  # noqa: ARG002
    ) -> Iterator[Receive]:
        """Within the context ``places`` (offset, size) get data by what it gives, which any thread may call for a part
        of them. Until it ends, what is there is nobody's to read or to compute with. ``ahead``: whoever receives has so
        much to do with it that memory should be made ready by another thread."""

        def receive(some: Sequence[tuple[int, int]], fill: Callable[[memoryview], None]) -> None:
            sizes = [size for _, size in some]
            memory = memoryview(bytearray(sum(sizes)))
            fill(memory)
            for (offset, _), part in zip(some, parts(memory, sizes), strict=True):
                self.write(buffer, offset, part)

        yield receive

    def read_soon(self, buffer: Buffer, offset: int, size: int) -> Later | None:  # noqa: ARG002
        """As :meth:`read`, without waiting; None where :meth:`read` does not wait either, or for many bytes."""
        return None

    def look(self, buffer: Buffer, offset: int, size: int, see: Callable[[Bytes], T]) -> T:
        """What ``see`` makes of those bytes, which it must not keep: they may be in memory that is used again."""
        return see(self.read(buffer, offset, size))

    @abstractmethod
    def fill(self, buffer: Buffer, offset: int, size: int, value: int) -> None:
        """Set ``size`` bytes from ``offset`` on to ``value``."""

    @abstractmethod
    def write_rows(self, buffer: Buffer, rows: Rows, data: Bytes) -> None:
        """Write ``data`` (``rows.copies`` times ``rows.size`` bytes) to ``rows``."""

    @abstractmethod
    def read_rows(self, buffer: Buffer, rows: Rows) -> Bytes:
        """The bytes of ``rows``, one row behind the other."""

    @abstractmethod
    def copy(self, source: Buffer, source_offset: int, target: Buffer, target_offset: int, size: int) -> None:
        """Copy ``size`` bytes, also within one buffer."""

    @abstractmethod
    def compile(
        self,
        graph: Graph,
        buffers: Mapping[int, Buffer],
        name: bytes | None = None,
        watch: Watch | None = None,
        client: Client = NOBODY,
    ) -> ServedProgram:
        """As :meth:`Device.compile`. ``name`` stands for the content of ``graph``, the sizes of ``buffers`` and the
        order in which they are given, where the caller knows a digest of all that. ``watch`` may end it. Clients take
        turns."""

    def mark(self, buffer: Buffer, offset: int, size: int) -> Mark:  # noqa: ARG002
        """Have it noted when ``size`` bytes from ``offset`` on, which were just written, are written again. Where
        devices do not note that, they count as written at once."""
        return Mark(offset, offset + size, written=True)

    def identify(self, buffer: Buffer, mark: Mark, name: Hashable) -> None:
        """The bytes at ``mark`` are those of that ``name``, if nobody has written to them: what is made of bytes of one
        name will do for all that have it."""

    def freeze(self, buffer: Buffer, offset: int, size: int) -> Frozen | None:  # noqa: ARG002
        """Those bytes as they are now, for other buffers to have as well (:meth:`take`); whatever is written to this
        one then goes to memory of its own. None where that can't be."""
        return None

    def take(self, buffer: Buffer, offset: int, frozen: Frozen) -> bool:  # noqa: ARG002
        """Let ``buffer`` have the bytes of ``frozen`` from ``offset`` on, in the same memory; whether that can be.
        Whatever is written there later goes to memory of its own."""
        return False

    def may_be_same(self, buffer: Buffer, other: Buffer) -> None:
        """Some bytes of ``buffer`` were copied from the same places of ``other``: perhaps they are the same as a whole.
        A device may then have them once, until one of the two is written to."""

    def trim(self) -> None:
        """A client that held much is gone: give back what was kept for it."""

    @abstractmethod
    def stop(self, seconds: float) -> bool:
        """End what is being computed and close; whether that was possible within ``seconds``."""
