"""Whether a picture shows what a prompt says: one plain yes or no for each thing that was said.

Positions are those of a shape's centre, in sides of the picture. A word for a place is right when the centre is in its
column and its row: "left" ends at 0.42, "right" begins at 0.58, "top" and "bottom" alike, and the middle, also the one
of "on the left" between top and bottom, reaches 0.15 to both sides of 0.5. These bounds are a little wider than those
within which captions use the words, so that nothing hangs on a pixel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

from .captions import BEFORE, BETWEEN
from .detect import Found, Sight
from .scenes import SHRINK, SIZES

OUTER, MIDDLE = 0.42, 0.15
"""What is nearer to the border than ``OUTER`` is left (or right, above, below); ``MIDDLE`` is around the centre."""

APART = 0.1
"""How far a shape is at least on the side of another one that was said; to that side it is also further than across."""

Place = tuple[int, int]
"""Column and row: a key of :data:`captions.PLACES` or, between two shapes, of :data:`captions.RELATIONS`."""


@dataclass(frozen=True)
class Stated:
    """What is said of one shape; None: nothing."""

    kind: str | None = None
    colour: str | None = None
    size: str | None = None
    place: Place | None = None


@dataclass(frozen=True)
class Expectation:
    """What is said of a picture. ``relation``: where the first shape is, seen from the second."""

    background: str | None
    shapes: tuple[Stated, ...]
    relation: Place | None = None


@dataclass(frozen=True)
class Verdict:
    """What is right in a picture; None: nothing was said of it.

    ``colours``: every colour that was said is on a shape of its own, whatever else there is. ``kinds``, ``sizes``,
    ``places`` and ``relation`` are about each shape, and all wrong where the count is, because nobody knows which one
    is meant.
    """

    count: bool
    background: bool | None
    colours: bool | None
    kinds: bool | None
    sizes: bool | None
    places: bool | None
    relation: bool | None

    @property
    def right(self) -> bool:
        """Everything that was said is right."""
        return all(value is not False for value in vars(self).values())


def judge(sight: Sight, expected: Expectation) -> Verdict:
    """What of ``expected`` the picture shows."""
    stated = expected.shapes
    colours = Counter(shape.colour for shape in stated if shape.colour is not None)
    count = len(sight.shapes) == len(stated)
    found = _matched(stated, sight.shapes) if count else ()

    def each(said: Callable[[Stated], object], right: Callable[[Stated, Found], bool]) -> bool | None:
        if all(said(shape) is None for shape in stated):
            return None
        return count and all(right(s, f) for s, f in zip(stated, found, strict=True) if said(s) is not None)

    return Verdict(
        count=count,
        background=None if expected.background is None else sight.background == expected.background,
        colours=colours <= Counter(shape.colour for shape in sight.shapes) if colours else None,
        kinds=each(lambda s: s.kind, lambda s, f: f.kind == s.kind),
        sizes=each(lambda s: s.size, lambda s, f: size_word(f.radius, len(stated)) == s.size),
        places=each(lambda s: s.place, lambda s, f: s.place is not None and is_at(f.x, f.y, s.place)),
        relation=None if expected.relation is None else count and is_beside(found[0], found[1], expected.relation),
    )


def _matched(stated: Sequence[Stated], found: Sequence[Found]) -> tuple[Found, ...]:
    """The shapes in the order in which they were named: the one in which most colours and then most kinds are right."""

    def right(order: Sequence[Found]) -> tuple[int, int]:
        pairs = list(zip(stated, order, strict=True))
        return sum(s.colour == f.colour for s, f in pairs), sum(s.kind == f.kind for s, f in pairs)

    return max(permutations(found), key=right)


def size_word(radius: float, count: int) -> str:
    """The size whose range of radii, among ``count`` shapes, is nearest."""
    radius /= SHRINK[min(count, len(SHRINK)) - 1]
    return min(SIZES, key=lambda word: abs(radius - sum(SIZES[word]) / 2))


def is_at(x: float, y: float, place: Place) -> bool:
    """Whether a shape's centre is where the word says."""
    return all(_in_third(at, third) for at, third in zip((x, y), place, strict=True))


def _in_third(at: float, third: int) -> bool:
    if third == BETWEEN:
        return abs(at - 0.5) <= MIDDLE
    return (at if third == BEFORE else 1 - at) < OUTER


def is_beside(one: Found, other: Found, relation: Place) -> bool:
    """Whether ``one`` is on the side of ``other`` that the word says."""
    across, down = relation
    along, aside = (one.x - other.x, one.y - other.y) if down == BETWEEN else (one.y - other.y, one.x - other.x)
    forwards = along * (across or down)
    return forwards >= APART and forwards > abs(aside)
