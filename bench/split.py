"""A model on two devices. Layers, where neither has room for the whole of it: one alone refuses, both together draw
what one with room draws, to the bit. Prompts, where the model is guided: each has the whole of it and evaluates one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

from sdrpc.diffusion.session import Session
from sdrpc.errors import DoesNotFit
from sdrpc.runtime.chain import Chain, Lanes

from . import prompts
from .families import Case, case_of
from .memory import GB
from .rows import Mark, Row
from .sampling import Sampled, difference, draw
from .scaling import LAYERS, PROMPTS, in_pairs, opened
from .setup import Setup

SHARE = 0.6
"""Of the diffusion model's weights, that a device may have."""


def run(setup: Setup) -> Iterator[Row]:
    parts = setup.families.parts
    for family in setup.families.names:
        case = case_of(setup, family)
        with opened(setup, 2) as devices, in_pairs(setup, devices) as pairs:
            one, note = Chain((devices[0],)), f"{case.request.width}×{case.request.height}, {case.request.steps} steps"
            if PROMPTS in parts and case.request.cfg_scale != 1:
                for row in prompts.rows(partial(_drawn, case), one, pairs, note, case.mark(prompts.MARK)):
                    yield replace(row, what=f"{row.what}, {case.title}")
            if LAYERS in parts:
                yield from _layers(case, one, pairs)


def _layers(case: Case, one: Chain, two: Mapping[str, Chain]) -> Iterator[Row]:
    with _session(case, one, {}) as session:
        whole = session.model["diffusion"].found.nbytes()
    limit = {"": int(SHARE * whole)}
    try:
        _sampled(case, one, limit)
    except DoesNotFit:
        pass
    else:
        raise AssertionError(f"{case.title}: one device took what it has no room for")
    alone = _sampled(case, one, {})
    note = f"{whole / GB:.2f} GB of weights, a device may have {limit[''] / GB:.2f} (max_vram); one alone refuses"
    for where, pair in two.items():
        halves = _sampled(case, pair, limit)
        yield Row(
            f"same latents, layers on two devices of {where}, {case.title}",
            100 * difference(halves.latents, alone.latents), "%", None, "", Mark(0.0, "ours"),
            f"distance (relative, L2) from one device's; {note}",
        )  # fmt: skip
        yield Row(
            f"step, layers on two devices of {where}, {case.title}", halves.seconds * 1e3, "ms", alone.seconds * 1e3,
            "one device with room for all", None, note,
        )  # fmt: skip


def _drawn(case: Case, place: Chain | Lanes, guided: bool) -> Sampled:
    """With all devices free for it."""
    return _sampled(case if guided else replace(case, request=replace(case.request, cfg_scale=1.0)), place, {})


def _session(case: Case, place: Chain | Lanes, limit: Mapping[str, int]) -> Session:
    """The diffusion model there, everything else on the first device."""
    first = (place.chains[0] if isinstance(place, Lanes) else place).devices[0]
    return Session.open(case.files, {"diffusion": place, "all": first}, case.cache, max_vram=limit)


def _sampled(case: Case, place: Chain | Lanes, limit: Mapping[str, int]) -> Sampled:
    """The second of two pictures: the first uploads."""
    with _session(case, place, limit) as session:
        settings = session.settings(case.request, case.film)
        draw(session, settings)
        return draw(session, settings)
