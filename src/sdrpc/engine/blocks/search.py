"""The searches by which ggml finds scales, for all groups of a tensor at once (ggml-quants.c, make_*_quants).

Groups are columns: ``x`` is [k, n], k elements of each of n groups; scales that are tried at once add a dimension
between them, [k, t, n]. Sums are made in ggml's order, one element after the other, since which trial wins can hang on
the last bit: the bytes are then the same as ggml's.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from .bits import constants

LEAST = 1e-15
"""What is smaller in all elements of a group counts as zero (GROUP_MAX_EPS)."""
_ROUNDER = 12582912.0
"""1.5 · 2^23: added to a number below 2^22 it leaves the nearest integer in the low bits."""
SWEEPS = 5
"""How often :func:`refined` goes over all elements."""


def in_order(terms: Tensor) -> Tensor:
    """The sum over the first dimension, in order."""
    return reduce(torch.add, terms.unbind(0))


def nearest(x: Tensor) -> Tensor:
    """The nearest integers, halves to even, as int32; where ``x`` is too large for that, what ggml gets."""
    return ((x + _ROUNDER).view(torch.int32) & 0x7FFFFF) - 0x400000


def away(x: Tensor) -> Tensor:
    """The nearest integers, halves away from zero (C's roundf), as int32."""
    whole = x.trunc()
    return (whole + ((x - whole).abs() >= 0.5) * x.sign()).int()


def root(x: Tensor) -> Tensor:
    """The square root to the last bit, which torch's own may miss on a CPU."""
    return x.sqrt() if x.device.type == "mps" else x.double().sqrt().float()  # MPS has no float64


def peak(x: Tensor, dim: int = 0) -> Tensor:
    """The first of the elements that are farthest from zero, along ``dim``, which stays with one element; zeros have no
    sign."""
    return x.gather(dim, x.abs().argmax(dim, keepdim=True)) + 0.0


def inverse(x: Tensor, of: float = 1.0) -> Tensor:
    """``of / x``, and zero where ``x`` is. (Torch divides a number by a tensor by multiplying with the reciprocal.)"""
    return torch.where(x == 0, 0.0, constants((of,), x.device) / x)


def best(sum_lx: Tensor, sum_l2: Tensor) -> tuple[Tensor, Tensor]:
    """The scale of the trial that explains most, and which one that is: [t, n] sums → [n], [n].

    Each has Σ w l x and Σ w l²; its best scale is the quotient, what that explains is (Σ w l x)² / Σ w l². The first is
    there to be beaten.
    """
    scale = torch.where(sum_l2[0] > 0, sum_lx[0] / sum_l2[0], 0.0)
    score, winner = scale * sum_lx[0], torch.zeros_like(scale, dtype=torch.int64)
    for trial in range(1, len(sum_lx)):  # each is compared with the best so far, whose score is rounded
        lx, l2 = sum_lx[trial], sum_l2[trial]
        better = (l2 > 0) & (lx * lx > score * l2)
        scale = torch.where(better, lx / l2, scale)
        score = torch.where(better, scale * lx, score)
        winner = torch.where(better, trial, winner)
    return scale, winner


def chosen(levels: Tensor, winner: Tensor) -> Tensor:
    """The [k, n] levels of each group's trial out of [k, t, n]."""
    index = winner.expand(levels.shape[0], 1, -1)
    return levels.gather(1, index).squeeze(1)


def symmetric(x: Tensor, top: int, weights: Tensor, steps: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x ≈ scale · level with levels from -top to top - 1: [n] scales and [k, n] levels. Besides the scale that brings
    the peak to -top, ``steps`` tenths of a level more are tried."""
    highest = peak(x)
    offsets = constants((0, *steps), x.device)[:, None] * 0.1
    trials = (-(top + offsets) / highest)[None]
    levels = nearest(trials * x[:, None]).clamp(-top, top - 1)
    wl = weights[:, None] * levels.float()
    scale, winner = best(in_order(weights[:, None] * x[:, None] * levels), in_order(wl * levels))
    zero = highest[0].abs() < LEAST
    return torch.where(zero, 0.0, scale), torch.where(zero, -top, chosen(levels, winner))


def refined(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """As :func:`symmetric`, for few levels: element after element is moved to the level that is best given the others,
    as long as that helps."""
    highest = peak(x)
    levels = nearest(inverse(highest, -top) * x).clamp(-top, top - 1).float()
    w = x * x
    wx = w * x
    sum_lx, sum_l2 = in_order(wx * levels), in_order(w * levels * levels)
    moved = list(levels.unbind(0))
    for _ in range(SWEEPS):
        for i, old in enumerate(moved):
            lx, l2 = sum_lx - wx[i] * old, sum_l2 - w[i] * old * old
            new = nearest(x[i] * l2 / lx).clamp(-top, top - 1).float()
            new_lx, new_l2 = lx + wx[i] * new, l2 + w[i] * new * new
            better = (lx > 0) & (new != old) & (new_l2 > 0)
            better &= new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
            moved[i] = torch.where(better, new, old)
            sum_lx, sum_l2 = torch.where(better, new_lx, sum_lx), torch.where(better, new_l2, sum_l2)
    zero = highest[0].abs() < LEAST
    scale = torch.where(zero | (sum_l2 <= 0), 0.0, sum_lx / sum_l2)
    return scale, torch.where(zero, -top, torch.stack(moved).int())


def affine(
    x: Tensor, top: int, weights: Tensor, start: float, trials: int, *, absolute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x ≈ scale · level - least with levels from 0 to top and least ≥ 0: [n] scales, [n] leasts, [k, n] levels.

    The first scale takes the whole range; ``trials`` more bring it to ``start``, ``start`` + 0.1 … levels above the
    top, from the least found so far, each with the scale and least that then fit best. The smallest error wins,
    weighted, ``absolute`` or squared.
    """

    def error(levels: Tensor, scale: Tensor, low: Tensor) -> Tensor:
        difference = scale * levels + low - x
        return in_order(weights * (difference.abs() if absolute else difference * difference))

    def levels_from(low: Tensor, levels: Tensor | float) -> Tensor:
        return nearest(levels / (high - low) * (x - low)).clamp(0, top).float()

    low, high = x.amin(0).clamp(max=0), x.amax(0)
    flat = high == low
    tops = torch.arange(trials, dtype=torch.float32, device=x.device) * 0.1 + start + top
    sum_w, sum_x = in_order(weights), in_order(weights * x)
    whole = constants((top,), x.device)
    scale = 1 / (whole / (high - low))
    found = levels_from(low, whole)
    least_error = error(found, scale, low)
    for trial in tops:
        levels = levels_from(low, trial)
        wl = weights * levels
        sum_l, sum_l2, sum_lx = in_order(torch.stack((wl, wl * levels, wl * x), 1))
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_low = (sum_l2 * sum_x - sum_l * sum_lx) / determinant
        new_scale = torch.where(new_low > 0, sum_lx / sum_l2, (sum_w * sum_lx - sum_x * sum_l) / determinant)
        new_low = new_low.clamp(max=0)
        new_error = error(levels, new_scale, new_low)
        better = (determinant > 0) & (new_error < least_error) & ~flat
        found, scale = torch.where(better, levels, found), torch.where(better, new_scale, scale)
        low, least_error = torch.where(better, new_low, low), torch.where(better, new_error, least_error)
    return torch.where(flat, 0.0, scale), -low, torch.where(flat, 0.0, found).int()
