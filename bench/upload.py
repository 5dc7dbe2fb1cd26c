"""How fast the diffusion model's weights get from the mapped file into the server's memory."""

from __future__ import annotations

import mmap
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import psutil

from sdrpc.client.carriers import MOST
from sdrpc.content import PIECE, pieces
from sdrpc.diffusion.events import Event
from sdrpc.diffusion.session import Session
from sdrpc.sockets import prepare
from tests.support.process import ServerProcess

from .rows import Mark, Row
from .setup import Setup

ROUNDS = 3
CONNECTIONS = max(1, min(MOST, os.cpu_count() or 1))
"""Over which ours go."""
SMALL = 8
"""Side of the latents of the step that makes the model load: its arithmetic shall not take long."""


def run(setup: Setup) -> Iterator[Row]:
    ours, plainly, together, copied = [], [], [], []
    size = 0
    path = setup.checkpoint(setup.variant.type)
    for _ in range(ROUNDS):
        with setup.server(setup.variant) as server:
            seconds, size, _ = uploaded(setup, server)
        ours.append(seconds)
        plainly.append(through_socket(path, size))
        together.append(through_sockets(path, size, CONNECTIONS, setup.on_cpu))
        copied.append(_copied(path, size))
    speed, plain, several, memory = (size / min(seconds) / 1e9 for seconds in (ours, plainly, together, copied))
    note = f"{size / 1e9:.2f} GB, best of {ROUNDS}"
    least = Mark(1.0 if setup.on_cpu else 5.0, "ours", at_least=True)
    yield Row("upload", speed, "GB/s", plain, "plain loopback socket, new memory", least, note)
    kind = "new memory" if setup.on_cpu else "the same memory again"
    against = f"{CONNECTIONS} plain loopback sockets, {kind}"
    yield Row("upload", speed, "GB/s", several, against, Mark(0.9, at_least=True), note)
    yield Row("upload", speed, "GB/s", memory, "memcpy to new memory", None, note)


class Upload(NamedTuple):
    """Seconds from the first byte of the diffusion model to the last, how many there are, and seconds that client's and
    server's processors spent meanwhile."""

    seconds: float
    size: int
    processor: float


def uploaded(setup: Setup, server: ServerProcess) -> Upload:
    """What it took to upload to ``server``."""
    with setup.session(setup.variant, server.port) as session:
        return loaded(setup, session, server)


def loaded(setup: Setup, session: Session, server: ServerProcess) -> Upload:
    """The same of ``session``, which goes on."""
    times: list[tuple[float, float]] = []
    size = 0
    there = psutil.Process(server.process.pid)

    def tell(event: Event) -> None:
        nonlocal size
        if event.stage == "upload" and event.component == "diffusion":
            processor = time.process_time() + float(sum(there.cpu_times()[:2]))
            times.append((time.perf_counter(), processor))
            size = event.total

    request = setup.request(steps=1, size=SMALL * session.model.pixels)
    for _ in session.generate(request, tell):
        pass
    (start, before), (end, after) = times[0], times[-1]
    return Upload(end - start, size, after - before)


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _connected(listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    """The two ends of a connection that is prepared as ours are."""
    sender = socket.create_connection(listener.getsockname())
    receiver, _ = listener.accept()
    for end in (sender, receiver):
        prepare(end, 10)
    return sender, receiver


def through_socket(path: Path, size: int) -> float:
    """Seconds for as many bytes of the mapped file through a socket into memory that was never touched."""
    target = memoryview(mmap.mmap(-1, size))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender, receiver = _connected(listener)

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


def through_sockets(path: Path, size: int, count: int, fresh: bool) -> float:
    """The same through ``count`` sockets at once, each with two threads that copy a piece of the file after the other:
    into memory that was never touched if ``fresh``, else into as much as one piece takes, again and again."""
    target = memoryview(mmap.mmap(-1, size if fresh else count * PIECE))
    source = memoryview(_mapped(path))[:size]
    turns = [[piece for i, piece in enumerate(pieces(size)) if i % count == mine] for mine in range(count)]

    def send(connection: socket.socket, mine: int) -> None:
        for at, length in turns[mine]:
            connection.sendall(source[at : at + length])

    def receive(connection: socket.socket, mine: int) -> None:
        for at, length in turns[mine]:
            start = at if fresh else mine * PIECE
            rest = target[start : start + length]
            while rest:
                rest = rest[connection.recv_into(rest) :]

    with ExitStack() as stack:
        threads = []
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        for mine in range(count):
            sender, receiver = map(stack.enter_context, _connected(listener))
            threads += [
                threading.Thread(target=send, args=(sender, mine)),
                threading.Thread(target=receive, args=(receiver, mine)),
            ]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - start


def _copied(path: Path, size: int) -> float:
    target = memoryview(mmap.mmap(-1, size))
    start = time.perf_counter()
    target[:] = memoryview(_mapped(path))[:size]
    return time.perf_counter() - start
