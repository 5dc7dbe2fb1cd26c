"""Where components go when nobody says: a plan from facts about them and about devices. Nothing here asks a device.

Components are tried beside each other, in every way that could be faster than the best one so far: whole on a device,
or cut over several where that saves much. Weights are sent once then and stay. The other plan is that they take turns,
and each picture pays for sending them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

CUT = 1.5
"""How much more a component that is cut counts: nobody cuts for a tenth of the time, which is a guess anyway."""


class Demand(NamedTuple):
    """A component. ``size``: bytes of its weights; ``largest``: of the largest one, which can't be cut; ``work``:
    multiplications and additions of a run; ``runs``: how often it runs for a picture; ``moved``: bytes that a run takes
    in and gives; ``crossing``: bytes that cross a cut, as a guess."""

    name: str
    size: int
    largest: int
    work: float
    runs: int
    moved: int
    crossing: int = 0


class Supply(NamedTuple):
    """A device. ``room``: bytes for weights; ``speed``: multiplications and additions a second; ``bandwidth``: bytes a
    second, and ``latency``: seconds, between it and this machine."""

    name: str
    room: int
    speed: float
    bandwidth: float
    latency: float


class Share(NamedTuple):
    """Up to ``room`` bytes of a component on ``device``."""

    device: str
    room: int


class Plan(NamedTuple):
    """``shares``: component → where it is, in order. ``turns``: whether weights leave their devices for others.
    ``seconds``: what a picture is guessed to take."""

    shares: Mapping[str, tuple[Share, ...]]
    turns: bool
    seconds: float


def fit(demands: Sequence[Demand], supplies: Sequence[Supply]) -> Plan | None:
    """The plan that is guessed to be the fastest; None where a component has room nowhere, not even cut and alone.

    No device gets more than its room: all components together, or where they take turns each of them. The same facts
    give the same plan, in whatever order they come.
    """
    by_speed = sorted(supplies, key=lambda s: (-s.speed, s.latency, -s.bandwidth, -s.room, s.name))
    by_work = sorted(demands, key=lambda d: (-d.work * d.runs, -d.size, d.name))
    plans = [plan for plan in (_beside_each_other(by_work, by_speed), _in_turns(by_work, by_speed)) if plan]
    return min(plans, key=lambda plan: plan.seconds, default=None)


def seconds(demand: Demand, shares: Sequence[Share], supplies: Mapping[str, Supply]) -> float:
    """What a component is guessed to take for a picture, with so much of it on each device."""
    total, left = 0.0, demand.size
    for number, share in enumerate(shares):
        device, here = supplies[share.device], min(share.room, left)
        left -= here
        part = here / max(demand.size, 1)
        bytes_moved = (demand.moved if number in (0, len(shares) - 1) else 0) + (demand.crossing if number else 0)
        total += demand.work * part / device.speed + bytes_moved / device.bandwidth + 2 * device.latency
    return total * demand.runs * (CUT if len(shares) > 1 else 1)


def _beside_each_other(demands: Sequence[Demand], supplies: Sequence[Supply]) -> Plan | None:
    """All components at the same time, found by going through all ways that are not slower than the best so far."""
    known = {supply.name: supply for supply in supplies}
    empty = {supply.name: supply.room for supply in supplies}
    rest = [0.0]
    """What the components from each on take at least."""
    for demand in reversed(demands):
        rest.insert(0, rest[0] + demand.runs * demand.work / max((s.speed for s in supplies), default=1.0))
    best: Plan | None = None

    def place(number: int, room: Mapping[str, int], shares: Mapping[str, tuple[Share, ...]], spent: float) -> None:
        nonlocal best
        if best is not None and spent + rest[number] >= best.seconds:
            return
        if number == len(demands):
            best = Plan(dict(shares), False, spent)
            return
        demand = demands[number]
        ways = [(seconds(demand, way, known), way) for way in _ways(demand, supplies, room)]
        for cost, way in sorted(ways, key=lambda each: each[0]):
            left = {**room, **{share.device: room[share.device] - share.room for share in way}}
            place(number + 1, left, {**shares, demand.name: way}, spent + cost)

    place(0, empty, {}, 0.0)
    return best


def _in_turns(demands: Sequence[Demand], supplies: Sequence[Supply]) -> Plan | None:
    """Each component where it is fastest if it is there alone, with the time to send it again."""
    known = {supply.name: supply for supply in supplies}
    room = {supply.name: supply.room for supply in supplies}
    shares, spent = {}, 0.0
    for demand in demands:
        ways = [
            (seconds(demand, way, known) + sum(share.room / known[share.device].bandwidth for share in way), way)
            for way in _ways(demand, supplies, room)
        ]
        if not ways:
            return None
        cost, shares[demand.name] = min(ways, key=lambda each: each[0])
        spent += cost
    return Plan(shares, True, spent)


def _ways(demand: Demand, supplies: Sequence[Supply], room: Mapping[str, int]) -> Iterator[tuple[Share, ...]]:
    """A component whole on each device that has room; cut, over the fastest devices that together have it, and over
    those with most room, which are the fewest."""
    for supply in supplies:
        if demand.size <= room[supply.name]:
            yield (Share(supply.name, demand.size),)
    by_room = sorted(supplies, key=lambda supply: -room[supply.name])
    found = dict.fromkeys(way for order in (supplies, by_room) if (way := _cut(demand, order, room)))
    yield from found


def _cut(demand: Demand, supplies: Sequence[Supply], room: Mapping[str, int]) -> tuple[Share, ...]:
    """A component cut over the first devices that have room for it; nothing where all of them have not. A part ends
    where the next weight does not fit, so that each but the last may stay emptier by the largest weight."""
    shares: list[Share] = []
    left = demand.size
    for supply in supplies:
        if room[supply.name] > demand.largest:
            here = min(room[supply.name], left)
            if here == left:
                return (*shares, Share(supply.name, here)) if shares else ()
            shares.append(Share(supply.name, here))
            left -= here - demand.largest
    return ()


def nearest(component: str, size: int, largest: int, rooms: Mapping[str, int]) -> str:
    """What would do for a component of ``size`` bytes that does not fit where it is wanted, on devices with these
    ``rooms``, by name: one of them, the fewest of them together, or a part at a time."""
    by_room = sorted(rooms.items(), key=lambda each: -each[1])
    supplies = [Supply(name, room, 1.0, 1.0, 0.0) for name, room in by_room]
    if by_room and by_room[0][1] >= size:
        name, room = by_room[0]
        return f"{name} has room for {_mebibytes(room)} (backend {component}={name})"
    shares = _cut(Demand(component, size, largest, 1.0, 1, 0), supplies, rooms)
    if shares:
        names = "&".join(share.device for share in shares)
        together = " + ".join(_mebibytes(rooms[share.device]) for share in shares)
        return f'{names} have room for {together} (backend "{component}={names}")'
    if by_room and by_room[0][1] > 2 * largest:
        name, room = by_room[0]
        return f"{name} can compute it a part at a time (params_backend {component}=disk), or use a quantized file"
    return "use a quantized file, or add a device (rpc)"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
