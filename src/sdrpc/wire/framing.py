"""Frames: headers, sizes, and what has to be read before a message is whole. No IO: readers are generators.

A reader yields how many bytes it needs next, is sent exactly those, and returns what they mean::

    reader = requests.read()
    received = drive(reader, receive_exactly)

A size is checked before anything of the payload is asked for. A tensor's data is not read at all: SET_TENSOR and the
answer to GET_TENSOR (and their 2D forms) end with ``bulk``, the number of bytes that follow and that the caller
receives straight into their destination. What is to be sent is a list of buffers, the caller's own tensor data among
them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from struct import Struct
from typing import Any, NamedTuple, TypeVar

from ..device import Bytes
from ..errors import RemoteProtocolError
from ..ggml.dialect import Dialect
from . import graphs, name_length, ranges
from .limits import DEFAULT_LIMITS, MAX_NAME_LENGTH, Limits
from .messages import (
    COMMANDS,
    EXCHANGES,
    Command,
    GraphCompute,
    SetTensor,
    SetTensor2d,
    command_known,
    decode,
    encode,
    message_layout,
    response_class,
)
from .name_length import NameLength

REQUEST_HEADER = Struct("<BQ")
REPLY_HEADER = Struct("<Q")
ERROR_MARK = 2**64 - 1
"""As the size of an answer: an error reply follows (``Capability.ERRORS``)."""
ERROR_HEADER = Struct("<I")
REFUSAL_MARK = 2**64 - 3
"""The same, in answer to ALLOC_BUFFER alone, and the connection goes on (``Capability.REASONS``)."""
BEAT_MARK = 2**64 - 2
BEAT = REPLY_HEADER.pack(BEAT_MARK)
"""Between two answers: the server is there and works on what comes next (``Capability.BEATS``)."""

T = TypeVar("T")


def drive(reader: Generator[int, Bytes, T], receive: Callable[[int], Bytes]) -> T:
    """Run a reader to its end with ``receive``, which returns exactly as many bytes as it is asked for."""
    try:
        wanted = next(reader)
        while True:
            wanted = reader.send(receive(wanted))
    except StopIteration as end:
        result: T = end.value
        return result


def byte_length(buffer: Bytes) -> int:
    return buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)


class Received(NamedTuple):
    """A request, and how many bytes of tensor data follow it on the wire (of :data:`FEEDS` only; after
    ``message.data``)."""

    command: Command
    message: Any
    bulk: int = 0


FEEDS = (Command.SET_TENSOR, Command.SET_TENSOR_2D)
"""Commands that end with tensor data."""


_MOST_BULK = {Command.SET_RANGES: ranges.MOST_BYTES, Command.SET_RANGES_DIGEST: ranges.MOST_NAMED_BYTES}
"""Bytes that may follow the fields of a request, where that is not for :class:`~sdrpc.wire.limits.Limits` to say."""


class ErrorReply(NamedTuple):
    """An sdrpc server refused; what it answers to may be an earlier command that has no answer of its own. If it
    ``goes_on``, that is all; else the connection is over."""

    reason: str
    goes_on: bool = False


class RequestReader:
    """A server's view of one client after HELLO: reads requests of one dialect and learns the length of its names.
    ``ours``: the commands of our own that the client and we agreed on."""

    def __init__(
        self,
        dialect: Dialect,
        limits: Limits = DEFAULT_LIMITS,
        known: NameLength = name_length.UNKNOWN,
        ours: Collection[Command] = (),
    ) -> None:
        self.dialect, self.limits, self.names, self.ours = dialect, limits, known, ours

    def read(self) -> Generator[int, Bytes, Received]:
        """One request. Raises :class:`RemoteProtocolError`, after which the stream has no meaning any more."""
        command, size = self.header((yield REQUEST_HEADER.size))
        request = EXCHANGES[command].request
        if command in FEEDS:
            return (yield from self._read_feed(command, size))
        payload = (yield size) if size else b""
        if request is GraphCompute and (length := graphs.split(payload, self.dialect).name_length):
            self.names = name_length.settle(self.names, command, length)
        return Received(command, decode(request, payload, self.dialect, self._name_length))

    @property
    def _name_length(self) -> int:
        return self.names.value or MAX_NAME_LENGTH

    def header(self, header: Bytes) -> tuple[Command, int]:
        """Command and payload size of a request header, both found good."""
        number, size = REQUEST_HEADER.unpack(header)
        if not command_known(number, self.dialect, self.ours) or number == Command.HELLO:
            raise RemoteProtocolError(
                "a second HELLO"
                if number == Command.HELLO
                else f"protocol {self.dialect.version} has no command {number}"
            )
        command = Command(number)
        self.names = name_length.learn(self.names, command, size, self.dialect)
        shape = message_layout(EXCHANGES[command].request, self.dialect)
        low = shape.size(name_length.ALL[0])
        high = low if not shape.records else shape.size(MAX_NAME_LENGTH)
        if shape.bulk:
            high += self._most(command)
        if not low <= size <= high:
            raise RemoteProtocolError(
                f"{command.name}: {size} bytes instead of {low}{f' to {high}' if high > low else ''}"
            )
        return command, size

    def _most(self, command: Command) -> int:
        """Bytes of bulk data that a request may have."""
        if command in FEEDS:
            return self.limits.tensor_bytes
        return _MOST_BULK.get(command, self.limits.graph_bytes)

    def _read_feed(self, command: Command, size: int) -> Generator[int, Bytes, Received]:
        request: type[SetTensor] | type[SetTensor2d] = EXCHANGES[command].request
        shape = message_layout(request, self.dialect)
        certain = self.names.value if self.names.certain else MAX_NAME_LENGTH
        head = yield min(size, shape.size(certain))
        self.names = name_length.learn_feed(self.names, request, bytes(head), size, self.dialect)
        message = decode(request, head, self.dialect, self.names.value)
        return Received(command, message, size - len(head))


def encode_request(message: Any, dialect: Dialect, name_length: int) -> list[Bytes]:
    """A request as buffers to send in order; the last one is the caller's own bulk data, if the message has any."""
    return _framed(REQUEST_HEADER.pack, (COMMANDS[type(message)],), encode(message, dialect, name_length))


