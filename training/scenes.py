"""The world of the small model: flat shapes on a plain background, drawn and described by a few numbers.

Scenes are arrays, so that a million of them are sampled by numpy in seconds and drawn by torch on any device.
Coordinates are fractions of the picture's side, x to the right and y down.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.12), "orange": (0.98, 0.55, 0.05), "yellow": (0.98, 0.90, 0.10),
    "green": (0.10, 0.60, 0.20), "cyan": (0.15, 0.85, 0.90), "blue": (0.10, 0.25, 0.85),
    "purple": (0.58, 0.14, 0.70), "pink": (1.00, 0.58, 0.76), "white": (0.97, 0.97, 0.97),
    "black": (0.04, 0.04, 0.04),
}  # fmt: skip
"""Each colour's RGB, 0 to 1; a drawn one is up to :data:`JITTER` beside it in each channel."""

JITTER = 0.04
NAMES = tuple(COLOURS)

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")

SIZES: dict[str, tuple[float, float]] = {"small": (0.10, 0.13), "medium": (0.16, 0.19), "large": (0.23, 0.29)}
"""Radii. Where there are more shapes, all are smaller, by :data:`SHRINK`."""

SHRINK = (1.0, 0.85, 0.75)
MOST = len(SHRINK)
"""The most shapes of a scene."""

SHARES = (0.45, 0.33, 0.22)
"""How many of the scenes have one shape, two, three."""

ALIKE = 0.2
"""The share of scenes of several shapes in which all have one kind and colour: what number words are learnt from."""

GAP = 0.03
"""Between two shapes' circles, and between a shape's circle and the picture's border."""

CELLS = (0.25, 0.5, 0.75)
"""Around these coordinates most single shapes lie, so that each of nine places is common."""

