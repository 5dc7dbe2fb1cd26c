"""Arithmetic that is the same, to the last bit, on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def quotient(x: Tensor, divisor: float) -> Tensor:
    """``x / divisor`` to the last bit: by a number that is not in its memory, a GPU multiplies with the reciprocal."""
    return x / torch.full((1,), divisor, dtype=x.dtype, device=x.device)
