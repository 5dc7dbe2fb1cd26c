"""CLIP's, T5's and UMT5's tokenizers, offline, and those that a diffusers directory brings.

CLIP's vocabulary is the one that the package openai-clip carries as data, T5's and UMT5's lie beside this file
(``data/``). The tokens equal those of transformers' CLIPTokenizer and T5Tokenizer, which models were trained with.
(stable-diffusion.cpp knows letters of ASCII only in CLIP's tokens, and does not normalize T5's text: for other scripts
its tokens differ, and so do its pictures.)
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram

from ..errors import CheckpointError, InvalidValue, SdrpcError

START, END = "<|startoftext|>", "<|endoftext|>"
START_ID, END_ID = 49406, 49407
VOCABULARY = 49408

T5_PAD, T5_END, T5_UNKNOWN = "<pad>", "</s>", "<unk>"
T5_PAD_ID, T5_END_ID, T5_UNKNOWN_ID = 0, 1, 2
T5_SENTINELS = 100
"""T5's last tokens, <extra_id_99> … <extra_id_0>, which stand for gaps in texts that it was trained on."""

UMT5_UNKNOWN_ID = 3
UMT5_SENTINELS = 300

MAX_FILE = 64 << 20
"""The largest tokenizer file that is read, in bytes; T5's and CLIP's take 1 … 3 MB, the largest in use about 20 MB."""

_MERGES = VOCABULARY - 2 * 256 - 2
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_DATA = Path(__file__).with_name("data")


@cache
def clip_tokenizer() -> Tokenizer:
    """CLIP's tokenizer: byte pair encoding, 49408 tokens. It adds no start and end tokens of its own."""
    merges = _merges()
    letters = printable_bytes()
    words = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), START, END]
    return _clip({word: number for number, word in enumerate(words)}, merges)


@cache
def t5_tokenizer() -> Tokenizer:
    """T5's tokenizer: a unigram language model of 32100 pieces (sentencepiece). It adds no end token of its own."""
    return _t5(*t5_vocabulary())


@cache
def umt5_tokenizer() -> Tokenizer:
    """UMT5's tokenizer: a unigram language model of 256300 pieces. It adds no end token of its own.

    It normalizes nothing but runs of spaces; characters that no piece has are ``<unk>``, as in transformers.
    """
    files = _vocabulary_files("umt5.tar.xz")
    tokenizer = Tokenizer(Unigram(_scored(files), unk_id=UMT5_UNKNOWN_ID, byte_fallback=False))
    tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    return _with_special(tokenizer, (T5_PAD, T5_END, "<s>", T5_UNKNOWN), UMT5_SENTINELS)


def t5_vocabulary() -> tuple[list[tuple[str, float]], bytes]:
    """T5's pieces with their scores, and sentencepiece's compiled map of characters; data/README.md says more."""
    files = _vocabulary_files("t5.tar.xz")
    return _scored(files), files["charsmap.bin"]


def _vocabulary_files(archive: str) -> dict[str, bytes]:
    with tarfile.open(_DATA / archive, "r:xz") as opened:
        files = {member.name: opened.extractfile(member) for member in opened}
        return {name: file.read() for name, file in files.items() if file is not None}


def _scored(files: Mapping[str, bytes]) -> list[tuple[str, float]]:
    """A vocabulary's pieces with their scores."""
    numbers: list[float] = np.frombuffer(files["scores.f32"], "<f4").tolist()
    return list(zip(files["pieces.txt"].decode("utf-8").split("\n"), numbers, strict=True))


def tokenizer_from(path: Path) -> Tokenizer:
    """The tokenizer of a diffusers directory's ``tokenizer``, ``tokenizer_2`` … folder, or of one tokenizer.json.

    tokenizer.json counts before vocab.json with merges.txt (CLIP's old form). Nothing is cut off or padded by it.
    Raises :class:`CheckpointError` when there is none of these, or what they contain is no tokenizer.
    """
    path = Path(path)
    whole, vocabulary, merges = path / "tokenizer.json", path / "vocab.json", path / "merges.txt"
    if path.is_file():
        return _read(path, _whole)
    if whole.is_file():
        return _read(whole, _whole)
    if vocabulary.is_file() and merges.is_file():
        return _read(vocabulary, lambda text: _clip(_vocabulary(text), _pairs(_text(merges))))
    if (path / "spiece.model").is_file():
        raise CheckpointError(
            path / "spiece.model",
            "a sentencepiece model can't be read here; transformers' save_pretrained writes a tokenizer.json",
        )
    raise CheckpointError(path, "no tokenizer here: neither tokenizer.json nor vocab.json with merges.txt")


