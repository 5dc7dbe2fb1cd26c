"""Whether a picture's shapes are outlines, and the same shapes filled, as a detector of shapes wants them.

Pixel arithmetic alone: what has the background's colour and is connected to the picture's border is outside; the rest,
holes and lines, are silhouettes. Half a line's width is peeled off each, since a line is half outside of its shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .detect import Mask, Pixels, Sight, components, detect, words_of
from .scenes import COLOURS, NAMES

LINE = 0.06
"""How wide outlines are, in sides of the picture: what a VAE that makes one latent of eight pixels can just draw."""

LEAST_HOLE = 0.1
"""The share of each silhouette that has the background's colour, at least: a star of middle size has 0.16."""


@dataclass(frozen=True)
class Outlines:
    """``sight``: what the picture shows when its shapes are filled; ``hollow``: every one of them had a hole."""

    sight: Sight
    hollow: bool


def outlines(picture: Pixels) -> Outlines:
    """What a picture (side, side, 3) of outlines shows."""
    words = words_of(picture)
    background = int(np.bincount(_border(words).clip(0), minlength=len(NAMES)).argmax())
    behind = words == background
    numbers = components(words, behind)
    outside = behind & np.isin(numbers, _border(numbers))
    silhouettes = components(np.zeros_like(words), ~outside)
    peeled = _peeled(~outside, round(LINE / 2 * len(picture)))
    painted = np.full_like(words, background)
    shares = []
    for number in np.unique(silhouettes[peeled]):
        silhouette = silhouettes == number
        painted[silhouette & peeled] = np.bincount(words[silhouette & ~behind].clip(0)).argmax()
        shares.append(float((silhouette & behind).sum() / silhouette.sum()))
    palette = (np.array([COLOURS[name] for name in NAMES]) * 255).round().astype(np.uint8)
    return Outlines(detect(palette[painted]), bool(shares) and min(shares) >= LEAST_HOLE)


def _border(pixels: Any) -> Any:
    return np.concatenate((pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


def _peeled(mask: Mask, by: int) -> Mask:
    """The pixels from which all are in the mask that are up to ``by`` pixels away; those beyond the picture are."""
    height, width = mask.shape
    padded = np.pad(mask, by, constant_values=True)
    reach = range(-by, by + 1)
    shifted = [
        padded[by + down : by + down + height, by + across : by + across + width]
        for down in reach for across in reach if np.hypot(down, across) <= by
    ]  # fmt: skip
    kept: Mask = np.logical_and.reduce(shifted)
    return kept
