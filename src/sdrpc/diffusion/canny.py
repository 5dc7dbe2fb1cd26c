"""Edges of a picture, for ControlNets that were trained on such: Canny's method as stable-diffusion.cpp computes it.

With its peculiarities: convolutions in half precision, gradients of 0 … 22.5 degrees compared with the maximum instead
of their neighbours, and weak edges followed in one pass over the picture.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .pictures import F32, Pixels, f32

SIGMA = 1.4
HIGH, LOW = f32(0.08), f32(0.08)
"""Thresholds: the higher one in parts of the strongest gradient, the lower one in parts of the higher."""
MARGIN = 3
"""Pixels at the border without edges."""
WEAK, STRONG = f32(0.8), f32(1)

_ACROSS = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], f32)
_DOWN = np.array([[1, 2, 1], [0, 0, 0], [-1, -2, -1]], f32)
_BEHIND = ((-1, 1), (0, 1), (-1, 0), (1, 0), (-1, -1), (0, -1))
"""(row, column) of the neighbours that make a weak edge a strong one."""


def canny(image: Pixels) -> Pixels:
    """The edges of ``image`` (height, width, 3), white on black."""
    grey = image.astype(f32) / f32(255) @ np.array([0.2989, 0.5870, 0.1140], f32)
    smooth = _convolved(grey, _gaussian())
    across, down = _convolved(smooth, _ACROSS), _convolved(smooth, _DOWN)
    slope = np.sqrt(across * across + down * down)
    if not slope.max() > 0:
        return np.zeros_like(image)
    edges = _thinned(slope / slope.max(), np.arctan2(down, across), smooth)
    high = edges.max() * HIGH
    levels = np.where(edges >= high, STRONG, np.where(edges >= high * LOW, WEAK, edges))
    inside = np.zeros(levels.shape, bool)
    inside[MARGIN : levels.shape[0] - MARGIN + 1, MARGIN : levels.shape[1] - MARGIN + 1] = True
    followed = _followed(np.where(inside, levels, f32(0)))
    return np.repeat((np.clip(followed, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)


def _gaussian() -> F32:
    places = np.arange(-2, 3)
    squares = (places[:, None] ** 2 + places[None] ** 2).astype(f32)
    return (np.exp(-squares / f32(2 * SIGMA**2)) / f32(2 * np.pi * SIGMA**2)).astype(f32)


def _convolved(plane: F32, kernel: F32) -> F32:
    """A correlation with zeros around, of numbers in half precision."""
    half = len(kernel) // 2
    padded = np.pad(plane.astype(np.float16).astype(f32), half)
    weights = kernel.astype(np.float16).astype(f32)
    height, width = plane.shape
    total = np.zeros(plane.shape, f32)
    for row, column in np.ndindex(*weights.shape):
        total += weights[row, column] * padded[row : row + height, column : column + width]
    return total


def _thinned(slope: F32, direction: F32, border: F32) -> F32:
    """Slopes that are no smaller than both neighbours along their direction, else 0; ``border``: what stays there."""
    degrees = direction[1:-1, 1:-1] * f32(180) / f32(np.pi)
    degrees = np.where(degrees < 0, degrees + f32(180), degrees)

    def beside(row: int, column: int) -> F32:
        height, width = slope.shape
        return slope[1 + row : height - 1 + row, 1 + column : width - 1 + column]

    ones = np.ones_like(degrees)
    sectors = [degrees >= 157.5, degrees >= 112.5, degrees >= 67.5, degrees >= 22.5, degrees <= 0]
    before = [beside(1, 0), beside(-1, -1), beside(0, 1), beside(-1, 1), beside(1, 0)]
    after = [beside(-1, 0), beside(1, 1), beside(0, -1), beside(1, -1), beside(-1, 0)]
    here = slope[1:-1, 1:-1]
    kept = (here >= np.select(sectors, before, ones)) & (here >= np.select(sectors, after, ones))
    result = border.copy()
    result[1:-1, 1:-1] = np.where(kept, here, f32(0))
    return result


def _followed(levels: F32) -> NDArray[np.float32]:
    """Weak edges become strong ones beside such, row by row, else nothing."""
    height, width = levels.shape
    for row, column in np.argwhere(levels == WEAK).tolist():
        if 0 < row < height - 1 and 0 < column < width - 1:
            beside = any(levels[row + down, column + right] == STRONG for down, right in _BEHIND)
            levels[row, column] = STRONG if beside else f32(0)
    return levels
