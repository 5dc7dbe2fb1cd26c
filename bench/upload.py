"""How fast the diffusion model's weights get from the mapped file into the server's memory."""

from __future__ import annotations

import mmap
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from sdrpc.diffusion.events import Event
from sdrpc.diffusion.session import Session

from .rows import Mark, Row
from .setup import Setup

ROUNDS = 3
SMALL = 8
"""Side of the latents of the step that makes the model load: its arithmetic shall not take long."""


def run(setup: Setup) -> Iterator[Row]:
    ours, plainly, copied = [], [], []
    size = 0
    path = setup.checkpoint(setup.variant.type)
    for _ in range(ROUNDS):
        with setup.server(setup.variant) as server:
            seconds, size = uploaded(setup, server.port)
        ours.append(seconds)
        plainly.append(through_socket(path, size))
        copied.append(_copied(path, size))
    speed, plain, memory = (size / min(seconds) / 1e9 for seconds in (ours, plainly, copied))
    note = f"{size / 1e9:.2f} GB, best of {ROUNDS}"
    yield Row("upload", speed, "GB/s", plain, "plain loopback socket", Mark(1.0, "ours", at_least=True), note)
    yield Row("upload", speed, "GB/s", memory, "memcpy to new memory", None, note)


def uploaded(setup: Setup, port: int) -> tuple[float, int]:
    """Seconds from the first byte of the diffusion model to the last, and how many there are, with the server at
    ``port``."""
    with setup.session(setup.variant, port) as session:
        return loaded(setup, session)


def loaded(setup: Setup, session: Session) -> tuple[float, int]:
    """The same of ``session``, which goes on."""
    times: list[float] = []
    size = 0

    def tell(event: Event) -> None:
        nonlocal size
        if event.stage == "upload" and event.component == "diffusion":
            times.append(time.perf_counter())
            size = event.total

    request = setup.request(steps=1, size=SMALL * session.model.pixels)
    for _ in session.generate(request, tell):
        pass
    return times[-1] - times[0], size


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def through_socket(path: Path, size: int) -> float:
    """Seconds for as many bytes of the mapped file through a socket into memory that was never touched."""
    target = memoryview(mmap.mmap(-1, size))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = socket.create_connection(listener.getsockname())
        receiver, _ = listener.accept()

    def receive() -> None:
        rest = target
        while rest:
            rest = rest[receiver.recv_into(rest) :]

    thread = threading.Thread(target=receive)
    with sender, receiver:
        start = time.perf_counter()
        thread.start()
        sender.sendall(memoryview(_mapped(path))[:size])
        thread.join()
        return time.perf_counter() - start


def _copied(path: Path, size: int) -> float:
    target = memoryview(mmap.mmap(-1, size))
    start = time.perf_counter()
    target[:] = memoryview(_mapped(path))[:size]
    return time.perf_counter() - start
