"""Fifty people at one sd-server: what its queue takes of a picture, beside the time in which it is drawn.

The queue's own time is that from a request being sent until it is accepted, that between the end of the picture
before, when the seat is free, and the beginning of this one, and that from its end until the user has it. Waiting while
others' pictures are drawn is none of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from tests.web.load import crowd, overheads, wrong
from tests.web.process import WebServer

from .rows import Mark, Row
from .setup import Setup

USERS, REQUESTS = 50, 20
BODY = {"prompt": "a large red circle on a white background", "width": 64, "height": 64,
        "sample_params": {"sample_steps": 1, "guidance": {"txt_cfg": 1}}}  # fmt: skip


def run(setup: Setup) -> Iterator[Row]:
    data = setup.folder / "queue"
    with WebServer(data) as server:
        crowd(server, 1, 3, BODY)
        began = time.perf_counter()
        seen = crowd(server, USERS, REQUESTS, BODY)
        seconds = time.perf_counter() - began
        server.stop()
    wanted = USERS * REQUESTS
    took = overheads(data, seen)
    what = f"{USERS} users × {REQUESTS} pictures, 64×64, one step of demo"
    bad = wanted - len({each.id for each in seen}) + wrong(seen)
    yield Row(f"{what}: lost or wrong", bad, "", wanted, "asked for", Mark(0, "ours"))
    yield Row(
        f"{what}: the queue's own time, p95", 1e3 * _p95([each.whole for each in took]), "ms",
        1e3 * _p95([each.drawn for each in took]), "drawing, p95", Mark(20, "ours"),
        ", ".join(f"to {name} {1e3 * _p95([getattr(each, name) for each in took]):.1f}" for name in _PARTS),
    )  # fmt: skip
    yield Row(f"{what}: a minute", 60 * wanted / seconds, "1/min")


_PARTS = ("accept", "begin", "tell")


def _p95(values: Sequence[float]) -> float:
    return sorted(values)[int(0.95 * len(values))]
