"""The tokenizers that pipelines of diffusers want, made offline."""

from __future__ import annotations

import gzip
import tarfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
from transformers import CLIPTokenizer, T5Tokenizer

WORDS = 49408
T5_VOCABULARY = Path(__file__).parents[2] / "src" / "sdrpc" / "prompts" / "data" / "t5.tar.xz"


def clip_tokenizer(padding: str = "<|endoftext|>") -> Any:
    """CLIP's, from the package openai-clip's file of merges; ``padding`` is "!" for OpenCLIP's."""
    # found without importing the package, which needs others
    path = Path(str(distribution("openai-clip").locate_file("clip/bpe_simple_vocab_16e6.txt.gz")))
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : 1 + WORDS - 2 * 256 - 2]
    merges: Any = [tuple(line.split()) for line in lines]
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=padding, model_max_length=77)


def t5_tokenizer() -> Any:
    """T5's, from the vocabulary that sdrpc ships (its README says what the files are)."""
    with tarfile.open(T5_VOCABULARY, "r:xz") as archive:
        names = ("pieces.txt", "scores.f32", "charsmap.bin")
        pieces, scores, charsmap = (file.read() for name in names if (file := archive.extractfile(name)) is not None)
    vocabulary: Any = list(zip(pieces.decode().split("\n"), np.frombuffer(scores, "<f4").tolist(), strict=True))
    return T5Tokenizer(vocab=vocabulary, _spm_precompiled_charsmap=charsmap, model_max_length=512)


def _byte_letters() -> list[str]:
    """The characters that stand for bytes, in the vocabulary's order: printable ones as themselves, then the rest."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(code) for code in printable] + [chr(256 + number) for number in range(256 - len(printable))]
