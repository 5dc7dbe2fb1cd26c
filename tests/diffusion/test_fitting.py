"""Plans from facts: tables of what people have, and what holds for any facts."""

from __future__ import annotations

from itertools import permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdrpc.diffusion.fitting import Demand, Plan, Share, Supply, fit, nearest, seconds

GIB = 1 << 30
NOWHERE = 1e12
"""Bytes a second of memory that is here."""

CPU = Supply("CPU", 24 * GIB, 5e11, NOWHERE, 0)
LARGE = Supply("RPC0", 23 * GIB, 5e13, 1e8, 1e-3)
SMALL = Supply("RPC1", 7 * GIB, 1e13, 1e8, 1e-3)
OTHER = Supply("RPC2", 7 * GIB, 1e13, 1e8, 1e-3)

SD1 = (
    Demand("clip_l", GIB // 4, GIB // 16, 1e10, 2, 1 << 19),
    Demand("diffusion", 2 * GIB, GIB // 16, 7e11, 20, 1 << 20),
    Demand("vae", GIB // 3, GIB // 64, 2e12, 1, 4 << 20),
)
FLUX = (
    Demand("clip_l", GIB // 4, GIB // 16, 1e10, 1, 1 << 19),
    Demand("t5xxl", 9 * GIB, GIB // 4, 2e12, 1, 4 << 20),
    Demand("diffusion", 12 * GIB, GIB // 8, 5e13, 20, 4 << 20, crossing=56 << 20),
    Demand("vae", GIB // 3, GIB // 64, 5e12, 1, 12 << 20),
)


def where(plan: Plan | None) -> dict[str, str]:
    assert plan is not None
    return {name: "&".join(share.device for share in shares) for name, shares in plan.shares.items()}


@pytest.mark.parametrize(
    ("demands", "supplies", "expected", "turns"),
    [
        (SD1, [CPU], {"clip_l": "CPU", "diffusion": "CPU", "vae": "CPU"}, False),
        (SD1, [CPU, LARGE], {"clip_l": "RPC0", "diffusion": "RPC0", "vae": "RPC0"}, False),
        (FLUX, [CPU, LARGE], {"clip_l": "RPC0", "t5xxl": "RPC0", "diffusion": "RPC0", "vae": "RPC0"}, False),
        (FLUX, [CPU, LARGE._replace(room=13 * GIB)],
         {"clip_l": "RPC0", "t5xxl": "CPU", "diffusion": "RPC0", "vae": "RPC0"}, False),
        (FLUX, [CPU, SMALL, OTHER],
         {"clip_l": "RPC2", "t5xxl": "CPU", "diffusion": "RPC1&RPC2", "vae": "RPC2"}, False),
        (FLUX, [CPU._replace(room=GIB), LARGE._replace(room=13 * GIB)],
         {"clip_l": "CPU", "t5xxl": "RPC0", "diffusion": "RPC0", "vae": "RPC0"}, True),
    ],
    ids=["sd1-alone", "sd1", "flux", "flux-small", "flux-two-small", "flux-turns"],
)  # fmt: skip
def test_what_people_have(
    demands: tuple[Demand, ...], supplies: list[Supply], expected: dict[str, str], turns: bool
) -> None:
    plan = fit(demands, supplies)
    assert where(plan) == expected
    assert plan is not None
    assert plan.turns is turns


def test_what_fits_nowhere() -> None:
    assert fit(FLUX, [SMALL]) is None
    assert fit(FLUX, []) is None


@pytest.mark.parametrize(
    ("rooms", "says"),
    [
        ({"RPC0": 5 * GIB, "RPC1": 9 * GIB}, "RPC1 has room for 9,216 MiB (backend diffusion=RPC1)"),
        ({"RPC0": 5 * GIB, "RPC1": 7 * GIB, "CPU": GIB},
         'RPC1&RPC0 have room for 7,168 MiB + 5,120 MiB (backend "diffusion=RPC1&RPC0")'),
        ({"RPC0": 2 * GIB, "RPC1": 3 * GIB},
         "RPC1 can compute it a part at a time (params_backend diffusion=disk), or use a quantized file"),
        ({"RPC0": GIB // 2}, "use a quantized file, or add a device (rpc)"),
        ({}, "use a quantized file, or add a device (rpc)"),
    ],
)  # fmt: skip
def test_what_would_do(rooms: dict[str, int], says: str) -> None:
    assert nearest("diffusion", 8 * GIB, GIB, rooms) == says


sizes = st.integers(1, 40)
any_demands = st.lists(
    st.builds(Demand, st.just("x"), sizes, st.just(1), st.integers(1, 99).map(float), st.integers(1, 9), sizes),
    min_size=1, max_size=4,
).map(lambda some: [each._replace(name=f"part {number}") for number, each in enumerate(some)])  # fmt: skip
speeds = st.integers(1, 9).map(float)
any_supplies = st.lists(st.builds(Supply, st.just("x"), st.integers(0, 60), speeds, speeds, speeds), max_size=3).map(
    lambda some: [each._replace(name=f"RPC{number}") for number, each in enumerate(some)]
)


def whole_ways(demands: list[Demand], supplies: list[Supply]) -> list[tuple[Supply, ...]]:
    """Every way to have each component whole on a device, all of them at the same time."""
    return [
        way
        for way in product(supplies, repeat=len(demands))
        if all(sum(d.size for d, s in zip(demands, way, strict=True) if s == each) <= each.room for each in supplies)
    ]


@given(any_demands, any_supplies)
def test_no_device_gets_more_than_its_room(demands: list[Demand], supplies: list[Supply]) -> None:
    plan = fit(demands, supplies)
    if plan is None:
        return
    assert plan.shares.keys() == {demand.name for demand in demands}
    rooms = {supply.name: supply.room for supply in supplies}
    for demand in demands:
        shares = plan.shares[demand.name]
        lost = (len(shares) - 1) * demand.largest
        assert sum(share.room for share in shares) - lost >= demand.size, "also where parts end early"
        assert len({share.device for share in shares}) == len(shares)
    together = [plan.shares.values()] if not plan.turns else [[shares] for shares in plan.shares.values()]
    for some in together:
        for name, room in rooms.items():
            assert sum(share.room for shares in some for share in shares if share.device == name) <= room


@given(any_demands, any_supplies)
def test_what_fits_is_found_and_nothing_faster_is_missed(demands: list[Demand], supplies: list[Supply]) -> None:
    """Against all ways to have whole components beside each other."""
    plan, known = fit(demands, supplies), {supply.name: supply for supply in supplies}
    for way in whole_ways(demands, supplies):
        assert plan is not None
        spent = sum(
            seconds(demand, [Share(supply.name, demand.size)], known)
            for demand, supply in zip(demands, way, strict=True)
        )
        assert plan.seconds <= spent * (1 + 1e-9)
    alone = [max((s.room for s in supplies), default=0) >= demand.size for demand in demands]
    assert plan is not None or not all(alone), "each has room on its own: they can take turns"


@given(any_demands, any_supplies)
def test_the_same_facts_give_the_same_plan(demands: list[Demand], supplies: list[Supply]) -> None:
    plans = {str(fit(some, others)) for some in permutations(demands[:3]) for others in permutations(supplies)}
    assert len(plans) == 1