Ints = NDArray[np.int8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Shape:
    """One shape: its place is its centre."""

    kind: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """What one picture shows."""

    background: str
    shapes: tuple[Shape, ...]


@dataclass(frozen=True)
class Scenes:
    """Many scenes. Words are numbers, into :data:`SHAPES`, :data:`NAMES` and :data:`SIZES`; -1 is no shape."""

    kinds: Ints  # [n, MOST]
    colours: Ints  # [n, MOST]
    sizes: Ints  # [n, MOST]
    centres: Floats  # [n, MOST, 2]
    radii: Floats  # [n, MOST]
    backgrounds: Ints  # [n]

    def __len__(self) -> int:
        return len(self.backgrounds)

    def __getitem__(self, i: int) -> Scene:
        shapes = tuple(
            Shape(
                SHAPES[self.kinds[i, j]], NAMES[self.colours[i, j]], tuple(SIZES)[self.sizes[i, j]],
                float(self.centres[i, j, 0]), float(self.centres[i, j, 1]), float(self.radii[i, j]),
            )
            for j in range(MOST) if self.kinds[i, j] >= 0
        )  # fmt: skip
        return Scene(NAMES[self.backgrounds[i]], shapes)

    def part(self, first: int, last: int) -> Scenes:
        """Scenes ``first`` to ``last``, the last not included."""
        return self.chosen(np.s_[first:last])

    def chosen(self, which: NDArray[np.intp] | slice) -> Scenes:
        """The scenes of these numbers."""
        arrays = (getattr(self, name)[which] for name in self.__dataclass_fields__)
        return Scenes(*arrays)


def held_out(kind: NDArray[np.int8], colour: NDArray[np.int8], background: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Which combinations no training scene has: one of twelve, so that each pair of words is still common."""
    result: NDArray[np.bool_] = (kind.astype(int) * 5 + colour.astype(int) * 7 + background.astype(int)) % 12 == 0
    return result


def sample(random: np.random.Generator, n: int) -> Scenes:
    """``n`` scenes for training: none has a shape, colour and background that :func:`held_out` keeps back."""
    count = random.choice(MOST, n, p=SHARES) + 1
    there = np.arange(MOST) < count[:, None]
    backgrounds = random.integers(0, len(NAMES), n).astype(np.int8)
    kinds, colours = _looks(random, backgrounds)
    alike = (random.random(n) < ALIKE) & (count > 1)
    kinds[alike], colours[alike] = kinds[alike, :1], colours[alike, :1]
    sizes, radii, centres = _places(random, there)
    kinds[~there] = -1
    return Scenes(kinds, colours, sizes, centres, radii, backgrounds)


def _looks(random: np.random.Generator, backgrounds: Ints) -> tuple[Ints, Ints]:
    """Kinds and colours, [n, MOST], drawn again until each is seen on its background and allowed there."""
    shape = (len(backgrounds), MOST)
    kinds, colours = np.zeros(shape, np.int8), np.zeros(shape, np.int8)
    behind = np.broadcast_to(backgrounds[:, None], shape)
    wrong = np.ones(shape, bool)
    while wrong.any():
        kinds[wrong] = random.integers(0, len(SHAPES), wrong.sum())
        colours[wrong] = random.integers(0, len(NAMES), wrong.sum())
        wrong = (colours == behind) | held_out(kinds, colours, behind)
    return kinds, colours


def _places(random: np.random.Generator, there: NDArray[np.bool_]) -> tuple[Ints, Floats, Floats]:
    """Sizes [n, MOST], radii [n, MOST] and centres [n, MOST, 2], drawn again until no two shapes meet."""
    n = len(there)
    sizes, radii = np.zeros(there.shape, np.int8), np.zeros(there.shape, np.float32)
    centres = np.zeros((*there.shape, 2), np.float32)
    ranges = np.array(list(SIZES.values()), np.float32)
    shrink = np.array(SHRINK, np.float32)[there.sum(1) - 1]
    wrong = np.arange(n)
    while len(wrong):
        shape = (len(wrong), MOST)
        sizes[wrong] = random.integers(0, len(SIZES), shape)
        low, high = np.moveaxis(ranges[sizes[wrong]], 2, 0)
        radii[wrong] = (low + (high - low) * random.random(shape, np.float32)) * shrink[wrong, None]
        margin = radii[wrong, :, None] + GAP
        anywhere = margin + (1 - 2 * margin) * random.random((*shape, 2), np.float32)
        cell = np.array(CELLS, np.float32)[random.integers(0, 3, (*shape, 2))]
        near = np.clip(cell + random.uniform(-0.06, 0.06, (*shape, 2)).astype(np.float32), margin, 1 - margin)
        in_cell = (there[wrong].sum(1) == 1) & (random.random(len(wrong)) < 0.75)
        centres[wrong] = np.where(in_cell[:, None, None], near, anywhere)
        wrong = wrong[_meet(centres[wrong], radii[wrong], there[wrong])]
    return sizes, radii, centres


def _meet(centres: Floats, radii: Floats, there: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether any two shapes of a scene are too near each other: [n]."""
    distance = np.linalg.norm(centres[:, :, None] - centres[:, None], axis=-1)
    near = distance < radii[:, :, None] + radii[:, None] + GAP
    pairs = there[:, :, None] & there[:, None] & ~np.eye(MOST, dtype=bool)
    result: NDArray[np.bool_] = (near & pairs).any((1, 2))
    return result


# Drawing: signed distances (negative inside) from a shape of radius 1 at the origin, for points x, y ------------------


def _half_planes(x: Tensor, y: Tensor, corners: int, reach: float) -> Tensor:
    """A regular polygon with a corner at the top, whose sides are ``reach`` from its middle."""
    angles = [math.pi * (2 * i + 1) / corners for i in range(corners)]
    sides = [math.sin(a) * x - math.cos(a) * y - reach for a in angles]
    return torch.stack(sides).amax(0)


def _box(x: Tensor, y: Tensor, width: float, height: float) -> Tensor:
    return torch.maximum(x.abs() - width, y.abs() - height)


def _star(x: Tensor, y: Tensor, outer: float = 1.05, inner: float = 0.46) -> Tensor:
    """Five points: the plane is folded onto half a point, of which one straight edge is left."""
    fifth = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    angle = ((angle + fifth / 2) % fifth - fifth / 2).abs()
    length = torch.hypot(x, y)
    u, v = length * angle.sin(), length * angle.cos()
    edge = (inner * math.sin(fifth / 2), inner * math.cos(fifth / 2) - outer)
    norm = math.hypot(*edge)
    return ((v - outer) * edge[0] - u * edge[1]) / norm


def _heart(x: Tensor, y: Tensor, half: float = 0.8) -> Tensor:
    """A square on its corner and two circles on its upper edges."""
    y = y - 0.1 * half
    square = (x.abs() + y.abs() - half) / math.sqrt(2)
    circle = torch.hypot(x.abs() - half / 2, y + half / 2) - half / math.sqrt(2)
    return torch.minimum(square, circle)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": lambda x, y: torch.hypot(x, y) - 0.9,
    "square": lambda x, y: _box(x, y, 0.8, 0.8),
    "triangle": lambda x, y: _half_planes(x, y - 0.15, 3, 0.6),
    "star": _star,
    "ring": lambda x, y: (torch.hypot(x, y) - 0.7).abs() - 0.22,
    "cross": lambda x, y: torch.minimum(_box(x, y, 0.95, 0.32), _box(x, y, 0.32, 0.95)),
    "heart": _heart,
    "diamond": lambda x, y: (x.abs() + y.abs() - 1) / math.sqrt(2),
}


def draw(scenes: Scenes, size: int, device: torch.device | str = "cpu", jitter: Tensor | None = None,
         line: float = 0) -> Tensor:  # fmt: skip
    """Pictures of the scenes: [n, 3, size, size], f32, 0 to 1, edges smoothed over a pixel.

    ``jitter``, [n, MOST + 1, 3] of -1 to 1, moves the colours of shapes and (last) background a little.
    ``line``: shapes are outlines this wide, in sides of the picture, half of it outside; 0: they are filled.
    """
    palette = torch.tensor(list(COLOURS.values()), device=device)
    words = np.concatenate((scenes.colours, scenes.backgrounds[:, None]), 1).astype(np.int64)
    colours = palette[torch.from_numpy(words).to(device)]  # [n, MOST + 1, 3]
    if jitter is not None:
        colours = (colours + JITTER * jitter.to(device)).clamp(0, 1)
    middles = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size
    kinds = torch.from_numpy(scenes.kinds.astype(np.int64)).to(device)
    centres, radii = (torch.from_numpy(a).to(device) for a in (scenes.centres, scenes.radii))
    picture = colours[:, MOST, :, None, None].expand(-1, -1, size, size)
    for j in range(MOST):
        radius = radii[:, j, None, None].clamp(min=1e-3)
        x = (middles[None, None, :] - centres[:, j, 0, None, None]) / radius
        y = (middles[None, :, None] - centres[:, j, 1, None, None]) / radius
        x, y = x.expand(len(scenes), size, size), y.expand(len(scenes), size, size)
        distance = torch.full_like(x, math.inf)
        for number, name in enumerate(SHAPES):
            here = kinds[:, j] == number
            distance[here] = DISTANCES[name](x[here], y[here])
        distance = (distance * radius).abs() - line / 2 if line else distance * radius
        cover = (0.5 - distance * size).clamp(0, 1)[:, None]
        picture = picture + cover * (colours[:, j, :, None, None] - picture)
    return picture
