"""A client from its greeting to its end: requests are read, answered in order, and whatever goes wrong is said once."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple

from ..content import PIECE, pieces
from ..device import Bytes, Later
from ..errors import ConnectionLost, OutOfMemory, OverQuota, RemoteProtocolError, SdrpcError, Stopped
from ..text import printable
from ..wire.framing import REPLY_HEADER, Received, RequestReader, drive, encode_error, encode_reply
from ..wire.hello import NATIVE, Capability, Hello, encode_hello_reply, own_commands, read_hello
from ..wire.messages import (
    AllocBufferReply,
    CarryReply,
    Command,
    GetTensorReply,
    SetRangesDigest,
    SetRangesDigestReply,
    response_class,
)
from ..wire.refusals import Refusal, refusal, to_text
from .asked_again import AskedAgain
from .door import Door
from .incoming import Part, receiving, take
from .loads import Loads
from .negotiation import Protocol
from .session import Session
from .stream import Stream
from .version_memory import Offer

log = logging.getLogger(__name__)

CAPABILITIES = (
    Capability.ERRORS
    | Capability.MANAGED
    | Capability.BEATS
    | Capability.REASONS
    | Capability.FORMATS
    | Capability.CARRIERS
)
"""What each server of ours can do beyond the native protocol. ``CACHE`` depends on whether it may have anything for the
client."""


ANSWERS = 8
"""Answers of a client that wait for a device, at most."""
_AMONG_DEVICES = frozenset({Command.COPY_TENSOR})
"""What devices do in their turn, also where something else before it is still to be answered."""
SMALL = 1 << 20
"""Bytes of an answer above which nothing else is dealt with before it is given."""
AT_ONCE = 4
"""Pieces of an answer that a device is asked for at once: each that is asked for later waits for what other clients
were given to compute meanwhile, and nobody can tell the client so in the middle of an answer."""
PAUSE = 0.00005
"""Seconds between two looks at a device that is not ready."""
LOOK = 0.002
"""Seconds between two looks at the client while something is looked for."""


class Greeting(NamedTuple):
    """What was said and answered at the beginning, and what both sides can do."""

    hello: Hello
    offer: Offer
    agreed: Capability


def converse(stream: Stream, session: Session, protocol: Protocol, door: Door, full: str = "") -> None:
    """Serve one client, if ``door`` lets it in, until it leaves or breaks the rules; or tell it why there is no place
    for it, if that is ``full``. Never raises; how it ended is logged in one line."""
    agreed = NATIVE
    try:
        stream.doing = "greeting"
        stream.deadline = time.monotonic() + session.limits.hello_seconds
        visitor = door.admit(stream)
        if visitor is None:
            return
        stream.owner = visitor.owner
        refused = OverQuota(full) if full else None
        try:
            session.admit(visitor)
        except OverQuota as error:
            refused = error
        greeting = _greet(stream, session, protocol)
        agreed = greeting.agreed
        if refused is not None:
            raise refused
        _serve(stream, session, protocol, greeting)
    except (Stopped, ConnectionLost) as error:
        _ended(stream, session, agreed, error)
    except SdrpcError as error:
        log.warning("%s: %sdisconnected: %s", stream.peer, _spoken(session), printable(str(error)))
        _tell(stream, session, agreed, refusal(error))
    except MemoryError:
        why = OverQuota(f"the server's machine has no memory left for it, while {stream.doing}")
        log.warning("%s: disconnected: %s", stream.peer, why)
        _tell(stream, session, agreed, refusal(why))
    except Exception:  # the boundary: a fault of ours ends this client, not the server
        log.exception("%s: disconnected: a fault in this server while %s", stream.peer, stream.doing)
        _tell(stream, session, agreed, Refusal("", f"a fault in the server while {stream.doing}; its log says more"))


def _ended(stream: Stream, session: Session, agreed: Capability, error: Stopped | ConnectionLost) -> None:
    """Log an end that is nobody's fault. If it was us who ended it, the client is told."""
    account = _account(stream, session)
    if stream.aborted:
        log.info("%s: disconnected: %s; %s", stream.peer, stream.aborted.reason, account)
        _tell(stream, session, agreed, stream.aborted)
    elif isinstance(error, Stopped):
        log.info("%s: %s; %s", stream.peer, printable(str(error)), account)
        if not stream.hung_up():
            _tell(stream, session, agreed, refusal(error))
    else:
        log.warning("%s; %s", printable(str(error)), account)


