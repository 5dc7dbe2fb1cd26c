"""Arithmetic that is the same, to the last bit, on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def quotient(x: Tensor, divisor: float) -> Tensor:
    """``x / divisor``, correctly rounded. (Given the divisor as a number, torch multiplies with its reciprocal on a
    GPU.)"""
    return x / torch.full((1,), divisor, dtype=x.dtype, device=x.device)
