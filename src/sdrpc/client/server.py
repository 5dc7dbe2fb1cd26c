"""One server, as all of its devices have it: a connection, what was asked over it, and what the server has for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..device import Content, Later, Turns
from ..errors import ConnectionFailed, ConnectionLost, RemoteProtocolError, SdrpcError
from ..wire import messages
from ..wire.hello import NATIVE, Capability
from ..wire.kept_graphs import KeptGraphs
from ..wire.messages import COMMANDS
from .carriers import LEAST_BYTES, MOST, Carriers, opened
from .connection import Connection
from .names import Names
from .naming import BY_DIGEST, NATIVE_THRESHOLD, Scheme, by_hash
from .refused import Refused

ROOM = 1 << 16
"""Bytes that a socket takes in any case."""
OUR_ROOM = 1 << 20
"""Bytes of answers that a server of ours gives when the device has them, and goes on reading until then."""


@dataclass(eq=False)
class RemoteBuffer:
    """Memory of a server. ``handle`` and ``base`` are the server's numbers for it, ``key`` is ours. ``life``: the
    device's when it was made."""

    key: int
    size: int
    handle: int
    base: int
    life: int
    alive: bool = True


class Tenant(Protocol):
    """What has a server's connection together with others: one of its devices."""

    index: int

    def meet(self) -> None:
        """Find out what the device is like, which may be another one after the connection was made anew."""


@dataclass(eq=False)
class Question:
    """What was sent for a device and will be answered; the bulk data of an answer belongs ``into`` somewhere."""

    message: Any
    into: memoryview
    device: str
    doing: str
    answer: Any = None


@dataclass(frozen=True, eq=False)
class Answer(Later):
    """What a GET_TENSOR asked for."""

    server: Server
    question: Question

    def wait(self) -> memoryview:
        self.server.answers_up_to(self.question)
        return self.question.into

    def shows_at(self) -> int | None:
        return self.server.connection.shows_at() if self.question in self.server.questions else None


