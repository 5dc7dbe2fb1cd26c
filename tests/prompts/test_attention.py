"""Attention syntax is read as stable-diffusion.cpp reads it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdrpc.errors import InvalidValue
from sdrpc.prompts.attention import Piece, parse


def test_prompts_are_read_as_by_sd_cpp(sdcpp: dict[str, Any]) -> None:
    for prompt, expected in sdcpp["prompts"]:
        pieces = parse(prompt)
        assert [piece.text for piece in pieces] == [text for text, _ in expected], prompt
        assert [piece.weight for piece in pieces] == pytest.approx([weight for _, weight in expected], rel=1e-7), prompt


def test_break_is_a_piece_of_its_own() -> None:
    assert [piece.is_break for piece in parse("one BREAK two")] == [False, True, False]


def test_nothing_is_one_empty_piece() -> None:
    assert parse("") == (Piece("", 1.0),)


@pytest.mark.parametrize("weight", [".", "+.", "..5", "9" * 60])
def test_weights_that_are_no_numbers(weight: str) -> None:
    with pytest.raises(InvalidValue, match="weight"):
        parse(f"a (cat:{weight})")


@given(st.text(alphabet="ab B()[]\\:.1BREAKé ", max_size=40))
def test_any_text_is_read_or_refused(prompt: str) -> None:
    try:
        pieces = parse(prompt)
    except InvalidValue:
        return
    assert pieces
    text = "".join(piece.text for piece in pieces)
    assert set(text) <= set(prompt) | set("BREAK")
