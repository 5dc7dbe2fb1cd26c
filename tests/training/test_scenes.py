"""Scenes as they are sampled and drawn, and captions, which say nothing that is not so."""

from __future__ import annotations

import re
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training import captions
from training.captions import AFTER, BEFORE, BETWEEN, NUMBERS, OTHER_WORDS, PLACES, RELATIONS, describe
from training.scenes import COLOURS, GAP, JITTER, MOST, NAMES, SHAPES, SHRINK, SIZES, Scene, Shape, draw, sample

SCENES = sample(np.random.default_rng(5), 3000)


def test_shapes_are_apart_and_inside() -> None:
    for i in range(len(SCENES)):
        shapes = SCENES[i].shapes
        assert 1 <= len(shapes) <= MOST
        for number, shape in enumerate(shapes):
            low, high = (radius * SHRINK[len(shapes) - 1] for radius in SIZES[shape.size])
            assert low - 1e-6 <= shape.radius <= high + 1e-6
            margin = shape.radius + GAP - 1e-6
            assert margin <= shape.x <= 1 - margin
            assert margin <= shape.y <= 1 - margin
            assert shape.colour != SCENES[i].background
            for other in shapes[:number]:
                assert np.hypot(shape.x - other.x, shape.y - other.y) >= shape.radius + other.radius + GAP - 1e-6


def test_a_part_is_those_scenes() -> None:
    part = SCENES.part(10, 13)
    assert [part[i] for i in range(len(part))] == [SCENES[i] for i in (10, 11, 12)]


@pytest.mark.parametrize("side", [64, 128, 192])
def test_drawings_have_the_colours(side: int) -> None:
    few = SCENES.part(0, 20)
    drawn = draw(few, side)
    assert drawn.shape == (20, 3, side, side)
    assert drawn.dtype == torch.float32
    for i in range(20):
        assert drawn[i, :, 0, 0].tolist() == pytest.approx(COLOURS[few[i].background])
        for shape in few[i].shapes:
            if shape.kind != "ring":
                middle = drawn[i, :, int(shape.y * side), int(shape.x * side)]
                assert middle.tolist() == pytest.approx(COLOURS[shape.colour], abs=1e-6)


def test_jitter_moves_colours_a_little() -> None:
    few = SCENES.part(0, 8)
    moved = draw(few, 64, jitter=torch.rand((8, MOST + 1, 3), generator=torch.Generator().manual_seed(1)) * 2 - 1)
    difference = (moved - draw(few, 64)).abs()
    assert 0 < difference[:, :, 0, 0].max() <= JITTER + 1e-6


# Captions -------------------------------------------------------------------------------------------------------------

_USUAL = {other: word for word, others in OTHER_WORDS.items() for other in others}
_COLOURS, _KINDS, _SIZES = (
    sorted([*words, *(other for other, word in _USUAL.items() if word in words)], key=len, reverse=True)
    for words in (NAMES, SHAPES, tuple(SIZES))
)
_PLACES = {words: place for place, several in PLACES.items() for words in several}
_RELATIONS = {words: relation for relation, several in RELATIONS.items() for words in several}
_LOOK = re.compile(
    rf"\b(?P<size>(?:{'|'.join(_SIZES)}) )?(?P<colour>(?:{'|'.join(_COLOURS)}) )?"
    rf"(?P<kind>{'|'.join(_KINDS)}|shape)(?P<plural>e?s)?\b"
)


def _usual(word: str | None) -> str | None:
    return None if word is None else _USUAL.get(word.strip(), word.strip())


def _fits(shape: Shape, look: re.Match[str]) -> bool:
    said = {name: _usual(look[name]) for name in ("size", "colour", "kind")}
    return all(word in (None, "shape", getattr(shape, name)) for name, word in said.items())


@given(number=st.integers(0, len(SCENES) - 1), seed=st.integers(0, 2**32))
def test_a_caption_says_what_is_so(number: int, seed: int) -> None:
    scene = SCENES[number]
    text = describe(scene, Random(seed))
    for frame in captions.FRAMES:  # "simple shapes" is none of the scene's
        for words in frame.split("{}"):
            text = text.replace(words, " ") if "shapes" in words else text
    for look in _LOOK.finditer(text):
        assert any(_fits(shape, look) for shape in scene.shapes), text
    for behind in re.finditer(rf"\b({'|'.join(_COLOURS)}) back(?:ground|drop)", text):
        assert _usual(behind[1]) == scene.background, text
    for related in re.finditer(
        rf"({_LOOK.pattern}) ({'|'.join(sorted(_RELATIONS, key=len, reverse=True))}) an? ", text
    ):
        other = _LOOK.search(text, related.end())
        assert other is not None
        words = related[0].removesuffix("a ").removesuffix("an ").strip().removeprefix(related[1]).strip()
        first = _LOOK.match(related[1])
        assert first is not None
        pairs = [
            (a, b) for a in scene.shapes for b in scene.shapes if a is not b and _fits(a, first) and _fits(b, other)
        ]
        assert any(captions.relation(a, b) == _RELATIONS[words] for a, b in pairs), text
    for count, words_of_count in NUMBERS.items():
        if re.search(rf"\b({'|'.join(words_of_count)}) \w+", text.replace("4k", "")):
            assert len(scene.shapes) == count, text


@given(x=st.floats(0.13, 0.87), y=st.floats(0.13, 0.87), seed=st.integers(0, 2**32))
def test_place_words_are_where_the_shape_is(x: float, y: float, seed: int) -> None:
    text = describe(Scene("white", (Shape("star", "red", "small", x, y, 0.1),)), Random(seed))
    said = max((words for words in _PLACES if re.search(rf"\b{words}\b", text)), key=len, default=None)
    if said is not None:
        assert _PLACES[said] == captions.place(x, y)


@pytest.mark.parametrize(
    ("x", "y", "place"),
    [
        (0.2, 0.5, (BEFORE, BETWEEN)), (0.8, 0.45, (AFTER, BETWEEN)), (0.5, 0.2, (BETWEEN, BEFORE)),
        (0.55, 0.8, (BETWEEN, AFTER)), (0.5, 0.5, (BETWEEN, BETWEEN)), (0.2, 0.2, (BEFORE, BEFORE)),
        (0.8, 0.8, (AFTER, AFTER)),
    ],
)  # fmt: skip
def test_places(x: float, y: float, place: tuple[int, int]) -> None:
    assert captions.place(x, y) == place


def test_articles() -> None:
    assert [captions.with_article(words) for words in ("red circle", "orange star")] == [
        "a red circle",
        "an orange star",
    ]