def _greet(stream: Stream, session: Session, protocol: Protocol) -> Greeting:
    """HELLO, within its time."""
    stream.doing = "greeting"
    hello = drive(read_hello(), stream.read)
    stream.deadline = None
    offer = protocol.offer(stream.address, hello)
    session.versions = offer.versions
    ours = CAPABILITIES | (Capability.CACHE if session.finder.has_any else NATIVE)
    if any(device.queues for device in session.devices):
        ours |= Capability.AHEAD
    agreed = hello.capabilities & ours
    stream.write([encode_hello_reply(offer.told, agreed)])
    stream.beats = Capability.BEATS in agreed
    kind = "a client of ggml's protocol" if hello.capabilities == NATIVE else "a client of sdrpc"
    key = session.visitor and session.visitor.key
    name = f" with the key {key.name}" if key else ""
    log.info("%s: came, %s%s, is offered protocol %s", stream.peer, kind, name, offer.name)
    return Greeting(hello, offer, agreed)


def _serve(stream: Stream, session: Session, protocol: Protocol, greeting: Greeting) -> None:
    reader = RequestReader(session.framing, ours=own_commands(greeting.agreed))
    spoken = ""
    if _gave_up(stream, session.limits.refusal_seconds):
        remedy = protocol.refused(stream.address, greeting.hello, greeting.offer)
        log.warning("%s: left right after the greeting, %s", stream.peer, remedy)
        return
    answers, asked = Answers(stream, session), AskedAgain()
    with Loads(stream, session) as loads:

        def asks() -> bool:
            """Whether the client says something more; it gets what is ready until then."""
            answers.catch_up()
            loads.catch_up()
            return stream.wait() and not stream.aborted

        while asks():
            question = asked.question(stream.ahead)
            if question and (known := asked.answer(question, session.versions)):
                stream.skip(len(question))
                answers.finish()
                stream.write([known])
                session.requests += 1
                continue
            stream.doing = "receiving a request"
            stream.expect(0)
            request = drive(reader.read(), stream.read)
            stream.doing = request.command.name
            if request.command == Command.CARRY:
                _carry(stream, session, request)
                break
            loads.before(request)
            if not answers.later(request):
                answers.before(request)
                if request.command == Command.SET_RANGES:
                    loads.begin(request.message)
                elif past := _PAST_THE_SESSION.get(request.command):
                    past(stream, session, request)
                else:
                    answer = _answer(session, request, greeting.agreed)
                    if question:
                        asked.keep(question, session.versions, answer)
                    answers.give(answer)
            stream.done()
            session.requests += 1
            if spoken != session.dialect.version:  # at first, and when a graph shows that it is another patch
                spoken = session.dialect.version
                protocol.accepted(stream.address, greeting.hello, spoken)
            stream.doing = "waiting for a request"
        loads.finish()
    if stream.aborted:
        raise Stopped(stream.aborted.reason, stream.aborted.reason)
    log.info("%s: left after %s", stream.peer, _account(stream, session))


def _carry(stream: Stream, session: Session, request: Received) -> None:
    """From now on the connection carries data for another one of the same client, until that ends it. What goes wrong
    is told there."""
    number, carrier = session.carries_for(request.message).join(stream)
    try:
        stream.write(encode_reply(Command.CARRY, CarryReply(number), session.dialect))
        stream.done()
        session.requests += 1
        carrier.work()
    except Exception as error:
        log.debug("%s: carries no more: %s", stream.peer, printable(str(error)))
    finally:
        carrier.leave()


class Coming(NamedTuple):
    """An answer on its way: whether it is there, what it is then, and how to pass a moment until then."""

    ready: Callable[[], bool]
    answer: Callable[[], list[Bytes]]
    pause: Callable[[], object]


