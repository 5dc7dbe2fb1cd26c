"""The prompts of the evaluation: held out, worded as what they say, the same every time."""

from __future__ import annotations

import re

import numpy as np
import pytest

from training.captions import AFTER, BEFORE, PLACES, RELATIONS
from training.judge import Expectation, Stated
from training.prompts import SEVERAL, SINGLE, Prompt, held_out_prompts, spread
from training.scenes import MOST, NAMES, SHAPES, SIZES, held_out, sample

PROMPTS = held_out_prompts()


def test_how_many_of_which_kind() -> None:
    counts = [len(prompt.says.shapes) for prompt in PROMPTS]
    assert len(PROMPTS) >= 500
    assert (counts.count(1), len(counts) - counts.count(1)) == (SINGLE, SEVERAL)
    assert min(counts.count(2), counts.count(3)) > SEVERAL / 3
    assert sum(prompt.says.relation is not None for prompt in PROMPTS) > SEVERAL / 5
    placed = [prompt.says.shapes[0].place for prompt in PROMPTS[:SINGLE]]
    assert 0.5 < 1 - placed.count(None) / SINGLE < 0.7
    assert set(placed) == {None, *PLACES}
    assert {prompt.says.relation for prompt in PROMPTS} == {None, *RELATIONS}
    assert {shape.size for prompt in PROMPTS for shape in prompt.says.shapes} == {None, *SIZES}


def test_no_training_scene_has_what_a_prompt_says() -> None:
    scenes = sample(np.random.default_rng(1), 20_000)
    there = scenes.kinds >= 0
    behind = np.broadcast_to(scenes.backgrounds[:, None], there.shape)
    trained = set(zip(scenes.kinds[there], scenes.colours[there], behind[there], strict=True))
    asked = {
        (SHAPES.index(str(shape.kind)), NAMES.index(str(shape.colour)), NAMES.index(str(prompt.says.background)))
        for prompt in PROMPTS
        for shape in prompt.says.shapes
    }
    assert len(trained) > 600  # all that there are
    assert not trained & asked
    assert held_out(*np.array(sorted(asked), np.int8).T).all()


def test_colours_of_a_picture_differ() -> None:
    for prompt in PROMPTS:
        colours = [prompt.says.background, *(shape.colour for shape in prompt.says.shapes)]
        assert len(set(colours)) == len(colours) <= MOST + 1


@pytest.mark.parametrize("prompt", PROMPTS[::5], ids=lambda prompt: prompt.text)
def test_the_text_says_what_is_judged(prompt: Prompt) -> None:
    assert parsed(prompt.text) == prompt.says


def test_the_same_prompts_every_time() -> None:
    assert held_out_prompts() == PROMPTS
    assert held_out_prompts(seed=1) != PROMPTS
    assert [prompt.seed for prompt in PROMPTS] == list(range(len(PROMPTS)))


@pytest.mark.parametrize("count", [1, 7, 104, len(PROMPTS), len(PROMPTS) + 1])
def test_spread_takes_from_everywhere(count: int) -> None:
    chosen = spread(PROMPTS, count)
    assert len(chosen) == min(count, len(PROMPTS))
    assert chosen == sorted(set(chosen), key=lambda prompt: prompt.seed)
    assert sum(len(prompt.says.shapes) == 1 for prompt in chosen) == pytest.approx(
        SINGLE * len(chosen) / len(PROMPTS), abs=1
    )


def _any(words: object) -> str:
    return "|".join(sorted(map(str, words), key=len, reverse=True))  # type: ignore[call-overload]


PLACE_WORDS = {words[0]: place for place, words in PLACES.items()}
RELATION_WORDS = {words[0]: relation for relation, words in RELATIONS.items()}
LOOK = re.compile(
    rf"\ban? (?:({_any(SIZES)}) )?({_any(NAMES)}) ({_any(SHAPES)})\b(?: ({_any(PLACE_WORDS)})(?! of))?", re.ASCII
)
BACKGROUND = re.compile(rf"(?:,? on|with) an? ({_any(NAMES)}) background$", re.ASCII)


def parsed(text: str) -> Expectation:
    """What a prompt says, read back from its words."""
    background = BACKGROUND.search(text)
    assert background is not None
    shapes = tuple(
        Stated(kind, colour, size or None, PLACE_WORDS.get(place)) for size, colour, kind, place in LOOK.findall(text)
    )
    related = re.search(rf"\b({_any(RELATION_WORDS)}) an? ", text)
    return Expectation(background[1], shapes, RELATION_WORDS[related[1]] if related else None)


def test_places_have_their_sides() -> None:
    assert PLACE_WORDS["on the left"][0] == BEFORE
    assert PLACE_WORDS["in the top right corner"] == (AFTER, BEFORE)
