"""Arithmetic that is the same, to the last bit, on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def quotient(x: Tensor, divisor: float) -> Tensor:
    """``x / divisor``, correctly rounded. (Given the divisor as a number, torch multiplies with its reciprocal on a
    GPU.)"""
    return x / torch.full((1,), divisor, dtype=x.dtype, device=x.device)


def rotated(x: Tensor, group: int) -> Tensor:
    """``x`` [rows, k] with each ``group`` of its numbers, 4ⁿ, rotated as ConvRot does it (arXiv:2512.03673): times the
    n-th Kronecker power of H4 / 2, H4 = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]. It is its own
    inverse. Additions have the order of stable-diffusion.cpp's ggml: what is rounded to 8 bits next goes the same way.
    """
    shape = x.shape
    x = x * group**-0.5  # a power of two
    step = 1
    while step < group:
        a, b, c, d = x.reshape(-1, 4, step).unbind(1)
        x = torch.stack((a + b + c - d, a + b - c + d, a - b + c + d, b - a + c + d), 1)
        step *= 4
    return x.reshape(shape)
