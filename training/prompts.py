"""Prompts that no caption of the training was made for, with what they say.

Every shape's kind and colour, together with the background, is a combination that :func:`scenes.held_out` keeps from
training. The wording is plain, as in "a small red circle on the left, on a yellow background": what is tested is
whether the words are understood, not whether rare ones are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from .captions import AFTER, BEFORE, BETWEEN, PLACES, RELATIONS, with_article
from .judge import Expectation, Place, Stated
from .scenes import NAMES, SHAPES, SIZES, held_out

SEED = 2024
SINGLE, SEVERAL = 300, 220
"""How many prompts have one shape, and two or three."""

BACKGROUNDS = ("{} on {} background", "{} on {} background", "{}, on {} background", "{} with {} background")
LISTS = {2: ("{} and {}", "{} next to {}", "{}, {}"), 3: ("{}, {} and {}", "{} and {} and {}")}

PAIRS: tuple[tuple[Place, Place], ...] = (
    ((BEFORE, BETWEEN), (AFTER, BETWEEN)),
    ((BETWEEN, BEFORE), (BETWEEN, AFTER)),
    ((BEFORE, BEFORE), (AFTER, AFTER)),
    ((AFTER, BEFORE), (BEFORE, AFTER)),
)
"""Places that two shapes can have at once, in either order."""

PLACED_SHARE, SIZED_SHARE = 0.6, 0.3


@dataclass(frozen=True)
class Prompt:
    """A prompt, what it says, and the seed of its picture."""

    text: str
    says: Expectation
    seed: int


def held_out_prompts(single: int = SINGLE, several: int = SEVERAL, seed: int = SEED) -> list[Prompt]:
    """So many prompts with one shape, then with two or three; the same ones for the same seed."""
    random = Random(seed)
    made = [_single(random) for _ in range(single)] + [_several(random) for _ in range(several)]
    return [Prompt(text, says, number) for number, (text, says) in enumerate(made)]


def _single(random: Random) -> tuple[str, Expectation]:
    background = random.choice(NAMES)
    place = random.choice(list(PLACES)) if random.random() < PLACED_SHARE else None
    (shape,) = _looks(background, 1, random)
    shape = Stated(shape.kind, shape.colour, shape.size, place)
    return _on(background, _named(shape), random), Expectation(background, (shape,))


def _several(random: Random) -> tuple[str, Expectation]:
    background = random.choice(NAMES)
    count = random.choice((2, 3))
    shapes = _looks(background, count, random)
    way = random.random()
    relation = None
    if way < 0.35:
        relation = random.choice(list(RELATIONS))
        text = f"{_named(shapes[0])} {RELATIONS[relation][0]} {_named(shapes[1])}"
        if count == 3:
            text += f" and {_named(shapes[2])}"
    elif way < 0.5 and count == 2:
        places = random.sample(random.choice(PAIRS), 2)
        shapes = [Stated(s.kind, s.colour, s.size, place) for s, place in zip(shapes, places, strict=True)]
        text = " and ".join(map(_named, shapes))
    else:
        text = random.choice(LISTS[count]).format(*map(_named, shapes))
    return _on(background, text, random), Expectation(background, tuple(shapes), relation)


def _looks(background: str, count: int, random: Random) -> list[Stated]:
    """Shapes of different colours, each of which is kept from training on this background."""
    sizes = [random.choice(list(SIZES)) if random.random() < SIZED_SHARE else None for _ in range(count)]
    looks: dict[str, str] = dict(random.sample(_kept_back(background), len(_kept_back(background))))
    colours = random.sample(list(looks), count)
    return [Stated(looks[colour], colour, size) for colour, size in zip(colours, sizes, strict=True)]


def _kept_back(background: str) -> list[tuple[str, str]]:
    """The (colour, kind) that no training scene has on this background."""
    pairs = [(colour, kind) for colour in NAMES if colour != background for kind in SHAPES]
    kinds = np.array([SHAPES.index(kind) for _, kind in pairs], np.int8)
    colours = np.array([NAMES.index(colour) for colour, _ in pairs], np.int8)
    kept = held_out(kinds, colours, np.full(len(pairs), NAMES.index(background), np.int8))
    return [pair for pair, is_kept in zip(pairs, kept, strict=True) if is_kept]


def _named(shape: Stated) -> str:
    look = with_article(" ".join(word for word in (shape.size, shape.colour, shape.kind) if word))
    return look if shape.place is None else f"{look} {PLACES[shape.place][0]}"


def _on(background: str, said: str, random: Random) -> str:
    return random.choice(BACKGROUNDS).format(said, with_article(background))


def spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """``count`` of the prompts, evenly from the whole list, so that each form has its share."""
    return [prompts[i * len(prompts) // count] for i in range(count)] if count < len(prompts) else list(prompts)
