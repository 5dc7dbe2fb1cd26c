"""What dialects.json says of a protocol version, against the sources of each real ggml that was built."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sdrpc.ggml.dialect import Dialect, dialects
from sdrpc.wire.messages import Command
from tests.support import ggml

pytestmark = pytest.mark.interop

BUILT = [protocol for protocol, folder in ggml.FOLDERS.items() if folder.is_dir()]
WITH_SERVER = [protocol for protocol in BUILT if (ggml.FOLDERS[protocol] / "ggml-rpc.cpp").is_file()]
"""Wheels bring headers, but not the server's own source."""
ACKED = ("FREE_BUFFER", "BUFFER_CLEAR", "INIT_TENSOR", "MEMSET_TENSOR")


class Source:
    """The files of one ggml, with comments taken out."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def text(self, name: str) -> str:
        return re.sub(r"//[^\n]*|/\*.*?\*/", "", (self._folder / name).read_text(), flags=re.DOTALL)

    def enum(self, name: str, prefix: str, file: str = "ggml.h") -> dict[str, int]:
        """The values of an enum by their names without ``prefix``; its last one, the count, is none."""
        body = re.search(rf"enum\s+{name}\s*\{{(.*?)\}}", self.text(file), re.DOTALL)
        assert body, f"{file} has no enum {name}"
        values, number = {}, 0
        for entry in filter(None, map(str.strip, body[1].split(","))):
            label, _, value = map(str.strip, entry.partition("="))
            number = int(value, 0) if value else number
            values[label.removeprefix(prefix)] = number
            number += 1
        return {label: value for label, value in values.items() if label != "COUNT"}

    def struct(self, name: str) -> str:
        body = re.search(rf"struct {name}\s*\{{(.*?)\}};", self.text("ggml-rpc.cpp"), re.DOTALL)
        return body[1] if body else ""

    def answers(self, command: str) -> bool:
        """Whether the server sends something for ``command``."""
        body = re.search(rf"case RPC_CMD_{command}: \{{(.*?)break;", self.text("ggml-rpc.cpp"), re.DOTALL)
        return body is not None and "send_msg" in body[1]


def listed(values: dict[str, int]) -> tuple[str, ...]:
    """Names of an enum that counts from 0."""
    assert list(values.values()) == list(range(len(values)))
    return tuple(values)


@pytest.fixture
def dialect(protocol: str) -> Dialect:
    return dialects()[protocol]


@pytest.fixture
def source(protocol: str) -> Source:
    return Source(ggml.FOLDERS[protocol])


@pytest.mark.parametrize("protocol", BUILT)
def test_numbers(protocol: str, dialect: Dialect, source: Source) -> None:
    parts = re.findall(r"RPC_PROTO_(?:MAJOR|MINOR|PATCH)_VERSION\s+(\d+)", source.text("ggml-rpc.h"))
    assert ".".join(parts) == protocol
    assert listed(source.enum("ggml_op", "GGML_OP_")) == dialect.ops
    assert listed(source.enum("ggml_unary_op", "GGML_UNARY_OP_")) == dialect.unary_ops
    assert listed(source.enum("ggml_glu_op", "GGML_GLU_OP_")) == dialect.glu_ops
    assert source.enum("ggml_tensor_flag", "GGML_TENSOR_FLAG_") == dialect.tensor_flags
    assert source.enum("ggml_type", "GGML_TYPE_") == dialect.type_numbers


@pytest.mark.parametrize("protocol", WITH_SERVER)
def test_messages(protocol: str, dialect: Dialect, source: Source) -> None:
    commands = source.enum("rpc_cmd", "RPC_CMD_", "ggml-rpc.cpp")
    assert dialect.has_memset_tensor == ("MEMSET_TENSOR" in commands)
    assert dialect.has_tensor_2d == (commands.get("SET_TENSOR_2D") == 18) == (commands.get("GET_TENSOR_2D") == 19)
    assert dialect.has_comm == (commands.get("COMM_INIT") == 20) == (commands.get("COMM_FREE") == 22)
    assert {source.answers(command) for command in ACKED if command in commands} == {dialect.acks_buffer_commands}
    assert dialect.set_tensor_has_cache_flag == ("cache_flag" in source.text("ggml-rpc.cpp"))
    assert dialect.has_use_count == ("use_count" in source.struct("rpc_tensor"))
    assert dialect.has_graph_uids == ("uid" in source.struct("rpc_msg_graph_recompute_req"))
    assert (dialect.hello_request_bytes > 0) == ("conn_caps" in source.struct("rpc_msg_hello_req"))
    assert (dialect.hello_response_bytes == 28) == ("conn_caps" in source.struct("rpc_msg_hello_rsp"))


def test_nothing_of_the_newest_is_unknown() -> None:
    """The commands of the newest version that was built are all ours."""
    names = Source(ggml.FOLDERS[ggml.NEWEST]).enum("rpc_cmd", "RPC_CMD_", "ggml-rpc.cpp")
    assert {name: number for name, number in names.items() if name != "NONE"} == {
        command.name: command.value for command in Command if command.value < 200
    }
