"""What takes long, in the log: where the time of a first picture goes."""

from __future__ import annotations

import logging
import time

LONG = 0.05
"""Seconds from which on it is told."""


def tell_if_long(log: logging.Logger, what: str, began: float) -> None:
    """Tell for debugging that ``what`` is so, and how long that took from ``began`` (:func:`time.monotonic`) on."""
    if (took := time.monotonic() - began) >= LONG:
        log.debug("%s after %.2f s", what, took)
