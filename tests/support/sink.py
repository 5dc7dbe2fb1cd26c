"""A server that takes any amount of tensor data and keeps none: what uploads are measured against."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sdrpc.ggml.dialect import newest
from sdrpc.wire import messages as m
from sdrpc.wire.framing import RequestReader, drive, encode_reply
from sdrpc.wire.hello import NATIVE, encode_hello_reply, read_hello
from sdrpc.wire.messages import Command

SCRATCH = 32 << 20
SIZE = 1 << 40
ANSWERS = {
    Command.DEVICE_COUNT: m.DeviceCountReply(1),
    Command.GET_ALIGNMENT: m.GetAlignmentReply(32),
    Command.GET_MAX_SIZE: m.GetMaxSizeReply(SIZE),
    Command.GET_DEVICE_MEMORY: m.GetDeviceMemoryReply(SIZE, SIZE),
    Command.GET_ALLOC_SIZE: m.GetAllocSizeReply(4),
    Command.ALLOC_BUFFER: m.AllocBufferReply(1, SIZE),
    Command.BUFFER_GET_BASE: m.BufferGetBaseReply(4096),
}


@contextmanager
def sink() -> Iterator[str]:
    """The endpoint of a sink for one client."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_serve, args=(listener,), daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join(60)


def _serve(listener: socket.socket) -> None:
    client, _ = listener.accept()
    scratch = memoryview(bytearray(SCRATCH))

    def receive(size: int) -> memoryview:
        view = scratch[:size]
        while view:
            got = client.recv_into(view)
            if not got:
                raise EOFError
            view = view[got:]
        return scratch[:size]

    with client:
        drive(read_hello(), receive)
        client.sendall(encode_hello_reply(newest(), NATIVE))
        reader = RequestReader(newest())
        try:
            while True:
                command, message, bulk = drive(reader.read(), receive)
                while bulk:
                    bulk -= len(receive(min(bulk, SCRATCH)))
                if command is Command.GET_TENSOR:
                    for part in encode_reply(command, m.GetTensorReply(scratch[: message.size]), newest()):
                        client.sendall(part)
                elif command in ANSWERS:
                    client.sendall(b"".join(encode_reply(command, ANSWERS[command], newest())))
        except EOFError:
            return
