"""Blocks that are not computed: what the middle of a transformer added last time is added again while little changes.

DBCache (dual block cache, of cache-dit; with one block in front and none behind it is the first block cache of
ParaAttention and diffusers), with the options that stable-diffusion.cpp documents. The first ``Fn`` blocks are always
computed. While they change the picture's tokens about as much as they did when all blocks were computed last, what the
blocks behind them added then is added again; the last ``Bn`` blocks are computed from there. A step costs the device
these blocks alone, and another number has to come back from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InvalidValue
from ..families.blocks import BLOCKS, STATE, Span
from ..families.model import ModelComponent


@dataclass(frozen=True)
class Options:
    """When blocks may be left out: where what the first ``Fn`` change differs by less than ``threshold`` (mean absolute
    difference, relative to the mean), in steps behind the first ``warmup``, in at most ``max_cached_steps`` and in
    ``max_continuous_cached_steps`` one after the other (below 0: any number). ``mask``: of steps that have an entry,
    1 is computed, and 0 may be left out, or is, if ``always`` so.
    """

    Fn: int = 8
    Bn: int = 0
    threshold: float = 0.08
    warmup: int = 8
    max_cached_steps: int = -1
    max_continuous_cached_steps: int = -1
    mask: tuple[int, ...] = ()
    always: bool = False

    @property
    def wrong(self) -> str:
        """What makes no sense of it, if anything."""
        if not (self.Fn >= 1 and min(self.Bn, self.warmup) >= 0):
            return "Fn can be 1 and more, Bn and warmup 0 and more"
        return "" if self.threshold >= 0 else "threshold can be 0 and more"


def check(options: Options, title: str, component: ModelComponent) -> None:
    """Raises :class:`InvalidValue` where a diffusion model leaves nothing to reuse; ``title``: of its family."""
    count, first, last = component.blocks, options.Fn, options.Bn
    if not count:
        reason = f"{title} has no row of blocks that could be left out; easycache leaves out whole steps"
        raise InvalidValue("cache_mode", "dbcache", reason)
    if first + last >= count:
        reason = f"of the {count} blocks of the {component.found.component.title} none is left between these"
        raise InvalidValue("cache_option", f"Fn={first},Bn={last}", f"{reason}; {count - 1} together can be")


Run = Callable[[Mapping[str, Any], Mapping[str, Any]], Sequence[Any]]
"""Runs the diffusion model with options added to its configuration, from inputs by name to outputs; these are arrays,
here or on a device."""


class DBCache:
    """What is remembered between the evaluations of one picture, of what is asked at one time.

    ``kept``: whether what is between blocks stays on the diffusion model's device."""

    def __init__(self, options: Options, blocks: int, kept: bool = True) -> None:
        self.kept = kept
        self.step = 0
        """Steps that are over."""
        self.asked, self.reused = 0, 0
        """Evaluations, and those of which blocks were left out."""
        self._options, self._blocks = options, blocks
        self._steps: set[int] = set()
        self._change: Any = None
        self._added: Any = None
        self._clock = _Clock()

    @property
    def saved(self) -> float | None:
        """About how many seconds were saved; None: it is not known, for no two evaluations can be compared."""
        return self._clock.saved(self.reused)

    def predict(self, run: Run, inputs: Mapping[str, Any]) -> Any:
        """The diffusion model's prediction."""
        first, last = self._options.Fn, self._blocks - self._options.Bn
        self.asked += 1
        state, change = run({BLOCKS: Span(0, first)}, inputs)
        if self._reuses(change):
            self.reused += 1
            self._steps.add(self.step)
            (predicted,) = run({BLOCKS: Span(last, last)}, {**inputs, STATE: state + self._added})
        else:
            predicted, self._added = run({BLOCKS: Span(first, last)}, {**inputs, STATE: state})
            self._change = change
        return predicted

    def _reuses(self, change: Any) -> bool:
        """Whether blocks are left out, if the first ones made this ``change``."""
        options, step = self._options, self.step
        masked = options.mask[step] if step < len(options.mask) else None
        if self._change is None or masked == 1 or step < options.warmup or not self._may_again():
            self._clock.lost()
            return False
        if masked == 0 and options.always:
            self._clock.lost()
            return True
        difference = float(np.asarray(abs(change - self._change).mean() / abs(self._change).mean()))
        reuses = difference < options.threshold
        self._clock.tick(reuses)
        return reuses

    def _may_again(self) -> bool:
        """Whether another step may leave out blocks, after those that did."""
        before = self._steps - {self.step}
        most, most_in_row = self._options.max_cached_steps, self._options.max_continuous_cached_steps
        row = next(length for length in range(len(before) + 1) if self.step - 1 - length not in before)
        return not 0 <= most <= len(before) and not 0 <= most_in_row <= row


class _Clock:
    """Seconds of evaluations, each from its decision to the next one: that is when a device is known to be done."""

    def __init__(self) -> None:
        self._seconds: dict[bool, list[float]] = {True: [], False: []}
        self._last: tuple[float, bool] | None = None

    def tick(self, reuses: bool) -> None:
        """An evaluation was decided to leave out blocks, or not to."""
        now = time.perf_counter()
        if self._last is not None:
            began, before = self._last
            self._seconds[before].append(now - began)
        self._last = now, reuses

    def lost(self) -> None:
        """An evaluation is not decided, so that nobody waits for the one before."""
        self._last = None

    def saved(self, reused: int) -> float | None:
        short, long = (float(np.mean(each)) if (each := self._seconds[kind]) else None for kind in (True, False))
        return None if short is None or long is None else max(0.0, reused * (long - short))


def told_of(caches: Sequence[DBCache], options: Options, blocks: int) -> str:
    """How much was not computed, in words."""
    asked, reused = sum(cache.asked for cache in caches), sum(cache.reused for cache in caches)
    known = [cache.saved for cache in caches if cache.saved is not None]
    seconds = f", about {sum(known):.1f} s less" if reused and known else ""
    between = blocks - options.Fn - options.Bn
    return f"{between} of {blocks} blocks were not computed in {reused} of {asked} evaluations{seconds}"
