"""What people would type for a scene. A caption says only what is true of it, and rarely all that is."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from .scenes import Scene, Shape

OTHER_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("disc", "dot"), "square": ("box",), "ring": ("donut",), "cross": ("plus sign", "plus"),
    "diamond": ("rhombus",), "purple": ("violet",), "cyan": ("turquoise",), "small": ("little", "tiny"),
    "large": ("big", "huge"), "medium": ("medium-sized",),
}  # fmt: skip
"""Said now and then instead of the first word."""

BEFORE, BETWEEN, AFTER = -1, 0, 1

PLACES: dict[tuple[int, int], tuple[str, ...]] = {
    (BEFORE, BETWEEN): ("on the left", "on the left side", "at the left"),
    (AFTER, BETWEEN): ("on the right", "on the right side", "at the right"),
    (BETWEEN, BEFORE): ("at the top", "on the top"),
    (BETWEEN, AFTER): ("at the bottom", "on the bottom"),
    (BETWEEN, BETWEEN): ("in the center", "in the middle", "in the centre"),
    (BEFORE, BEFORE): ("in the top left corner", "at the top left", "in the upper left corner"),
    (AFTER, BEFORE): ("in the top right corner", "at the top right", "in the upper right corner"),
    (BEFORE, AFTER): ("in the bottom left corner", "at the bottom left", "in the lower left corner"),
    (AFTER, AFTER): ("in the bottom right corner", "at the bottom right", "in the lower right corner"),
}
"""Words for where a shape's centre is, by its column and row; the first ones are the usual ones."""

RELATIONS: dict[tuple[int, int], tuple[str, ...]] = {
    (BEFORE, BETWEEN): ("on the left of", "to the left of", "left of"),
    (AFTER, BETWEEN): ("on the right of", "to the right of", "right of"),
    (BETWEEN, BEFORE): ("above", "over", "on top of"),
    (BETWEEN, AFTER): ("below", "under", "underneath"),
}
"""Words for where a shape is, seen from another."""

BACKGROUNDS = (
    "{} on {a} background", "{} on {a} background", "{} on {a} background", "{}, on {a} background",
    "{}, {word} background", "{} against {a} background", "{} with {a} background", "{} on {word}",
)  # fmt: skip
BRIEF_BACKGROUNDS = ("{}, {word} background", "{}, {word} backdrop")
FRAMES = (
    "a picture of {}", "an image of {}", "a drawing of {}", "a photo of {}", "a painting of {}",
    "an illustration of {}", "{}, flat design", "{}, simple shapes", "{}, high quality", "{}, minimalist", "{}, 4k",
    "{}, masterpiece", "there is {}", "{}.", "draw {}",
)  # fmt: skip
NUMBERS = {2: ("two", "2", "a pair of"), 3: ("three", "3")}

EDGE, BAND = 0.38, 0.12
"""Left of ``EDGE`` is left; within ``BAND`` of the middle is the middle; what is between is not spoken of."""


def place(x: float, y: float) -> tuple[int, int] | None:
    """Column and row, a key of :data:`PLACES`, or None for a place without a name."""
    column, row = _third(x), _third(y)
    return None if column is None or row is None else (column, row)


def _third(at: float) -> int | None:
    if abs(at - 0.5) <= BAND:
        return BETWEEN
    return BEFORE if at < EDGE else AFTER if at > 1 - EDGE else None


def relation(a: Shape, b: Shape) -> tuple[int, int] | None:
    """Where ``a`` is, seen from ``b``: a key of :data:`RELATIONS`, or None where it is neither beside nor above."""
    x, y = a.x - b.x, a.y - b.y
    if abs(x) > max(0.2, 1.3 * abs(y)):
        return (BEFORE if x < 0 else AFTER), BETWEEN
    if abs(y) > max(0.2, 1.3 * abs(x)):
        return BETWEEN, (BEFORE if y < 0 else AFTER)
    return None