def whole_tokenizer(path: Path, text: bytes | str) -> Tokenizer:
    """The tokenizer in the text of a tokenizer.json that the file at ``path`` holds. Raises :class:`CheckpointError`
    for what is none."""
    with failures(lambda error: CheckpointError(path, f"its tokenizer can't be read: {error}")):
        return _whole(text.decode("utf-8") if isinstance(text, bytes) else text)


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """The text's tokens, without any that begin or end it. Raises :class:`InvalidValue` where the tokenizer fails."""
    with failures(lambda error: InvalidValue("prompt", text, f"the model's tokenizer fails: {error}")):
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids


@contextmanager
def failures(refusal: Callable[[BaseException], SdrpcError]) -> Iterator[None]:
    """Whatever the tokenizers library raises, as an error of ours: plain exceptions, and panics of its Rust code."""
    try:
        yield
    except SdrpcError:
        raise
    except BaseException as error:  # pyo3's PanicException is no Exception, and can't be imported
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise refusal(error) from error
        raise


def _read(path: Path, build: Callable[[str], Tokenizer]) -> Tokenizer:
    """What ``build`` makes of a file's text; whatever is wrong with that text is the file's fault."""
    text = _text(path)
    with failures(lambda error: CheckpointError(path, f"no tokenizer that can be read: {error}")):
        return build(text)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise CheckpointError(path, f"more than {MAX_FILE >> 20} MiB; that is no tokenizer")
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(path, f"can't be read: {error}") from error


def _whole(text: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _vocabulary(text: str) -> dict[str, int]:
    words = json.loads(text)
    if not isinstance(words, dict) or not all(
        type(number) is int and 0 <= number < 1 << 32 for number in words.values()
    ):
        raise ValueError("not an object that gives each word a number")
    return words


def _pairs(text: str) -> list[tuple[str, str]]:
    """The pairs of a merges.txt, which may begin with a line ``#version: …``."""
    lines = text.split("\n")
    return [pair(line) for line in lines[lines[0].startswith("#version") :] if line.strip()]


def pair(line: str) -> tuple[str, str]:
    first, _, second = line.partition(" ")
    return first, second


def _clip(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token=END))
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


def _t5(vocabulary: Sequence[tuple[str, float]], charsmap: bytes) -> Tokenizer:
    """``charsmap`` is sentencepiece's compiled map of characters: its normalization of text, "nmt_nfkc"."""
    tokenizer = Tokenizer(Unigram(list(vocabulary), unk_id=T5_UNKNOWN_ID, byte_fallback=False))
    tokenizer.normalizer = normalizers.Precompiled(charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
        ]
    )
    return _with_special(tokenizer, (T5_PAD, T5_END, T5_UNKNOWN), T5_SENTINELS)


def _with_special(tokenizer: Tokenizer, tokens: Sequence[str], sentinels: int) -> Tokenizer:
    """With tokens that are found in a text as they are; the last are its ``sentinels``."""
    last = [f"<extra_id_{number}>" for number in reversed(range(sentinels))]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (*tokens, *last)])
    return tokenizer


def _merges() -> list[tuple[str, str]]:
    """The pairs that the encoding joins, most frequent first, from openai-clip's file (found without importing it)."""
    spec = importlib.util.find_spec("clip")
    folders = spec.submodule_search_locations if spec is not None else None
    paths = [Path(folder) / "bpe_simple_vocab_16e6.txt.gz" for folder in folders or ()]
    for path in filter(Path.is_file, paths):
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : 1 + _MERGES]
        pairs = [pair(line) for line in lines]
        if len(pairs) == _MERGES:
            return pairs
    raise SdrpcError("CLIP's vocabulary is not here; it comes with a package: pip install openai-clip")


def printable_bytes() -> list[str]:
    """The 256 characters that stand for bytes, in the order of the vocabulary: printable ones first, as themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + number) for number in range(rest)]
