"""The HELLO exchange, before which there is no dialect, and what our own peers say in it.

``conn_caps`` are 24 bytes for the transport parameters of an RDMA peer: queue pair u32, sequence u32, address 16 bytes.
All zero means plain TCP. Ours keep the queue pair 0 and put a magic that begins like an IPv6 address that is routed
nowhere (100::/64, RFC 6666) in the place of the address, so that a peer with RDMA can't mistake them for somebody it
can reach; the capability bits are the second word. A server sends them only to a client that sent them.
"""

from __future__ import annotations

from collections.abc import Generator
from enum import IntFlag
from struct import Struct
from typing import NamedTuple

from ..device import Bytes
from ..errors import RemoteProtocolError
from ..ggml.dialect import Dialect, Version
from .framing import REPLY_HEADER, REQUEST_HEADER
from .messages import OURS, Command

CAPS = Struct("<II16s")
MAGIC = bytes.fromhex("0100000000000000") + b"sdrpc\0\0\1"
VERSION_ONLY = Struct("<3B")
VERSION_AND_CAPS = Struct("<4B24s")


class Capability(IntFlag):
    """What two of our own peers can do beyond the native protocol. Unknown bits are ignored."""

    ERRORS = 1
    """A refusal is answered with a reason (:func:`sdrpc.wire.framing.encode_error`)."""
    MANAGED = 2
    """Graph nodes may live in no buffer; only nodes flagged OUTPUT are stored."""
    LOCKED = 8
    """Of a server: it says nothing more to this client, which needs a key (:mod:`sdrpc.key`)."""
    BEATS = 16
    """A server that works on something says so every few seconds (:data:`sdrpc.wire.framing.BEAT`)."""
    REASONS = 32
    """What a server says when it refuses tells programs, too (:mod:`sdrpc.wire.refusals`); where it has no memory it
    says so and goes on."""
    AHEAD = 64
    """The server's devices queue what they are to do, so that it pays to send it before it is their turn."""
    FORMATS = 128
    """Tensors may be of types that ggml does not have (:data:`sdrpc.ggml.types.OWN_TYPES`)."""
    CARRIERS = 256
    """Data of tensors may come over further connections of the same client (:mod:`sdrpc.wire.carrying`)."""
    CACHE = 1024
    """The server has tensors, and finds them by SET_RANGES_DIGEST. (4 and 512 were the same with other questions.)"""


NATIVE = Capability(0)
"""A peer that is none of ours."""


def own_commands(agreed: Capability) -> frozenset[Command]:
    """The commands of our own that may be used where that was ``agreed`` on."""
    return frozenset(command for command, name in OURS.items() if Capability[name] in agreed)


class Hello(NamedTuple):
    """A client's greeting; ``with_caps`` is false for the empty one of protocol 3.x."""

    with_caps: bool
    capabilities: Capability


class HelloReply(NamedTuple):
    version: Version
    capabilities: Capability


def encode_caps(capabilities: Capability) -> bytes:
    return CAPS.pack(0, capabilities, MAGIC) if capabilities else bytes(CAPS.size)


def decode_caps(caps: bytes) -> Capability:
    """Our bits out of ``conn_caps``; a peer that sends anything else is native."""
    queue_pair, bits, magic = CAPS.unpack(caps)
    return Capability(bits & sum(Capability)) if (queue_pair, magic) == (0, MAGIC) else NATIVE


def encode_hello(capabilities: Capability | None) -> bytes:
    """A client's greeting: in the form of protocol 4.0 and later, or in that of 3.x when ``capabilities`` is None."""
    payload = b"" if capabilities is None else encode_caps(capabilities)
    return REQUEST_HEADER.pack(Command.HELLO, len(payload)) + payload


def read_hello() -> Generator[int, Bytes, Hello]:
    """A server's end of :func:`encode_hello`: yields how many bytes it needs next."""
    command, size = REQUEST_HEADER.unpack((yield REQUEST_HEADER.size))
    if command != Command.HELLO:
        raise RemoteProtocolError(f"the first command is {command} instead of HELLO")
    if size == 0:
        return Hello(with_caps=False, capabilities=NATIVE)
    if size != CAPS.size:
        raise RemoteProtocolError(f"a HELLO of {size} bytes; 0 (protocol 3.x) or {CAPS.size} are known")
    return Hello(with_caps=True, capabilities=decode_caps(bytes((yield CAPS.size))))


def encode_hello_reply(dialect: Dialect, capabilities: Capability) -> bytes:
    """A server's answer: its version, and what both sides can do (``NATIVE`` for a native client)."""
    if dialect.hello_response_bytes == VERSION_ONLY.size:
        payload = VERSION_ONLY.pack(*dialect.triple)
    else:
        payload = VERSION_AND_CAPS.pack(*dialect.triple, 0, encode_caps(capabilities))
    return REPLY_HEADER.pack(len(payload)) + payload


def read_hello_reply() -> Generator[int, Bytes, HelloReply]:
    """A client's end of :func:`encode_hello_reply`."""
    header = bytes((yield REPLY_HEADER.size))
    (size,) = REPLY_HEADER.unpack(header)
    if size == VERSION_ONLY.size:
        major, minor, patch = VERSION_ONLY.unpack((yield size))
        return HelloReply((major, minor, patch), NATIVE)
    if size != VERSION_AND_CAPS.size:
        text = header.decode("latin-1").rstrip("\r\n")
        if text.isascii() and text.isprintable():  # as HTTP, SSH and mail begin
            raise RemoteProtocolError(f"it answers {text!r}: another program listens there; is the port right?")
        raise RemoteProtocolError(f"an answer of {size} bytes to HELLO: no RPC server known here answers so")
    major, minor, patch, _, caps = VERSION_AND_CAPS.unpack((yield size))
    return HelloReply((major, minor, patch), decode_caps(caps))