class Answers:
    """Answers that wait for a device, or for what the server looks for, and those behind them, while the client's next
    requests are dealt with: a GPU then need not wait for us. They are given in the order of the questions."""

    def __init__(self, stream: Stream, session: Session) -> None:
        self._stream, self._session = stream, session
        self._waiting: deque[Coming | list[Bytes]] = deque()
        self._looking = False

    def later(self, request: Received) -> bool:
        """Whether ``request`` will be answered later."""
        if request.command == Command.SET_RANGES_DIGEST:
            self._waiting.append(self._looked_for(request.message))
            self._looking = True
            return True
        if self._looking:
            self.finish()
        if request.command != Command.GET_TENSOR or request.message.size > SMALL:
            return False
        soon = self._session.read_soon(request.message)
        if soon is None:
            return False
        self._waiting.append(self._read(soon))
        return True

    def _read(self, soon: Later) -> Coming:
        """What a device reads when it has done what is before that."""

        def answer() -> list[Bytes]:
            return encode_reply(Command.GET_TENSOR, GetTensorReply(soon.wait()), self._session.dialect)

        return Coming(soon.ready, answer, partial(time.sleep, PAUSE))

    def _looked_for(self, asked: SetRangesDigest) -> Coming:
        """Whether the server has bytes."""
        looking = self._session.look_for(asked)

        def answer() -> list[Bytes]:
            reply = SetRangesDigestReply(bytes(looking.answers()))
            return encode_reply(Command.SET_RANGES_DIGEST, reply, self._session.dialect)

        return Coming(looking.done, answer, partial(looking.wait, LOOK))

    def before(self, request: Received) -> None:
        """Give the answers that ``request``'s own must not overtake."""
        waits = request.command in _AMONG_DEVICES and len(self._waiting) < ANSWERS
        if not waits and response_class(request.command, self._session.dialect) is not None:
            self.finish()

    def give(self, answer: list[Bytes]) -> None:
        """Give an answer, behind those that wait."""
        if self._waiting and answer:
            self._waiting.append(answer)
        elif answer:
            self._stream.write(answer)

    def catch_up(self) -> None:
        """Give the answers that are ready, and all while the client sends nothing."""
        while self._waiting:
            if not self._is_ready(self._waiting[0]):
                if len(self._waiting) <= ANSWERS and self._stream.has_more:
                    break
                self._pass(self._waiting[0])
                continue
            self._next()

    def finish(self) -> None:
        """Give all answers that wait."""
        while self._waiting:
            self._next()
        self._looking = False

    @staticmethod
    def _is_ready(answer: Coming | list[Bytes]) -> bool:
        return isinstance(answer, list) or answer.ready()

    def _pass(self, answer: Coming | list[Bytes]) -> None:
        """Pass a moment until ``answer`` is there. The client hears that somebody is at work."""
        self._stream.beat()
        if not isinstance(answer, list):
            answer.pause()

    def _next(self) -> None:
        answer = self._waiting.popleft()
        while not self._is_ready(answer):
            self._pass(answer)
        self._stream.write(answer if isinstance(answer, list) else answer.answer())


def _come(stream: Stream, soon: Later) -> Bytes:
    """What a device reads when it has done what is before that. The client hears that somebody is at work."""
    while not soon.ready():
        stream.beat()
        time.sleep(PAUSE)
    return soon.wait()


def _answer(session: Session, request: Received, agreed: Capability) -> list[Bytes]:
    """A request's answer in bytes. A buffer that can't be had is no reason to end the connection."""
    try:
        return encode_reply(request.command, session.answer(request.message), session.dialect)
    except (OutOfMemory, OverQuota) as error:
        if request.command != Command.ALLOC_BUFFER:
            raise
        if Capability.REASONS in agreed:
            return [encode_error(to_text(refusal(error)), goes_on=True)]
        return encode_reply(request.command, AllocBufferReply(0, 0), session.dialect)


def _account(stream: Stream, session: Session) -> str:
    """What a client had, in words."""
    seconds = time.monotonic() - stream.began
    received, sent, held = (count / 2**20 for count in (stream.received, stream.sent, session.most_held))
    return (
        f"{session.requests} requests in {seconds:,.1f} s, {received:,.1f} MiB in, {sent:,.1f} MiB out, "
        f"{held:,.1f} MiB held at most"
    )


