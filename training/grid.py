"""A picture of pictures, each with its prompt below."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

COLUMNS = 4
PADDING, TEXT_SIZE, TEXT_LINES = 16, 11, 4
INK, PAPER = (40, 40, 40), (255, 255, 255)

PROMPTS = (
    "a small red circle on the left of a large blue square, on a yellow background",
    "a green star on a pink background",
    "a large orange heart in the center on a white background",
    "a white ring in the top right corner on a blue background",
    "a purple diamond and a yellow triangle on a black background",
    "three small cyan circles on a purple background",
    "a black cross at the bottom, on an orange background",
    "a yellow star above a white square on a green background",
    "a red heart, a blue ring and a green triangle on a white background",
    "a small pink square in the bottom left corner on a cyan background",
    "a large yellow circle on the right on a blue background",
    "two orange diamonds on a black background",
)
"""What a grid shows."""


def arranged(pictures: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> Image.Image:
    """The pictures, all (side, side, 3), in rows of :data:`COLUMNS`."""
    side = len(pictures[0])
    line = TEXT_SIZE + 3
    width, height = side + 2 * PADDING, side + TEXT_LINES * line + PADDING
    rows = -(-len(pictures) // COLUMNS)
    grid = Image.new("RGB", (COLUMNS * width, rows * height + PADDING), PAPER)
    pen = ImageDraw.Draw(grid)
    font = ImageFont.load_default(TEXT_SIZE)
    for number, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        left, top = number % COLUMNS * width + PADDING, number // COLUMNS * height + PADDING
        grid.paste(Image.fromarray(picture), (left, top))
        words = textwrap.wrap(prompt, width=side * 2 // TEXT_SIZE + 1)
        for row, words_of_row in enumerate(words[:TEXT_LINES]):
            pen.text((left, top + side + 4 + row * line), words_of_row, INK, font)
    return grid
