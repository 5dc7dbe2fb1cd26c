"""Edges of pictures, where they are known."""

from __future__ import annotations

import numpy as np
import pytest

from sdrpc.diffusion.canny import MARGIN, canny
from sdrpc.diffusion.pictures import Pixels

SIDE, FROM, TO = 64, 20, 44


def square(inside: int, around: int = 0) -> Pixels:
    image = np.full((SIDE, SIDE, 3), around, np.uint8)
    image[FROM:TO, FROM:TO] = inside
    return image


def test_a_square_has_edges_where_it_ends() -> None:
    """Steep slopes are white lines along its sides, at most as wide as what it was smoothed with."""
    edges = canny(square(255))
    assert edges.shape == (SIDE, SIDE, 3)
    assert edges.dtype == np.uint8
    assert (edges == edges[..., :1]).all()
    assert set(np.unique(edges)) <= {0, 255}
    found = np.argwhere(edges[..., 0])
    distance = np.minimum(np.abs(found - FROM), np.abs(found - (TO - 1))).min(1)
    assert distance.max() <= 3
    middle = edges[SIDE // 2, :, 0]
    assert middle[FROM - 3 : FROM + 3].any()
    assert middle[TO - 3 : TO + 3].any()
    assert not middle[FROM + 4 : TO - 4].any()


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_plain_picture_has_none_inside(value: int) -> None:
    """What lies beyond the border is black, whose edge is left out."""
    edges = canny(np.full((SIDE, SIDE, 3), value, np.uint8))
    assert not edges[MARGIN + 3 : -MARGIN - 3, MARGIN + 3 : -MARGIN - 3].any()


def test_a_slope_below_both_thresholds_is_none() -> None:
    edges = canny(np.maximum(square(255), np.roll(square(1), 0)))
    faint = square(255)
    faint[5:12, 50:57] = 1
    assert (canny(faint) == edges).all()
