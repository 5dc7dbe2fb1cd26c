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


def turned(x: Tensor, group: int) -> Tensor:
    """:func:`rotated` as a product with a matrix, which takes an eighth of the time on a GPU. Sums are in any order:
    of whole numbers of 8 bits they are exact all the same."""
    return (x.reshape(-1, group) @ _rotation(group, x)).reshape(x.shape)


def _rotation(group: int, x: Tensor) -> Tensor:
    """What :func:`turned` multiplies with, [group, group], for ``x``. H4 has its -1 where two digits add up to 3, so a
    number is negative where an odd count of the pairs of digits, base 4, of its row and column do."""
    place = torch.arange(group, device=x.device)
    pairs = place[:, None] ^ place
    negative = pairs & (pairs >> 1) & 0x5555_5555
    for shift in (16, 8, 4, 2):
        negative = negative ^ (negative >> shift)
    matrix: Tensor = (1 - 2 * (negative & 1)).to(x.dtype) * group**-0.5
    return matrix