def with_article(words: str) -> str:
    """ "a red circle", "an orange star"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def describe(scene: Scene, random: Random) -> str:
    """A caption of the scene, drawn from many ways to say it."""
    if random.random() < 0.05:
        return _one_word(scene, random)
    brief = random.random() < 0.12  # "red circle, blue square, yellow background"
    shapes = random.sample(scene.shapes, len(scene.shapes))
    said = _shapes(shapes, random, brief)
    if random.random() < 0.88:
        word = _word(scene.background, random)
        said = random.choice(BRIEF_BACKGROUNDS if brief else BACKGROUNDS).format(said, word=word, a=with_article(word))
    return random.choice(FRAMES).format(said) if random.random() < 0.3 else said


def _one_word(scene: Scene, random: Random) -> str:
    """A single quality: what is put into negative prompts."""
    shape = random.choice(scene.shapes)
    ways = [shape.colour, shape.kind, f"{shape.kind}s", shape.size, f"{scene.background} background"]
    if scene.shapes == (shape,) and (where := place(shape.x, shape.y)):
        ways.append(PLACES[where][0])
    if len(scene.shapes) > 1:
        ways.append(f"{NUMBERS[len(scene.shapes)][0]} shapes")
    return random.choice(ways)


def _word(word: str, random: Random) -> str:
    others = OTHER_WORDS.get(word)
    return random.choice(others) if others and random.random() < 0.1 else word


def _look(shape: Shape, random: Random) -> str:
    """ "small red circle", often without its size, seldom without its colour or kind."""
    kind = _word(shape.kind, random) if random.random() < 0.95 else "shape"
    colour = _word(shape.colour, random) if random.random() < 0.93 else ""
    size = _word(shape.size, random) if random.random() < 0.55 else ""
    return " ".join(word for word in (size, colour, kind) if word)


def _shapes(shapes: Sequence[Shape], random: Random, brief: bool) -> str:
    alike = len({(s.kind, s.colour) for s in shapes}) == 1 and len(shapes) > 1
    if alike and random.random() < 0.85:
        return _several(shapes, random)
    named = [_look(shape, random) if brief else with_article(_look(shape, random)) for shape in shapes]
    if brief:
        return ", ".join(named)
    if len(shapes) == 1:
        return _placed(named[0], shapes[0], random)
    first = _pair(shapes[0], named[0], shapes[1], named[1], random)
    if len(shapes) == 2:
        return first
    return f"{first}{random.choice((' and ', ', and ', ' and ', ', '))}{named[2]}"


def _several(shapes: Sequence[Shape], random: Random) -> str:
    """ "three small red stars": of one look."""
    sizes = {shape.size for shape in shapes}
    look = _look(shapes[0], random)
    if len(sizes) > 1:
        look = " ".join(word for word in (shapes[0].colour, _word(shapes[0].kind, random)) if word)
    plural = f"{look[:-1]}xes" if look.endswith("x") else f"{look}es" if look.endswith("s") else f"{look}s"
    return f"{random.choice(NUMBERS[len(shapes)])} {plural}"


def _placed(named: str, shape: Shape, random: Random, often: float = 0.75) -> str:
    where = place(shape.x, shape.y)
    if where is None or random.random() > often:
        return named
    words = PLACES[where]
    return f"{named} {words[0] if random.random() < 0.6 else random.choice(words)}"


def _pair(a: Shape, a_named: str, b: Shape, b_named: str, random: Random) -> str:
    seen = relation(a, b)
    way = random.random()
    if seen and way < 0.5:
        return f"{a_named} {random.choice(RELATIONS[seen])} {b_named}"
    if way < 0.65:
        return f"{_placed(a_named, a, random)} and {_placed(b_named, b, random)}"
    return f"{a_named}{random.choice((' and ', ', ', ' next to ', ' and ', ' beside ', ' with '))}{b_named}"
