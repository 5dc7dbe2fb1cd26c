"""Further connections of a client that carry its tensors' data (:mod:`sdrpc.wire.carrying`).

Each has a thread of its own, which admits it like any other, and then receives what the client's first connection has
it receive. So everything is decided, checked and refused there, in one place and in order; a carrier is of no use
alone, and ends with it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from queue import SimpleQueue
from threading import Lock

from ..errors import ConnectionLost, RemoteProtocolError
from .stream import Stream

TOKEN_BYTES = 32
_NOBODY = "CARRY: nobody waits for this connection"

Job = Callable[[Stream], None]


class Carrier:
    """One of them: what its thread is to do. ``stream``: its connection."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._jobs: SimpleQueue[tuple[Job, Future[None]] | None] = SimpleQueue()
        self._lock, self._over = Lock(), False

    def ask(self, job: Job) -> Future[None]:
        """Have ``job`` done."""
        done: Future[None] = Future()
        with self._lock:
            if self._over:
                done.set_exception(ConnectionLost(self.stream.peer, "carrying data"))
            else:
                self._jobs.put((job, done))
        return done

    def work(self) -> None:
        """Do what is asked for, until :meth:`end`, in the carrier's own thread; then it must :meth:`leave`. Raises what
        goes wrong."""
        while asked := self._next():
            job, done = asked
            try:
                job(self.stream)
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)
                raise
            finally:
                del asked, job, done  # the error refers to this frame, which must not refer to the error

    def leave(self) -> None:
        """Nothing is done any more, also of what was asked for: who waits for it is told."""
        with self._lock:
            self._over = True
        while not self._jobs.empty():
            if asked := self._jobs.get():
                asked[1].set_exception(ConnectionLost(self.stream.peer, "carrying data"))

    def _next(self) -> tuple[Job, Future[None]] | None:
        """What is to be done next. It is no idle client that waits here: it goes when its own does."""
        self.stream.doing = "waiting for data to carry"
        return self._jobs.get()

    def end(self) -> None:
        """Let its thread end, whatever it waits for."""
        self._jobs.put(None)
        self.stream.cut()


class Carriers:
    """The carriers of one client, up to ``most``. They are of the same ``owner``, so also encrypted if it has a key."""

    def __init__(self, owner: str, most: int) -> None:
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.owner, self._most = owner, most
        self._lock, self._closed = Lock(), False
        self._carriers: list[Carrier] = []

    def join(self, stream: Stream) -> tuple[int, Carrier]:
        """One more, and which it is. Raises :class:`RemoteProtocolError` where there is no place for it."""
        with self._lock:
            if self._closed or len(self._carriers) >= self._most:
                raise RemoteProtocolError(_NOBODY)
            self._carriers.append(Carrier(stream))
            return len(self._carriers) - 1, self._carriers[-1]

    def begin(self, jobs: Sequence[Job]) -> list[Future[None]]:
        """Have the first carriers do one of ``jobs`` each, behind what they do. Raises :class:`RemoteProtocolError`
        when there are too few."""
        with self._lock:
            carriers = self._carriers[: len(jobs)]
        if len(carriers) < len(jobs):
            raise RemoteProtocolError(f"SET_RANGES: {len(jobs)} carriers where there are {len(carriers)}")
        return [carrier.ask(job) for carrier, job in zip(carriers, jobs, strict=True)]

    def finish(self, under_way: Sequence[Future[None]], behind: Sequence[Future[None]] = ()) -> None:
        """Wait for what :meth:`begin` gave. Raises what goes wrong with one; then the others end, too, and what was
        begun ``behind`` them."""
        begun: list[Future[None]] = []
        try:
            if any(each.exception() for each in wait(under_way, return_when=FIRST_EXCEPTION).done):
                self.close()
                begun = [*under_way, *behind]
                wait(begun)  # nobody writes to the client's memory any more when this returns
                begun.sort(key=_tells_most)
                begun[0].result()
        finally:
            del under_way, behind, begun  # as in Carrier.work

    def close(self) -> None:
        with self._lock:
            self._closed = True
            carriers, self._carriers = self._carriers, []
        for carrier in carriers:
            carrier.end()


def _tells_most(done: Future[None]) -> int:
    """For sorting: what went wrong, then a lost connection (a client that loses one ends all of them), then what did
    not go wrong."""
    error = done.exception()
    return 2 if error is None else int(isinstance(error, ConnectionLost))


class Expected:
    """The carriers that may come to a server, by what they have to show. For any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._of: dict[bytes, Carriers] = {}

    def add(self, carriers: Carriers) -> None:
        with self._lock:
            self._of[carriers.token] = carriers

    def remove(self, carriers: Carriers) -> None:
        with self._lock:
            self._of.pop(carriers.token, None)

    def find(self, token: bytes, owner: str) -> Carriers:
        """Those of ``owner`` with that ``token``. Raises :class:`RemoteProtocolError` where there are none."""
        with self._lock:
            found = self._of.get(token)
        if found is None or found.owner != owner:
            raise RemoteProtocolError(_NOBODY)
        return found
