"""CLIP's tokens equal those of transformers; chunks and weights are those of stable-diffusion.cpp."""

from __future__ import annotations

import sys
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from sdrpc.diffusion import tokenizer as tokenizer_module
from sdrpc.diffusion.tokenizer import END_ID, START_ID, apply_weights, clip_tokenizer, tokenize


@cache
def reference() -> CLIPTokenizer:
    """transformers' tokenizer, made from the same vocabulary."""
    tokenizer = clip_tokenizer()
    return CLIPTokenizer(vocab=tokenizer.get_vocab(), merges=tokenizer_module._merges())


def check(text: str) -> None:
    assert clip_tokenizer().encode(text, add_special_tokens=False).ids == reference()(text).input_ids[1:-1]


@pytest.mark.parametrize(
    "text",
    ["a lovely cat", "", "  many\n\tspaces ", "don't we'll I'M", "3.14 1000", "!!! ... ?!", "CAFÉ Ünïcödé",
     "日本語 текст 🐱", "<|endoftext|> in <|startoftext|> between", "under_score-dash", "ﬁ e\u0301"],
)  # fmt: skip
def test_tokens_are_those_of_transformers(text: str) -> None:
    check(text)


@settings(max_examples=200)
@given(st.text(max_size=30))
def test_tokens_of_any_text_are_those_of_transformers(text: str) -> None:
    check(text)


def test_known_tokens() -> None:
    """As published with CLIP."""
    assert clip_tokenizer().encode("a photo of a cat", add_special_tokens=False).ids == [320, 1125, 539, 320, 2368]
    assert clip_tokenizer().get_vocab_size() == tokenizer_module.VOCABULARY


def test_a_prompt_fills_a_chunk() -> None:
    made = tokenize("a (lovely:1.3) cat")
    assert made.ids.shape == made.weights.shape == (1, 77)
    assert made.ids[0].tolist() == [START_ID, 320, 2165, 2368] + [END_ID] * 73
    assert made.weights[0].tolist() == [1, 1, np.float32(1.3), 1] + [1] * 73


@pytest.mark.parametrize(("words", "chunks"), [(0, 1), (75, 1), (76, 2), (150, 2), (151, 3)])
def test_long_prompts_take_more_chunks(words: int, chunks: int) -> None:
    made = tokenize(" ".join(["cat"] * words))
    assert made.ids.shape == (chunks, 77)
    assert (made.ids[:, 0] == START_ID).all()
    assert (made.ids[:, -1] == END_ID).all()
    assert np.count_nonzero(made.ids == 2368) == words


def test_break_starts_a_new_chunk() -> None:
    made = tokenize("a cat BREAK a dog")
    assert made.ids.shape == (2, 77)
    assert made.ids[1, :3].tolist() == [START_ID, 320, 1929]
    assert (made.weights == 1).all()


def test_weights_scale_and_keep_the_mean() -> None:
    hidden = np.random.default_rng(0).normal(0.3, 1, (77, 16)).astype(np.float32)
    weights = np.ones(77, np.float32)
    weights[3] = 1.5
    weighted = apply_weights(hidden, weights)
    assert weighted.mean() == pytest.approx(hidden.mean(), rel=1e-5)
    ratio = weighted / hidden
    assert (ratio[3] / ratio[0]).mean() == pytest.approx(1.5, rel=1e-5)
    np.testing.assert_array_equal(apply_weights(hidden, np.ones(77, np.float32)), hidden)


def test_a_mean_of_rounding_errors_scales_nothing() -> None:
    hidden = np.random.default_rng(0).normal(0, 1, (77, 768))
    hidden = ((hidden - hidden.mean(1, keepdims=True)) / hidden.std(1, keepdims=True)).astype(np.float32)
    weights = np.ones(77, np.float32)
    weights[3] = 1.3
    np.testing.assert_array_equal(apply_weights(hidden, weights), hidden * weights[:, None])


def test_clip_itself_is_not_imported() -> None:
    clip_tokenizer()
    assert "clip.clip" not in sys.modules
