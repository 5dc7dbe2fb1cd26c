"""Edges of pictures, where they are known."""

from __future__ import annotations

from hashlib import sha256

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


def scene(width: int, height: int) -> Pixels:
    y, x = np.mgrid[:height, :width]
    picture = np.stack([x * 255 // width, y * 255 // height, (x * y) % 97 * 2], -1)
    picture[height // 4 : height // 2, width // 3 : width // 2] = 250, 20, 90
    picture[(x - width // 2) ** 2 + (y - height // 2) ** 2 < 64] = 10, 200, 60
    return picture.astype(np.uint8)


@pytest.mark.parametrize(
    ("width", "height", "count", "digest"),
    [(64, 64, 472, "7ef708916deebe777866f5fb5270c3efd63f7efce267e4858d469d327e2e32bf"),
     (96, 40, 432, "ed2975be2a355c2ba84e859880078c3d3458a4d4184ac19869bb5a902e7ddafb"),
     (33, 57, 183, "a8b7a69d4bebe29f10d1aba48ecb1db97974c2b361d3ea5e609f9c5d79ae821e")],
)  # fmt: skip
def test_edges_are_stable_diffusion_cpps(width: int, height: int, count: int, digest: str) -> None:
    """What preprocess_canny of stable-diffusion-cpp-python 0.4.7 makes of the same pictures, pixel by pixel."""
    edges = canny(scene(width, height))
    assert set(np.unique(edges)) == {0, 255}
    assert np.count_nonzero(edges[..., 0]) == count
    assert sha256(np.packbits(edges[..., 0] > 0).tobytes()).hexdigest() == digest
