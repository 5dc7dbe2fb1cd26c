"""Clients of all kinds: those that work, that vanish, that misbehave. Each comes, does one thing, and is gone.

A kind is a function of the :class:`Scene`; it returns in a bounded time, and raises :class:`AssertionError` where the
server did it wrong."""

from __future__ import annotations

import random
import socket
import struct
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import sdrpc
from sdrpc.client import Keychain, connect
from sdrpc.diffusion.pictures import Picture
from sdrpc.diffusion.request import Request
from sdrpc.diffusion.session import Session
from sdrpc.errors import OutOfMemory
from sdrpc.ggml.dialect import newest
from sdrpc.runtime.cache import Cache
from sdrpc.server.key_ring import KeyRing
from sdrpc.wire import messages
from sdrpc.wire.hello import NATIVE, Capability
from tests.support.client import Adder, RawClient, busy
from tests.support.process import ServerProcess
from tests.support.trouble import Passage, Trouble, Wire, flip

OPTIONS = ("--precision", "exact", "-d", "CPU", "--protocol", newest().version)
"""Raw clients speak one version, and take what they are offered for that."""
REQUEST = Request("a cat", width=64, height=64, steps=2, sampling_method="euler_a")
LEAVES_AT_ONCE = struct.pack("ii", 1, 0)
"""SO_LINGER of a socket whose close is a reset."""
GONE = (OSError, EOFError)
"""What a client meets whom the server has thrown out."""


class Module(torch.nn.Module):
    """Some products, whose results are whole numbers: the same wherever they are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(256) * 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight) @ self.weight


@dataclass
class Scene:
    """A server on ``port`` of this machine, which takes the key in ``keychain``, a checkpoint, and the pictures that it
    gives, by seed."""

    port: int
    checkpoint: Path
    graphs: Cache
    keychain: Keychain
    right: dict[int, np.ndarray] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def opened(cls, checkpoint: Path, seeds: int, *options: str) -> Iterator[tuple[Scene, ServerProcess]]:
        """With a server of its own, that has these ``options`` as well, and ``seeds`` pictures."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            key = KeyRing(folder / "keys.json").add("laptop").key
            with ServerProcess(*OPTIONS, *options, state=folder) as server:
                keychain = Keychain([(None, key)], folder / "servers.json")
                scene = cls(server.port, checkpoint, Cache(folder / "graphs"), keychain)
                for seed in range(seeds):
                    scene.right[seed] = scene.draw(scene.endpoint, seed)[0].image
                yield scene, server

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def draw(self, endpoint: str, seed: int, keychain: Keychain | None = None) -> list[Picture]:
        (device,) = connect([endpoint], keychain=keychain)
        try:
            with Session.open(self.checkpoint, device, self.graphs) as session:
                return list(session.generate(Request(**{**vars(REQUEST), "seed": seed})))
        finally:
            device.close()

    def check(self, pictures: list[Picture]) -> None:
        assert pictures
        for picture in pictures:
            np.testing.assert_array_equal(picture.image, self.right[picture.seed])


def draws(scene: Scene) -> None:
    """A picture, as it must be."""
    scene.check(scene.draw(scene.endpoint, random.choice(list(scene.right))))


def draws_over_a_bad_network(scene: Scene) -> None:
    """The same picture, though the connection is cut somewhere."""

    def cut(passage: Passage) -> None:
        passage.cut()

    with Trouble(scene.port, random.randrange(4, 500), cut) as trouble:
        scene.check(scene.draw(trouble.endpoint, random.choice(list(scene.right))))


def draws_by_key(scene: Scene) -> None:
    """The same picture in TLS, though a bit is turned over somewhere."""
    with Wire(scene.port) as wire:
        wire.disturb(flip, up=True, after=random.randrange(10_000, 10_000_000))
        scene.check(scene.draw(wire.endpoint, random.choice(list(scene.right)), scene.keychain))


def stops_drawing(scene: Scene) -> None:
    """Ctrl-C in the middle."""
    with suppress(KeyboardInterrupt):
        (device,) = connect([scene.endpoint])
        left = random.randrange(1, 40)
        try:
            with Session.open(scene.checkpoint, device, scene.graphs) as session:

                def tell(_: object) -> None:
                    nonlocal left
                    left -= 1
                    if not left:
                        raise KeyboardInterrupt

                for _ in session.generate(REQUEST, tell):
                    pass
        finally:
            device.close()


def offloads(scene: Scene) -> None:
    """A module of somebody's own pipeline."""
    (device,) = connect([scene.endpoint])
    module = sdrpc.offload(Module(), device)
    try:
        for number in range(3):
            x = torch.full((8, 256), float(number))
            torch.testing.assert_close(module(x), x * 4, rtol=0, atol=0)
    finally:
        module.close()  # type: ignore[operator]
        device.close()


