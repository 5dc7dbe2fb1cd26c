"""What a request says that changes nothing about its pictures. They are drawn all the same, as stable-diffusion.cpp
does, but whoever said it should know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..families.model import Model
from .halves import HIGH_NOISE
from .request import Request, Settings
from .samplers import find_sampler


class Idle(NamedTuple):
    """The request's ``field`` has no effect; ``beside``: with what."""

    field: str
    beside: str


class _Rule(NamedTuple):
    """``field`` has an effect where a model with these settings ``uses`` it; ``beside`` says with what it has none."""

    field: str
    uses: Callable[[Model, Settings], bool]
    beside: Callable[[Model, Settings], str]


_NOTHING = Request("")
"""Which says nothing."""

_RULES = (
    _Rule("negative_prompt", lambda _, how: how.predictions > 1, lambda *_: "a CFG scale of 1"),
    _Rule("guidance", lambda model, _: model.is_told_guidance, lambda *_: "a model that was not distilled with it"),
    _Rule("clip_skip", lambda model, _: model.family.skips_clip, lambda model, _: model.family.title),
    _Rule("eta", lambda _, how: find_sampler(how.sampling_method).eta is not None, lambda _, how: how.sampling_method),
)


def idle_fields(model: Model, request: Request, settings: Settings) -> Iterator[Idle]:
    """What of ``request``, whose ``settings`` are those with everything filled in, has no effect on what ``model``
    draws."""
    halves = [settings.of(name) for name in ("diffusion", HIGH_NOISE) if name in model.components]
    for field, uses, beside in _RULES:
        said = getattr(request, field) != getattr(_NOTHING, field)
        if said and not any(uses(model, half) for half in halves):
            yield Idle(field, beside(model, settings))
