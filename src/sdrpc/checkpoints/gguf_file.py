"""A GGUF file: header parsed by :mod:`sdrpc.checkpoints.gguf_header`, tensors mapped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import CheckpointError
from ..ggml.types import F32, TYPES
from ..ggml.weight import Weight
from . import gguf_header
from .expressions import cast, reshape, unpermute_heads
from .gguf_header import Header
from .mapped import Mapped

_HEADS = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
_QUERY_OR_KEY = re.compile(r"blk\.\d+\.(attn_[qk])\.(?:weight|bias)")


class Opened(NamedTuple):
    """What a file holds. ``skipped``: tensors of types that are not read, with the type."""

    tensors: Mapping[str, Weight]
    skipped: Mapping[str, str]
    header: Header


def read(file: Mapped) -> Opened:
    """All tensors: in the shapes that they had before a converter folded them, F64 as F32, and queries and keys of
    llama.cpp's architecture ``llama`` in the order of transformers' files. Raises :class:`CheckpointError`."""
    try:
        header = gguf_header.parse(file.data)
    except ValueError as error:
        raise CheckpointError(file.path, f"damaged: {error}") from error
    tensors: dict[str, Weight] = {}
    skipped: dict[str, str] = {}
    for info in header.tensors:
        if info.type not in TYPES:
            skipped[info.name] = info.type
            continue
        weight = file.weight(info.name, info.type, info.shape, info.begin, info.end)
        weight = reshape(weight, header.original_shape(info))
        tensors[info.name] = cast(weight, F32) if info.type == "F64" else weight
    if header.metadata.get("general.architecture") == "llama":
        tensors = {name: _in_order(weight, header.metadata) for name, weight in tensors.items()}
    return Opened(tensors, skipped, header)


def tokenizer(file: Mapped, header: Header) -> Mapping[str, Any]:
    """The entries ``tokenizer.…``: text and numbers as text, arrays as lists. Takes a moment: vocabularies are long."""
    entries: dict[str, Any] = {key: text for key, text in header.metadata.items() if key.startswith("tokenizer.")}
    try:
        return entries | {key: gguf_header.read_array(file.data, at) for key, at in header.arrays.items()}
    except ValueError as error:
        raise CheckpointError(file.path, f"damaged: {error}") from error


def vocabulary(file: Mapped, header: Header) -> Mapping[str, gguf_header.Value]:
    """The same entries as they stand in the file, for another one."""
    try:
        return {key: gguf_header.read_value(file.data, at) for key, at in header.vocabulary.items()}
    except ValueError as error:
        raise CheckpointError(file.path, f"damaged: {error}") from error


def _in_order(weight: Weight, metadata: Mapping[str, str]) -> Weight:
    match = _QUERY_OR_KEY.fullmatch(weight.name)
    if match is None:
        return weight
    key = _HEADS[match[1]]
    heads = metadata.get(key) or metadata.get(_HEADS["attn_q"], "")
    if not heads.isdecimal() or len(heads) > 9:
        raise CheckpointError(
            weight.file, f"is permuted, and the metadata does not say how: no number {key!r}", weight.name
        )
    return unpermute_heads(weight, int(heads))
