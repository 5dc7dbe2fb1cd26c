"""Weights in the form that a program computes with, made once and kept while memory allows."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from sdrpc.ggml.types import Type

from .blocks import dequantize

PIECE = 1 << 16
"""Elements that a core converts at a time."""


class Form(NamedTuple):
    """How a weight is wanted: its dtype, and whether its channels lie together (kernels of convolutions)."""

    dtype: torch.dtype
    channels_last: bool = False


def convert(raw: Tensor, type: Type, ne: tuple[int, int, int, int], form: Form) -> Tensor:
    """``raw``, a typed view of memory, in ``form``; always a copy unless it has that form already."""
    x = raw if type.plain else dequantize(raw, type, ne, form.dtype)
    if (x.dtype, form.dtype, x.device.type) == (torch.float16, torch.bfloat16, "cpu"):
        x = _bfloat16(x)
    if form.channels_last:
        return x.to(form.dtype, memory_format=torch.channels_last)
    return x.to(form.dtype)


def _bfloat16(x: Tensor) -> Tensor:
    """``x``, float16 on a CPU, as bfloat16. Torch has no vector code for this pair: it goes through float32, in pieces
    that stay in the cores' caches, which takes a quarter of the time."""
    y = torch.empty(x.shape, dtype=torch.bfloat16)
    size = PIECE * torch.get_num_threads()
    between = torch.empty(min(size, x.numel()), dtype=torch.float32)
    for part, result in zip(torch.split(x.reshape(-1), size), torch.split(y.view(-1), size), strict=True):
        result.copy_(between[: len(part)].copy_(part))
    return y


@dataclass(frozen=True, slots=True)
class _Entry:
    tensor: Tensor
    start: int
    end: int
    size: int


class Weights:
    """Converted weights by place and form. An entry lives until its bytes are written or its buffer is freed.

    Once ``budget`` bytes are full, further weights are converted at each use: nothing is thrown out for them, since a
    program uses all of its weights in turn and would find none of them again.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0
        self.dropped = 0
        """Counts entries that were forgotten: as long as it stays, every tensor handed out is still right."""
        self._entries: dict[int, dict[Hashable, _Entry]] = {}
        self._lock = Lock()

    def get(self, buffer: int, start: int, end: int, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The weight that ``key`` names, of bytes ``[start, end)`` of ``buffer``; ``make`` converts it."""
        with self._lock:
            entry = self._entries.get(buffer, {}).get(key)
        if entry is not None:
            return entry.tensor
        tensor = make()
        size = tensor.nbytes
        with self._lock:
            if self.used + size <= self.budget:
                self._entries.setdefault(buffer, {})[key] = _Entry(tensor, start, end, size)
                self.used += size
        return tensor

    def drop(self, buffer: int, start: int = 0, end: int | None = None) -> None:
        """Forget what was made of bytes ``[start, end)`` of ``buffer``, by default of all of it."""
        with self._lock:
            entries = self._entries.get(buffer)
            if not entries:
                return
            stale = [key for key, e in entries.items() if e.end > start and (end is None or e.start < end)]
            for key in stale:
                self.used -= entries.pop(key).size
            self.dropped += len(stale)

    def holds(self, buffer: int, key: Hashable) -> bool:
        """Whether the weight that ``key`` names is kept."""
        with self._lock:
            return key in self._entries.get(buffer, {})
