"""A client from its greeting to its end: requests are read, answered in order, and whatever goes wrong is said once."""

from __future__ import annotations

import logging
import time

from ..errors import ConnectionLost, RemoteProtocolError, SdrpcError
from ..ggml.dialect import Dialect, dialects
from ..wire.framing import Received, RequestReader, drive, encode_error, encode_reply
from ..wire.hello import NATIVE, Capability, Hello, encode_hello_reply, read_hello
from ..wire.messages import Command
from .session import Session, chunks
from .stream import Stream

log = logging.getLogger(__name__)

CAPABILITIES = Capability.ERRORS | Capability.MANAGED
"""What this server can do beyond the native protocol."""


def converse(stream: Stream, session: Session) -> None:
    """Serve one client until it leaves or breaks the rules. Never raises; one line is logged either way."""
    agreed = NATIVE
    try:
        agreed = _greet(stream, session)
        _serve(stream, session)
    except ConnectionLost as error:
        log.warning("%s", error)
    except SdrpcError as error:
        log.warning("%s: disconnected: %s", stream.peer, error)
        _tell(stream, session, agreed, str(error))
    except Exception:  # the boundary: a fault of ours ends this client, not the server
        log.exception("%s: disconnected: a fault in this server while %s", stream.peer, stream.doing)
        _tell(stream, session, agreed, f"a fault in the server while {stream.doing}; its log says more")


def _greet(stream: Stream, session: Session) -> Capability:
    """HELLO, within its time; the capabilities of both sides."""
    stream.doing = "greeting"
    stream.deadline = time.monotonic() + session.limits.hello_seconds
    hello = drive(read_hello(), stream.read)
    stream.deadline = None
    _check_family(hello, session.dialect)
    agreed = hello.capabilities & CAPABILITIES
    stream.write([encode_hello_reply(session.dialect, agreed)])
    return agreed


def _check_family(hello: Hello, dialect: Dialect) -> None:
    """A greeting tells protocol 3.x from the later ones, and nothing more."""
    expected = dialect.hello_request_bytes > 0
    if hello.with_caps == expected:
        return
    fitting = [d.version for d in dialects().values() if (d.hello_request_bytes > 0) == hello.with_caps]
    versions = f"{fitting[0]} to {fitting[-1]}" if len(fitting) > 1 else fitting[0]
    raise RemoteProtocolError(
        f"the client speaks one of the protocols {versions}, this server {dialect.version}; "
        f"start the server with --protocol {fitting[-1]} (or what the client has) to serve it"
    )


def _serve(stream: Stream, session: Session) -> None:
    reader = RequestReader(session.dialect)
    requests = 0
    stream.doing = "waiting for a request"
    while stream.wait():
        stream.doing = "receiving a request"
        reader.dialect = session.dialect  # a graph may have told its patch
        request = drive(reader.read(), stream.read)
        stream.doing = request.command.name
        if request.command == Command.SET_TENSOR:
            _receive_tensor(stream, session, request)
        else:
            reply = session.answer(request.message)
            stream.write(encode_reply(request.command, reply, session.dialect))
        requests += 1
        stream.doing = "waiting for a request"
    if requests:
        log.info("%s: left after %d requests", stream.peer, requests)
    else:
        log.warning(
            "%s: left right after the greeting, as clients of another protocol version than %s do (see --protocol)",
            stream.peer,
            session.dialect.version,
        )


def _receive_tensor(stream: Stream, session: Session, request: Received) -> None:
    """The data of a SET_TENSOR: into the device's own memory where that can be had, else piece by piece."""
    head = memoryview(request.message.data)  # what was read ahead of the rest
    region, start, total = session.destination(request.message, len(head) + request.bulk)
    device = session.devices[region.device]
    window = device.window(region.buffer, start, total)
    if window is not None:
        window[: len(head)] = head
        stream.read_into(window[len(head) :])
        return
    device.write(region.buffer, start, head)
    for offset, size in chunks(start + len(head), request.bulk):
        piece = stream.staging(size)
        stream.read_into(piece)
        device.write(region.buffer, offset, piece)


def _tell(stream: Stream, session: Session, agreed: Capability, reason: str) -> None:
    """Send the reason to a client that knows what to make of it."""
    if Capability.ERRORS not in agreed:
        return
    try:
        stream.write([encode_error(reason)])
        stream.linger(session.limits.linger_seconds)
    except SdrpcError as error:
        log.debug("%s: could not be told: %s", stream.peer, error)
