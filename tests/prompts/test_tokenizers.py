"""Tokens equal those of transformers and, for T5, of sentencepiece itself."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from functools import cache, reduce
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer, T5Tokenizer

from sdrpc.errors import CheckpointError, InvalidValue, SdrpcError
from sdrpc.prompts import clip_tokenizer, t5_chunks, t5_tokenizer, tokenizer_from
from sdrpc.prompts import tokenizers as module


@cache
def clip_reference() -> CLIPTokenizer:
    """transformers' tokenizer, made from the same vocabulary."""
    tokenizer = clip_tokenizer()
    return CLIPTokenizer(vocab=tokenizer.get_vocab(), merges=module._merges())


@cache
def t5_reference() -> T5Tokenizer:
    """transformers' tokenizer, made from the same pieces."""
    vocabulary, charsmap = module.t5_vocabulary()
    return T5Tokenizer(vocab=vocabulary, _spm_precompiled_charsmap=charsmap)


def clip_ids(text: str) -> tuple[list[int], list[int]]:
    return clip_tokenizer().encode(text, add_special_tokens=False).ids, clip_reference()(text).input_ids[1:-1]


def t5_ids(text: str) -> tuple[list[int], list[int]]:
    return t5_tokenizer().encode(text, add_special_tokens=False).ids, t5_reference()(text).input_ids[:-1]


BOTH = pytest.mark.parametrize("ids", [clip_ids, t5_ids])


@BOTH
@pytest.mark.parametrize(
    "text",
    ["a lovely cat", "", "  many\n\tspaces ", "don't we'll I'M", "3.14 1000", "!!! ... ?!", "CAFÉ Ünïcödé",
     "日本語 текст 🐱", "<|endoftext|> in <|startoftext|> between", "under_score-dash", "ﬁ e\u0301",
     "</s> <pad> <extra_id_3>", "▁ ▁▁a▁b", "½ ℃ Ａ\u3000x\u00a0y\u200bz"],
)  # fmt: skip
def test_tokens_are_those_of_transformers(ids: Callable[[str], tuple[list[int], list[int]]], text: str) -> None:
    ours, theirs = ids(text)
    assert ours == theirs


@BOTH
@settings(max_examples=200)
@given(text=st.text(max_size=30))
def test_tokens_of_any_text_are_those_of_transformers(
    ids: Callable[[str], tuple[list[int], list[int]]], text: str
) -> None:
    ours, theirs = ids(text)
    assert ours == theirs


def test_t5s_tokens_are_those_of_sentencepiece() -> None:
    """See tools/t5_reference.py."""
    rows = json.loads((Path(__file__).parent.parent / "data" / "t5_tokens.json").read_text(encoding="utf-8"))
    assert len(rows) > 100
    for text, ids in rows:
        assert t5_tokenizer().encode(text, add_special_tokens=False).ids == ids, text


def test_known_tokens() -> None:
    """As published with CLIP, and with T5's paper's code (its README)."""
    assert clip_tokenizer().encode("a photo of a cat", add_special_tokens=False).ids == [320, 1125, 539, 320, 2368]
    assert clip_tokenizer().get_vocab_size() == module.VOCABULARY
    assert t5_tokenizer().encode("translate English to German: The house is wonderful.").ids == [
        13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5,
    ]  # fmt: skip
    assert t5_tokenizer().get_vocab_size() == 32100


def test_clip_itself_is_not_imported() -> None:
    clip_tokenizer()
    assert "clip.clip" not in sys.modules


def saved(folder: Path) -> None:
    """CLIP's tokenizer in its old form, as diffusers directories have it."""
    (folder / "vocab.json").write_text(json.dumps(clip_tokenizer().get_vocab()), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in module._merges())
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")


TEXT = "A Lovely caté, 日本 #version: 1.2"


