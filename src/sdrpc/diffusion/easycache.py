"""Steps that are not computed: the model's last change to its input is used again while little would change.

EasyCache (Zhou et al. 2025, "Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching")
with the arithmetic of stable-diffusion.cpp. Over a network a step that is left out is a round trip that is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .predictions import F32, TIMESTEPS, Prediction, f32


@dataclass(frozen=True)
class Options:
    """When steps may be left out: while the output is expected to change by less than ``threshold`` (relative to its
    size, added up over the steps left out), between ``start`` and ``end`` of the way, 0 … 1."""

    threshold: float = 0.2
    start: float = 0.15
    end: float = 0.95

    @property
    def wrong(self) -> str:
        """What makes no sense of it, if anything."""
        sensible = self.threshold >= 0 and 0 <= self.start < self.end <= 1
        return "" if sensible else "threshold can be 0 and more, start and end 0 … 1, start first"


class EasyCache:
    """What is remembered between the steps of one picture."""

    def __init__(self, options: Options, prediction: Prediction) -> None:
        self.reused = 0
        """Steps that were left out."""
        self._threshold = f32(options.threshold)
        self._highest, self._lowest = (self._level(share, prediction) for share in (options.start, options.end))
        self._changes: tuple[F32, ...] = ()
        self._input: F32 | None = None
        self._output: F32 | None = None
        self._rate: f32 | None = None
        self._moved: f32 | None = None
        self._expected = f32(0)

    @staticmethod
    def _level(share: float, prediction: Prediction) -> f32:
        if not 0 < share < 1:
            return f32(np.inf) if share <= 0 else f32(0)
        return prediction.sigma(f32(1 - share) * f32(TIMESTEPS - 1))

    def covers(self, sigma: f32) -> bool:
        """Whether steps at this level may be left out."""
        return bool(self._lowest < sigma <= self._highest)

    def guess(self, x: F32) -> tuple[F32, ...] | None:
        """What the model would predict from ``x``, in the order of :meth:`remember`; None: it has to be asked."""
        if self._input is None or self._output is None:
            return None
        self._moved = _mean(x - self._input)
        size = _mean(self._output)
        if self._rate is None or not self._moved > 0 or not size > 0:
            return None
        self._expected += self._rate * self._moved / size
        if self._expected < self._threshold:
            self.reused += 1
            return tuple(x + change for change in self._changes)
        self._expected = f32(0)
        return None

    def remember(self, x: F32, predictions: Sequence[F32]) -> None:
        """What the model predicted from ``x``; the last is the one by which changes are measured."""
        self._changes = tuple(predicted - x for predicted in predictions)
        output = predictions[-1]
        if self._output is not None and self._moved is not None and self._moved > 0:
            changed = _mean(output - self._output)
            if changed > 0:
                self._rate = changed / self._moved
        self._input, self._output, self._moved, self._expected = x, output, None, f32(0)


def _mean(values: F32) -> f32:
    return f32(np.abs(values).mean(dtype=np.float64))
