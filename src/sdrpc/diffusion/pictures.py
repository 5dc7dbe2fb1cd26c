"""Pictures as pixels: from and to the numbers that models work with, in another size, and the check that what a model
computes are numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import ComputeError

F32 = NDArray[np.float32]
f32 = np.float32
Pixels = NDArray[np.uint8]
"""A picture (height, width, 3), or a mask (height, width)."""


class Picture(NamedTuple):
    """A finished picture: uint8 (height, width, 3), and the seed that it was drawn with."""

    image: Pixels
    seed: int


class Sound(NamedTuple):
    """What is to be heard: ``samples``, float32 (ears, count) of -1 … 1, ``rate`` of them a second."""

    samples: F32
    rate: int


@dataclass(frozen=True)
class Video:
    """A film that was drawn, and the seed that it was drawn with.

    ``frames``: ``count`` pictures, uint8 (height, width, 3), each read from its device when it is asked for, once and
    before the session draws anything else; ``fps`` of them make a second. ``sound``: what is heard with them; None:
    nothing.
    """

    frames: Iterator[Pixels]
    count: int
    fps: int
    width: int
    height: int
    seed: int
    sound: Sound | None = None


def to_pixels(picture: F32) -> Pixels:
    """A picture (3, height, width) of -1 … 1 as pixels (height, width, 3) of 0 … 255, rounded half up."""
    unit = np.clip((picture + f32(1)) * f32(0.5), f32(0), f32(1))
    return np.ascontiguousarray((unit * f32(255) + f32(0.5)).astype(np.uint8).transpose(1, 2, 0))


def from_pixels(image: Pixels) -> F32:
    """Pixels (height, width, 3) as a picture (1, 3, height, width) of -1 … 1."""
    return np.ascontiguousarray(image.transpose(2, 0, 1)[None]).astype(f32) / f32(255) * f32(2) - f32(1)


def fitted(image: Pixels, width: int, height: int) -> Pixels:
    """``image`` in another size: what is around its middle in the shape of the size, each new pixel the mean, in
    linear light, of those in its place. As stable-diffusion.cpp's sd-cli does it."""
    rows, columns = image.shape[:2]
    if (columns, rows) == (width, height):
        return image
    wanted, given = f32(width) / f32(height), f32(columns) / f32(rows)
    kept_columns = max(1, int(f32(rows) * wanted)) if given > wanted else columns
    kept_rows = max(1, int(f32(columns) / wanted)) if given < wanted else rows
    top, left = (rows - kept_rows) // 2, (columns - kept_columns) // 2
    middle = image[top : top + kept_rows, left : left + kept_columns].reshape(kept_rows, kept_columns, -1)
    planes = [_LINEAR[middle[..., channel]] for channel in range(middle.shape[2])]
    scaled = [np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BOX)) for plane in planes]
    return _from_linear(np.stack(scaled, -1)).reshape(height, width, *image.shape[2:])


def _to_linear(values: F32) -> F32:
    """sRGB's transfer function: of 0 … 1, to linear light."""
    return np.where(values <= 0.04045, values / f32(12.92), ((values + f32(0.055)) / f32(1.055)) ** f32(2.4))


_LINEAR = _to_linear(np.arange(256, dtype=f32) / f32(255))


def _from_linear(light: F32) -> Pixels:
    light = np.clip(light, f32(0), f32(1))
    values = np.where(light <= 0.0031308, light * f32(12.92), f32(1.055) * light ** f32(1 / 2.4) - f32(0.055))
    return (values * f32(255) + f32(0.5)).astype(np.uint8)


def finite(values: F32, what: str) -> F32:
    """``values``, or :class:`ComputeError` that says what they are when some are no finite numbers."""
    if np.isfinite(values).all():
        return values
    broken = np.count_nonzero(~np.isfinite(values))
    raise ComputeError(
        f"{what}: {broken} of {values.size} values are NaN or infinite; damaged weights give that, and so may a device "
        "that computes with fewer bits (try precision exact)",
        "precision",
    )
