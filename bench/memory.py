"""Memory that is the client's and the server's alone during a whole picture."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sdrpc.ggml.memory_planner import place
from sdrpc.runtime.cache import SUFFIX
from sdrpc.runtime.lowered import from_bytes

from .command import SdCli
from .rows import Mark, Row
from .setup import Setup

SECONDS = 0.02
GB = 1e9
ALIGNMENT = 64


class Watched:
    """The largest amount of its own memory that a process had: private pages and the anonymous shared ones that a
    server keeps tensors in, without mapped files. ``anonymous`` is the largest amount of private pages alone: files
    below /dev/shm count as shared ones where they are mapped."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self.peak = self.anonymous = 0

    def look(self) -> None:
        try:
            lines = dict(line.split(":", 1) for line in self._status.read_text().splitlines())
        except (FileNotFoundError, ProcessLookupError):
            return
        if "RssAnon" in lines:  # a process that has just ended has no memory to tell of
            anonymous, shared = (int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
            self.peak, self.anonymous = max(self.peak, anonymous + shared), max(self.anonymous, anonymous)


class WatchedDevice:
    """The same of a CUDA device's memory, beyond what was in use at first."""

    def __init__(self) -> None:
        self._before = torch.cuda.mem_get_info()[0]
        self.peak = 0

    def look(self) -> None:
        self.peak = max(self.peak, self._before - torch.cuda.mem_get_info()[0])


@contextmanager
def watching(*watched: Watched | WatchedDevice) -> Iterator[None]:
    """Look at them again and again for as long as the context lasts."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(SECONDS):
            for each in watched:
                each.look()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _holdings(log: str) -> Iterator[Row]:
    """What the device's memory was taken by after that first run of a program after which it was most."""
    found = [
        {name: float(size) for name, size in re.findall(r"(\w+) (\d+\.\d+)", line)}
        for line in re.findall("after a first run: (.*) GB", log)
    ]
    most = max(found, key=lambda each: each["reserved_at_most"] + each["context"], default={})
    for name, size in most.items():
        yield Row(f"memory, server's device: {name.replace('_', ' ')}", size, "GB")


def run(setup: Setup) -> Iterator[Row]:
    graphs = setup.folder / "memory" / "graphs"
    graphs.mkdir(parents=True)
    checkpoint = setup.checkpoint(setup.variant.type)
    on_device = None if setup.on_cpu else WatchedDevice()
    with setup.server(setup.variant) as server:
        client = SdCli(setup.request(), {"model": checkpoint}, graphs, "--rpc", f"127.0.0.1:{server.port}")
        watched_client, watched_server = Watched(client.process.pid), Watched(server.process.pid)
        with watching(watched_client, watched_server, *([on_device] if on_device else [])):
            client.wait()
    lowered = [from_bytes(path.read_bytes()) for path in graphs.rglob(f"*{SUFFIX}")]
    weights = sum({(w.name, w.shape): w.leaf.nbytes for low in lowered for w in low.weights}.values())
    activations = max(place(low.graph, ALIGNMENT, 1).size for low in lowered)
    holds = f"weights {weights / GB:.2f} + activations {activations / GB:.2f}"
    yield Row(
        "memory, client", watched_client.peak / GB, "GB", None, "", Mark(1.5, "ours"),
        f"peak of a whole run, {setup.size}×{setup.size}, graphs captured",
    )  # fmt: skip
    for where, seen in (("server", watched_server), ("server's device", on_device)):
        if seen is not None and (where == "server") == setup.on_cpu:
            needed = (weights + activations) / GB
            yield Row(f"memory, {where}", seen.peak / GB, "GB", needed, holds, Mark(needed + 1, "ours"), "mark: + 1 GB")
    if on_device is not None:
        yield from _holdings(server.output)
        yield Row("memory, server", watched_server.peak / GB, "GB", None, "", None, "host memory, torch's own included")
