"""Tokenizers of language models that encode prompts: pairs of bytes that are joined, without a hub.

Qwen's and Mistral's vocabularies lie beside this file (``data/``, whose README says where they are from). The tokens
equal those of transformers' Qwen2Tokenizer, and of Mistral's own library.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from ..errors import CheckpointError
from .sentence_pieces import pieces_of_gguf
from .tokenizers import failures, pair, printable_bytes, whole_tokenizer

_DATA = Path(__file__).with_name("data")

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
MISTRAL_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)

QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>",
    "</think>",
)  # fmt: skip
"""Behind Qwen's words, in the order of their numbers."""
QWEN_PAD, MISTRAL_PAD = "<|endoftext|>", "<pad>"
MISTRAL_SPECIAL = 1000
"""Mistral's first tokens are special ones."""


@cache
def qwen_tokenizer() -> Tokenizer:
    """That of Qwen2, Qwen2.5 and Qwen3, also with vision: 151669 tokens. It adds none of its own to a text."""
    merges = [pair(line) for line in _packed("qwen_merges.txt.xz")]
    words = [*printable_bytes(), *map("".join, merges), *QWEN_SPECIAL]
    return _tokenizer({word: number for number, word in enumerate(words)}, merges, QWEN_SPECIAL, "qwen2")


@cache
def mistral_tokenizer() -> Tokenizer:
    """That of Mistral Small 3 and its relatives ("tekken"): 131072 tokens. It adds none of its own to a text."""
    tokens = _packed("mistral_tokens.txt.xz")
    numbers = {token: number for number, token in enumerate(tokens)}
    return _tokenizer(numbers, _all_splits(tokens[MISTRAL_SPECIAL:], numbers), tokens[:MISTRAL_SPECIAL], "tekken")


def gguf_tokenizer(path: Path, entries: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in the ``tokenizer.…`` entries of the GGUF file at ``path``.

    Raises :class:`CheckpointError` for one of another kind, and for entries that are no tokenizer.
    """
    kind, words = (entries.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind is None and isinstance(whole := entries.get("tokenizer.huggingface.json"), str):
        return whole_tokenizer(path, whole)
    if kind == "llama":
        return pieces_of_gguf(path, entries)
    if kind != "gpt2" or not isinstance(words, str) or words not in _WORDS:
        reason = f"its tokenizer is of a kind that sdrpc can't read ({kind!s:.40}, {words!s:.40})"
        raise CheckpointError(path, f"{reason}; it reads llama, and gpt2 with {' or '.join(_WORDS)}")
    tokens, merges = (_texts(entries.get(f"tokenizer.ggml.{key}")) for key in ("tokens", "merges"))
    kinds = entries.get("tokenizer.ggml.token_type")
    if not tokens or not merges or not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise CheckpointError(path, "its tokenizer lacks tokens, their types, or merges")
    special = [token for token, token_kind in zip(tokens, kinds, strict=True) if token_kind in _SPECIAL_KINDS]
    numbers = {token: number for number, token in enumerate(tokens)}
    with failures(lambda error: CheckpointError(path, f"its tokenizer can't be read: {error}")):
        return _tokenizer(numbers, [pair(line) for line in merges], special, words)


_SPECIAL_KINDS = (3, 4)
"""Of GGUF's types of tokens: control, and defined by users."""
_WORDS = {"qwen2": QWEN_WORDS, "tekken": MISTRAL_WORDS}
"""How a text falls into words, by llama.cpp's names; pairs are joined within a word."""


def _texts(value: object) -> list[str]:
    """``value`` if it is a list of texts, else none."""
    return value if isinstance(value, list) and all(isinstance(text, str) for text in value) else []


def _tokenizer(numbers: dict[str, int], merges: list[tuple[str, str]], special: Iterable[str], words: str) -> Tokenizer:
    tokenizer = Tokenizer(BPE(vocab=numbers, merges=merges))
    if words == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS[words]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def _packed(name: str) -> list[str]:
    return lzma.decompress((_DATA / name).read_bytes()).decode("utf-8").split("\n")


def _all_splits(tokens: Sequence[str], numbers: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every pair that a token can be joined of, tokens in order: the vocabulary's order alone says what is joined
    first."""
    merges: list[tuple[str, str]] = []
    for token in tokens:
        splits = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [split for split in splits if split[0] in numbers and split[1] in numbers]
        merges += sorted(known, key=lambda split: (numbers[split[0]], numbers[split[1]]))
    return merges