def encode_reply(command: Command, message: Any, dialect: Dialect) -> list[Bytes]:
    """The answer to ``command`` as buffers to send in order; nothing where the dialect has no answer to it.

    ``message`` is of the command's response class; where that is ``Ack`` or nothing, it is not looked at.
    """
    response = response_class(command, dialect)
    if response is None:
        return []
    payload = encode(message, dialect, MAX_NAME_LENGTH) if response._fields else []  # type: ignore[attr-defined]
    return _framed(REPLY_HEADER.pack, (), payload)


def _framed(pack: Callable[..., bytes], first: tuple[int, ...], payload: list[Bytes]) -> list[Bytes]:
    size = sum(byte_length(part) for part in payload)
    return [pack(*first, size), *payload]


def read_reply(command: Command, dialect: Dialect, bulk: int = 0, errors: bool = False) -> Generator[int, Bytes, Any]:
    """A client's end of :func:`encode_reply`: the response, or an :class:`ErrorReply` where ``errors`` were agreed on.
    Beats are passed over then.

    An answer that ends with bulk data must announce ``bulk`` bytes of it; they stay on the wire, and that field is
    empty. Must not be called for a command that has no answer.
    """
    response = response_class(command, dialect)
    if response is None:
        raise ValueError(f"{command.name} has no answer in protocol {dialect.version}")
    size = yield from _read_size(errors)
    if errors and (size == ERROR_MARK or (size == REFUSAL_MARK and command == Command.ALLOC_BUFFER)):
        return ErrorReply((yield from _read_reason(DEFAULT_LIMITS)), size == REFUSAL_MARK)
    shape = message_layout(response, dialect)
    if size != shape.size(0) + bulk:
        raise RemoteProtocolError(f"{command.name}: an answer of {size} bytes instead of {shape.size(0) + bulk}")
    payload = (yield shape.size(0)) if shape.size(0) else b""
    return decode(response, payload, dialect, MAX_NAME_LENGTH)


def encode_error(reason: str, limits: Limits = DEFAULT_LIMITS, goes_on: bool = False) -> bytes:
    """An error reply: u64 2**64-1 (2**64-3 if the connection ``goes_on``), u32 length, the reason as UTF-8 (cut to
    ``Limits.error_bytes``)."""
    text = reason.encode("utf-8", "replace")[: limits.error_bytes].decode("utf-8", "ignore").encode()
    return REPLY_HEADER.pack(REFUSAL_MARK if goes_on else ERROR_MARK) + ERROR_HEADER.pack(len(text)) + text


def read_error() -> Generator[int, Bytes, ErrorReply]:
    """A client's end of :func:`encode_error`, where nothing else can come."""
    size = yield from _read_size(beats=True)
    if size != ERROR_MARK:
        raise RemoteProtocolError(f"an answer of {size} bytes that nobody asked for")
    return ErrorReply((yield from _read_reason(DEFAULT_LIMITS)))


def _read_size(beats: bool) -> Generator[int, Bytes, int]:
    """The size of an answer, behind any number of beats."""
    while True:
        (size,) = REPLY_HEADER.unpack((yield REPLY_HEADER.size))
        if size != BEAT_MARK or not beats:
            return int(size)


def _read_reason(limits: Limits) -> Generator[int, Bytes, str]:
    (size,) = ERROR_HEADER.unpack((yield ERROR_HEADER.size))
    if size > limits.error_bytes:
        raise RemoteProtocolError(f"an error reply of {size} bytes; at most {limits.error_bytes} are read")
    text = (yield size) if size else b""
    return bytes(text).decode("utf-8", "replace")
