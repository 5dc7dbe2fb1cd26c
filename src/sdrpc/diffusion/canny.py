"""Edges of a picture, for ControlNets that were trained on such: Canny's method as stable-diffusion.cpp computes it.

With its peculiarities: whatever the direction of a slope, it is compared with its neighbours above and below (and where
it falls to the left, with the maximum), and weak edges are followed in one pass over the picture.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .pictures import F32, Pixels, f32

SIGMA = f32(1.4)
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
    red, green, blue = np.moveaxis(image.astype(f32) / f32(255), 2, 0)
    grey = f32(0.2989) * red + f32(0.5870) * green + f32(0.1140) * blue
    smooth = _convolved(grey, _gaussian())
    across, down = _convolved(smooth, _ACROSS), _convolved(smooth, _DOWN)
    slope = np.sqrt(across * across + down * down)
    if not slope.max() > 0:
        return np.zeros_like(image)
    edges = _thinned(slope * (f32(1) / slope.max()), np.arctan2(down, across))
    high = edges.max() * HIGH
    levels = np.where(edges >= high, STRONG, np.where(edges >= high * LOW, WEAK, edges))
    inside = np.zeros(levels.shape, bool)
    inside[MARGIN : levels.shape[0] - MARGIN + 1, MARGIN : levels.shape[1] - MARGIN + 1] = True
    followed = _followed(np.where(inside, levels, f32(0)))
    return np.repeat((np.clip(followed, 0, 1) * f32(255) + f32(0.5)).astype(np.uint8)[..., None], 3, axis=2)


def _gaussian() -> F32:
    """Rounded as it is there: plain areas are edges or none by the last bit."""
    places = np.arange(-2, 3, dtype=f32)
    squares, twice = places[:, None] ** 2 + places[None] ** 2, f32(2) * (SIGMA * SIGMA)
    return np.exp(-(squares / twice).astype(np.float64)).astype(f32) * (f32(1) / (f32(np.pi) * twice))


def _convolved(plane: F32, kernel: F32) -> F32:
    """A correlation with zeros around."""
    half = len(kernel) // 2
    padded = np.pad(plane, half)
    height, width = plane.shape
    total = np.zeros(plane.shape, f32)
    for row, column in np.ndindex(*kernel.shape):
        total += kernel[row, column] * padded[row : row + height, column : column + width]
    return total


def _thinned(slope: F32, direction: F32) -> F32:
    """Slopes that are no smaller than those above and below, else 0; none at the border."""
    degrees = direction[1:-1, 1:-1] * f32(180) / f32(np.pi)
    degrees = np.where(degrees < 0, degrees + f32(180), degrees)
    steepest = np.where(degrees <= f32(157.5), np.maximum(slope[2:, 1:-1], slope[:-2, 1:-1]), f32(1))
    result = np.zeros_like(slope)
    result[1:-1, 1:-1] = np.where(slope[1:-1, 1:-1] >= steepest, slope[1:-1, 1:-1], f32(0))
    return result


def _followed(levels: F32) -> NDArray[np.float32]:
    """Weak edges become strong ones beside such, row by row, else nothing."""
    height, width = levels.shape
    for row, column in np.argwhere(levels == WEAK).tolist():
        if 0 < row < height - 1 and 0 < column < width - 1:
            beside = any(levels[row + down, column + right] == STRONG for down, right in _BEHIND)
            levels[row, column] = STRONG if beside else f32(0)
    return levels
