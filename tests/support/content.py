"""Bytes to keep and to ask for, and the name by which native clients call them."""

from __future__ import annotations

import numpy as np

from sdrpc.content import FNV_START, fnv1a

SIZE = 5 * 1000 * 1000
"""Two pieces, the second one odd."""


def noise(seed: int, size: int = SIZE) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def fnv(data: bytes) -> int:
    compiled = fnv1a()
    assert compiled is not None
    return compiled(data, FNV_START)
