"""The weights of a prompt's attention syntax, applied to what a text encoder made of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDING = 1e-6
"""What summing float32 numbers leaves of a mean that is zero, in parts of their size."""


def apply_weights(hidden: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Hidden states (length, width) times each token's weight, scaled back to the mean that they had before.

    A mean that is nothing but rounding is left alone: behind a layer norm without weights, as in models of random
    numbers, the quotient of two such means would be noise, another one on every device.
    """
    before = np.float32(hidden.mean(dtype=np.float64))
    weighted = hidden * weights[:, None]
    after = np.float32(weighted.mean(dtype=np.float64))
    least = ROUNDING * float(np.sqrt(np.square(hidden, dtype=np.float64).mean()))
    return weighted * (before / after) if min(abs(before), abs(after)) > least else weighted
