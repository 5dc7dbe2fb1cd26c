"""A prompt's tokens, with the weights of its attention syntax, in the chunks that text encoders read.

Chunks and weights are those of stable-diffusion.cpp (conditioner.hpp, tokenizer.cpp): a long prompt takes several
chunks, which are encoded one by one and joined afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..errors import InvalidValue
from .attention import Piece, joined, parse
from .learned import NOTHING, Learned
from .tokenizers import END, START, T5_END, T5_PAD, clip_tokenizer, encoded, t5_tokenizer


@dataclass(frozen=True)
class Tokens:
    """Chunks of token numbers, int32 (chunks, length), and the weight of each, float32 of the same shape. ``learned``:
    the words whose numbers are above the vocabulary's."""

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    learned: Learned = NOTHING


def clip_chunks(
    prompt: str,
    *,
    length: int = 77,
    pad: int | None = None,
    cut: bool = False,
    breaks: bool = True,
    learned: Learned = NOTHING,
    tokenizer: Tokenizer | None = None,
) -> Tokens:
    """A prompt's tokens for a CLIP text encoder: start token, up to ``length`` - 2 tokens, end token, ``pad``.

    ``pad`` is the end token itself unless told otherwise; OpenCLIP's encoders were trained with 0: those of SD 2 and
    the second one of SDXL. BREAK fills up its chunk with end tokens.

    ``cut`` replaces by ``pad`` whatever follows a chunk's first end token, also where BREAK or the prompt's own text
    put that token there; stable-diffusion.cpp does so for SDXL's second encoder, not for SD 2. Without ``breaks``,
    BREAK is a word like others (with weight -1), as stable-diffusion.cpp reads it for FLUX and SD 3.

    Raises :class:`InvalidValue` for a prompt that can't be read, or a tokenizer without CLIP's start and end tokens.
    """
    tokenizer = tokenizer or clip_tokenizer()
    start, end = (number_of(tokenizer, token) for token in (START, END))
    pad = end if pad is None else pad
    ids, weights = _weighted(tokenizer, parse(prompt), room=length - 2, fill=end if breaks else None, learned=learned)
    tokens = replace(_chunked(ids, weights, length, (start,), (end,), pad), learned=learned)
    if cut:
        behind = np.cumsum(tokens.ids == end, axis=1) - (tokens.ids == end) > 0
        tokens.ids[behind] = pad
    return tokens


def t5_chunks(prompt: str, *, length: int = 256, tokenizer: Tokenizer | None = None) -> Tokens:
    """A prompt's tokens for T5: up to ``length`` - 1 tokens, the end token ``</s>``, then ``<pad>``.

    Each piece of the attention syntax is tokenized by itself. BREAK is a word like others, with weight -1, as in
    stable-diffusion.cpp. Raises :class:`InvalidValue` for a prompt that can't be read, or a tokenizer without T5's end
    and padding tokens.
    """
    tokenizer = tokenizer or t5_tokenizer()
    end, pad = (number_of(tokenizer, token) for token in (T5_END, T5_PAD))
    ids, weights = _weighted(tokenizer, parse(prompt), room=length - 1, fill=None)
    return _chunked(ids, weights, length, (), (end,), pad)


class Template(NamedTuple):
    """What a language model is told before and behind a prompt, with its special tokens."""

    before: str
    after: str


def llm_tokens(prompt: str, template: Template, tokenizer: Tokenizer) -> Tokens:
    """A prompt's tokens for a language model, in its template: one chunk, as long as the text is.

    Neighbours of the same weight are tokenized together, the template with them; so a prompt without weights has the
    tokens that diffusers gives it. BREAK is a word like others, with weight -1, as in stable-diffusion.cpp. Raises
    :class:`InvalidValue` for a prompt that can't be read.
    """
    pieces = joined([Piece(template.before, 1.0), *parse(prompt), Piece(template.after, 1.0)])
    ids, weights = _weighted(tokenizer, pieces, room=0, fill=None)
    return Tokens(np.array([ids], np.int32), np.array([weights], np.float32))


def number_of(tokenizer: Tokenizer, token: str) -> int:
    """The number of a special token. Raises :class:`InvalidValue` where the tokenizer has none."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise InvalidValue("tokenizer", token, "the tokenizer has no such token; it belongs to another text encoder")
    return int(number)


def _weighted(
    tokenizer: Tokenizer, pieces: tuple[Piece, ...], room: int, fill: int | None, learned: Learned = NOTHING
) -> tuple[list[int], list[float]]:
    """Tokens and weights of all pieces. A BREAK fills its chunk of ``room`` tokens with ``fill``, if there is one."""
    ids: list[int] = []
    weights: list[float] = []
    for piece in pieces:
        if piece.is_break and fill is not None:
            new, weight = [fill] * (-len(ids) % room), 1.0
        else:
            parts = [encoded(tokenizer, p) if isinstance(p, str) else p for p in learned.split(piece.text)]
            new, weight = list(chain.from_iterable(parts)), piece.weight
        ids += new
        weights += [weight] * len(new)
    return ids, weights


def _chunked(
    ids: list[int], weights: list[float], length: int, before: tuple[int, ...], after: tuple[int, ...], pad: int
) -> Tokens:
    """Chunks of ``length``: ``before``, tokens, ``after``, then ``pad``. All but the tokens weigh 1. At least one."""
    room = length - len(before) - len(after)
    chunks = max(1, -(-len(ids) // room))
    all_ids = np.full((chunks, length), pad, np.int32)
    all_weights = np.ones((chunks, length), np.float32)
    for chunk in range(chunks):
        part = slice(chunk * room, (chunk + 1) * room)
        whole = (*before, *ids[part], *after)
        all_ids[chunk, : len(whole)] = whole
        all_weights[chunk, len(before) : len(whole) - len(after)] = weights[part]
    return Tokens(all_ids, all_weights)
