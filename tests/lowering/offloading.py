"""Modules to offload, and how results are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.lowering.compare import TOLERANCE, error


def same(mine: Any, theirs: Any, tolerance: float = TOLERANCE["exact"]) -> None:
    assert mine.dtype == theirs.dtype
    assert error(mine.detach().float().numpy(), theirs.detach().float().numpy()) <= tolerance


class Calling(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class Scale:
    def __init__(self, factor: float, table: Tensor | None = None) -> None:
        self.factor, self.table = factor, table


class Scaled(nn.Module):
    def forward(self, x: Tensor, scale: Scale) -> Tensor:
        y = x * scale.factor
        return y if scale.table is None else y + scale.table


class Writing(nn.Module):
    """Writes slices, as SlicedAttnProcessor does."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i in range(2):
            y[i : i + 1] = x[i : i + 1] * 2
        return y
