"""What a sampler follows, from several predictions of the diffusion model: with the prompt, with the negative one, with
what is around a mask, and without some layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from ..families.base import F32, Conditions
from ..runtime.ahead import DeviceArray
from ..runtime.elsewhere import Elsewhere
from ..runtime.mirrors import Mirrored
from .dbcache import DBCache
from .denoising import Guess
from .easycache import EasyCache
from .pictures import f32, finite

T = TypeVar("T")


class Ask(Protocol):
    """The diffusion model as :meth:`sdrpc.diffusion.sampling.Sampling.predict`."""

    def __call__(self, latents: F32, timestep: F32, conditions: Conditions, *, lane: int = 0, **options: Any) -> F32:
        """Latents (1, c, h, w), a timestep (1,) and the conditions of b prompts → the prediction (b, c, h, w), by the
        model of that lane."""
        ...


class Told(NamedTuple):
    """What the diffusion model is told of one picture: about the prompt; about the negative one, where guidance needs
    it; about the negative one beside what is around a mask, where that is guided on its own."""

    positive: Conditions
    negative: Conditions | None = None
    shown: Conditions | None = None

    def followed(self, cfg_scale: float, img_cfg_scale: float) -> Told:
        """What of it guidance by these scales needs."""
        return Told(self.positive) if cfg_scale == img_cfg_scale == 1 else self

    @property
    def by_name(self) -> dict[str, Conditions]:
        """What there is of it, as it stands in a batch: the prompt comes last."""
        named = {"negative": self.negative, "shown": self.shown, "positive": self.positive}
        return {name: conditions for name, conditions in named.items() if conditions is not None}


@dataclass(frozen=True)
class LeftOut:
    """Skip layer guidance (Stability AI, for SD 3.5 medium): away from what the model predicts without ``layers``.

    ``scale``: how far; ``start`` and ``end``: between which of the steps, 0 … 1.
    """

    scale: float
    layers: tuple[int, ...]
    start: float
    end: float

    def at(self, step: int, steps: int) -> bool:
        """Whether in a step, counted from 1. As stable-diffusion.cpp counts, which has one level more than steps."""
        return int(self.start * (steps + 1)) < step < int(self.end * (steps + 1))


class Skipped(NamedTuple):
    """Layers, and between which of the steps they are left out, 0 … 1."""

    layers: tuple[int, ...]
    start: float
    end: float


SKIPPED = Skipped((7, 8, 9), 0.01, 0.2)
"""What is usual for SD 3.5 medium."""


class Guide:
    """The model for one picture as a sampler asks it. ``step_done`` has to be told of every step that is over.

    With several ``lanes`` the model is there as often, and what it is asked at one time is asked on all of them.
    ``cache`` leaves out steps; what ``blocks`` makes leaves out blocks, and each of what is asked apart has one."""

    def __init__(
        self,
        ask: Ask,
        told: Told,
        sigmas: F32,
        *,
        cfg_scale: float,
        img_cfg_scale: float,
        left_out: LeftOut | None = None,
        cache: EasyCache | None = None,
        blocks: Callable[[], DBCache] | None = None,
        tempered: Callable[[F32, F32], F32] | None = None,
        lanes: Sequence[int] = (0,),
    ) -> None:
        self._tempered, self._lanes = tempered, lanes
        self._ask, self._sigmas, self._left_out, self._cache = ask, sigmas, left_out, cache
        self._cfg, self._img_cfg = f32(cfg_scale), f32(img_cfg_scale)
        self._conditions = told.by_name
        alike = len({tuple(array.shape for array in each.values()) for each in self._conditions.values()}) == 1
        everything = list(self._conditions.values())
        self._batches = [_joined(everything)] if alike and len(lanes) == 1 else everything
        self.caches = [] if blocks is None else [blocks() for _ in self._batches]
        """What is remembered of blocks, of each batch."""
        self._done, self._first = 0, True
        self._begun = False
        """Whether the model was asked anything: then it is on its devices."""

    def step_done(self, done: int) -> None:
        """``done`` steps are over."""
        self._done, self._first = done, True
        for cache in self.caches:
            cache.step = done

    def __call__(self, x: F32, timestep: f32) -> Guess:
        """Classifier-free guidance (Ho & Salimans 2022), in two parts where a picture is shown (Brooks et al. 2023)."""
        predicted = dict(zip(self._conditions, self._predicted(x, timestep), strict=True))
        guided = positive = predicted["positive"]
        negative, shown = predicted.get("negative"), predicted.get("shown")
        if negative is not None and shown is not None:
            guided = negative + self._img_cfg * (shown - negative) + self._cfg * (positive - shown)
        elif negative is not None:
            guided = negative + self._cfg * (positive - negative)
        if guided is not positive and self._tempered is not None:
            guided = self._tempered(guided, positive)
        if self._left_out is not None and self._left_out.at(self._done + 1, len(self._sigmas) - 1):
            layers = list(self._left_out.layers)
            (without,) = self._asked_of(0, x, timestep, [(self._conditions["positive"], {"skip_layers": layers})])
            (without,) = self._shared(x, [without])
            guided = guided + (positive - without) * f32(self._left_out.scale)
        return Guess(guided, negative)

    def _predicted(self, x: F32, timestep: f32) -> Sequence[F32]:
        """Of all that the model is told, the prompt last; guessed where a step may be left out."""
        cache, first, self._first = self._cache, self._first, False
        if cache is None or not cache.covers(f32(self._sigmas[self._done])):
            return self._computed(x, timestep)
        guessed = cache.guess(x) if first else None
        if guessed is not None:
            return guessed
        computed = self._computed(x, timestep)
        cache.remember(x, computed)
        return computed

    def _computed(self, x: F32, timestep: f32) -> Sequence[F32]:
        """One evaluation of a batch, or one of each where the texts differ in length or lanes are to be used."""
        lanes = self._lanes
        asked: list[tuple[Conditions, dict[str, Any]]] = [(batch, {}) for batch in self._batches]
        if self.caches:
            asked = [(batch, {"blocks": cache}) for batch, cache in zip(self._batches, self.caches, strict=True)]

        ahead = isinstance(x, Elsewhere) and (self._begun or not isinstance(x, Mirrored))
        given = x if ahead else np.asarray(x)  # at first the model goes to all lanes, which is to be at one time
        works = [
            partial(self._asked_of, position, given, timestep, asked[position :: len(lanes)])
            for position in range(min(len(lanes), len(asked)))
        ]
        by_lane = [work() for work in works] if ahead else at_once(works)
        self._begun = True
        predicted = [by_lane[number % len(lanes)][number // len(lanes)] for number in range(len(asked))]
        return [each[number : number + 1] for each in self._shared(x, predicted) for number in range(len(each))]

    def _asked_of(
        self, position: int, x: F32, timestep: f32, asked: Sequence[tuple[Conditions, dict[str, Any]]]
    ) -> list[F32]:
        """What the model predicts in the lane at ``position`` for conditions and further options: there, if x is."""
        mine, lane = x.copies[position] if isinstance(x, Mirrored) else x, self._lanes[position]
        found = [self._ask(mine, np.array([timestep], f32), each, lane=lane, **options) for each, options in asked]
        if isinstance(mine, DeviceArray):  # nobody waits for its numbers: what comes of them is looked at
            return found
        return [finite(each, f"the diffusion model's prediction at timestep {timestep:.3g}") for each in found]

    def _shared(self, x: F32, predicted: Sequence[F32]) -> Sequence[F32]:
        """What lanes have predicted, on the devices of all of them if x is."""
        return x.mirrors.shared(predicted) if isinstance(x, Mirrored) else predicted


def at_once(works: Sequence[Callable[[], T]]) -> list[T]:
    """What ``works`` give, all at the same time. Nothing of it goes on when this is over: then the first error is
    raised."""
    if len(works) == 1:
        return [works[0]()]
    with ThreadPoolExecutor(len(works)) as pool:
        waiting = [pool.submit(work) for work in works]
    return [each.result() for each in waiting]


def _joined(conditions: Sequence[Conditions]) -> Mapping[str, F32]:
    return {name: np.concatenate([each[name] for each in conditions]) for name in conditions[0]}
