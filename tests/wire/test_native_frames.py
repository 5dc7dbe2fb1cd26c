"""Conversations of ggml's own RPC client with its own server (GGML_MAX_NAME 64), recorded between them.

7.0.0: the client allocated tensors, set, copied and filled them, computed a graph twice (MUL_MAT, SCALE, UNARY in
place, CPY), read results, asked for sizes, and freed. 8.0.0 (``python -m tests.interop.record``): rows set and got,
three graphs that take turns by their numbers, tensors filled in part. All streams are read to their last byte, and
written again from the messages.
"""

from __future__ import annotations

import json
import lzma
from collections import Counter
from pathlib import Path

import pytest

from sdrpc.ggml.dialect import dialects
from sdrpc.ggml.params import Scale, Unary
from sdrpc.wire.framing import FEEDS, RequestReader, encode_reply, encode_request, read_reply
from sdrpc.wire.graphs import decode_graph, encode_graph, split
from sdrpc.wire.hello import NATIVE, encode_hello, encode_hello_reply, read_hello, read_hello_reply
from sdrpc.wire.messages import Command, response_class
from sdrpc.wire.name_length import NameLength
from sdrpc.wire.records import decode_records
from tests.support.stream import Stream

DIALECT = dialects()["7.0.0"]
DATA = Path(__file__).parents[1] / "data"


def recorded(protocol: str) -> tuple[list[dict[str, str]], int]:
    """Both streams of each conversation, in hexadecimal, and how long names are."""
    table = json.loads(lzma.decompress((DATA / f"ggml-{protocol}.frames.json.xz").read_bytes()))
    assert table["protocol"] == protocol
    return table.get("conversations", [table]), table["name_length"]


COMMANDS: dict[str, dict[str, int]] = {
    "7.0.0": {
        "ALLOC_BUFFER": 2,
        "BUFFER_CLEAR": 1,
        "BUFFER_GET_BASE": 2,
        "COPY_TENSOR": 1,
        "FREE_BUFFER": 1,
        "GET_ALIGNMENT": 1,
        "GET_ALLOC_SIZE": 3,
        "GET_DEVICE_MEMORY": 1,
        "GET_MAX_SIZE": 1,
        "GET_TENSOR": 3,
        "GRAPH_COMPUTE": 2,
        "INIT_TENSOR": 1,
        "MEMSET_TENSOR": 1,
        "SET_TENSOR": 4,
    },
    "8.0.0": {
        "ALLOC_BUFFER": 6,
        "BUFFER_CLEAR": 2,
        "BUFFER_GET_BASE": 6,
        "DEVICE_COUNT": 3,
        "FREE_BUFFER": 6,
        "GET_ALIGNMENT": 3,
        "GET_ALLOC_SIZE": 3,
        "GET_MAX_SIZE": 3,
        "GET_TENSOR": 14,
        "GET_TENSOR_2D": 6,
        "GRAPH_COMPUTE": 3,
        "GRAPH_RECOMPUTE": 6,
        "INIT_TENSOR": 2,
        "MEMSET_TENSOR": 4,
        "SET_TENSOR": 10,
        "SET_TENSOR_2D": 3,
    },
}
FETCHES = (Command.GET_TENSOR, Command.GET_TENSOR_2D)


@pytest.mark.parametrize("piece", [1 << 30, 1])
@pytest.mark.parametrize("protocol", COMMANDS)
def test_both_streams(protocol: str, piece: int) -> None:
    conversations, name_length = recorded(protocol)
    dialect, seen = dialects()[protocol], []
    for streams in conversations:
        client, server = (
            Stream(bytes.fromhex(streams["client"]), piece),
            Stream(bytes.fromhex(streams["server"]), piece),
        )
        assert client.drive(read_hello()).capabilities == NATIVE
        assert server.drive(read_hello_reply()).version == dialect.triple
        assert client.data.startswith(encode_hello(NATIVE))
        assert server.data.startswith(encode_hello_reply(dialect, NATIVE))
        reader = RequestReader(dialect)
        while client.rest:
            request_at, reply_at = client.taken, server.taken
            command, message, bulk = client.drive(reader.read())
            if command in FEEDS:
                message = message._replace(data=bytes(message.data) + bytes(client.receive(bulk)))
            seen.append(command.name)
            again = b"".join(encode_request(message, dialect, name_length))
            assert again == client.data[request_at : client.taken], command.name
            if response_class(command, dialect):
                expected = message.size * getattr(message, "n_copies", 1) if command in FETCHES else 0
                reply = server.drive(read_reply(command, dialect, expected))
                if expected:
                    reply = reply._replace(data=server.receive(expected))
                assert b"".join(encode_reply(command, reply, dialect)) == server.data[reply_at : server.taken], command
        assert server.rest == b""
        assert reader.names in (NameLength(name_length, certain=True), NameLength())
    assert Counter(seen) == COMMANDS[protocol]


def test_the_graph() -> None:
    (streams,), _ = recorded("7.0.0")
    client, reader = Stream(bytes.fromhex(streams["client"])), RequestReader(DIALECT)
    client.drive(read_hello())
    while (received := client.drive(reader.read())).command is not Command.GRAPH_COMPUTE:
        client.receive(received.bulk)
    payload = received.message.payload
    graph = decode_graph(payload, DIALECT, lambda handle, address: (handle, address)).graph
    assert [node.op for node in graph.nodes] == ["MUL_MAT", "SCALE", "UNARY", "CPY"]
    assert graph.nodes[1].params == Scale(2.0, 0.5)
    assert graph.nodes[2].params == Unary("SILU")
    assert graph.nodes[2].view_src is graph.nodes[1]
    assert graph.nodes[3].src == (graph.nodes[2],)  # ggml_cast: its destination is the node itself
    assert [leaf.name for leaf in graph.leaves] == ["w" * 63, "input é"]
    ours = encode_graph(graph, 0, DIALECT, 64, lambda key, offset: (key, offset))
    assert sorted(normalised(ours)) == sorted(normalised(payload))


def normalised(payload: bytes) -> list[tuple[object, ...]]:
    """The tensors of a graph, with ids replaced by what they are: all that a native server looks at, use counts too."""
    records = decode_records(split(payload, DIALECT).tensors, 64)
    places = {one.id: (one.data, one.op) for one in records} | {0: ()}
    return [
        tuple(one._replace(id=0, src=tuple(places[i] for i in one.src), view_src=places[one.view_src]))  # type: ignore[arg-type]
        for one in records
    ]