@dataclass(eq=False)
class Server:
    """What the devices of one server share. ``reconnect`` gives another connection and the number of devices there;
    ``life`` counts how often that was done. ``graphs``: digests of those that GRAPH_RECOMPUTE would run again (native
    servers forget all of them when any buffer is freed). ``computing``: the device whose graph was started and of whose
    end no answer has told yet."""

    connection: Connection
    reconnect: Callable[[], tuple[Connection, int]]
    life: int = 0
    buffers: list[RemoteBuffer] = field(default_factory=list)
    graphs: KeptGraphs[bytes] = field(default_factory=KeptGraphs)
    computing: str = ""
    questions: deque[Question] = field(default_factory=deque)
    """What was asked for and did not come yet."""
    copies: dict[tuple[int, int], bool] = field(default_factory=dict)
    """Whether it copies tensors from one of its devices to another, where that was asked: a native server's GPUs may do
    so, and none of them to its CPU."""
    names: Names = field(default_factory=Names)
    devices: list[Tenant] = field(default_factory=list)
    """Those that are open."""
    turns: Turns = field(default_factory=Turns)
    another: Callable[[], Connection] | None = None
    """One more connection to the same server, which is only greeted."""

    @property
    def ours(self) -> bool:
        return self.connection.capabilities != NATIVE

    def scheme(self, contents: Sequence[Content]) -> Scheme | None:
        """How to ask this server for ``contents``, which it may have; None when that is of no use."""
        if self.ours:
            return BY_DIGEST if self.connection.capabilities & Capability.CACHE else None
        large = any(content.size > NATIVE_THRESHOLD and content.origin for content in contents)
        return by_hash() if large else None

    def ask_later(self, device: str, message: Any, doing: str, size: int = 0) -> Question:
        """Send ``message`` for ``device``; its answer is received when somebody waits for it or a later one. ``size``:
        bytes of bulk data in that."""
        return self.ask_all_later(device, [message], doing, size)[0]

    def ask_all_later(self, device: str, messages: Sequence[Any], doing: str, size: int = 0) -> list[Question]:
        """The same for several messages."""
        self.connection.ask_later(messages, doing)
        asked = [Question(message, np.empty(size, np.uint8).data, device, doing) for message in messages]
        self.questions.extend(asked)
        return asked

    def answers_up_to(self, question: Question) -> None:
        """Receive the answers that did not come yet, until that to ``question`` is there. Raises
        :class:`ConnectionLost` where it never comes: it was asked over a connection that was lost."""
        while question in self.questions:
            self._next_answer()
        if question.answer is None:
            raise ConnectionLost(str(self.connection.endpoint), question.doing, "the connection was lost meanwhile")

    def _next_answer(self) -> None:
        asked = self.questions.popleft()
        answer = self._answer(
            asked.device, asked.doing, lambda doing: self.connection.answer_of(asked.message, asked.into, doing)
        )
        asked.answer = answer
        if isinstance(answer, messages.CopyTensorReply) and not answer.result:
            raise self.accuse(f"it copied a tensor before, and does not any more (while {asked.doing})")

    def _answers(self) -> None:
        """Receive what was asked for before."""
        while self.questions:
            self._next_answer()

    def make_room(self, size: int) -> None:
        """To be called before ``size`` bytes are sent: a server that is giving an answer does not read meanwhile, and
        we would wait for each other. So answers that sockets may have no room for are received first."""
        awaited = sum(len(question.into) for question in self.questions)
        if size > ROOM and awaited > (OUR_ROOM if self.ours else ROOM):
            self._answers()

    def ask(self, device: str, message: Any, doing: str, into: memoryview | None = None) -> Any:
        """Send a message for ``device`` and return its answer; that of a GET_TENSOR is received in ``into``."""
        if self.questions and messages.response_class(COMMANDS[type(message)], self.connection.dialect) is not None:
            self._answers()
        if into is None:
            return self._answer(device, doing, lambda doing: self.connection.call(message, doing))
        return self._answer(device, doing, lambda doing: self.connection.fetch(message, into, doing))

    @contextmanager
    def carriers(self, device: str, size: int) -> Iterator[Carriers | None]:
        """Further connections for an upload of ``size`` bytes to ``device``, where they pay."""
        if size < LEAST_BYTES or Capability.CARRIERS not in self.connection.capabilities or self.another is None:
            yield None
            return
        reply = self.ask(device, messages.GetCarriers(MOST), "asking for carriers")
        if reply.carriers > MOST:
            raise self.accuse(f"{reply.carriers} carriers where {MOST} were asked for")
        made = opened(reply, self.another)
        try:
            yield made
        except Exception:
            if made is not None:  # the server waits for the rest of what it was told of
                with suppress(SdrpcError):
                    self._finish_over(device, made)
            raise
        finally:
            if made is not None:
                if made.busy:  # somebody does not want to wait for that
                    self.connection.close("an upload was interrupted")
                made.close()
            if not self.connection.closed_because:
                self.ask(device, messages.GetCarriers(0), "ending its carriers")

    def send_over(
        self,
        device: str,
        carriers: Carriers,
        message: Any,
        data: Sequence[Sequence[memoryview]],
        sent: Callable[[], None],
        doing: str,
    ) -> None:
        """Send a message for ``device`` and its data over ``carriers``; ``sent`` is called when that is done."""
        self._answer(device, doing, lambda doing: self.connection.send_over(carriers, message, data, sent, doing))
        carriers.tell()

    def finish_over(self, device: str, carriers: Carriers) -> None:
        """Wait until all that ``carriers`` have for ``device`` is sent."""
        self._finish_over(device, carriers)
        carriers.tell()

    def _finish_over(self, device: str, carriers: Carriers) -> None:
        self._answer(device, "writing", lambda doing: self.connection.finish_over(carriers, doing))

    def _answer(self, device: str, doing: str, exchange: Callable[[str], Any]) -> Any:
        if self.computing:
            doing = f"{doing} (after a graph was started on {self.computing})"
        try:
            reply = exchange(doing)
        except Refused as refused:
            raise refused.meant(self.computing or device, bool(self.computing)) from refused
        if reply is not None:
            self.computing = ""
        return reply

    def reopen(self) -> None:
        """Connect anew if the connection was lost, to a server that knows nothing of what was there before."""
        if not self.connection.closed_because:
            return
        connection, there = self.reconnect()
        needed = 1 + max(device.index for device in self.devices)
        if there < needed:
            connection.close()
            raise ConnectionFailed(str(connection.endpoint), f"the server has {there} devices now, not {needed}")
        connection.go_on_from(self.connection)
        self.connection = connection
        self.life += 1
        self.buffers.clear()
        self.graphs = KeptGraphs()
        self.questions.clear()
        self.copies = {}
        self.computing = ""
        for device in self.devices:
            device.meet()

    def accuse(self, reason: str) -> RemoteProtocolError:
        """The error for an answer that makes no sense; nothing more is said to such a server."""
        self.connection.close(reason)
        return RemoteProtocolError(f"{self.connection.endpoint}: {reason}")
