"""Clients that do right and wrong in any order, over real sockets, with a server that computes.

Whatever they do: each is answered or thrown out for a reason, the server is never at fault, another client gets right
results all the time, and memory, connections and threads come back when they have left.
"""

from __future__ import annotations

import logging
import random
import socket
import tempfile
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    rule,
    run_state_machine_as_test,
)

from sdrpc.client import Endpoint
from sdrpc.client.keychain import Credential
from sdrpc.client.secure import secured, show_key
from sdrpc.engine.device import LocalDevice
from sdrpc.engine.precision import Precision
from sdrpc.errors import SdrpcError
from sdrpc.ggml.dialect import newest
from sdrpc.server import Door, Keys, Limits, Server
from sdrpc.server.key_ring import KeyRing
from sdrpc.wire import messages
from sdrpc.wire.framing import drive
from sdrpc.wire.hello import NATIVE, Capability, encode_hello, read_hello_reply
from sdrpc.wire.messages import Command
from tests.server.conftest import eventually
from tests.support.client import Adder, RawClient

OURS = Capability.ERRORS | Capability.MANAGED | Capability.CARRIERS
GONE = (OSError, EOFError, AssertionError, SdrpcError)
"""How a client that was thrown out, or told a reason, learns of it."""
SIZES = st.sampled_from([0, 1, 16, 4096, 1 << 20, 1 << 33, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1)
NUMBERS = st.sampled_from([0, 1, 2, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
SHAPES = st.lists(st.sampled_from([0, 1, 2, 4, 32, 255, 2**31, 2**62]), min_size=1, max_size=4)
OPS = st.sampled_from(newest().ops)
SOME_SHAPES = st.lists(SHAPES, min_size=2, max_size=4)
COMMANDS = st.sampled_from([*Command])
WORDS = st.lists(st.sampled_from([0, 1, -1, 2, 7, 32, 2**31 - 1, -(2**31)]), max_size=16)


class Talker:
    """A client and the buffers that it has."""

    def __init__(self, raw: RawClient) -> None:
        self.raw = raw
        self.buffers: list[tuple[int, int]] = [(0, 0), (7, 1 << 32)]


class Faults(logging.Handler):
    """Lines of the log that say that the server is at fault."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


class House:
    """One server for many conversations, and a client that always gets right results."""

    def __init__(self) -> None:
        self._end = ExitStack()
        folder = Path(self._end.enter_context(tempfile.TemporaryDirectory()))
        ring = KeyRing(folder / "keys.json")
        self.key = ring.add("laptop").key
        self.device = LocalDevice("CPU", torch.device("cpu"), Precision("exact"), threads=1, compute_limit=5.0)
        limits = Limits(
            hello_seconds=5.0, stall_seconds=5.0, linger_seconds=0.1, attempts=1 << 30, bytes_of_all=256 << 20
        )
        door = Door(keys=Keys(ring, folder / "server.pem"), limits=limits)
        self.server = self._end.enter_context(Server([self.device], limits=limits, door=door))
        self.works = Adder(RawClient(self.server.port))
        self.works()
        self.faults = Faults()
        logging.getLogger("sdrpc").addHandler(self.faults)
        self._end.callback(logging.getLogger("sdrpc").removeHandler, self.faults)
        self.free = self.server._buffers.held
        self.messages = 0

    def close(self) -> None:
        self.works.client.close()
        self._end.close()
        self.device.close()

    def is_well(self) -> None:
        """What must hold when nobody else is connected."""
        self.works()
        assert eventually(lambda: self.server.clients == 1, 60.0), "a connection has not ended"
        assert self.server._buffers.held == self.free, "memory did not come back"
        assert not self.faults.lines, self.faults.lines
        assert threading.active_count() < 40


def machine(house: House) -> type[RuleBasedStateMachine]:
    """The conversations with ``house``."""

    class Conversation(RuleBasedStateMachine):
        talkers: Bundle[Talker] = Bundle("talkers")

        def _do(self, talker: Talker, action) -> None:  # type: ignore[no-untyped-def]
            house.messages += 1
            try:
                action(talker.raw)
            except GONE:
                talker.raw.close()

        @initialize(target=talkers)
        def comes(self) -> Talker:
            return Talker(RawClient(house.server.port, capabilities=OURS))

        @rule(target=talkers, kind=st.sampled_from([NATIVE, OURS]))
        def another_comes(self, kind: Capability) -> Talker:
            return Talker(RawClient(house.server.port, capabilities=kind))

        @rule(target=talkers)
        def one_with_a_key(self) -> object:
            raw = RawClient(house.server.port, capabilities=None)
            where = Endpoint("127.0.0.1", house.server.port)
            encrypted = secured(where, raw.socket)
            raw.socket = encrypted
            show_key(where, encrypted, [Credential(house.key)], raw.receive)
            raw.send(encode_hello(OURS))
            raw.hello = drive(read_hello_reply(), raw.receive)
            raw.errors = True
            return Talker(raw)

        @rule(data=st.binary(max_size=200), first=st.sampled_from([b"", b"\x16\x03\x01", b"\x0e"]))
        def somebody_says_anything(self, data: bytes, first: bytes) -> None:
            house.messages += 1
            with socket.create_connection(("127.0.0.1", house.server.port), 120) as sock, suppress(OSError):
                sock.sendall(first + data)

        @rule(talker=talkers, size=SIZES)
        def allocates(self, talker: Talker, size: int) -> None:
            def action(raw: RawClient) -> None:
                handle, _ = raw.ask(messages.AllocBuffer(0, size))
                if handle:
                    talker.buffers.append((handle, raw.ask(messages.BufferGetBase(handle)).base_ptr))

            self._do(talker, action)

        @rule(talker=talkers, which=st.integers(0, 5))
        def frees(self, talker: Talker, which: int) -> None:
            handle = talker.buffers[which % len(talker.buffers)][0]
            self._do(talker, lambda raw: raw.ask(messages.FreeBuffer(handle)))

        @rule(talker=talkers, which=st.integers(0, 5), shape=SHAPES, offset=NUMBERS, size=st.integers(0, 8192))
        def writes_and_reads(self, talker: Talker, which: int, shape: list[int], offset: int, size: int) -> None:
            buffer = talker.buffers[which % len(talker.buffers)]

            def action(raw: RawClient) -> None:
                tensor = raw.record(buffer, shape, nb=(4, 4 * shape[0] % 2**32, 16, 16))
                raw.set(tensor, bytes(size), offset)
                raw.get(tensor, min(size, 64), offset)

            self._do(talker, action)

        @rule(talker=talkers, which=st.integers(0, 5), op=OPS, shapes=SOME_SHAPES, words=WORDS)
        def computes(self, talker: Talker, which: int, op: str, shapes: list[list[int]], words: list[int]) -> None:
            """One operation, with any sources and parameters."""
            buffer = talker.buffers[which % len(talker.buffers)]

            def action(raw: RawClient) -> None:
                small = [[min(n, 64) or 1 for n in shape] for shape in shapes]
                sources = [raw.record(buffer, shape, id=i + 1, at=1024 * i) for i, shape in enumerate(small[:-1])]
                ids = [source.id for source in sources]
                result = raw.record(buffer, small[-1], id=9, at=4096, op=op, src=ids, words=words)
                raw.compute([9], [*sources, result], uid=which % 3)
                raw.ask(messages.DeviceCount())

            self._do(talker, action)

        @rule(talker=talkers, uid=st.integers(0, 2))
        def recomputes(self, talker: Talker, uid: int) -> None:
            self._do(talker, lambda raw: (raw.post(messages.GraphRecompute(0, uid)), raw.ask(messages.DeviceCount())))

        @rule(talker=talkers, command=COMMANDS, payload=st.binary(max_size=400), lie=st.none() | NUMBERS)
        def sends_anything(self, talker: Talker, command: Command, payload: bytes, lie: int | None) -> None:
            self._do(talker, lambda raw: raw.command(command, payload, lie))

        @rule(talker=consumes(talkers))
        def leaves(self, talker: Talker) -> None:
            talker.raw.close()
            house.works()

        def teardown(self) -> None:
            for talker in self.names_to_values.values():
                if isinstance(talker, Talker):
                    talker.raw.close()
            house.is_well()

    return Conversation


def converse(house: House, conversations: int, seed: int, steps: int = 20) -> None:
    """So many conversations. What is wrong comes out as the shortest one that shows it."""
    chosen = settings(
        max_examples=conversations,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    kind = machine(house)
    kind._hypothesis_internal_use_seed = random.Random(seed).getrandbits(64)  # type: ignore[attr-defined]
    run_state_machine_as_test(kind, settings=chosen)
