"""Pictures as pixels, and the check that what a model computes are numbers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import ComputeError

F32 = NDArray[np.float32]
f32 = np.float32


class Picture(NamedTuple):
    """A finished picture: uint8 (height, width, 3), and the seed that it was drawn with."""

    image: NDArray[np.uint8]
    seed: int


def to_pixels(picture: F32) -> NDArray[np.uint8]:
    """A picture (3, height, width) of -1 … 1 as pixels (height, width, 3) of 0 … 255, rounded half up."""
    unit = np.clip((picture + f32(1)) * f32(0.5), f32(0), f32(1))
    return np.ascontiguousarray((unit * f32(255) + f32(0.5)).astype(np.uint8).transpose(1, 2, 0))


def finite(values: F32, what: str) -> F32:
    """``values``, or :class:`ComputeError` that says what they are when some are no finite numbers."""
    if np.isfinite(values).all():
        return values
    broken = np.count_nonzero(~np.isfinite(values))
    raise ComputeError(
        f"{what}: {broken} of {values.size} values are NaN or infinite; damaged weights give that, and so may reduced "
        "precision (try --precision exact)"
    )
