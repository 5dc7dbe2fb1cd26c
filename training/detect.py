"""What a picture shows, read from its pixels: colour words, connected components, and the shape whose drawing covers
each best. Nothing here is learnt.

A picture is first cut up by words: each pixel belongs to the nearest colour of :data:`scenes.COLOURS`, or to none when
all are far away. The commonest word is the background's. Pixels of one other word that touch each other are a shape,
if some of them have only such neighbours: edges, which are mixtures and may look like a third colour, are a pixel or
two wide and have hardly any. From there on a pixel is a number: how far it is on the way from the background's colour
to the shape's. These numbers' sum is the area and their middle the centre of mass; each kind is drawn with just these,
and the drawing that shares most with what is there says the kind.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .scenes import COLOURS, DISTANCES, NAMES, SHAPES

NEAR = 0.3
"""A pixel has a colour's name up to this distance from it in RGB; the nearest two colours are 0.35 apart."""

LEAST_BACKGROUND = 0.4
"""The share of the picture that a background's plain pixels have at least: three large shapes leave half as much again.
A pixel is plain, and in the core of what it belongs to, when those beside, above and below it have its word."""

LEAST_AREA = 0.002
"""The share of the picture below which something is a speck and no shape: a quarter of the smallest one drawn."""

LEAST_CORE = 0.15
"""The share of a shape's pixels that are plain, at least; of a small ring a third."""

LEAST_OVERLAP = 0.75
"""Below this overlap with the best drawing, common area over joint area, a shape's kind is unknown."""

MARGIN = 2
"""How many pixels around a shape's own its softened edge may reach."""

EDGE_SCALE = 128
"""Edges are a pixel or two wide in pictures of this side, twice that in twice as large ones."""

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Words = NDArray[np.int64]
Floats = NDArray[np.floating]

_PALETTE = np.array(list(COLOURS.values()), np.float32)
_NO_WORD = -1


@dataclass(frozen=True)
class Found:
    """A shape in a picture. Words are None for what has no name.

    ``x``, ``y``, ``radius``: as a :class:`scenes.Shape` has them, in sides of the picture. ``overlap``: what the shape
    and the best drawing have in common, 0 to 1.
    """

    kind: str | None
    colour: str | None
    x: float
    y: float
    radius: float
    overlap: float


@dataclass(frozen=True)
class Sight:
    """What a picture shows: the background's colour, None when there is none, and the shapes, the largest first."""

    background: str | None
    shapes: tuple[Found, ...]


def detect(picture: Pixels) -> Sight:
    """What the picture, (side, side, 3), shows. Without a background it shows no shapes either.

    Raises :class:`ValueError` for an array of another shape or dtype.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.shape[0] != picture.shape[1]:
        raise ValueError(f"a picture is (side, side, 3), not {picture.shape}")
    if picture.dtype != np.uint8:
        raise ValueError(f"a picture's pixels are uint8, not {picture.dtype}")
    pixels = picture.astype(np.float32) / 255
    words = words_of(picture)
    core = _core(words)
    counts = np.bincount(words[core & (words != _NO_WORD)], minlength=len(NAMES))
    background = int(counts.argmax())
    if counts[background] < LEAST_BACKGROUND * words.size:
        return Sight(None, ())
    behind = pixels[core & (words == background)].mean(0)
    parts = list(_parts(words, core, background))
    windows = _windows(parts) if parts else []
    shapes = [
        _found(pixels, behind, pixels[part & core].mean(0), window) for part, window in zip(parts, windows, strict=True)
    ]
    return Sight(NAMES[background], tuple(sorted(shapes, key=lambda shape: -shape.radius)))


def words_of(picture: Pixels) -> Words:
    """The number of each pixel's colour word, [side, side], into :data:`scenes.NAMES`; -1 where no colour is near."""
    pixels = picture.astype(np.float32) / 255
    distances = _distances(pixels.reshape(-1, 3)).reshape(len(_PALETTE), *pixels.shape[:2])
    return np.where(distances.min(0) <= NEAR, distances.argmin(0), _NO_WORD)


def _distances(colours: Floats) -> Floats:
    """How far colours [n, 3] are from those that have words: [words, n]."""
    squares = (_PALETTE**2).sum(1)[:, None] - 2 * (_PALETTE @ colours.T) + (colours**2).sum(1)
    result: Floats = np.sqrt(squares.clip(0))
    return result


def _core(words: Words) -> Mask:
    """The pixels that have only their like beside, above and below them."""
    core = np.ones(words.shape, bool)
    for step in range(1, max(1, round(len(words) / EDGE_SCALE)) + 1):
        same = words[step:] == words[:-step]
        core[step:] &= same
        core[:-step] &= same
        same = words[:, step:] == words[:, :-step]
        core[:, step:] &= same
        core[:, :-step] &= same
    return core


