"""What encryption costs: an upload and a sampling step through TLS, over the same without, in turn."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np

from sdrpc.client import Keychain, RemoteDevice, connect, given_keys
from sdrpc.device import Device
from sdrpc.diffusion.session import Session
from tests.support.process import ServerProcess

from .rows import Mark, Row
from .sampling import Sampled, sample, step_seconds
from .setup import Setup

ROUNDS = 5
SIZE = 256 << 20
"""Bytes of an upload: weights as they go, in pieces of 32 MiB."""


def run(setup: Setup) -> Iterator[Row]:
    with ExitStack() as stack:
        plain = stack.enter_context(setup.server(setup.variant))
        encrypted = stack.enter_context(setup.server(setup.variant, "--require-key"))
        devices = [opened(setup, plain, stack), opened(setup, encrypted, stack)]
        yield from _uploads(devices)
        yield from _steps(setup, devices, stack)


def opened(setup: Setup, server: ServerProcess, stack: ExitStack) -> RemoteDevice:
    """The first device of a server, by the key that it printed if it did."""
    port = server.port
    keys = given_keys(re.findall(r"--rpc-key (\S+)", server.output))
    device, *others = connect([f"127.0.0.1:{port}"], keychain=Keychain(keys, setup.folder / f"{port}.json"))
    for each in (device, *others):
        stack.callback(each.close)
    return device


def _uploads(devices: list[RemoteDevice]) -> Iterator[Row]:
    data = memoryview(np.random.default_rng(0).bytes(SIZE))
    seconds: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for which, device in enumerate(devices):
            buffer = device.allocate(SIZE)  # new memory, as weights come to
            start = time.perf_counter()
            device.write(buffer, 0, data)
            device.read(buffer, SIZE - 1, 1)  # it has arrived
            seconds[which].append(time.perf_counter() - start)
            device.free(buffer)
    plain, encrypted = (SIZE / min(times) / 1e9 for times in seconds)
    mark = Mark(0.60, at_least=True)
    yield Row("upload, TLS", encrypted, "GB/s", plain, "without TLS", mark, f"{SIZE >> 20} MiB, best of {ROUNDS}")


def _steps(setup: Setup, devices: list[RemoteDevice], stack: ExitStack) -> Iterator[Row]:
    request = setup.request()
    sessions = [stack.enter_context(_session(setup, device)) for device in devices]
    conditions = sessions[0].conditions(sessions[0].settings(request))
    drawn: list[list[Sampled]] = [[], []]
    for _ in range(ROUNDS):
        for which, session in enumerate(sessions):
            drawn[which].append(sample(session, request, conditions))
    if not np.array_equal(drawn[0][-1].latents, drawn[1][-1].latents):
        raise SystemExit("encryption: the two sides draw different pictures")
    plain, encrypted = (step_seconds(*runs) for runs in drawn)
    note = f"{request.width}×{request.height}, {request.steps} steps, {ROUNDS} times each in turn"
    yield Row("step, TLS", encrypted * 1e3, "ms", plain * 1e3, "without TLS", Mark(1.02), note)


def _session(setup: Setup, device: Device) -> Session:
    return Session.open(setup.checkpoint(setup.variant.type), device, setup.cache)
