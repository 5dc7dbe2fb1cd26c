"""A conversation of ggml 7.0.0's own RPC client with its own server (GGML_MAX_NAME 64), recorded between them.

The client allocated tensors, set, copied and filled them, computed a graph twice (MUL_MAT, SCALE, UNARY in place, CPY),
read results, asked for sizes, and freed. Both streams are read to their last byte, and written again from the messages.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from sdrpc.ggml.dialect import dialects
from sdrpc.ggml.params import Scale, Unary
from sdrpc.wire.framing import RequestReader, encode_reply, encode_request, read_reply
from sdrpc.wire.graphs import decode_graph, encode_graph, split
from sdrpc.wire.hello import NATIVE, encode_hello, encode_hello_reply, read_hello, read_hello_reply
from sdrpc.wire.messages import Command, response_class
from sdrpc.wire.name_length import NameLength
from sdrpc.wire.records import decode_records
from tests.support.stream import Stream

RECORDED = json.loads(lzma.decompress((Path(__file__).parents[1] / "data" / "ggml-7.0.0.frames.json.xz").read_bytes()))
DIALECT = dialects()[RECORDED["protocol"]]
COMMANDS = [
    "GET_DEVICE_MEMORY", "GET_ALIGNMENT", "GET_MAX_SIZE", "GET_ALLOC_SIZE", "ALLOC_BUFFER", "BUFFER_GET_BASE",
    "INIT_TENSOR", "SET_TENSOR", "SET_TENSOR", "SET_TENSOR", "SET_TENSOR", "COPY_TENSOR", "MEMSET_TENSOR",
    "GET_ALLOC_SIZE", "ALLOC_BUFFER", "BUFFER_GET_BASE", "GRAPH_COMPUTE", "GET_TENSOR", "GRAPH_COMPUTE", "GET_TENSOR",
    "GET_ALLOC_SIZE", "BUFFER_CLEAR", "FREE_BUFFER", "GET_TENSOR",
]  # fmt: skip


@pytest.mark.parametrize("piece", [1 << 30, 1])
def test_both_streams(piece: int) -> None:
    client, server = Stream(bytes.fromhex(RECORDED["client"]), piece), Stream(bytes.fromhex(RECORDED["server"]), piece)
    assert client.drive(read_hello()).capabilities == NATIVE
    assert server.drive(read_hello_reply()).version == DIALECT.triple
    assert bytes.fromhex(RECORDED["client"]).startswith(encode_hello(NATIVE))
    assert bytes.fromhex(RECORDED["server"]).startswith(encode_hello_reply(DIALECT, NATIVE))
    reader, seen = RequestReader(DIALECT), []
    while client.rest:
        request_at, reply_at = client.taken, server.taken
        command, message, bulk = client.drive(reader.read())
        if command is Command.SET_TENSOR:
            message = message._replace(data=bytes(message.data) + bytes(client.receive(bulk)))
        seen.append(command.name)
        again = b"".join(encode_request(message, DIALECT, RECORDED["name_length"]))
        assert again == client.data[request_at : client.taken], command.name
        if response_class(command, DIALECT):
            expected = message.size if command is Command.GET_TENSOR else 0
            reply = server.drive(read_reply(command, DIALECT, expected))
            if expected:
                reply = reply._replace(data=server.receive(expected))
            assert b"".join(encode_reply(command, reply, DIALECT)) == server.data[reply_at : server.taken], command.name
    assert seen == COMMANDS
    assert server.rest == b""
    assert reader.names == NameLength(RECORDED["name_length"], certain=True)


def test_the_graph() -> None:
    client, reader = Stream(bytes.fromhex(RECORDED["client"])), RequestReader(DIALECT)
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