def _parts(words: Words, core: Mask, background: int) -> Iterator[Mask]:
    """The pixels of each shape. What has no colour's name can be a shape as well."""
    inside = words != background
    labels = components(words, inside)
    areas = np.bincount(labels[inside], minlength=words.size)
    cores = np.bincount(labels[inside & core], minlength=words.size)
    for label in np.flatnonzero((areas >= LEAST_AREA * words.size) & (cores >= LEAST_CORE * areas)):
        yield labels == label


def components(words: Words, inside: Mask) -> Words:
    """For each pixel inside the number of one pixel of its component, the same for all of it; -1 outside.

    Neighbours (also diagonal ones) of one word belong together. Each round hands the smaller number over every seam
    and then lets all numbers point through; the rounds grow like the logarithm of a component's length.
    """
    height, width = words.shape
    numbers = np.arange(words.size).reshape(words.shape)
    seams = []
    for down, across in ((0, 1), (1, 0), (1, 1), (1, -1)):
        here = (slice(0, height - down), slice(max(0, -across), width - max(0, across)))
        there = (slice(down, height), slice(max(0, across), width - max(0, -across)))
        joined = inside[here] & inside[there] & (words[here] == words[there])
        seams.append(np.stack((numbers[here][joined], numbers[there][joined])))
    one, other = np.concatenate(seams, 1)
    labels = numbers.ravel().copy()
    while (labels[one] != labels[other]).any():
        low, high = np.minimum(labels[one], labels[other]), np.maximum(labels[one], labels[other])
        np.minimum.at(labels, high, low)
        while (labels[labels] != labels).any():
            labels = labels[labels]
    return np.where(inside, labels.reshape(words.shape), -1)


def _windows(parts: list[Mask]) -> list[Mask]:
    """For each part the pixels in which its edges are: those around it that are no other part's."""
    taken = np.logical_or.reduce(parts)
    return [part | (grown(part, MARGIN) & ~taken) for part in parts]


def grown(mask: Mask, by: int) -> Mask:
    """The mask and all pixels that are up to ``by`` rows and columns away."""
    height, width = mask.shape
    padded = np.pad(mask, by)
    rows = np.logical_or.reduce([padded[i : i + height] for i in range(2 * by + 1)])
    grown: Mask = np.logical_or.reduce([rows[:, i : i + width] for i in range(2 * by + 1)])
    return grown


def _found(pixels: Floats, behind: Floats, colour: Floats, window: Mask) -> Found:
    """The shape of this colour whose pixels, edges included, are inside ``window``."""
    side = len(pixels)
    top, bottom, left, right = _bounds(window)
    part = np.s_[top:bottom, left:right]
    towards = colour - behind
    cover = ((pixels[part] - behind) @ (towards / (towards @ towards))).clip(0, 1) * window[part]
    x, y = ((np.arange(*ends, dtype=np.float32) + 0.5) / side for ends in ((left, right), (top, bottom)))
    mass = cover.sum()
    middle = np.array((cover.sum(0) @ x, cover.sum(1) @ y)) / mass
    areas, offsets = _moments()
    radii = np.sqrt(mass / side**2 / areas)
    centres = middle - radii[:, None] * offsets
    drawn = _drawn(x, y, centres, radii, side)
    overlaps = np.minimum(drawn, cover).sum((1, 2)) / np.maximum(drawn, cover).sum((1, 2))
    best = int(overlaps.argmax())
    distances = _distances(colour[None])[:, 0]
    return Found(
        SHAPES[best] if overlaps[best] >= LEAST_OVERLAP else None,
        NAMES[distances.argmin()] if distances.min() <= NEAR else None,
        float(centres[best, 0]), float(centres[best, 1]), float(radii[best]), float(overlaps[best]),
    )  # fmt: skip


def _bounds(mask: Mask) -> tuple[int, int, int, int]:
    """The first and last row and column (the last not included) between which the mask is."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _drawn(x: Floats, y: Floats, centres: Floats, radii: Floats, side: int) -> Floats:
    """How much of each pixel each kind covers, [kinds, y, x], with its own centre and radius: as scenes.draw does."""
    covers = []
    for kind, (middle_x, middle_y), radius in zip(SHAPES, centres.tolist(), radii.tolist(), strict=True):
        across, down = torch.from_numpy((x - middle_x) / radius), torch.from_numpy((y - middle_y) / radius)
        distance = DISTANCES[kind](across.expand(len(y), -1), down[:, None].expand(-1, len(x)))
        covers.append((0.5 - distance * radius * side).clamp(0, 1))
    result: Floats = torch.stack(covers).numpy()
    return result


@functools.cache
def _moments() -> tuple[Floats, Floats]:
    """The area of each kind at radius 1, [kinds], and where its centre of mass is, (x, y), [kinds, 2]."""
    reach, points = 1.2, 800
    line = ((np.arange(points, dtype=np.float32) + 0.5) / points * 2 - 1) * reach
    covers = _drawn(line, line, np.zeros((len(SHAPES), 2)), np.ones(len(SHAPES)), round(points / 2 / reach))
    masses = covers.sum((1, 2))
    middles = np.stack((covers.sum(1) @ line, covers.sum(2) @ line), 1) / masses[:, None]
    return masses * (2 * reach / points) ** 2, middles
