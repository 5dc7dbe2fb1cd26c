"""How many graphs that ggml accepts our server accepts, and computes as ggml's CPU backend does.

python -m tests.interop.accepted [DRAWS]    # DRAWS of each operation that is drawn at random, 240 unless given

Graphs are made by ggml's own constructors: all cases that are written down (:mod:`tests.interop.cases`) and random ones
(:mod:`tests.interop.cases.drawn`), sent by ggml's own client. ``SDRPC_TEST_DEVICE=CUDA0`` has another device compute
them. Several processes share the operations, each a server and a client.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import NamedTuple

from sdrpc.engine import LocalDevice
from sdrpc.server import Server
from tests.engine.conftest import open_device
from tests.interop.cases import BOUNDS, CASES, OPERATIONS, drawn
from tests.interop.conftest import NativeClient

DRAWS = 240
AT_ONCE = 60
CORES_EACH = 2
"""Of a server and its client, which wait for each other."""


class Tally(NamedTuple):
    """Of an operation's graphs: how many there are, and which are not accepted, or give another result."""

    total: int
    refused: list[str]
    wrong: list[str]


def main(draws: int) -> None:
    groups = {op: list(names) for op, names in OPERATIONS.items()}
    for op in drawn.DRAWN:
        groups.setdefault(op, []).extend(f"{op}-drawn-{number}" for number in range(draws))
    tallies = []
    many = max(1, (os.cpu_count() or 1) // CORES_EACH)
    with ProcessPoolExecutor(many, multiprocessing.get_context("spawn")) as pool:
        described = pool.submit(describe)
        counted = {pool.submit(count, names): op for op, names in groups.items()}
        for done in as_completed(counted):
            tally = done.result()
            tallies.append(tally)
            accepted = tally.total - len(tally.refused)
            agree = accepted - len(tally.wrong)
            print(f"{counted[done]}: {accepted:,} of {tally.total:,} accepted, {agree:,} agree", flush=True)
    total = sum(tally.total for tally in tallies)
    refused = [name for tally in tallies for name in tally.refused]
    wrong = [name for tally in tallies for name in tally.wrong]
    accepted = total - len(refused)
    print(
        f"{described.result()}: {accepted:,} of {total:,} valid graphs of {len(groups)} operations accepted "
        f"({draws * len(drawn.DRAWN):,} of them drawn), {accepted - len(wrong):,} agree with ggml's CPU backend"
    )
    if refused or wrong:
        sys.exit("not so: " + ", ".join((refused + wrong)[:50]))


@cache
def device() -> LocalDevice:
    return open_device("exact")


def describe() -> str:
    return device().description


def count(names: Sequence[str]) -> Tally:
    """Have the graphs of ``names`` computed."""
    refused, wrong = [], []
    with tempfile.TemporaryDirectory() as folder, Server([device()]) as server:
        client = NativeClient(Path(folder) / "client.log")
        for start in range(0, len(names), AT_ONCE):
            some = names[start : start + AT_ONCE]
            for name, outcome in zip(some, client.run_all(some, server.endpoint), strict=True):
                if math.isinf(outcome.error):
                    refused.append(name)
                elif not outcome.error <= BOUNDS[(CASES.get(name) or drawn.case(name)).bound]:
                    wrong.append(name)
        client.close()
    return Tally(len(names), refused, wrong)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else DRAWS)