def is_native(scene: Scene) -> None:
    """A client of ggml's protocol that works for a while."""
    with RawClient(scene.port) as client:
        adder = Adder(client, 4096)
        for _ in range(50):
            adder()


def vanishes_while_uploading(scene: Scene) -> None:
    with RawClient(scene.port) as client:
        size = 32 << 20
        client.begin_set(client.record(client.buffer(size), (size // 4,)), size)
        client.send(bytes(random.randrange(size // 2)))
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LEAVES_AT_ONCE)


def vanishes_while_it_computes(scene: Scene) -> None:
    with RawClient(scene.port, capabilities=random.choice([NATIVE, Capability.ERRORS | Capability.BEATS])) as client:
        busy(client, products=400, n=512)
        time.sleep(random.random())


def asks_on_and_leaves(scene: Scene) -> None:
    """Many computations lie in its socket when it goes."""
    with RawClient(scene.port) as client:
        busy(client, products=20, n=256, uid=1)
        for _ in range(300):
            client.post(messages.GraphRecompute(0, 1))


def does_not_read(scene: Scene) -> None:
    """Large answers that nobody takes."""
    with RawClient(scene.port) as client:
        size = 16 << 20
        tensor = client.record(client.buffer(size), (size // 4,))
        for _ in range(4):
            client.post(messages.GetTensor(tensor, 0, size))
        time.sleep(1 + random.random() * 2)


def is_idle(scene: Scene) -> None:
    with RawClient(scene.port) as client:
        client.buffer(1 << 20)
        time.sleep(random.random() * 5)


def says_nothing(scene: Scene) -> None:
    with socket.create_connection(("127.0.0.1", scene.port), 120):
        time.sleep(random.random() * 3)


def is_slow(scene: Scene) -> None:
    """A byte at a time."""
    with RawClient(scene.port) as client:
        for byte in struct.pack("<BQ", 15, 0):
            client.send(bytes([byte]))
            time.sleep(0.05)
        assert client.receive(12)


def is_greedy(scene: Scene) -> None:
    """All the memory that a client may have, twice; it is told what there is, and what it can have it gets."""
    (device,) = connect([scene.endpoint])
    refused: list[OutOfMemory] = []
    try:
        for _ in range(2):
            try:
                device.allocate(device.max_size)
            except OutOfMemory as error:
                refused.append(error)
        assert refused, "all of it was given twice"
        free = refused[-1].free
        assert None not in (free, refused[-1].others), refused[-1]
        if free:  # as much as leaves something for others who are as greedy
            device.allocate(free // 2)
        for _ in range(100):
            device.allocate(random.randrange(1, 1 << 10))
    finally:
        device.close()


def talks_nonsense(scene: Scene) -> None:
    with socket.create_connection(("127.0.0.1", scene.port), 120) as connection, suppress(*GONE):
        connection.sendall(random.choice([b"GET / HTTP/1.1\r\n\r\n", random.randbytes(200), b"\x0e" + bytes(31)]))
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass


def breaks_the_protocol(scene: Scene) -> None:
    """Right until its last message."""
    with RawClient(scene.port, capabilities=random.choice([NATIVE, Capability.ERRORS])) as client, suppress(*GONE):
        client.buffer(1 << 20)
        wrong = [
            lambda: client.command(200),
            lambda: client.command(10, random.randbytes(300)),
            lambda: client.compute([7], [client.record(id=7, op="ADD", src=(8, 9))]),
            lambda: client.post(messages.FreeBuffer(99)),
            lambda: client.command(6, b"", 1 << 61),
        ]
        random.choice(wrong)()
        client.ended()


KINDS: dict[Callable[[Scene], None], int] = {
    draws: 3, draws_over_a_bad_network: 2, draws_by_key: 2, stops_drawing: 2, offloads: 2, is_native: 4,
    vanishes_while_uploading: 3, vanishes_while_it_computes: 2, asks_on_and_leaves: 2, does_not_read: 2, is_idle: 3,
    says_nothing: 2, is_slow: 2, is_greedy: 2, talks_nonsense: 4, breaks_the_protocol: 4,
}  # fmt: skip
"""Kind → how often it comes, as against others."""


def come(scene: Scene, kinds: Mapping[Callable[[Scene], None], int] = KINDS) -> tuple[str, str]:
    """A client of one of ``kinds`` comes and goes: its kind, and what was wrong, with where, if something was."""
    (kind,) = random.choices(list(kinds), list(kinds.values()))
    try:
        kind(scene)
    except Exception as error:  # whatever it is, somebody was wrongly served
        return kind.__name__, "".join(traceback.format_exception(error, limit=-6))
    return kind.__name__, ""
