"""Everything that reads bytes of others, each with its invariant: what may come of any bytes, and nothing else."""

from __future__ import annotations

import io
import json
import struct
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace

from sdrpc.checkpoints import gguf_header
from sdrpc.checkpoints.checkpoint import open_checkpoint
from sdrpc.client import Endpoint, Keychain
from sdrpc.client.names import Names
from sdrpc.diffusion.image_files import read_picture
from sdrpc.errors import (
    CheckpointError,
    GraphError,
    InvalidValue,
    OutOfMemory,
    OverQuota,
    RemoteProtocolError,
    UsageError,
)
from sdrpc.ggml import validate
from sdrpc.ggml.build import leaf, node
from sdrpc.ggml.dialect import Dialect, dialects, newest
from sdrpc.ggml.params import Scale
from sdrpc.ggml.tensor import Graph
from sdrpc.ggml.types import F32
from sdrpc.ggml.weight import Origin
from sdrpc.key import Key, nonce
from sdrpc.prompts.byte_pairs import gguf_tokenizer
from sdrpc.prompts.tokenizers import encoded, tokenizer_from
from sdrpc.runtime.lowered import from_bytes
from sdrpc.server import Cache
from sdrpc.server.key_ring import KeyRing, read
from sdrpc.server.version_memory import VersionMemory
from sdrpc.wire import graphs, key_exchange, refusals, service
from sdrpc.wire.framing import RequestReader, read_error, read_reply
from sdrpc.wire.graphs import encode_graph
from sdrpc.wire.hello import CAPS, Capability, encode_hello, encode_hello_reply, read_hello, read_hello_reply
from sdrpc.wire.limits import Limits
from sdrpc.wire.messages import OURS, Command, response_class
from tests.support.stream import EndOfStream, Stream
from tests.wire.examples import commands, frame
from tests.wire.test_fuzz import is_sound
from tests.wire.test_graphs import GOOD, same

LIMITS = Limits(graph_bytes=1 << 16)


def _sums() -> bytes:
    """A graph with operands, parameters and views."""
    x, y = (replace(leaf(F32, 8, 4), buffer=1, offset=128 * i) for i in (0, 1))
    total = replace(node("SCALE", node("SQR", node("ADD", x, y)), params=Scale(2.0)), buffer=1, offset=512)
    return encode_graph(Graph((total,)), 0, newest(), 64, same)


GRAPH = _sums()


class Parser(NamedTuple):
    """``check`` reads bytes and raises what the parser must not raise, or when what it gives is not sound. ``seeds``
    makes some that are right."""

    name: str
    invariant: str
    check: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]]


# --- the wire


def requests(data: bytes) -> None:
    stream, reader = Stream(data[1:]), RequestReader(_dialect(data), LIMITS, ours=OURS)
    with suppress(RemoteProtocolError, EndOfStream):
        while True:
            received = stream.drive(reader.read())
            assert received.bulk <= LIMITS.tensor_bytes
            stream.skip(received.bulk)
    assert max(stream.wanted, default=0) <= max(LIMITS.graph_bytes, 1 << 14)


def replies(data: bytes) -> None:
    dialect = _dialect(data)
    stream = Stream(data[2:])
    asked = commands(dialect)
    command = asked[data[1] % len(asked)] if len(data) > 1 else Command.DEVICE_COUNT
    readers = [read_error()]
    if response_class(command, dialect) is not None:
        readers.append(read_reply(command, dialect, 0, True))
    for reader in readers:
        with suppress(RemoteProtocolError, EndOfStream):
            stream.drive(reader)
    assert max(stream.wanted, default=0) <= LIMITS.error_bytes


def reasons(data: bytes) -> None:
    said = refusals.from_text(data.decode("utf-8", "replace"))
    assert said.kind in ("", *refusals.KINDS)
    assert all(0 <= number < refusals.MAX_NUMBER for number in said.numbers.values())
    assert len(said.node) <= refusals.MAX_NODE


def greetings(data: bytes) -> None:
    for reader in (
        read_hello(), read_hello_reply(), key_exchange.read_offer(), key_exchange.read_challenge(2),
        key_exchange.read_verdict(),
    ):  # fmt: skip
        stream = Stream(data)
        with suppress(RemoteProtocolError, EndOfStream):
            stream.drive(reader)
        assert max(stream.wanted, default=0) <= 16 * 8 + CAPS.size + 41


def decoded_graphs(data: bytes) -> None:
    with suppress(RemoteProtocolError):
        graph = graphs.decode_graph(data[1:], _dialect(data), same).graph
        is_sound(graph)
        with suppress(GraphError):
            validate.check(graph, {tensor.buffer: 1 << 20 for tensor in graph.tensors if tensor.buffer})


