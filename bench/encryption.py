"""What encryption costs: an upload, what a sampling step says, and the step, through TLS, over the same without.

Both take turns, in pairs of which every other one begins with TLS, and what is compared are the two of a pair: other
work on the machine comes and goes, but mostly for both. Seconds of the processor, at both ends together, are measured
beside those of the clock: other work makes these longer, but hardly those."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from statistics import median, quantiles
from typing import NamedTuple, TypeVar

import numpy as np
import psutil

from sdrpc.client import Keychain, RemoteDevice, connect, given_keys
from sdrpc.device import Device
from sdrpc.diffusion.session import Session
from sdrpc.ggml.build import leaf, node
from sdrpc.ggml.tensor import OUTPUT, Graph
from sdrpc.ggml.types import F32
from tests.support.process import ServerProcess

from .rows import Mark, Row
from .sampling import Sampled, sample
from .setup import Setup

T = TypeVar("T")

PAIRS = 12
SIZE = 256 << 20
"""Bytes of an upload: weights as they go, in pieces of 32 MiB."""
PREDICTION = 128 << 10
"""Bytes that a step of Stable Diffusion with guidance sends at 512×512, and as many that it reads."""
EXCHANGES, EXCHANGE_PAIRS = 25, 80


class Spent(NamedTuple):
    """Seconds of the clock, and of the processor."""

    clock: float
    processor: float


class Watch:
    """Measures what this process and a server spend."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = psutil.Process(server.process.pid)

    def __call__(self, work: Callable[[], T]) -> tuple[T, Spent]:
        clock, processor = time.perf_counter(), self._processor()
        result = work()
        return result, Spent(time.perf_counter() - clock, self._processor() - processor)

    def _processor(self) -> float:
        return time.process_time() + float(sum(self._server.cpu_times()[:2]))


class Pairs(NamedTuple):
    """What was spent without and with TLS, pair by pair."""

    plain: list[Spent]
    encrypted: list[Spent]

    @property
    def extra(self) -> float:
        """Seconds of the clock that TLS costs: the median within pairs."""
        return median(tls.clock - plain.clock for plain, tls in zip(self.plain, self.encrypted, strict=True))

    def rows(self, what: str, unit: float, name: str, note: str, mark: Mark | None = None) -> Iterator[Row]:
        """The clock's time, the processor's, in a unit of which a second has ``unit``, and the ratio within pairs."""
        plain, encrypted = (min(spent.clock for spent in side) * unit for side in self)
        yield Row(f"{what}, TLS", encrypted, name, plain, "without TLS", None, f"{note}, best of {len(self.plain)}")
        ratios = [tls.clock / plain.clock for plain, tls in zip(self.plain, self.encrypted, strict=True)]
        low, middle, high = quantiles(ratios, n=4)
        spread = f"{len(ratios)} pairs, half of them {low:.3f} to {high:.3f}"
        ours = mark and replace(mark, of="ours")
        yield Row(f"{what}, TLS over without", middle, "×", mark=ours, note=spread)
        # all together, for a server tells hundredths of a second
        plain, encrypted = (sum(spent.processor for spent in side) / len(side) * unit for side in self)
        yield Row(f"{what}, TLS, processor", encrypted, name, plain, "without TLS", None, note)


def run(setup: Setup) -> Iterator[Row]:
    with ExitStack() as stack:
        servers = [stack.enter_context(setup.server(setup.variant, *key)) for key in ((), ("--require-key",))]
        devices = [opened(setup, server, stack) for server in servers]
        watches = [Watch(server) for server in servers]
        yield from _uploads(devices, watches)
        said = _exchanges(devices, watches)
        yield from said.rows("what a step says", 1e6 / EXCHANGES, "µs", f"{PREDICTION >> 10} KiB there and back")
        yield from _steps(setup, devices, watches, said.extra / EXCHANGES, stack)


