"""How fast a device computes and how far away it is: a short measurement, kept on disk for the next time."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..device import Device
from ..errors import SdrpcError
from ..ggml import build
from ..ggml.tensor import OUTPUT, Graph
from ..ggml.types import F32
from ..storage import cache_folder, read_own, write_whole
from .lowered import Input, Lowered, Output
from .run import Executable

log = logging.getLogger(__name__)

SIDE, ROWS, PRODUCTS = 1024, 512, 4
"""A matrix of SIDE² elements times ROWS rows, so often: 2·10⁹ multiplications, a tenth of a second on one core."""

SAMPLE = 4 << 20
"""Bytes that are sent to see how many a second arrive."""

KEPT_SECONDS = 7 * 24 * 3600
"""How old a measurement may be: devices change, and networks do."""

MAX_FILE = 1 << 20
MOST = 256
"""Measurements that are kept."""


class Speed(NamedTuple):
    """``products``: multiplications and additions a second; ``bandwidth``: bytes a second to the device, ``latency``:
    seconds until it answers."""

    products: float
    bandwidth: float
    latency: float


def speed_of(device: Device, path: Path | None = None) -> Speed:
    """A device's speed, as it was measured in the last days or is now. Raises what the device raises."""
    path = path or cache_folder("speeds") / "speeds.json"
    known = _read(path)
    now = time.time()
    name = device.description
    if name in known and 0 <= now - known[name][0] < KEPT_SECONDS:
        return known[name][1]
    with device.turns:
        found = measured(device)
    log.info("%s: %.3g products/s, %.3g bytes/s, %.3g s away", device.name, *found)
    newest = sorted({**known, name: (now, found)}.items(), key=lambda entry: -entry[1][0])[:MOST]
    try:
        write_whole(path, json.dumps({name: [when, *speed] for name, (when, speed) in newest}).encode())
    except (OSError, SdrpcError) as error:
        log.warning("what was measured is not kept: %s", error)
    return found


def measured(device: Device) -> Speed:
    """The speed now, from the best of three runs each. In the device's turn."""
    x = build.leaf(F32, SIDE, ROWS)
    matrix = build.leaf(F32, SIDE, SIDE)
    nodes = [build.mul_mat(matrix, x)]
    for _ in range(PRODUCTS - 1):
        nodes.append(build.mul_mat(matrix, nodes[-1]))
    nodes.append(build.node("SUM_ROWS", nodes[-1], flags=OUTPUT))
    inputs = (Input("x", "float32", (ROWS, SIDE), (x,)), Input("matrix", "float32", (SIDE, SIDE), (matrix,)))
    graph = Lowered(Graph(tuple(nodes)), inputs, (), (), (Output("float32", (ROWS, 1), nodes[-1]),))
    numbers = {entry.name: np.full(entry.shape, 1 / SIDE, np.float32) for entry in inputs}
    sample = bytes(SAMPLE)
    buffer = device.allocate(SAMPLE)
    try:
        near = min(_seconds(lambda: device.read(buffer, 0, 4)) for _ in range(3))

        def send() -> None:
            device.write(buffer, 0, sample)
            device.read(buffer, 0, 4)

        sent = min(_seconds(send) for _ in range(3))
    finally:
        device.free(buffer)
    with Executable(graph, device, {}) as program:
        program(**numbers)  # what is only done once is done
        took = min(_seconds(lambda: program(**numbers)) for _ in range(3))
    apart = 1e-6  # clocks are not finer
    return Speed(SIDE * SIDE * ROWS * PRODUCTS / max(took - near, apart), SAMPLE / max(sent - near, apart), near)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _read(path: Path) -> dict[str, tuple[float, Speed]]:
    """What was measured: description → when, and the speed. What makes no sense is not there."""
    try:
        known = json.loads(read_own(path, MAX_FILE) or b"{}")
    except (ValueError, RecursionError):
        return {}
    entries = known.items() if isinstance(known, dict) else ()
    return {name: (entry[0], Speed(*entry[1:])) for name, entry in entries if _makes_sense(entry)}


def _makes_sense(entry: object) -> bool:
    numbers = isinstance(entry, list) and len(entry) == 4 and all(isinstance(n, float) and n >= 0 for n in entry)
    return numbers and all(map(math.isfinite, entry)) and all(entry[:3])  # type: ignore[index, call-overload]
