"""How many graphs that ggml accepts our server accepts, and computes as ggml's CPU backend does.

python -m tests.interop.accepted [DRAWS]    # DRAWS of each operation that is drawn at random, 240 unless given

Graphs are made by ggml's own constructors: all cases that are written down (:mod:`tests.interop.cases`) and random ones
(:mod:`tests.interop.cases.drawn`), sent by ggml's own client. ``SDRPC_TEST_DEVICE=CUDA0`` has another device compute
them.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sdrpc.server import Server
from tests.engine.conftest import open_device
from tests.interop.cases import BOUNDS, CASES, OPERATIONS, drawn
from tests.interop.conftest import NativeClient
from tests.interop.worker import Outcome

DRAWS = 240
AT_ONCE = 60


def bound(name: str) -> float:
    case = CASES.get(name) or drawn.case(name)
    return BOUNDS[case.bound]


def main(draws: int) -> None:
    device = open_device("exact")
    groups = {op: list(names) for op, names in OPERATIONS.items()}
    for op in drawn.DRAWN:
        groups.setdefault(op, []).extend(f"{op}-drawn-{number}" for number in range(draws))
    accepted = agreed = total = 0
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder, Server([device]) as server:
        client = NativeClient(Path(folder) / "client.log")
        for op, names in groups.items():
            outcomes = compute(client, names, server.endpoint)
            answered = [name for name, outcome in zip(names, outcomes, strict=True) if not math.isinf(outcome.error)]
            right = [name for name, outcome in zip(names, outcomes, strict=True) if outcome.error <= bound(name)]
            accepted, agreed, total = accepted + len(answered), agreed + len(right), total + len(names)
            wrong += sorted(set(names) - set(right))
            print(f"{op}: {len(answered):,} of {len(names):,} accepted, {len(right):,} agree", flush=True)
        client.close()
    device.close()
    print(
        f"{device.description}: {accepted:,} of {total:,} valid graphs of {len(groups)} operations accepted "
        f"({draws * len(drawn.DRAWN):,} of them drawn), {agreed:,} agree with ggml's CPU backend"
    )
    if wrong:
        sys.exit("not so: " + ", ".join(wrong[:50]))


def compute(client: NativeClient, names: Sequence[str], endpoint: str) -> list[Outcome]:
    return [
        outcome
        for start in range(0, len(names), AT_ONCE)
        for outcome in client.run_all(names[start : start + AT_ONCE], endpoint)
    ]


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else DRAWS)
