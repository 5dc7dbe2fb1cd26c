"""What it costs to keep weights, and what it spares: on disk, and in memory for a second client."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from unittest import mock

import numpy as np

from sdrpc.client import connect
from sdrpc.content import FNV_START, digest, fnv1a
from sdrpc.diffusion.session import Session

from .rows import Mark, Row
from .setup import Setup
from .upload import loaded, uploaded

HASHED = 256 << 20
ROUNDS = 3
SETTLE_SECONDS = 120.0


def run(setup: Setup) -> Iterator[Row]:
    data = np.random.default_rng(0).bytes(HASHED)
    fnv = fnv1a()
    if fnv is None:
        raise SystemExit("bench cache: FNV-1a needs numba (pip install 'sdrpc[cache]')")
    note = f"{HASHED >> 20} MiB, one thread, best of {ROUNDS}"
    sha = _rate(lambda: digest(data))
    yield Row(
        "FNV-1a 64", _rate(lambda: fnv(data, FNV_START)), "GB/s", sha, "SHA-256", Mark(0.5, "ours", at_least=True), note
    )
    home = setup.folder / "cache"
    with mock.patch.dict(os.environ, SDRPC_CACHE=str(home)):
        setup.checkpoint(setup.variant.type)
        with setup.server(setup.variant) as server:
            plain, size = uploaded(setup, server.port)
        with setup.server(setup.variant, "--cache") as server:
            first, _ = uploaded(setup, server.port)
            until = time.monotonic() + SETTLE_SECONDS
            while any((home / "weights").glob("*.part")) and time.monotonic() < until:
                time.sleep(0.1)
        with setup.server(setup.variant, "--cache") as server:
            again, _ = uploaded(setup, server.port)
    note = f"{size / 1e9:.2f} GB over loopback"
    yield Row("upload that is kept", first, "s", plain, "server without a cache", None, f"{note}; hashed on both sides")
    yield from _two_clients(setup, plain)
    yield Row("the same again", again, "s", plain, "server without a cache", None, f"{note}, of which none is sent")


def _two_clients(setup: Setup, alone: float) -> Iterator[Row]:
    """A second client of the same checkpoint, while the first one is there, of a server that keeps nothing on disk."""
    with setup.server(setup.variant) as server, setup.session(setup.variant, server.port) as first:
        _, size = loaded(setup, first)
        one = _memory(server.process.pid)
        with (
            closing(connect([f"127.0.0.1:{server.port}"])[0]) as device,
            Session.open(setup.checkpoint(setup.variant.type), device, setup.cache) as second,
        ):
            seconds, _ = loaded(setup, second)
            sent = device.sent or 0
            two = _memory(server.process.pid)
    note = f"{size / 1e9:.2f} GB"
    yield Row("a second client's upload", seconds, "s", alone, "the first one's", None, note)
    yield Row("bytes of tensors that it sends", sent / 1e6, "MB", size / 1e6, "all weights", Mark(0.01), note)
    if setup.on_cpu:
        yield Row("memory, server, with both", two / 1e9, "GB", one / 1e9, "with the first", Mark(1.1), note)


def _memory(pid: int) -> int:
    """Bytes that a process has for itself, each page counted once however often it is mapped."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(lines[name].split()[0]) * 1024 for name in ("Pss_Anon", "Pss_Shmem"))


def _rate(work: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return HASHED / min(times) / 1e9