def opened(setup: Setup, server: ServerProcess, stack: ExitStack) -> RemoteDevice:
    """The first device of a server, by the key that it printed if it did."""
    port = server.port
    keys = given_keys(re.findall(r"--rpc-key (\S+)", server.output))
    device, *others = connect([f"127.0.0.1:{port}"], keychain=Keychain(keys, setup.folder / f"{port}.json"))
    for each in (device, *others):
        stack.callback(each.close)
    return device


def _uploads(devices: list[RemoteDevice], watches: list[Watch]) -> Iterator[Row]:
    data = memoryview(np.random.default_rng(0).bytes(SIZE))

    def upload(device: RemoteDevice) -> None:
        buffer = device.allocate(SIZE)  # new memory, as weights come to
        device.write(buffer, 0, data)
        device.read(buffer, SIZE - 1, 1)  # it has arrived
        device.free(buffer)

    pairs = _in_pairs(lambda side: upload(devices[side]), watches, PAIRS)
    yield from pairs.rows("upload", 1e9 / SIZE, "s/GB", f"{SIZE >> 20} MiB", Mark(1 / 0.6))


def _steps(
    setup: Setup, devices: list[RemoteDevice], watches: list[Watch], said: float, stack: ExitStack
) -> Iterator[Row]:
    """``said``: seconds that TLS costs what a step says."""
    request = setup.request()
    sessions = [stack.enter_context(_session(setup, device)) for device in devices]
    settings = sessions[0].settings(request)
    conditions, steps = sessions[0].conditioning.conditions(settings), settings.steps
    drawn: list[list[Sampled]] = [[], []]

    def draw(side: int) -> None:
        drawn[side].append(sample(sessions[side], request, conditions))

    for side in (0, 1):  # weights go up
        draw(side)
    pairs = _in_pairs(draw, watches, PAIRS)
    if not np.array_equal(drawn[0][-1].latents, drawn[1][-1].latents):
        raise SystemExit("encryption: the two sides draw different pictures")
    note = f"{request.width}×{request.height}, {steps} steps at a time"
    yield from pairs.rows("step", 1e3 / steps, "ms", note, Mark(1.02))
    plain = min(spent.clock for spent in pairs.plain) / steps
    by_words = "best without TLS, and what TLS adds to what a step says"
    yield Row(
        "step, TLS, by what it says", (plain + said) * 1e3, "ms", plain * 1e3, "without TLS", Mark(1.02), by_words
    )


def _exchanges(devices: list[RemoteDevice], watches: list[Watch]) -> Pairs:
    """What a step says to a server, which computes eight numbers: what is left of a step whose computing costs nothing,
    and so the most of TLS that a step can have."""
    talks = [_talk(device) for device in devices]

    def exchange(side: int) -> None:
        for _ in range(EXCHANGES):
            talks[side]()

    for side in (0, 1):
        exchange(side)
    return _in_pairs(exchange, watches, EXCHANGE_PAIRS)


def _talk(device: RemoteDevice) -> Callable[[], None]:
    buffer = device.allocate(1 << 20)
    x = replace(leaf(F32, 8), buffer=buffer.key)
    squared = replace(node("SQR", x), buffer=buffer.key, offset=1024, flags=OUTPUT)
    program = device.compile(Graph((squared,)), {buffer.key: buffer})
    latents = np.random.default_rng(0).bytes(PREDICTION)

    def talk() -> None:
        device.write(buffer, 4096, latents)
        device.write(buffer, 0, bytes(4))  # the timestep
        program.run()
        device.read(buffer, 4096, PREDICTION)

    return talk


def _in_pairs(work: Callable[[int], None], watches: list[Watch], count: int) -> Pairs:
    """``work`` of both sides (0: without TLS), so many times."""
    pairs = Pairs([], [])
    for number in range(count):
        for side in (0, 1) if number % 2 else (1, 0):
            pairs[side].append(watches[side](partial(work, side))[1])
    return pairs


def _session(setup: Setup, device: Device) -> Session:
    return Session.open(setup.checkpoint(setup.variant.type), device, setup.cache)
