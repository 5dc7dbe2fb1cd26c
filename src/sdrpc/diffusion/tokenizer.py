"""CLIP's tokens: byte pair encoding, chunks of 77, weights.

The vocabulary is the one that the package openai-clip carries as data; the tokens equal those of transformers'
CLIPTokenizer, which models were trained with. (stable-diffusion.cpp knows letters of ASCII only: for other scripts its
tokens differ, and so do its pictures.) Chunks and weights are as in stable-diffusion.cpp (conditioner.hpp).
"""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from ..errors import SdrpcError
from .prompt import parse

START, END = "<|startoftext|>", "<|endoftext|>"
START_ID, END_ID = 49406, 49407
VOCABULARY = 49408

_MERGES = VOCABULARY - 2 * 256 - 2
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class Tokens:
    """Chunks of token numbers, int32 (chunks, length), and the weight of each, float32 of the same shape."""

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]


def tokenize(prompt: str, length: int = 77) -> Tokens:
    """A prompt's tokens with the weights of its attention syntax, in chunks of ``length``.

    Each chunk begins with the start token and is filled up with end tokens, at least one. BREAK fills up its chunk.
    """
    room = length - 2
    ids: list[int] = []
    weights: list[float] = []
    for piece in parse(prompt):
        if piece.is_break:
            new, weight = [END_ID] * (-len(ids) % room), 1.0
        else:
            new, weight = clip_tokenizer().encode(piece.text, add_special_tokens=False).ids, piece.weight
        ids += new
        weights += [weight] * len(new)
    chunks = max(1, -(-len(ids) // room))
    all_ids = np.full((chunks, length), END_ID, np.int32)
    all_weights = np.ones((chunks, length), np.float32)
    all_ids[:, 0] = START_ID
    for chunk in range(chunks):
        part = slice(chunk * room, (chunk + 1) * room)
        count = len(ids[part])
        all_ids[chunk, 1 : 1 + count] = ids[part]
        all_weights[chunk, 1 : 1 + count] = weights[part]
    return Tokens(all_ids, all_weights)


ROUNDING = 1e-6
"""What summing float32 numbers leaves of a mean that is zero, in parts of their size."""


def apply_weights(hidden: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Hidden states (length, width) times each token's weight, scaled back to the mean that they had before.

    A mean that is nothing but rounding is left alone: behind a layer norm without weights, as in models of random
    numbers, the quotient of two such means would be noise, another one on every device.
    """
    before = np.float32(hidden.mean(dtype=np.float64))
    weighted = hidden * weights[:, None]
    after = np.float32(weighted.mean(dtype=np.float64))
    least = ROUNDING * float(np.sqrt(np.square(hidden, dtype=np.float64).mean()))
    return weighted * (before / after) if min(abs(before), abs(after)) > least else weighted


@cache
def clip_tokenizer() -> Tokenizer:
    """CLIP's tokenizer, without start and end tokens of its own."""
    merges = _merges()
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), START, END]
    tokenizer = Tokenizer(
        BPE(
            vocab={word: number for number, word in enumerate(words)},
            merges=merges,
            end_of_word_suffix="</w>",
            unk_token=END,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens([START, END])
    return tokenizer


def _merges() -> list[tuple[str, str]]:
    """The pairs that the encoding joins, most frequent first, from openai-clip's file (found without importing it)."""
    spec = importlib.util.find_spec("clip")
    folders = spec.submodule_search_locations if spec is not None else None
    paths = [Path(folder) / "bpe_simple_vocab_16e6.txt.gz" for folder in folders or ()]
    for path in filter(Path.is_file, paths):
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : 1 + _MERGES]
        pairs = [(first, second) for first, _, second in (line.partition(" ") for line in lines)]
        if len(pairs) == _MERGES:
            return pairs
    raise SdrpcError("CLIP's vocabulary is not here; it comes with a package: pip install openai-clip")


def _byte_letters() -> list[str]:
    """The 256 characters that stand for bytes, in the order of the vocabulary: printable ones first, as themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + number) for number in range(rest)]
