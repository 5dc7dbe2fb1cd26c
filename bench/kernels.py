"""What a GPU does in a step, kernel by kernel: ours and diffusers' beside each other, in this process."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from rich.console import Console
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

log = Console(stderr=True, highlight=False, soft_wrap=True)

KINDS = {
    "attention": re.compile(r"flash|fmha|attention|sdpa", re.IGNORECASE),
    "products": re.compile(r"gemm|cutlass|nvjet|xmma|addmm|\bmm\b|bmm|linear", re.IGNORECASE),
    "convolutions": re.compile(r"conv|cudnn|nchw|nhwc", re.IGNORECASE),
    "fused": re.compile("triton|cpp_fused"),
}
"""Kernels by their names; the first that fits. Others are copies and what torch brings for single operations."""
OTHERS = "others"
SHOWN = 24


class Kernels(NamedTuple):
    """Milliseconds of a step by kernel, and how often each runs in it."""

    spent: Mapping[str, float]
    times: Mapping[str, float]

    def by_kind(self) -> dict[str, float]:
        sums = dict.fromkeys((*KINDS, OTHERS), 0.0)
        for name, spent in self.spent.items():
            sums[next((kind for kind, pattern in KINDS.items() if pattern.search(name)), OTHERS)] += spent
        return sums

    def show(self, title: str) -> None:
        """The longest ones, to the terminal."""
        log.print(f"{title}: {sum(self.spent.values()):.2f} ms, {sum(self.times.values()):,.0f} kernels a step")
        for name, spent in sorted(self.spent.items(), key=lambda each: -each[1])[:SHOWN]:
            log.print(f"  {spent:8.3f} ms {self.times[name]:7.1f} × {name[:150]}", markup=False)


def kernels_of(draw: Callable[[], object], steps: int, device: torch.device) -> Kernels:
    """Of a picture in so many ``steps``."""
    cuda = device.type == "cuda"
    every_thread = None if cuda else _ExperimentalConfig(profile_all_threads=True)
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity], experimental_config=every_thread) as seen:
        draw()
        if cuda:
            torch.cuda.synchronize()
    found = seen.key_averages()
    spent = {each.key: each.self_device_time_total if cuda else each.self_cpu_time_total for each in found}
    return Kernels(
        {name: time / 1e3 / steps for name, time in spent.items() if time},
        {each.key: each.count / steps for each in found},
    )


class Heard(logging.Handler):
    """What the engine has said, as a server process's ``output``."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.output = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.output += record.getMessage() + "\n"


@contextmanager
def hearing() -> Iterator[Heard]:
    """What the engine says meanwhile."""
    heard, engine = Heard(), logging.getLogger("sdrpc.engine")
    level = engine.level
    engine.addHandler(heard)
    engine.setLevel(logging.INFO)
    try:
        yield heard
    finally:
        engine.removeHandler(heard)
        engine.setLevel(level)
