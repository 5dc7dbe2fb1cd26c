"""The HELLO of 3.x and that of later versions, native peers and our own."""

from __future__ import annotations

from contextlib import suppress
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdrpc.errors import RemoteProtocolError
from sdrpc.ggml.dialect import Dialect, dialects
from sdrpc.wire.hello import (
    MAGIC,
    NATIVE,
    Capability,
    Hello,
    HelloReply,
    decode_caps,
    encode_caps,
    encode_hello,
    encode_hello_reply,
    read_hello,
    read_hello_reply,
)
from tests.support.stream import EndOfStream, Stream
from tests.wire.examples import DIALECTS

ALL = Capability(0b101_1111_1011)
every_dialect = pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.version)
pieces = pytest.mark.parametrize("piece", [1 << 30, 1])

GREETINGS = {
    "3.x": (None, pack("<BQ", 14, 0), Hello(False, NATIVE)),
    "native": (NATIVE, pack("<BQ", 14, 24) + bytes(24), Hello(True, NATIVE)),
    "ours": (ALL, pack("<BQII", 14, 24, 0, 0b101_1111_1011) + MAGIC, Hello(True, ALL)),
}


@pieces
@pytest.mark.parametrize(("offer", "expected", "hello"), GREETINGS.values(), ids=GREETINGS)
def test_requests(offer: Capability | None, expected: bytes, hello: Hello, piece: int) -> None:
    assert encode_hello(offer) == expected
    stream = Stream(expected + b"next", piece)
    assert stream.drive(read_hello()) == hello
    assert stream.rest == b"next"


@pieces
@every_dialect
def test_replies(dialect: Dialect, piece: int) -> None:
    for capabilities in (NATIVE, ALL):
        encoded = encode_hello_reply(dialect, capabilities)
        assert len(encoded) == 8 + dialect.hello_response_bytes
        stream = Stream(encoded + b"next", piece)
        has_caps = dialect.hello_response_bytes > 3
        expected = HelloReply(dialect.triple, capabilities if has_caps else NATIVE)
        assert stream.drive(read_hello_reply()) == expected
        assert stream.rest == b"next"


def test_replies_are_the_bytes_of_native_servers() -> None:
    assert encode_hello_reply(dialects()["3.6.1"], NATIVE) == bytes.fromhex("0300000000000000 030601")
    assert encode_hello_reply(dialects()["6.0.0"], NATIVE) == bytes.fromhex("1c00000000000000 06000000") + bytes(24)
    assert encode_hello_reply(dialects()["7.0.0"], NATIVE) == bytes.fromhex("1c00000000000000 07000000") + bytes(24)


@pytest.mark.parametrize("size", [1, 3, 23, 25, 28, 2**31, 2**63, 2**64 - 1])
def test_request_sizes(size: int) -> None:
    stream = Stream(pack("<BQ", 14, size) + bytes(64))
    with pytest.raises(RemoteProtocolError, match=f"a HELLO of {size} bytes"):
        stream.drive(read_hello())
    assert stream.wanted == [9]


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n", bytes(24), b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"\xff" * 9]
)
def test_another_protocol_is_not_hello(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="instead of HELLO"):
        Stream(data).drive(read_hello())


@pytest.mark.parametrize("said", ["HTTP/1.1", "SSH-2.0-", "-ERR unk", "220 mail", "550 no\r\n"])
def test_another_program_is_told_by_its_words(said: str) -> None:
    words = said.strip()
    with pytest.raises(RemoteProtocolError, match=f"answers '{words}': another program listens there"):
        Stream(said.encode() + b" and so on\r\n").drive(read_hello_reply())


@pytest.mark.parametrize("size", [0, 1, 4, 24, 27, 29, 2**31, 2**63, 2**64 - 1])
def test_reply_sizes(size: int) -> None:
    stream = Stream(pack("<Q", size) + bytes(64))
    with pytest.raises(RemoteProtocolError, match=f"an answer of {size} bytes"):
        stream.drive(read_hello_reply())
    assert stream.wanted == [8]


def test_unknown_capabilities_are_ignored() -> None:
    caps = pack("<II", 0, 0xFFFFFFFF) + MAGIC
    assert decode_caps(caps) == ALL


@pytest.mark.parametrize(
    "caps",
    [
        bytes(24),
        pack("<II", 17, 3) + MAGIC,  # a queue pair: somebody with RDMA
        pack("<II", 0, 3) + MAGIC[:-1] + b"\2",
        pack("<II", 4711, 815) + bytes.fromhex("fe800000000000000000000000000001"),
    ],
)
def test_anybody_else_is_native(caps: bytes) -> None:
    assert decode_caps(caps) == NATIVE


def test_our_capabilities_reach_nobody_by_rdma() -> None:
    """What an RDMA peer would read from them: no queue pair, and an address out of 100::/64, the discard prefix."""
    caps = encode_caps(ALL)
    assert caps[:4] == bytes(4)
    assert caps[8:16] == bytes.fromhex("0100000000000000")
    assert encode_caps(NATIVE) == bytes(24)


@given(st.binary(max_size=64))
def test_any_bytes_are_a_greeting_or_an_error(data: bytes) -> None:
    for reader in (read_hello, read_hello_reply):
        stream = Stream(data)
        with suppress(RemoteProtocolError, EndOfStream):  # EndOfStream: there would have been more to read
            stream.drive(reader())
        assert sum(stream.wanted) <= 9 + 28