def test_a_directory_with_vocabulary_and_merges(tmp_path: Path) -> None:
    saved(tmp_path)
    made = tokenizer_from(tmp_path)
    assert (
        made.encode(TEXT, add_special_tokens=False).ids == clip_tokenizer().encode(TEXT, add_special_tokens=False).ids
    )


def test_a_tokenizer_json_counts_first_and_neither_cuts_nor_pads(tmp_path: Path) -> None:
    saved(tmp_path)
    tokenizer = module._t5(*module.t5_vocabulary())
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=99)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        made = tokenizer_from(path)
        assert made.encode(TEXT).ids == t5_tokenizer().encode(TEXT).ids


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "neither tokenizer.json nor vocab.json"),
        ({"spiece.model": b"\n"}, "sentencepiece"),
        ({"vocab.json": b"{}"}, "neither tokenizer.json nor vocab.json"),
        ({"tokenizer.json": b"{"}, "no tokenizer that can be read"),
        ({"tokenizer.json": b"[]"}, "no tokenizer that can be read"),
        ({"tokenizer.json": b"\xff"}, "can't be read"),
        ({"tokenizer.json": b'{"model": {"type": "BPE", "vocab": [], "merges": 7}}'}, "no tokenizer that can be read"),
        ({"vocab.json": b"[1]", "merges.txt": b""}, "gives each word a number"),
        ({"vocab.json": b'{"a": -1}', "merges.txt": b""}, "gives each word a number"),
        ({"vocab.json": b'{"a": "b"}', "merges.txt": b""}, "gives each word a number"),
        ({"vocab.json": b'{"a": 0}', "merges.txt": b"a b"}, "no tokenizer that can be read"),
        ({"vocab.json": b"[" * 100_000, "merges.txt": b""}, "no tokenizer that can be read"),
        ({"vocab.json": b"{}", "merges.txt": b"\xff"}, "merges.txt: can't be read"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_in_a_line(tmp_path: Path, files: dict[str, bytes], reason: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        tokenizer_from(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_file_that_is_too_large_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="more than 64 MiB"):
        tokenizer_from(tmp_path)


def test_a_hostile_file_gives_no_other_error(tmp_path: Path) -> None:
    """Random damage to a tokenizer.json; the tokenizers library panics at some of it, while loading or later."""
    vocabulary, charsmap = module.t5_vocabulary()
    whole = json.loads(module._t5(vocabulary[:40] + vocabulary[-100:], charsmap).to_str())
    places = [place for place in _places(whole) if place]
    generator = random.Random(1)
    outcomes = set()
    for _ in range(600):
        damaged = json.loads(json.dumps(whole))
        *way, last = generator.choice(places)
        reduce(lambda value, key: value[key], way, damaged)[last] = generator.choice(DAMAGE)
        (tmp_path / "tokenizer.json").write_text(json.dumps(damaged), encoding="utf-8")
        try:
            t5_chunks("a cat (é:1.2)</s>", tokenizer=tokenizer_from(tmp_path))
            outcomes.add(None)
        except SdrpcError as error:
            outcomes.add(type(error))
    assert outcomes >= {None, CheckpointError}


def test_a_tokenizer_that_fails_at_a_prompt(tmp_path: Path) -> None:
    vocabulary, charsmap = module.t5_vocabulary()
    whole = json.loads(module._t5(vocabulary[:40] + vocabulary[-100:], charsmap).to_str())
    whole["model"]["unk_id"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(InvalidValue, match="tokenizer fails") as caught:
        t5_chunks("日本", tokenizer=tokenizer_from(tmp_path))
    assert caught.value.field == "prompt"


DAMAGE = (None, 0, -1, 7, 10**9, 1e300, "", "x", [], {}, "AAAA", [["a", 1]], True, 1 << 40)


def _places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to everything in a JSON value, of long lists to the first five."""
    yield way
    inside = value.items() if isinstance(value, dict) else enumerate(value[:5]) if isinstance(value, list) else ()
    for key, item in inside:
        yield from _places(item, (*way, key))
