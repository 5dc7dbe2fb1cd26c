"""--auto-fit: components where a plan puts them that is made of what devices hold and how fast they are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..device_names import AUTO, folded
from ..diffusion.placement import assigned
from ..errors import DoesNotFit, Room
from ..runtime.chain import Chain, Lanes, devices_of
from . import report
from .progress import mebibytes

if TYPE_CHECKING:
    from ..device import Device
    from ..diffusion.fitting import Demand, Plan, Supply
    from ..diffusion.request import Settings
    from ..families.model import Model

Placed = Mapping[str, Sequence[Lanes]]


def is_asked_for(named: Iterable[Collection[str]]) -> bool:
    """Whether somebody wrote ``auto`` where devices are named."""
    return any(folded(name) == AUTO for names in named for name in names)


def fitted(
    model: Model,
    settings: Settings,
    placed: Placed,
    fixed: Collection[str],
    devices: Sequence[Device],
    limits: Mapping[str, int],
    waits: Mapping[str, str],
) -> dict[str, list[Lanes]]:
    """``placed``, but the model's components that are not ``fixed`` where a plan puts them, which is told. ``limits``:
    bytes of weights, by device; ``waits``: where weights are that nobody uses, as a session takes it. Raises
    :class:`DoesNotFit`."""
    from ..diffusion.demands import demands
    from ..diffusion.fitting import Plan, Share, fit, nearest
    from ..diffusion.rooms import weights_room

    if set(model.components) <= set(fixed):
        report.warn("auto-fit has nothing to plan: --backend names a device for each component")
        return {name: list(places) for name, places in placed.items()}
    wanted = {demand.name: demand for demand in demands(model, settings, Chain(tuple(devices)).target)}
    given = {device.name: weights_room(device, limits) for device in devices}
    rooms = {name: room.size for name, room in given.items()}
    for name in fixed:
        for device in devices_of(placed[name][:1]) if name in wanted else ():
            rooms[device.name] = max(0, rooms[device.name] - wanted[name].size)
    left = [demand for name, demand in wanted.items() if name not in fixed]
    supplies, most = _supplies(devices, rooms), max(rooms, key=lambda name: rooms[name])
    nowhere = {demand.name: demand for demand in left if fit([demand], supplies) is None}
    away = {name for name, where in assigned(list(wanted), waits, "params_backend", "auto").items() if where != "auto"}
    in_parts = {name for name, demand in nowhere.items() if name in away and rooms[most] > 2 * demand.largest}
    plan = fit([demand for demand in left if demand.name not in in_parts], supplies)
    if plan is None:
        sizes = {name: demand.size for name, demand in nowhere.items() if name not in in_parts}
        largest = nowhere[max(sizes, key=lambda name: sizes[name])]
        hint = nearest(largest.name, largest.size, largest.largest, rooms)
        there = [Room(rooms[name], room.limited) for name, room in given.items()]
        raise DoesNotFit(sizes, {" and ".join(rooms): there}, hint)
    if in_parts:
        parts = {name: (Share(most, rooms[most]),) for name in in_parts}
        plan = Plan({**plan.shares, **parts}, True, plan.seconds)
    _tell(plan, {demand.name: demand for demand in left}, rooms)
    by_name = {device.name: device for device in devices}
    found = {name: list(places) for name, places in placed.items()}
    for name, shares in plan.shares.items():
        several = len(shares) > 1
        spare = {share.device: 0 if plan.turns else rooms[share.device] - _used(plan, share.device) for share in shares}
        part_rooms = tuple(share.room + spare[share.device] for share in shares) if several else None
        found[name] = [Lanes((Chain(tuple(by_name[share.device] for share in shares), part_rooms),))]
    return found


def _supplies(devices: Sequence[Device], rooms: Mapping[str, int]) -> list[Supply]:
    from ..diffusion.fitting import Supply
    from ..runtime.speed import speed_of

    return [Supply(device.name, rooms[device.name], *speed_of(device)) for device in devices]


def _used(plan: Plan, device: str) -> int:
    """Bytes of a device that a plan gives away."""
    return sum(share.room for shares in plan.shares.values() for share in shares if share.device == device)


def _tell(plan: Plan, wanted: Mapping[str, Demand], rooms: Mapping[str, int]) -> None:
    turns = "; components take turns, since they do not fit beside each other" if plan.turns else ""
    report.say(f"auto-fit: about {roughly(plan.seconds)} a picture, once weights are there{turns}")
    for device, room in rooms.items():
        here = []
        for name, shares in plan.shares.items():
            of, alone = wanted[name].size, len(shares) == 1
            for share in shares:
                if share.device == device:
                    in_turn = " a part at a time" if alone and share.room < of else ""
                    here.append(f"{'' if alone else 'a part of '}{name}{in_turn} ({mebibytes(min(share.room, of))})")
        if here:
            report.say(f"auto-fit: {device}, with room for {mebibytes(room)}: {', '.join(here)}")


def roughly(seconds: float) -> str:
    """A guess, with no more digits than it deserves."""
    if seconds < 1:
        return f"{seconds:.1g} s"
    unit, size = next((u, s) for u, s in (("s", 1), ("min", 60), ("h", 3600)) if seconds < 100 * s or s == 3600)
    return f"{seconds / size:.0f} {unit}"