def announcements(data: bytes) -> None:
    parts = data.split(b"\0")
    told = dict(zip((b"devices", b"key", b"certificate"), parts[1:], strict=False))
    found = service.parse(parts[0].decode("utf-8", "replace"), ["10.0.0.7"], 50052, told)
    assert found is not None
    assert found.name.isprintable()


# --- files


def gguf(data: bytes) -> None:
    with suppress(ValueError):
        header = gguf_header.parse(memoryview(data))
        for tensor in header.tensors:
            assert tensor.type.startswith("type") or 0 <= tensor.begin <= tensor.end <= len(data)


def checkpoints(data: bytes) -> None:
    path = _folder() / "model"
    path.write_bytes(data)
    with suppress(CheckpointError):
        for weight in open_checkpoint(path).tensors.values():
            assert len(weight.data()) == weight.nbytes


def tokenizers(data: bytes) -> None:
    """As a tokenizer.json, and as a GGUF file's entries."""
    path = _folder() / "tokenizer.json"
    path.write_bytes(data)
    with suppress(CheckpointError, InvalidValue):
        _encodes(tokenizer_from(path))
    with suppress(ValueError, RecursionError, CheckpointError, InvalidValue):
        entries = json.loads(data)
        if isinstance(entries, dict):
            _encodes(gguf_tokenizer(path, entries))


def _encodes(tokenizer: Tokenizer) -> None:
    assert all(0 <= token < 1 << 32 for token in encoded(tokenizer, "a cat, <|end|>\u00e9 \U0001f408\n"))


def lowered_graphs(data: bytes) -> None:
    """With the digest that belongs to the bytes: whoever can write the file can write that, too."""
    from tests.runtime.test_lowered import sealed

    with suppress(GraphError):
        from_bytes(sealed(data))


def cached_names(data: bytes) -> None:
    cache_folder = Cache(_folder() / "weights", 1 << 20)
    path = cache_folder._name_path(7, 100, "somebody")
    path.write_bytes(data)
    found = cache_folder.lookup(7, 100, "somebody")
    assert found is None or len(found) == 32


def digests(data: bytes) -> None:
    names = Names(_folder() / "digests")
    names.folder.mkdir(exist_ok=True)
    names._path("file").write_bytes(data)
    found = names.get(Origin("file", "part"))
    assert found is None or len(found) in (8, 32)


def learnt_versions(data: bytes) -> None:
    with suppress(ValueError):
        text = data.decode()
        assert VersionMemory.parse(VersionMemory.parse(text).dump()).dump() == VersionMemory.parse(text).dump()


def server_keys(data: bytes) -> None:
    path = _folder() / "keys.json"
    _write_secret(path, data)
    with suppress(UsageError):
        assert all(entry.name == name for name, entry in read(path).items())


def client_keys(data: bytes) -> None:
    path = _folder() / "servers.json"
    _write_secret(path, data)
    with suppress(UsageError):
        for credential in Keychain(path=path).credentials(Endpoint("desktop", 50052)):
            assert credential.fingerprint is None or len(credential.fingerprint) == 32


def pictures(data: bytes) -> None:
    with suppress(InvalidValue):
        pixels = read_picture("init_image", data)
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3


# --- what is right


def _dialect(data: bytes) -> Dialect:
    known = list(dialects().values())
    return known[data[0] % len(known)] if data else newest()


@cache
def _folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="sdrpc-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    _kept.append(folder)
    Path(folder.name).chmod(0o700)
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


def _write_secret(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    path.chmod(0o600)


def _conversations() -> list[bytes]:
    result = []
    for index, dialect in enumerate(dialects().values()):
        for length in (64, 160):
            result += [bytes([index]) + frame(command, dialect, length) for command in commands(dialect)]
    return result


def _replies() -> list[bytes]:
    return [
        bytes([0, number]) + struct.pack("<Q", size) + bytes(size) for number in range(20) for size in (1, 4, 8, 16)
    ]


def _reasons() -> list[bytes]:
    made = (OutOfMemory("CPU", 1 << 30, "none left"), OverQuota("too much"), GraphError("no shape", "node 3 (ADD)"))
    return [refusals.to_text(refusals.refusal(error)).encode() for error in made]


def _greetings() -> list[bytes]:
    own = Capability.ERRORS | Capability.MANAGED
    return [
        encode_hello(None), encode_hello(own), encode_hello_reply(newest(), own),
        key_exchange.encode_offer(nonce(), [b"12345678"]),
        key_exchange.encode_challenge(key_exchange.Challenge(key_exchange.Verdict.WELCOME)),
    ]  # fmt: skip


def _graphs() -> list[bytes]:
    last = len(dialects()) - 1
    return [bytes([last]) + GOOD, bytes([last]) + GRAPH]


def _gguf() -> list[bytes]:
    from tests.checkpoints.test_checkpoint import gguf_bytes

    return [gguf_bytes()]


def _checkpoints() -> list[bytes]:
    pickled = io.BytesIO()
    torch.save({"state_dict": {"a": torch.ones(4, 4).t(), "b": torch.ones(3).half()}, "n": [1, {2: "x"}]}, pickled)
    plain = save({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)})
    return [plain, pickled.getvalue(), *_gguf(), *_quantized()]


