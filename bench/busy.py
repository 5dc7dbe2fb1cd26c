"""What torch's threads cost on a machine that has other things to do, and whether letting them sleep costs anything on
one that has not.

OpenMP's threads spin while they wait, as torch has it (``OMP_WAIT_POLICY=ACTIVE``), or sleep (``PASSIVE``, which our
commands ask for). Spinning saves the time of waking up; on a busy core it takes the time of the thread that is waited
for.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from sdrpc.diffusion.request import Request
from sdrpc.models import SHIPPED

from .command import SdCli
from .rows import Mark, Row
from .setup import Setup

STEPS = 20
SIZES = 128, 256
"""The model's own, whose operations are small, and one whose operations are larger."""
ROUNDS = 3
POLICY = "OMP_WAIT_POLICY"


def run(setup: Setup) -> Iterator[Row]:
    for size in SIZES:
        for remote in (False, True):
            what = f"{STEPS} steps of demo, {size}×{size}{', --rpc' if remote else ''}"
            _seconds(setup, size, remote, None)  # graphs are captured, files read
            ours, spinning = _in_turn(setup, size, remote, "ACTIVE")
            yield Row(f"{what}, quiet", ours, "s", spinning, "threads that spin", Mark(1.05))
            with busy_cores():
                ours, spinning = _in_turn(setup, size, remote, "ACTIVE")
                yield Row(f"{what}, busy", ours, "s", spinning, "threads that spin")
                ours, asleep = _in_turn(setup, size, remote, "PASSIVE")
                yield Row(f"{what}, busy", ours, "s", asleep, "threads told to sleep", Mark(2.0))


def _in_turn(setup: Setup, size: int, remote: bool, policy: str) -> tuple[float, float]:
    """Seconds of the steps as users have it, and under ``policy``: the best of a few rounds, in turn."""
    rounds = [[_seconds(setup, size, remote, each) for each in (None, policy)] for _ in range(ROUNDS)]
    ours, theirs = map(min, zip(*rounds, strict=True))
    return ours, theirs


def _seconds(setup: Setup, size: int, remote: bool, policy: str | None) -> float:
    request = Request("a red circle", width=size, height=size, steps=STEPS, cfg_scale=4.0, sampling_method="euler")
    with ExitStack() as stack:
        stack.enter_context(_waiting(policy))
        options = ["--backend", "CPU"]
        if remote:
            server = stack.enter_context(setup.server(setup.variant))
            options = ["--rpc", f"127.0.0.1:{server.port}", "--backend", "RPC0"]
        graphs = setup.folder / "busy" / "graphs"
        graphs.mkdir(parents=True, exist_ok=True)
        return SdCli(request, {"model": SHIPPED["demo"]}, graphs, *options).wait().stages["sample"]


@contextmanager
def _waiting(policy: str | None) -> Iterator[None]:
    """Processes that start meanwhile are told how their threads should wait; None: nothing."""
    before = os.environ.pop(POLICY, None)
    os.environ |= {POLICY: policy} if policy else {}
    try:
        yield
    finally:
        os.environ.pop(POLICY, None)
        os.environ |= {POLICY: before} if before else {}


@contextmanager
def busy_cores() -> Iterator[None]:
    """Meanwhile each core has a process that wants all of it."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()
