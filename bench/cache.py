"""What it costs to keep weights, and what it spares: on disk, and in memory for a second client."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from hashlib import sha256
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from sdrpc.client import connect
from sdrpc.content import FNV_START, digest, fnv1a
from sdrpc.diffusion.session import Session

from .rows import Mark, Row
from .setup import Setup
from .upload import Upload, loaded, uploaded

HASHED = 256 << 20
HASHES = 3
ROUNDS = 2
SETTLE_SECONDS = 120.0


def run(setup: Setup) -> Iterator[Row]:
    data = np.random.default_rng(0).bytes(HASHED)
    fnv = fnv1a()
    if fnv is None:
        raise SystemExit("bench cache: FNV-1a needs numba (pip install 'sdrpc[cache]')")
    note = f"{HASHED >> 20} MiB, one thread, best of {HASHES}"
    sha = _rate(lambda: sha256(data).digest())
    least = Mark(0.5, "ours", at_least=True)
    yield Row("FNV-1a 64", _rate(lambda: fnv(data, FNV_START)), "GB/s", sha, "SHA-256", least, note)
    yield Row("digest (BLAKE3)", _rate(lambda: digest(data)), "GB/s", sha, "SHA-256", None, note)
    plain, kept, again = [], [], []
    for number in range(ROUNDS):
        with _own_cache(setup, f"plain-{number}"), setup.server(setup.variant) as server:
            plain.append(uploaded(setup, server))
        with _own_cache(setup, f"kept-{number}") as home:
            with setup.server(setup.variant, "--cache") as server:
                kept.append(uploaded(setup, server))
                until = time.monotonic() + SETTLE_SECONDS
                while any((home / "weights").glob("*.part")) and time.monotonic() < until:
                    time.sleep(0.1)
            with setup.server(setup.variant, "--cache") as server:
                again.append(uploaded(setup, server))
        shutil.rmtree(home)
    alone = min(plain)
    yield _speed("upload that is kept", min(kept), alone, "server without a cache", Mark(0.8, at_least=True))
    yield _seconds("the same again, of which none is sent", min(again), alone, "server without a cache", Mark(1.0))
    yield from _two_clients(setup, alone)


def _two_clients(setup: Setup, alone: Upload) -> Iterator[Row]:
    """A second and a third client of the same checkpoint, while the first one is there, of a server that keeps nothing
    on disk. The second one has to find out what its weights are called, the third one knows it."""
    before = 0 if setup.on_cpu else _taken(setup.torch_device)
    with (
        _own_cache(setup, "clients"),
        setup.server(setup.variant) as server,
        setup.session(setup.variant, server.port) as first,
    ):

        def memory() -> int:
            return _memory(server.process.pid) if setup.on_cpu else _taken(setup.torch_device) - before

        size = loaded(setup, first, server).size
        one = memory()
        uploads = []
        for _ in range(2):
            with (
                closing(connect([f"127.0.0.1:{server.port}"])[0]) as device,
                Session.open(setup.checkpoint(setup.variant.type), device, setup.cache) as session,
            ):
                uploads.append(loaded(setup, session, server))
                sent = device.sent or 0
                two = memory()
    yield _seconds("a second client's upload", uploads[0], alone, "the first one's", Mark(1.0))
    yield _seconds("a third client's, which knows their digests", uploads[1], alone, "the first one's", Mark(1.0))
    note = f"{size / 1e9:.2f} GB"
    yield Row("bytes of tensors that it sends", sent / 1e6, "MB", size / 1e6, "all weights", Mark(0.01), note)
    where = "server" if setup.on_cpu else "server's device"
    yield Row(f"memory, {where}, with both", two / 1e9, "GB", one / 1e9, "with the first", Mark(1.1), note)


@contextmanager
def _own_cache(setup: Setup, name: str) -> Iterator[Path]:
    """Nothing is remembered, neither by clients nor by servers. The model's graphs are kept by the session."""
    home = setup.folder / name
    setup.checkpoint(setup.variant.type)
    with mock.patch.dict(os.environ, SDRPC_CACHE=str(home)):
        yield home


def _speed(what: str, ours: Upload, theirs: Upload, against: str, mark: Mark) -> Row:
    speeds = [upload.size / upload.seconds / 1e9 for upload in (ours, theirs)]
    return Row(what, speeds[0], "GB/s", speeds[1], against, mark, _note(ours, theirs))


def _seconds(what: str, ours: Upload, theirs: Upload, against: str, mark: Mark) -> Row:
    return Row(what, ours.seconds, "s", theirs.seconds, against, mark, _note(ours, theirs))


def _note(ours: Upload, theirs: Upload) -> str:
    size = f"{ours.size / 1e9:.2f} GB over loopback"
    return f"{size}; processors {ours.processor:.2f} s, there {theirs.processor:.2f} s"


def _memory(pid: int) -> int:
    """Bytes that a process has for itself, each page counted once however often it is mapped."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(lines[name].split()[0]) * 1024 for name in ("Pss_Anon", "Pss_Shmem"))


def _taken(device: torch.device) -> int:
    """Bytes of a CUDA device that are taken by whatever."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def _rate(work: Callable[[], object]) -> float:
    times = []
    for _ in range(HASHES):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return HASHED / min(times) / 1e9
