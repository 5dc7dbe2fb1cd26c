"""Attention syntax in prompts, as stable-diffusion.cpp reads it.

    (word)        more attention: 1.1 times       (word:1.3)   1.3 times
    [word]        less: 1 / 1.1 times             \\( \\[ …      the character itself
    BREAK         go on with a new chunk of tokens

Brackets nest and multiply; ones that are never closed reach to the end. The syntax is that of the stable-diffusion
web UI; where stable-diffusion.cpp differs (only ``\\(`` loses its backslash), its reading counts, because the same
prompt has to draw the same picture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ..errors import InvalidValue

f32 = np.float32

MORE = f32(1.1)
LESS = f32(1) / MORE
BREAK = "BREAK"

_TOKEN = re.compile(
    r"\\\(|\\\)|\\\[|\\\]|\\\\|\\|\(|\[|:(?P<weight>[+-]?[.\d]+)\)|\)|\]|\bBREAK\b|[^\\()\[\]:B]+|:|\bB", re.ASCII
)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")


class Piece(NamedTuple):
    """A piece of a prompt and its weight; or (``BREAK``, -1)."""

    text: str
    weight: float

    @property
    def is_break(self) -> bool:
        return self == (BREAK, -1.0)


def parse(prompt: str) -> tuple[Piece, ...]:
    """The pieces of a prompt with their weights, neighbours of the same weight joined. Never empty.

    Raises :class:`InvalidValue` for a weight that is no number: ``(word:.)``.
    """
    texts: list[str] = []
    weights: list[f32] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: f32) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # who checks the prompt says it
            weights[start:] = [weight * factor for weight in weights[start:]]

    rest = prompt
    while match := _TOKEN.search(rest):  # searched anew each time: \b sees the rest alone, as there
        piece, weight, rest = match[0], match["weight"], rest[match.end() :]
        if piece in opened:
            opened[piece].append(len(texts))
        elif weight is not None:
            if opened["("]:
                multiply(opened["("].pop(), _number(weight, prompt))
        elif piece == ")" and opened["("]:
            multiply(opened["("].pop(), MORE)
        elif piece == "]" and opened["["]:
            multiply(opened["["].pop(), LESS)
        elif re.search(r"\bBREAK\b", piece):
            texts.append(BREAK)
            weights.append(f32(-1))
        else:
            texts.append("(" if piece == r"\(" else piece)
            weights.append(f32(1))
    for start in opened["("]:
        multiply(start, MORE)
    for start in opened["["]:
        multiply(start, LESS)
    return joined(Piece(text, float(weight)) for text, weight in zip(texts, weights, strict=True)) or (Piece("", 1.0),)


def _number(weight: str, prompt: str) -> f32:
    """The number that ``weight`` begins with; what follows (a second point) is ignored, as there."""
    number = _NUMBER.match(weight)
    if number is None or not math.isfinite(value := float(number[0])) or value > float(np.finfo(f32).max):
        raise InvalidValue("prompt", prompt, f"the weight {weight!r} is no number")
    return f32(value)


def joined(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """``pieces`` with neighbours of the same weight as one."""
    found: list[Piece] = []
    for piece in pieces:
        if found and found[-1].weight == piece.weight:
            found[-1] = Piece(found[-1].text + piece.text, piece.weight)
        else:
            found.append(piece)
    return tuple(found)
