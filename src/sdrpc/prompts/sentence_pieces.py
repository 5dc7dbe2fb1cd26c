"""Tokenizers of sentencepiece's kind that join pairs (Gemma's), from a model of sentencepiece's or a GGUF file.

A text is its characters, with "▁" for spaces, and of all neighbours that together are a piece those whose piece has the
best score are joined first. Characters that are no pieces are their bytes. Tokens equal those of sentencepiece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, normalizers
from tokenizers.models import BPE

from ..errors import CheckpointError, UsageError
from .tokenizers import failures

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of pieces, as sentencepiece and GGUF files number them."""
SPACE = "▁"
LONGEST = 256
"""Characters of a piece, at most; Gemma's have up to 31."""


class Pieces(NamedTuple):
    """A vocabulary: pieces in the order of their numbers, with scores and kinds. ``space``: whether a text is read with
    a space before it."""

    pieces: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    space: bool


def sentencepiece_tokenizer(path: Path, model: bytes) -> Tokenizer:
    """The tokenizer in a model of sentencepiece's, from the file at ``path``.

    Raises :class:`CheckpointError` for bytes that are no such model, or one of another kind, and :class:`UsageError`
    where the libraries that read it are not installed.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        reason = f"reading the vocabulary in {path} needs sentencepiece and protobuf ({error})"
        raise UsageError(f"{reason}: pip install 'sdrpc[gemma]'") from error
    with failures(lambda error: CheckpointError(path, f"its tokenizer can't be read: {error}")):
        proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        proto.ParseFromString(model)
        if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
            raise CheckpointError(path, "its tokenizer does not join pairs, as those of language models do")
        pieces, scores, kinds = ([getattr(each, name) for each in proto.pieces] for name in ("piece", "score", "type"))
        return _joining(path, Pieces(pieces, scores, kinds, proto.normalizer_spec.add_dummy_prefix))


def pieces_of_gguf(path: Path, entries: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in the ``tokenizer.…`` entries of a GGUF file that llama.cpp calls ``llama``'s. Raises
    :class:`CheckpointError` for entries that are no tokenizer."""
    pieces, scores, kinds = (entries.get(f"tokenizer.ggml.{key}", []) for key in ("tokens", "scores", "token_type"))
    sizes = {len(values) for values in (pieces, scores, kinds) if isinstance(values, list)}
    if not (_all(pieces, str) and _all(scores, float) and _all(kinds, int)) or len(sizes) > 1:
        raise CheckpointError(path, "its tokenizer lacks pieces, their scores, or their types")
    space = str(entries.get("tokenizer.ggml.add_space_prefix", "true")).lower() not in ("false", "0")
    with failures(lambda error: CheckpointError(path, f"its tokenizer can't be read: {error}")):
        return _joining(path, Pieces(pieces, scores, kinds, space))


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, kind) for value in values)


def _joining(path: Path, vocabulary: Pieces) -> Tokenizer:
    if max(map(len, vocabulary.pieces), default=0) > LONGEST:
        raise CheckpointError(path, f"its tokenizer has pieces of more than {LONGEST} characters")
    pieces, kinds = vocabulary.pieces, vocabulary.kinds
    numbers = {piece: number for number, piece in enumerate(pieces)}
    unknown = next((piece for piece, kind in zip(pieces, kinds, strict=True) if kind == UNKNOWN), None)
    tokenizer = Tokenizer(
        BPE(vocab=numbers, merges=_merges(vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in kinds)
    )
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if vocabulary.space else spaces
    of_kind = {
        wanted: [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == wanted]
        for wanted in (CONTROL, USER_DEFINED)
    }
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in of_kind[CONTROL]])
    tokenizer.add_tokens([AddedToken(piece, normalized=True) for piece in of_kind[USER_DEFINED]])
    return tokenizer


def _merges(vocabulary: Pieces) -> list[tuple[str, str]]:
    """Every pair that a piece can be joined of, those of the best piece first."""
    rows = zip(vocabulary.pieces, vocabulary.scores, vocabulary.kinds, strict=True)
    scores = {piece: score for piece, score, kind in rows if kind == NORMAL}
    merges: list[tuple[str, str]] = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        splits = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        merges += [(first, second) for first, second in splits if first in scores and second in scores]
    return merges
