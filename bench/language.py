"""A language model in llama.cpp's client: tokens per second with our server and with ggml's own, over the same RPC."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support import ggml
from tests.support.language import SPAWN, Llama, Shape, Speed, write_model

from .rows import Row
from .setup import Setup, Variant

SHAPE = Shape(layers=4, width=1024, heads=16, groups=4, hidden=2816, vocabulary=4096)
PROMPT, GENERATED = 128, 64
"""Tokens."""
TYPES = ("F16", "Q4_K")
START_SECONDS = 30.0


def run(setup: Setup) -> Iterator[Row]:
    for kind in TYPES:
        with _native_server() as endpoint:
            theirs = _speed(setup, kind, endpoint)
        for precision in ("exact", "fast"):
            with setup.server(Variant(kind, precision)) as server:
                ours = _speed(setup, kind, f"127.0.0.1:{server.port}")
            for what, mine, native in zip(Speed._fields, ours, theirs, strict=True):
                yield Row(
                    f"language model, {kind}, {precision}: {what}", mine, "tokens/s", native, "ggml's server", None,
                    f"{SHAPE.layers} layers of {SHAPE.width}; {PROMPT} tokens in, {GENERATED} out",
                )  # fmt: skip


def _speed(setup: Setup, type: str, endpoint: str) -> Speed:
    model = setup.folder / f"{type}.gguf"
    if not model.exists():
        write_model(model, type, SHAPE)
    with Llama(setup.folder / "llama.log", endpoint) as llama:
        return llama.speed(model, PROMPT, GENERATED, threads=1)


@contextmanager
def _native_server() -> Iterator[str]:
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
