"""The detector: right on drawings, nearly as right on blurred and noisy ones, and not to be fooled by broken ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from training.detect import Sight, detect
from training.scenes import MOST, NAMES, SHAPES, Scene, Scenes, draw, sample

NEARLY = 0.02
"""How far off a centre may be found, in sides of the picture."""

Pixels = NDArray[np.uint8]


def scene(background: str, *shapes: tuple[str, str, float, float, float]) -> Scenes:
    """One scene of shapes: kind, colour, x, y, radius."""
    empty = [("", "", 0.0, 0.0, 0.0)] * (MOST - len(shapes))
    kinds, colours, *_ = zip(*shapes, *empty, strict=True)
    numbers = np.array([[shape[2:] for shape in (*shapes, *empty)]], np.float32)
    return Scenes(
        np.array([[SHAPES.index(kind) if kind else -1 for kind in kinds]], np.int8),
        np.array([[NAMES.index(colour) if colour else 0 for colour in colours]], np.int8),
        np.zeros((1, MOST), np.int8),
        numbers[:, :, :2],
        numbers[:, :, 2],
        np.array([NAMES.index(background)], np.int8),
    )


def pictures(scenes: Scenes, side: int = 128, blur: float = 0.0, noise: float = 0.0, seed: int = 0) -> Pixels:
    """Drawings (n, side, side, 3) with jittered colours, blurred by so many pixels, with noise of this deviation."""
    random = torch.Generator().manual_seed(seed)
    drawn = draw(scenes, side, jitter=torch.rand((len(scenes), MOST + 1, 3), generator=random) * 2 - 1)
    if blur:
        bell = torch.exp(-((torch.arange(-3, 4) / blur) ** 2) / 2)
        bell = (bell / bell.sum()).expand(3, 1, 7)
        padded = torch.nn.functional.pad(drawn, (3, 3, 3, 3), mode="replicate")
        rows = torch.nn.functional.conv2d(padded, bell[..., None], groups=3)
        drawn = torch.nn.functional.conv2d(rows, bell[:, :, None], groups=3)
    noisy = (drawn + noise * torch.randn(drawn.shape, generator=random)).clamp(0, 1)
    return (noisy * 255).round().byte().permute(0, 2, 3, 1).numpy()


def seen(scenes: Scenes) -> Sight:
    return detect(pictures(scenes)[0])


def shares(scenes: Scenes, drawn: Pixels) -> dict[str, float]:
    """Of how many scenes everything of a sort was found."""
    found = [_found(scenes[i], detect(picture)) for i, picture in enumerate(drawn)]
    return {what: float(np.mean([each[what] for each in found])) for what in found[0]}


def _found(scene: Scene, sight: Sight) -> dict[str, bool]:
    left = list(sight.shapes)
    pairs = []
    for shape in scene.shapes[: len(left)]:
        nearest = min(left, key=lambda found: np.hypot(found.x - shape.x, found.y - shape.y))
        left.remove(nearest)
        pairs.append((shape, nearest))
    count = len(sight.shapes) == len(scene.shapes)
    return {
        "background": sight.background == scene.background,
        "count": count,
        "colours": count and all(shape.colour == found.colour for shape, found in pairs),
        "kinds": count and all(shape.kind == found.kind for shape, found in pairs),
        "places": count and all(np.hypot(shape.x - f.x, shape.y - f.y) < NEARLY for shape, f in pairs),
        "radii": count and all(abs(shape.radius - found.radius) < NEARLY for shape, found in pairs),
    }


def test_right_on_drawings() -> None:
    scenes = sample(np.random.default_rng(7), 800)
    found = [shares(part, pictures(part, seed=i)) for i in range(4) for part in [scenes.part(i * 200, i * 200 + 200)]]
    for what in found[0]:
        assert np.mean([share[what] for share in found]) >= 0.995, what


def test_right_in_larger_pictures() -> None:
    scenes = sample(np.random.default_rng(8), 30)
    assert min(shares(scenes, pictures(scenes, 256)).values()) >= 0.98


@pytest.mark.parametrize("blur", [0.5, 1.0])
def test_right_through_a_vae(blur: float) -> None:
    scenes = sample(np.random.default_rng(9), 100)
    found = shares(scenes, pictures(scenes, blur=blur, noise=0.03))
    assert min(found.values()) >= 0.98, found


@pytest.mark.parametrize("kind", SHAPES)
def test_each_kind_alone(kind: str) -> None:
    (shape,) = seen(scene("white", (kind, "blue", 0.4, 0.6, 0.2))).shapes
    assert (shape.kind, shape.colour) == (kind, "blue")
    assert (shape.x, shape.y, shape.radius) == pytest.approx((0.4, 0.6, 0.2), abs=0.005)
    assert shape.overlap > 0.98


@pytest.mark.parametrize("background", NAMES)
def test_every_colour_on_every_background(background: str) -> None:
    for colour in NAMES:
        if colour != background:
            sight = seen(scene(background, ("ring", colour, 0.5, 0.5, 0.12)))
            assert [(shape.kind, shape.colour) for shape in sight.shapes] == [("ring", colour)]
            assert sight.background == background


@pytest.mark.parametrize(
    ("one", "other"), [("red", "orange"), ("orange", "yellow"), ("blue", "purple"), ("pink", "white")]
)
def test_near_colours_stay_apart_where_shapes_touch(one: str, other: str) -> None:
    sight = seen(scene("black", ("square", one, 0.3, 0.5, 0.2), ("square", other, 0.62, 0.5, 0.2)))
    assert sorted(str(shape.colour) for shape in sight.shapes) == sorted((one, other))
    assert {shape.kind for shape in sight.shapes} == {"square"}


def test_the_largest_shape_is_first() -> None:
    sight = seen(scene("black", ("star", "red", 0.2, 0.5, 0.1), ("heart", "red", 0.65, 0.5, 0.25)))
    assert [shape.kind for shape in sight.shapes] == ["heart", "star"]


def test_specks_are_no_shapes() -> None:
    drawn = pictures(scene("white", ("circle", "red", 0.5, 0.5, 0.2)))[0]
    drawn[5:10, 5:10] = (0, 0, 200)
    assert len(detect(drawn).shapes) == 1
    drawn[5:12, 5:12] = (0, 0, 200)
    assert len(detect(drawn).shapes) == 2


def test_what_has_no_name_is_still_a_shape() -> None:
    drawn = pictures(scene("white", ("circle", "red", 0.7, 0.5, 0.15)))[0]
    drawn[30:60, 10:40] = 128
    assert {shape.colour for shape in detect(drawn).shapes} == {"red", None}
    drawn[30:60, 10:40] = 255
    drawn[60:66, 5:50] = (0, 0, 200)
    assert {shape.kind for shape in detect(drawn).shapes} == {"circle", None}


def broken() -> dict[str, Pixels]:
    random = np.random.default_rng(3)
    noise = random.integers(0, 256, (128, 128, 3), np.uint8)
    grey = np.repeat(random.normal(128, 40, (128, 128, 1)).clip(0, 255).astype(np.uint8), 3, 2)
    board = np.indices((128, 128)).sum(0)[..., None] % 2 * np.full(3, 255)
    ramp = np.broadcast_to(np.linspace(0, 255, 128)[:, None], (128, 128, 3))
    flat = np.full((128, 128, 3), 128)
    return {name: np.array(value, np.uint8) for name, value in locals().items() if name not in ("random",)}


@pytest.mark.parametrize("name", sorted(broken()))
def test_a_broken_picture_shows_nothing(name: str) -> None:
    assert detect(broken()[name]) == Sight(None, ())


def test_an_empty_picture_shows_its_background() -> None:
    assert detect(np.full((128, 128, 3), 250, np.uint8)) == Sight("white", ())


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 4, 3), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
    ],
)
def test_what_is_no_picture_is_refused(wrong: NDArray[np.generic]) -> None:
    with pytest.raises(ValueError, match="a picture"):
        detect(wrong)  # type: ignore[arg-type]
