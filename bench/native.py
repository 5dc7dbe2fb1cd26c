"""ggml's own rpc-server, to be measured beside ours."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support import ggml
from tests.support.language import SPAWN

START_SECONDS = 30.0


@contextmanager
def native_server() -> Iterator[str]:
    """The endpoint of ggml's own server, with all cores."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    endpoint = f"127.0.0.1:{port}"
    process = SPAWN.Process(target=ggml.serve, args=(endpoint, 1, os.cpu_count() or 1), daemon=True)
    process.start()
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(port):
            if time.monotonic() > deadline or not process.is_alive():
                raise SystemExit(f"ggml's server does not answer at {endpoint}")
            time.sleep(0.05)
        yield endpoint
    finally:
        process.kill()
        process.join()


def _answers(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0