def _quantized() -> list[bytes]:
    """A layer in each format that keeps numbers and scales apart."""
    from safetensors.torch import save as save_torch

    from tools.checkpoints.formats import FORMATS

    matrix = torch.linspace(-1, 1, 64 * 2).reshape(2, 64)
    made = [write(matrix).tensors for write, _ in FORMATS.values()]
    files = [save_torch({"l" + end: tensor.contiguous() for end, tensor in tensors.items()}) for tensors in made]
    said = {"_quantization_metadata": json.dumps({"layers": {"l": {"format": "float8_e4m3fn"}}})}
    return [*files, save_torch({"l.weight": matrix.to(torch.float8_e4m3fn), "l.weight_scale": torch.ones(2)}, said)]


def _tokenizers() -> list[bytes]:
    entries = {"model": "gpt2", "pre": "qwen2", "tokens": ["c", "a", "t", "ca", "cat", "<|end|>"]}
    entries |= {"merges": ["c a", "ca t"], "token_type": [1, 1, 1, 1, 1, 3]}
    in_gguf = {f"tokenizer.ggml.{name}": value for name, value in entries.items()}
    pieces = Tokenizer(Unigram([("<unk>", 0.0), ("\u2581a", -1.0), ("cat", -2.0)], unk_id=0, byte_fallback=False))
    pieces.pre_tokenizer = Metaspace()
    whole = gguf_tokenizer(Path("tokenizer.gguf"), in_gguf), pieces
    return [json.dumps(in_gguf).encode(), *(each.to_str().encode() for each in whole)]


def _lowered() -> list[bytes]:
    from tests.runtime.test_lowered import BODY

    return [bytes(BODY)]


def _key_file() -> list[bytes]:
    ring = KeyRing(_folder() / "seed.json")
    with suppress(InvalidValue):
        ring.add("laptop")
        ring.add("guest")
    return [ring.path.read_bytes()]


def _servers_file() -> list[bytes]:
    chain = Keychain(path=_folder() / "seed servers.json")
    chain.accepted(Endpoint("desktop", 50052), Key.new(), bytes(32))
    return [(_folder() / "seed servers.json").read_bytes()]


def _versions() -> list[bytes]:
    memory = VersionMemory()
    memory.accepted("10.0.0.7", "5.0.1")
    return [memory.dump().encode()]


def _pictures() -> list[bytes]:
    image = Image.fromarray(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3))
    result = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        file = io.BytesIO()
        image.save(file, kind, **({"comment": b"Steps: 20"} if kind in ("GIF", "JPEG") else {}))
        result.append(file.getvalue())
    return result


PARSERS = (
    Parser("requests", "messages or RemoteProtocolError; no more is asked for than a limit", requests, _conversations),
    Parser("replies", "an answer or RemoteProtocolError; at most a reason's length is asked for", replies, _replies),
    Parser("reasons", "a kind that is known and numbers of 64 bits, or words", reasons, _reasons),
    Parser("greetings", "HELLO and keys: a value or RemoteProtocolError, of bounded size", greetings, _greetings),
    Parser("graphs", "a sound graph or RemoteProtocolError; then valid, or GraphError", decoded_graphs, _graphs),
    Parser("announcements", "printable names, numbers", announcements, lambda: [b"pc\0CPU:1\x001\0" + b"0" * 32]),
    Parser("gguf", "tensors inside the file, or ValueError", gguf, _gguf),
    Parser("checkpoints", "weights with all their bytes, or CheckpointError", checkpoints, _checkpoints),
    Parser("tokenizers", "tokens, or CheckpointError, or InvalidValue", tokenizers, _tokenizers),
    Parser("lowered graphs", "a graph with all that it needs, or GraphError", lowered_graphs, _lowered),
    Parser("cached names", "a digest or nothing", cached_names, lambda: [b"ab" * 32, b""]),
    Parser("digests", "a digest or nothing", digests, lambda: [json.dumps({"part": "ab" * 32}).encode()]),
    Parser("versions", "what is written again as it is, or ValueError", learnt_versions, _versions),
    Parser("server keys", "keys with their names, or UsageError", server_keys, _key_file),
    Parser("client keys", "a key with a whole fingerprint, or UsageError", client_keys, _servers_file),
    Parser("pictures", "pixels, or InvalidValue", pictures, _pictures),
)  # fmt: skip
