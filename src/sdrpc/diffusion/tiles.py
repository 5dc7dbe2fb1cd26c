"""Large pictures piece by piece: tiles that overlap and are blended, so that no piece needs much memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import NamedTuple, cast

import numpy as np

from .pictures import F32, f32


class Tiling(NamedTuple):
    """Tiles of ``width`` and ``height`` cells, which share ``overlap`` of a side with the next one, 0 … 0.9. A cell is
    a latent of a VAE, a pixel of an upscaler."""

    width: int
    height: int
    overlap: float = 0.5


class Cell(NamedTuple):
    """Numbers on a side of a cell: of what goes ``into`` a network, and of what comes ``out``."""

    into: int
    out: int


def tiled(
    x: F32, tiling: Tiling, cell: Cell, run: Callable[[F32], F32], on_tile: Callable[[int, int], None] = lambda *_: None
) -> F32:
    """``run`` of ``x`` (…, h, w), which gives (…, h · out / into, w · out / into), from tiles.

    All have one size, so that one graph does for all. Where they overlap each counts the less the nearer its edge is
    (smootherstep, as in stable-diffusion.cpp). ``on_tile`` is told how many are done, and of how many.
    """
    height, width = (side // cell.into for side in x.shape[-2:])
    rows, columns = min(tiling.height, height), min(tiling.width, width)
    down, across = _sides(height, rows, tiling.overlap, cell.out), _sides(width, columns, tiling.overlap, cell.out)
    weights = np.zeros((height * cell.out, width * cell.out), f32)
    places = list(product(down, across))
    for number, ((top, by_row), (left, by_column)) in enumerate(places):
        piece = run(np.ascontiguousarray(x[..., _part(top, rows, cell.into), _part(left, columns, cell.into)]))
        if not number:
            total = np.zeros((*piece.shape[:-2], *weights.shape), f32)
        place, weight = (_part(top, rows, cell.out), _part(left, columns, cell.out)), np.outer(by_row, by_column)
        total[..., place[0], place[1]] += piece * weight
        weights[place] += weight
        on_tile(number + 1, len(places))
    return cast(F32, total / weights)


def _part(start: int, size: int, side: int) -> slice:
    return slice(start * side, (start + size) * side)


def _sides(length: int, size: int, overlap: float, out: int) -> list[tuple[int, F32]]:
    """Where tiles of ``size`` begin along ``length``, evenly, and what each number of theirs counts."""
    stride = max(1, int(size * (1 - overlap)))
    count = -(-(length - size) // stride) + 1
    begins = [round(number * (length - size) / max(1, count - 1)) for number in range(count)]
    shared = f32(max(1, (size - stride) * out))
    inside = (np.arange(size * out, dtype=f32) + f32(0.5)) / shared
    rising, falling = _smootherstep(inside), _smootherstep(inside[::-1])
    ones = np.ones_like(rising)
    return [(begin, (rising if begin > 0 else ones) * (falling if begin + size < length else ones)) for begin in begins]


def _smootherstep(x: F32) -> F32:
    x = np.clip(x, f32(1e-3), f32(1))  # not 0: somebody has to count
    return x * x * x * (x * (x * f32(6) - f32(15)) + f32(10))
