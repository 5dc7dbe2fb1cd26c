"""What it costs to keep weights, and what it spares."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np

from sdrpc.content import FNV_START, digest, fnv1a

from .rows import Mark, Row
from .setup import Setup
from .upload import uploaded

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
    yield Row("the same again", again, "s", plain, "server without a cache", None, f"{note}, of which none is sent")


def _rate(work: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return HASHED / min(times) / 1e9
