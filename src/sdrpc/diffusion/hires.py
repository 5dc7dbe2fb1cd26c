"""Large pictures in two passes ("hires fix"): drawn in a size that the model knows, enlarged, and on from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import InvalidValue
from .pictures import F32, Pixels

LATENT, PIXELS = "Latent", "Lanczos"

Enlarging = Callable[[int, int], np.ndarray]
"""From the length of a line and that of the longer one to what makes this of that: (longer, length)."""


def _nearest(length: int, longer: int, part: Fraction) -> np.ndarray:
    """Each new number is the one at that ``part`` of its place."""
    places = [int((number + part) * length / longer) for number in range(longer)]
    return np.eye(length)[places]


def _weighted(
    length: int, longer: int, weight: Callable[[np.ndarray], np.ndarray], reach: int, ends: bool
) -> np.ndarray:
    """Each new number is a sum of its neighbours, ``reach`` on each side, by the ``weight`` of their distances. Where
    the line ``ends`` they are fewer; else its first and last number go on beyond it."""
    places = (np.arange(longer) + 0.5) * length / longer - 0.5
    found = np.zeros((longer, length))
    for neighbour in range(1 - reach, reach + 1):
        at = np.floor(places).astype(int) + neighbour
        within = (at >= 0) & (at < length)
        weights = weight(np.abs(places - at)) * (within | (not ends))
        np.add.at(found, (np.arange(longer), at.clip(0, length - 1)), weights)
    return found / found.sum(1, keepdims=True)


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic kernel (1981)."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    found: np.ndarray = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
    return found


_LINEAR: Enlarging = partial(_weighted, weight=lambda distance: 1 - distance, reach=1, ends=False)

LATENT_FILTERS: dict[str, Enlarging] = {
    LATENT: _LINEAR,
    "Latent (antialiased)": _LINEAR,  # they differ where something is made smaller
    "Latent (bicubic)": partial(_weighted, weight=partial(_cubic, a=-0.75), reach=2, ends=False),
    "Latent (bicubic antialiased)": partial(_weighted, weight=partial(_cubic, a=-0.5), reach=2, ends=True),
    "Latent (nearest)": partial(_nearest, part=Fraction(0)),
    "Latent (nearest-exact)": partial(_nearest, part=Fraction(1, 2)),
}
"""Ways to enlarge latents, by the names that sd-cli and AUTOMATIC1111 have for them: as torch's ``interpolate``, which
the latter uses. (stable-diffusion.cpp's bicubic is the same, antialiased or not.)"""

PIXEL_FILTERS = {PIXELS: Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}
"""Ways to enlarge the picture that the VAE makes of them."""

UPSCALERS = (*LATENT_FILTERS, *PIXEL_FILTERS)

MAX_SCALE = 16.0


@dataclass(frozen=True)
class Hires:
    """The second pass: ``width`` and ``height`` in pixels, how it is enlarged, of how many ``steps``, and how much of
    the noise (``strength``, 0 … 1) the enlarged picture gets. ``network``: the file of one that enlarges it, in tiles
    of ``tile`` pixels on a side; None: a filter does. ``sigmas``: all its levels of noise, instead of ``strength``'s
    part of a schedule."""

    width: int
    height: int
    upscaler: str
    steps: int
    strength: float
    network: Path | None = None
    tile: int = 128
    sigmas: tuple[float, ...] = ()


def second_size(
    width: int, height: int, wanted: tuple[int | None, int | None], scale: float, multiple: int
) -> tuple[int, int]:
    """Width and height of the second pass: those that are ``wanted``, the other side in proportion, or ``scale`` times
    the first ones; multiples of ``multiple``. Raises :class:`InvalidValue` for a size that is smaller."""
    if not 1 <= scale <= MAX_SCALE:
        raise InvalidValue("hires_scale", scale, f"it can be 1 … {MAX_SCALE:g}")
    given_width, given_height = wanted
    larger = given_width or (width * given_height / height if given_height else width * scale)
    higher = given_height or (height * given_width / width if given_width else height * scale)
    found = tuple(max(1, round(side / multiple)) * multiple for side in (larger, higher))
    for field, side, before in (("hires_width", found[0], width), ("hires_height", found[1], height)):
        if side < before:
            raise InvalidValue(field, side, f"the first pass has {before} pixels already")
    return found[0], found[1]


def enlarged_latents(latents: F32, upscaler: str, height: int, width: int) -> F32:
    """Latents (1, c, h, w) → (1, c, ``height``, ``width``)."""
    enlarging = LATENT_FILTERS[upscaler]
    rows, columns = enlarging(latents.shape[2], height), enlarging(latents.shape[3], width)
    return np.asarray(rows @ latents @ columns.T, np.float32)


def enlarged_pixels(image: Pixels, upscaler: str, height: int, width: int) -> Pixels:
    """Pixels (h, w, 3) → (``height``, ``width``, 3)."""
    return np.asarray(Image.fromarray(image).resize((width, height), PIXEL_FILTERS[upscaler]))