def _gave_up(stream: Stream, seconds: float) -> bool:
    """Wait for a client's first request, as long as it takes; whether it hung up instead, and soon, as one does that
    does not like what HELLO was answered with."""
    stream.doing = "waiting for a request"
    until = time.monotonic() + seconds
    try:
        goes_on = stream.wait()
    except ConnectionLost:  # a process that is killed by its own abort() may leave so
        goes_on = False
    return not goes_on and not stream.aborted and time.monotonic() < until


def _spoken(session: Session) -> str:
    return f"protocol {session.dialect.version}: " if session.versions else ""


def _receive_tensor(stream: Stream, session: Session, request: Received) -> None:
    """The data of a SET_TENSOR, piece by piece."""
    head = memoryview(request.message.data)  # what was read ahead of the rest
    place = session.destination(request.message, len(head) + request.bulk)
    stream.expect(place.size)

    def read(piece: memoryview) -> None:
        nonlocal head
        piece[: len(head)] = head
        stream.read_into(piece[len(head) :])
        head = head[:0]

    with receiving(session, [place], ahead=stream.encrypted) as (incoming,):
        for offset, size in pieces(place.size):
            take([Part(incoming, offset, size)], read)


def _receive_rows(stream: Stream, session: Session, request: Received) -> None:
    """The data of a SET_TENSOR_2D, in pieces of many rows or of a part of one."""
    head = memoryview(request.message.data)
    region, rows = session.rows(request.message)
    total = len(head) + request.bulk
    if total != rows.size * rows.copies:
        raise RemoteProtocolError(f"{total} bytes for {request.message.n_copies} rows of {request.message.size}")
    stream.expect(total)
    for part in rows.parts(PIECE):
        piece = stream.staging(part.size * part.copies)
        ahead = min(len(head), len(piece))
        piece[:ahead] = head[:ahead]
        stream.read_into(piece[ahead:])
        head = head[ahead:]
        session.devices[region.device].write_rows(region.buffer, part, piece)


def _send_tensor(stream: Stream, session: Session, request: Received) -> None:
    """The answer to a GET_TENSOR."""
    region, offset, size = session.source(request.message)
    device = session.devices[region.device]

    def ask(at: int, length: int) -> Callable[[], Bytes]:
        soon = device.read_soon(region.buffer, offset + at, length)
        if soon is None:
            return partial(device.read, region.buffer, offset + at, length)
        return soon.wait if at else partial(_come, stream, soon)

    def parts() -> Iterator[Bytes]:
        asked = (ask(at, length) for at, length in pieces(size))
        waiting = deque(islice(asked, AT_ONCE))
        while waiting:
            yield waiting.popleft()()
            waiting.extend(islice(asked, 1))

    _send(stream, size, parts())


def _send_rows(stream: Stream, session: Session, request: Received) -> None:
    """The answer to a GET_TENSOR_2D."""
    region, rows = session.rows(request.message)
    device = session.devices[region.device]
    parts = (device.read_rows(region.buffer, part) for part in rows.parts(PIECE))
    _send(stream, rows.size * rows.copies, parts)


def _send(stream: Stream, size: int, parts: Iterator[Bytes]) -> None:
    """An answer of ``size`` bytes, piece by piece: it is never in memory as a whole. What goes wrong in its middle ends
    the connection without a word, which would be taken for data."""
    first = next(parts, b"")
    stream.write([REPLY_HEADER.pack(size), first])
    stream.halved = True
    for part in parts:
        stream.write([part])
    stream.halved = False


_PAST_THE_SESSION: dict[Command, Callable[[Stream, Session, Received], None]] = {
    Command.SET_TENSOR: _receive_tensor,
    Command.SET_TENSOR_2D: _receive_rows,
    Command.GET_TENSOR: _send_tensor,
    Command.GET_TENSOR_2D: _send_rows,
}
"""Commands whose data goes straight between socket and device."""


def _tell(stream: Stream, session: Session, agreed: Capability, why: Refusal) -> None:
    """Send the reason to a client that knows what to make of it, and that would not take it for data."""
    if Capability.ERRORS not in agreed or stream.halved:
        return
    try:
        stream.write([encode_error(to_text(why) if Capability.REASONS in agreed else why.reason)])
        stream.linger(session.limits.linger_seconds)
    except SdrpcError as error:
        log.debug("%s: could not be told: %s", stream.peer, error)
