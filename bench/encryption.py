"""What encryption costs: an upload and a sampling step through TLS, over the same without, in turn.

Seconds of the processor, at both ends together, are measured beside those of the clock: other work on the machine makes
these longer, but hardly those."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import psutil

from sdrpc.client import Keychain, RemoteDevice, connect, given_keys
from sdrpc.device import Device
from sdrpc.diffusion.session import Session
from tests.support.process import ServerProcess

from .rows import Mark, Row
from .sampling import Sampled, sample, step_seconds
from .setup import Setup

T = TypeVar("T")

ROUNDS = 5
SIZE = 256 << 20
"""Bytes of an upload: weights as they go, in pieces of 32 MiB."""


class Spent(NamedTuple):
    """Seconds of the clock, and of the processor."""

    clock: float
    processor: float


class Watch:
    """Measures what this process and a server spend."""

    def __init__(self, server: ServerProcess) -> None:
        self._processes = (psutil.Process(), psutil.Process(server.process.pid))

    def __call__(self, work: Callable[[], T]) -> tuple[T, Spent]:
        clock, processor = time.perf_counter(), self._processor()
        result = work()
        return result, Spent(time.perf_counter() - clock, self._processor() - processor)

    def _processor(self) -> float:
        return sum(float(sum(process.cpu_times()[:2])) for process in self._processes)


def run(setup: Setup) -> Iterator[Row]:
    with ExitStack() as stack:
        servers = [stack.enter_context(setup.server(setup.variant, *key)) for key in ((), ("--require-key",))]
        devices = [opened(setup, server, stack) for server in servers]
        watches = [Watch(server) for server in servers]
        yield from _uploads(devices, watches)
        yield from _steps(setup, devices, watches, stack)


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

    spent: list[list[Spent]] = [[], []]
    for _ in range(ROUNDS):
        for each, device, watch in zip(spent, devices, watches, strict=True):
            each.append(watch(partial(upload, device))[1])
    note = f"{SIZE >> 20} MiB, best of {ROUNDS}"
    plain, encrypted = (SIZE / min(each.clock for each in side) / 1e9 for side in spent)
    yield Row("upload, TLS", encrypted, "GB/s", plain, "without TLS", Mark(0.60, at_least=True), note)
    plain, encrypted = (min(each.processor for each in side) / SIZE * 1e9 for side in spent)
    yield Row("upload, TLS, processor", encrypted, "s/GB", plain, "without TLS", None, note)


def _steps(setup: Setup, devices: list[RemoteDevice], watches: list[Watch], stack: ExitStack) -> Iterator[Row]:
    request = setup.request()
    sessions = [stack.enter_context(_session(setup, device)) for device in devices]
    settings = sessions[0].settings(request)
    conditions, steps = sessions[0].conditions(settings), settings.steps
    drawn: list[list[tuple[Sampled, Spent]]] = [[], []]
    for _ in range(ROUNDS):
        for each, session, watch in zip(drawn, sessions, watches, strict=True):
            each.append(watch(partial(sample, session, request, conditions)))
    if not np.array_equal(drawn[0][-1][0].latents, drawn[1][-1][0].latents):
        raise SystemExit("encryption: the two sides draw different pictures")
    note = f"{request.width}×{request.height}, {steps} steps, {ROUNDS} times each in turn"
    plain, encrypted = (step_seconds(*(run for run, _ in side)) * 1e3 for side in drawn)
    yield Row("step, TLS", encrypted, "ms", plain, "without TLS", Mark(1.02), note)
    plain, encrypted = (min(spent.processor for _, spent in side) * 1e3 / steps for side in drawn)
    yield Row("step, TLS, processor", encrypted, "ms", plain, "without TLS", Mark(1.02), note)


def _session(setup: Setup, device: Device) -> Session:
    return Session.open(setup.checkpoint(setup.variant.type), device, setup.cache)
