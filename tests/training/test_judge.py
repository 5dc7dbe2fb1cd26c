"""What counts as right: each yes and no, with a case for and a case against."""

from __future__ import annotations

from dataclasses import replace

import pytest

from training.captions import AFTER, BEFORE, BETWEEN, PLACES
from training.detect import Found, Sight
from training.judge import Expectation, Place, Stated, Verdict, is_at, is_beside, judge, size_word
from training.scenes import SHRINK, SIZES

RED = Found("circle", "red", 0.25, 0.5, 0.11, 0.95)
BLUE = Found("square", "blue", 0.7, 0.5, 0.2, 0.95)
SAID = Expectation(
    "white",
    (Stated("circle", "red", "small", (BEFORE, BETWEEN)), Stated("square", "blue", "large", (AFTER, BETWEEN))),
    (BEFORE, BETWEEN),
)


def test_everything_right() -> None:
    verdict = judge(Sight("white", (BLUE, RED)), SAID)
    assert verdict == Verdict(True, True, True, True, True, True, True)
    assert verdict.right


@pytest.mark.parametrize(
    ("background", "shapes", "wrong"),
    [
        ("black", (BLUE, RED), {"background"}),
        ("white", (BLUE, replace(RED, colour="pink")), {"colours"}),
        ("white", (BLUE, replace(RED, kind="star")), {"kinds"}),
        ("white", (BLUE, replace(RED, kind=None)), {"kinds"}),
        ("white", (BLUE, replace(RED, radius=0.2)), {"sizes"}),
        ("white", (BLUE, replace(RED, x=0.44)), {"places"}),
        ("white", (BLUE, replace(RED, y=0.3)), {"places"}),
        ("white", (replace(BLUE, x=0.25), replace(RED, x=0.7)), {"places", "relation"}),
        ("white", (BLUE, RED, replace(RED, x=0.5)), {"count", "kinds", "sizes", "places", "relation"}),
        ("white", (BLUE,), {"count", "colours", "kinds", "sizes", "places", "relation"}),
        (None, (), {"background", "count", "colours", "kinds", "sizes", "places", "relation"}),
    ],
)
def test_one_thing_wrong(background: str | None, shapes: tuple[Found, ...], wrong: set[str]) -> None:
    verdict = judge(Sight(background, shapes), SAID)
    assert {name for name, value in vars(verdict).items() if value is False} == wrong
    assert not verdict.right


def test_what_is_not_said_is_not_judged() -> None:
    verdict = judge(Sight("black", (RED,)), Expectation(None, (Stated(),)))
    assert verdict == Verdict(True, None, None, None, None, None, None)
    assert verdict.right


def test_two_of_a_colour_need_two_shapes() -> None:
    said = Expectation(None, (Stated(colour="red"), Stated(colour="red")))
    assert judge(Sight("white", (RED, RED)), said).colours
    assert not judge(Sight("white", (RED, BLUE)), said).colours


def test_shapes_of_one_colour_are_told_apart_by_kind() -> None:
    star = replace(RED, kind="star", x=0.8)
    said = Expectation(None, (Stated("star", "red"), Stated("circle", "red")), (AFTER, BETWEEN))
    for order in ((star, RED), (RED, star)):
        assert judge(Sight("white", order), said).right


@pytest.mark.parametrize("place", PLACES)
def test_each_place_is_only_itself(place: Place) -> None:
    middles = {BEFORE: 0.25, BETWEEN: 0.5, AFTER: 0.75}
    x, y = (middles[third] for third in place)
    assert [other for other in PLACES if is_at(x, y, other)] == [place]


@pytest.mark.parametrize(
    ("at", "thirds"),
    [
        (0.349, {BEFORE}), (0.351, {BEFORE, BETWEEN}), (0.419, {BEFORE, BETWEEN}), (0.421, {BETWEEN}),
        (0.579, {BETWEEN}), (0.581, {BETWEEN, AFTER}), (0.649, {BETWEEN, AFTER}), (0.651, {AFTER}),
    ],
)  # fmt: skip
def test_where_places_end(at: float, thirds: set[int]) -> None:
    assert {third for third in (BEFORE, BETWEEN, AFTER) if is_at(at, 0.5, (third, BETWEEN))} == thirds
    assert {third for third in (BEFORE, BETWEEN, AFTER) if is_at(0.5, at, (BETWEEN, third))} == thirds


def test_beside_and_above() -> None:
    one, other = replace(RED, x=0.3, y=0.5), replace(RED, x=0.6, y=0.6)
    assert is_beside(one, other, (BEFORE, BETWEEN))
    assert is_beside(other, one, (AFTER, BETWEEN))
    assert not is_beside(one, other, (AFTER, BETWEEN))
    assert not is_beside(one, other, (BETWEEN, BEFORE))
    assert is_beside(replace(one, y=0.1), other, (BETWEEN, BEFORE))
    assert is_beside(other, replace(one, y=0.1), (BETWEEN, AFTER))
    assert not is_beside(replace(other, x=0.55), other, (BEFORE, BETWEEN))


@pytest.mark.parametrize("count", range(1, len(SHRINK) + 1))
@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_those_that_are_drawn(size: str, count: int) -> None:
    assert {size_word(radius * SHRINK[count - 1], count) for radius in SIZES[size]} == {size}
