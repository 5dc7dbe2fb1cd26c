"""sd-cli's own UNet graph, as it was recorded, on the engine: fast over exact, over all and per operation.

Floors: the products' operations at the rate of a large torch.mm, and everything else's bytes at the rate of a large
copy, both measured here.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from sdrpc.engine import LocalDevice, devices
from sdrpc.engine.device import LocalProgram
from sdrpc.engine.operations import EngineOp
from sdrpc.engine.ops import KERNELS
from sdrpc.engine.system import keep_freed_memory
from sdrpc.engine.values import Value, ordered
from tests.engine.recorded import contents, load

from .rows import Row
from .setup import Setup

ROUNDS = 3
MATRIX, COPIED = 2048, 1 << 28
REST = "(all else)"
"""Conversions of dtypes and of weights, results stored."""


class Timed(NamedTuple):
    """Seconds of a run, and of it per operation (empty on devices that run ahead of us)."""

    seconds: float
    by_op: Mapping[str, float]


class Floor(NamedTuple):
    """Seconds that a graph's operations take at the very least, by operation."""

    by_op: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.by_op.values())


def run(setup: Setup) -> Iterator[Row]:
    part = "unet" if setup.checkpoint_size == "full" else "clip"
    timed: dict[str, Timed] = {}
    floors: dict[str, Floor] = {}
    for precision in ("exact", "fast"):
        timed[precision], floors[precision] = _measured(setup, part, precision)
    exact, fast = timed["exact"], timed["fast"]
    yield Row(f"recorded {part}", fast.seconds * 1e3, "ms", exact.seconds * 1e3, "fast over exact")
    for precision in ("exact", "fast"):
        yield Row(
            f"recorded {part}, {precision}", timed[precision].seconds * 1e3, "ms", floors[precision].seconds * 1e3,
            "operations and bytes at full speed",
        )  # fmt: skip
    for op in sorted(exact.by_op, key=lambda op: -exact.by_op[op]):
        floor = ", ".join(f"{name} {floors[name].by_op.get(op, 0) * 1e3:.1f}" for name in floors)
        yield Row(
            f"  {op}", fast.by_op.get(op, 0) * 1e3, "ms", exact.by_op[op] * 1e3, "fast over exact", None,
            "" if op == REST else f"floor: {floor} ms",
        )  # fmt: skip


def _measured(setup: Setup, part: str, precision: str) -> tuple[Timed, Floor]:
    keep_freed_memory()  # as the commands do
    found = {device.name: device for device in devices(precision)}
    device = found[setup.device]
    spent: defaultdict[str, float] = defaultdict(float)
    try:
        with _watched(spent) if setup.on_cpu else _unwatched():
            program = _program(device, part)
            runs: list[Timed] = []
            for _ in range(1 + ROUNDS):
                spent.clear()
                start = time.perf_counter()
                program.run()
                if not setup.on_cpu:
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
                rest = {REST: seconds - sum(spent.values())} if spent else {}
                runs.append(Timed(seconds, dict(spent) | rest))
            values = ordered(program.bound.compiled.roots)
    finally:
        for each in found.values():
            each.close()
    warm = runs[1:]
    by_op = {op: median(r.by_op.get(op, 0.0) for r in warm) for op in warm[0].by_op}
    return Timed(median(r.seconds for r in warm), by_op), _floor(values, device.torch_device)


def _program(device: LocalDevice, part: str) -> LocalProgram:
    recorded = load(part)
    buffers = {number: device.allocate(size) for number, size in recorded.sizes.items()}
    recorded = load(part, {number: buffer.key for number, buffer in buffers.items()})
    by_key = {buffer.key: buffer for buffer in buffers.values()}
    rng = np.random.default_rng(0)
    for leaf in recorded.graph.leaves:
        device.write(by_key[leaf.buffer], leaf.offset, contents(leaf, rng).tobytes())
    return device.compile(recorded.graph, by_key)


@contextmanager
def _watched(spent: defaultdict[str, float]) -> Iterator[None]:
    """Programs compiled in this context note what each operation takes: the engine's table holds watched functions."""

    def watched(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            spent[op] += time.perf_counter() - start
            return result

        return call

    plain = dict(KERNELS)
    KERNELS.update({op: replace(each, function=watched(str(op), each.function)) for op, each in plain.items()})
    try:
        yield
    finally:
        KERNELS.update(plain)


@contextmanager
def _unwatched() -> Iterator[None]:
    yield


def _floor(values: list[Value], device: torch.device) -> Floor:
    rates: dict[torch.dtype, float] = {}
    bandwidth = _bandwidth(device)
    floor: defaultdict[str, float] = defaultdict(float)
    for value in values:
        if value.op in (EngineOp.LEAF, EngineOp.VIEW, EngineOp.WEIGHT):
            continue
        seconds = _moved(value) / bandwidth
        if operations := _operations(value):
            dtype = next(s.dtype for s in reversed(value.src) if s is not None and s.dtype is not None)
            if dtype not in rates:
                rates[dtype] = _rate(device, dtype)
            seconds = max(seconds, operations / rates[dtype])
        floor[str(value.op)] += seconds
    return Floor(floor)


def _moved(value: Value) -> int:
    """Bytes that have to be read and written."""
    if value.op == "GET_ROWS":  # not all of the table
        return 2 * _bytes(value)
    return sum(_bytes(each) for each in (value, *value.src) if each is not None)


def _bytes(value: Value) -> int:
    return prod(value.ne) * (value.dtype.itemsize if value.dtype is not None else 4)


def _operations(value: Value) -> int:
    """Multiplications and additions of a product; 0 for what is none."""
    first = value.src[0] if value.src else None
    if first is None:
        return 0
    if value.op in ("MUL_MAT", EngineOp.LINEAR):
        return 2 * prod(value.ne) * first.ne[0]
    if value.op == "CONV_2D":
        return 2 * prod(value.ne) * prod(first.ne[:3])
    if value.op in (EngineOp.ATTENTION, "FLASH_ATTN_EXT"):
        keys = value.src[1]
        return 4 * prod(first.ne) * keys.ne[1] if keys is not None else 0
    return 0


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product."""
    a, b = (torch.randn(MATRIX, MATRIX, device=device).to(dtype) for _ in range(2))
    return 2 * MATRIX**3 / _best(lambda: torch.mm(a, b), device)


def _bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes."""
    a, b = (torch.zeros(COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * COPIED / _best(lambda: b.copy_(a), device)


def _best(work: Callable[[], Any], device: torch.device, rounds: int = 8) -> float:
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
