"""The evaluation counts what is there: a perfect artist reaches every mark, one that draws noise none."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from sdrpc.cli.progress import Meter, StatusLine
from training.evaluate import MORE, ONE, ROWS, Row, Score, Setting, _passed, _reached, _scores, _table
from training.grid import COLUMNS, PROMPTS, arranged
from training.prompts import Prompt, held_out_prompts
from training.scenes import MOST, NAMES, SHAPES, SHRINK, SIZES, Scenes, draw

SETTING = Setting("euler, 20", Path("demo.safetensors"), "euler", 20, 4.0)
METER = Meter(StatusLine(Console(file=io.StringIO())), print)
FREE = ((0.25, 0.25), (0.75, 0.75), (0.25, 0.75))
THIRDS = {-1: 0.25, 0: 0.5, 1: 0.75}


@dataclass(frozen=True)
class Perfect:
    """Draws the scene that a prompt means, knowing the prompts by their seeds."""

    prompts: dict[int, Prompt]

    def draw(self, setting: Setting, prompt: str, seed: int, negative: str = "") -> NDArray[np.uint8]:
        assert (prompt, negative) == (self.prompts[seed].text, "")
        return (draw(meant(self.prompts[seed]), 128)[0] * 255).round().byte().permute(1, 2, 0).numpy()


class Noise:
    def draw(self, setting: Setting, prompt: str, seed: int, negative: str = "") -> NDArray[np.uint8]:
        return np.random.default_rng(seed).integers(0, 256, (128, 128, 3), np.uint8)


def meant(prompt: Prompt) -> Scenes:
    shapes = prompt.says.shapes
    centres = [
        (THIRDS[s.place[0]], THIRDS[s.place[1]]) if s.place else free for s, free in zip(shapes, FREE, strict=False)
    ]
    if prompt.says.relation is not None:
        centres[:2] = [(0.5 + 0.25 * sign * prompt.says.relation[0], 0.5 + 0.25 * sign * prompt.says.relation[1])
                       for sign in (1, -1)]  # fmt: skip
        centres[2:] = [(0.85, 0.85)] * (len(shapes) - 2)
    radii = [sum(SIZES[shape.size or "small"]) / 2 * SHRINK[len(shapes) - 1] for shape in shapes]
    pad = MOST - len(shapes)
    return Scenes(
        np.array([[SHAPES.index(str(s.kind)) for s in shapes] + [-1] * pad], np.int8),
        np.array([[NAMES.index(str(s.colour)) for s in shapes] + [0] * pad], np.int8),
        np.zeros((1, MOST), np.int8),
        np.array([centres + [(0.0, 0.0)] * pad], np.float32),
        np.array([radii + [0.0] * pad], np.float32),
        np.array([NAMES.index(str(prompt.says.background))], np.int8),
    )


def test_a_perfect_artist_reaches_every_mark() -> None:
    prompts = held_out_prompts(40, 0) + held_out_prompts(0, 40)
    by_kind = [
        _scores(Perfect({p.seed: p for p in some}), SETTING, some, METER) for some in (prompts[:40], prompts[40:])
    ]  # type: ignore[arg-type]
    for row, one, more in zip(ROWS, *by_kind, strict=True):
        score = one if row.prompts == ONE else more
        assert score.asked > 0
        if row.prompts == ONE or row.what in ("count", "every colour", "background", "every shape"):
            assert score.share == 1, row


def test_noise_reaches_none() -> None:
    prompts = held_out_prompts(5, 5)
    scores = _scores(Noise(), SETTING, prompts, METER)  # type: ignore[arg-type]
    assert all(score.right == 0 for score in scores)
    assert not any(_passed([SETTING], [scores])[i] for i, row in enumerate(ROWS) if row.mark and scores[i].asked)


MARKED = Row(ONE, "colour", 0.9, lambda verdict: verdict.colours)


@pytest.mark.parametrize(("right", "reached"), [(90, True), (89, False)])
def test_the_first_setting_has_the_marks(right: int, reached: bool) -> None:
    score = Score(right, 100)
    assert _reached(SETTING, MARKED, score, score) is reached


@pytest.mark.parametrize(("right", "reached"), [(97, True), (100, True), (96, False)])
def test_others_are_measured_by_the_first(right: int, reached: bool) -> None:
    other = Setting("dpm++2m, 12", SETTING.model, "dpm++2m", 12, 4.0, within=3)
    assert _reached(other, MARKED, Score(right, 100), Score(100, 100)) is reached


def test_some_are_only_shown() -> None:
    first, other = Score(100, 100), Score(1, 100)
    assert _reached(Setting("", SETTING.model, "euler", 20, 1.0), MARKED, other, first) is None
    assert _reached(SETTING, Row(MORE, "sizes", None, lambda verdict: verdict.sizes), first, first) is None
    assert _reached(SETTING, MARKED, Score(0, 0), Score(0, 0)) is None


def test_the_table_has_every_row() -> None:
    table = _table([SETTING], [[Score(9, 10)] * len(ROWS)])
    assert table.row_count == len(ROWS)


def test_a_grid_holds_all_pictures() -> None:
    pictures = [np.full((128, 128, 3), 20 * number, np.uint8) for number in range(len(PROMPTS))]
    grid = np.asarray(arranged(pictures, PROMPTS))
    assert len(PROMPTS) % COLUMNS == 0
    for number in range(len(PROMPTS)):
        assert (grid == 20 * number).all(-1).sum() >= 128 * 128
