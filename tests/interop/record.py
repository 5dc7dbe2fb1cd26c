"""Record what ggml's own RPC client and server say to each other, for tests/wire/test_native_frames.py.

SDRPC_DEV_CACHE=… python -m tests.interop.record 8.0.0     # writes tests/data/ggml-8.0.0.frames.json.xz
"""

from __future__ import annotations

import json
import lzma
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from tests.interop.conftest import NativeClient, NativeServer

DATA = Path(__file__).parents[1] / "data"
SCENARIOS = ("rows-are-set-and-got", "schedulers-take-turns", "a-tensor-is-filled-in-part")
NAME_LENGTH = 64


class Recorder:
    """Passes connections on to ``target`` and keeps both streams of each."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self.streams: list[tuple[bytearray, bytearray]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listening.accept()
            server = socket.create_connection(self._target)
            kept = bytearray(), bytearray()
            self.streams.append(kept)
            for source, target, into in ((client, server, kept[0]), (server, client, kept[1])):
                threading.Thread(target=self._pass, args=(source, target, into), daemon=True).start()

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket, into: bytearray) -> None:
        while piece := source.recv(1 << 20):
            into += piece
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)


def main(protocol: str) -> None:
    conversations: list[dict[str, Any]] = []
    for name in SCENARIOS:
        server = NativeServer(devices=2, protocol=protocol)
        recorder = Recorder(server.endpoint)
        with tempfile.TemporaryDirectory() as folder:
            client = NativeClient(Path(folder) / "client.log", protocol)
            client.run(name, recorder.endpoint)
            client.close()
        server.kill()
        said = [(bytes(up), bytes(down)) for up, down in recorder.streams if up]
        conversations += [{"client": up.hex(), "server": down.hex()} for up, down in said]
    table = {"protocol": protocol, "name_length": NAME_LENGTH, "conversations": conversations}
    (DATA / f"ggml-{protocol}.frames.json.xz").write_bytes(lzma.compress(json.dumps(table).encode(), preset=9))


if __name__ == "__main__":
    main(sys.argv[1])
