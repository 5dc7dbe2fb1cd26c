"""A function of tensors as a CUDA graph, and the clock of a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WARMING = 3
"""Calls before one is recorded: in these kernels are chosen and memory is found."""


def recorded(
    call: Callable[..., Tensor], given: Sequence[Tensor], graph: torch.cuda.CUDAGraph
) -> Callable[..., Tensor]:
    """``call`` of ``given``, recorded in ``graph``; what this returns runs it with other numbers of the same shapes."""
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        for _ in range(WARMING):
            call(*given)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        result = call(*given)

    def replay(*changed: Tensor) -> Tensor:
        for mine, new in zip(given, changed, strict=True):
            if mine is not new:
                mine.copy_(new)
        graph.replay()
        return result

    return replay


def now(device: torch.device) -> float:
    """Seconds, when the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
