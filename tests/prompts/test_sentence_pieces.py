"""Tokenizers that join pieces: tokens are those of sentencepiece and of transformers; damaged ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2

from sdrpc.errors import CheckpointError
from sdrpc.prompts import gguf_tokenizer, sentencepiece_tokenizer
from sdrpc.prompts.sentence_pieces import LONGEST
from tools.checkpoints.tokenizers import gemma_entries, gemma_pieces, gemma_tokenizer

FILE = Path("model")
TEXTS = (
    "a lovely cat, in the style of nobody", "double  spaces   and\n\nlines\n", "Ünïcode 🐈 日本 <b>", "", " lead",
    "tab\tx",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_sentencepiece_and_of_transformers(text: str) -> None:
    wanted = SentencePieceProcessor(model_proto=gemma_pieces()).encode(text)
    for tokenizer in (sentencepiece_tokenizer(FILE, gemma_pieces()), gguf_tokenizer(FILE, gemma_entries())):
        assert tokenizer.encode(text, add_special_tokens=False).ids == wanted
        behind_start = tokenizer.encode(f"<bos>{text}", add_special_tokens=False).ids
        assert behind_start == gemma_tokenizer()(text).input_ids
        assert behind_start[0] == 2


@pytest.mark.parametrize("space", [False, True])
def test_a_space_stands_before_a_text_where_the_model_says_so(space: bool) -> None:
    proto = _model()
    proto.normalizer_spec.add_dummy_prefix = space
    wanted = SentencePieceProcessor(model_proto=proto.SerializeToString()).encode("a cat")
    assert sentencepiece_tokenizer(FILE, proto.SerializeToString()).encode("a cat").ids == wanted
    assert (
        gguf_tokenizer(FILE, gemma_entries() | {"tokenizer.ggml.add_space_prefix": str(space)}).encode("a cat").ids
        == wanted
    )


def test_what_is_no_tokenizer_that_joins_pieces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="can't be read"):
        sentencepiece_tokenizer(FILE, gemma_pieces()[:-3])
    with pytest.raises(CheckpointError, match="can't be read"):
        sentencepiece_tokenizer(FILE, b"\xff" * 64)
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a lovely cat"] * 9), model_prefix=str(tmp_path / "u"), model_type="unigram",
        vocab_size=12, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="does not join pairs"):
        sentencepiece_tokenizer(FILE, (tmp_path / "u.model").read_bytes())
    proto = _model()
    proto.pieces[-1].piece = "a" * (LONGEST + 1)
    with pytest.raises(CheckpointError, match="pieces of more than 256 characters"):
        sentencepiece_tokenizer(FILE, proto.SerializeToString())


@pytest.mark.parametrize(
    "damage", [{"scores": [0.0]}, {"scores": None}, {"tokens": "a"}, {"token_type": ["a"]}, {"tokens": []}]
)
def test_entries_that_are_no_tokenizer_are_refused(damage: dict[str, Any]) -> None:
    entries = gemma_entries() | {f"tokenizer.ggml.{key}": value for key, value in damage.items()}
    with pytest.raises(CheckpointError, match="lacks pieces, their scores, or their types"):
        gguf_tokenizer(FILE, entries)


def _model() -> Any:
    return sentencepiece_model_pb2.ModelProto.FromString(gemma_pieces())  # type: ignore[attr-defined]
