"""Words that were learnt for a model (textual inversion): vectors that stand where a text encoder has its words'."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

BEGINNING = "embedding:"
"""What may stand before such a word, as in ComfyUI; the web UIs and stable-diffusion.cpp have the word alone."""

FIRST = 1 << 20
"""The number that the first vector has among tokens: above those of any vocabulary."""


@dataclass(frozen=True, eq=False)
class Learned:
    """The words of one prompt. ``words``: in small letters, each with the numbers of its vectors among the prompt's
    tokens. ``vectors``: by text encoder, float32 (vectors, width)."""

    words: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    vectors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def split(self, text: str) -> Iterator[str | tuple[int, ...]]:
        """``text`` in order: what is between its learnt words, and these words' numbers."""
        if not self.words:
            yield text
            return
        at = 0
        for match in pattern(self.words).finditer(text):
            yield text[at : match.start()]
            yield self.words[match["word"].lower()]
            at = match.end()
        yield text[at:]

    def embedded(self, encoder: str, ids: NDArray[np.int32]) -> dict[str, NDArray[np.generic]]:
        """Inputs of a text encoder for tokens (1, length): ``ids`` with 0 for what it has no words for, and where there
        is such, what of its own vectors is kept, 0 or 1, (1, length, 1), and what is added to them (1, length,
        width)."""
        strange = ids >= FIRST
        if not strange.any():
            return {"ids": ids}
        vectors = self.vectors[encoder]
        added = np.zeros((*ids.shape, vectors.shape[1]), np.float32)
        added[strange] = vectors[ids[strange] - FIRST]
        return {
            "ids": np.where(strange, np.int32(0), ids),
            "kept": (~strange).astype(np.float32)[..., None],
            "added": added,
        }


NOTHING = Learned()


def pattern(words: Iterable[str]) -> re.Pattern[str]:
    """What finds any of ``words`` (group ``word``) in a text, standing alone, with or without their beginning."""
    names = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return re.compile(rf"(?<![\w-])(?:{BEGINNING})?(?P<word>{names})(?![\w-])", re.IGNORECASE)
