"""Chunks and weights are those of stable-diffusion.cpp."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from sdrpc.errors import InvalidValue
from sdrpc.prompts import END_ID, START_ID, clip_chunks, t5_chunks, t5_tokenizer

CAT, DOG = 2368, 1929
"""CLIP's tokens."""


def test_a_prompt_fills_a_chunk() -> None:
    made = clip_chunks("a (lovely:1.3) cat")
    assert made.ids.shape == made.weights.shape == (1, 77)
    assert made.ids[0].tolist() == [START_ID, 320, 2165, CAT] + [END_ID] * 73
    assert made.weights[0].tolist() == [1, 1, np.float32(1.3), 1] + [1] * 73


@pytest.mark.parametrize(("words", "chunks"), [(0, 1), (75, 1), (76, 2), (150, 2), (151, 3)])
def test_long_prompts_take_more_chunks(words: int, chunks: int) -> None:
    made = clip_chunks(" ".join(["cat"] * words))
    assert made.ids.shape == (chunks, 77)
    assert (made.ids[:, 0] == START_ID).all()
    assert (made.ids[:, -1] == END_ID).all()
    assert np.count_nonzero(made.ids == CAT) == words


def test_break_starts_a_new_chunk() -> None:
    made = clip_chunks("a cat BREAK a dog")
    assert made.ids.shape == (2, 77)
    assert made.ids[1, :3].tolist() == [START_ID, 320, DOG]
    assert (made.weights == 1).all()


def test_openclip_is_padded_with_zeros_behind_the_end() -> None:
    made = clip_chunks("cat", pad=0)
    assert made.ids[0].tolist() == [START_ID, CAT, END_ID] + [0] * 74


def test_a_break_fills_with_ends_for_sd_2_and_not_for_sdxls_second_encoder() -> None:
    kept, cut = (clip_chunks("cat BREAK dog", length=8, pad=0, cut=cut).ids.tolist() for cut in (False, True))
    assert kept == [[START_ID, CAT, *[END_ID] * 6], [START_ID, DOG, END_ID, *[0] * 5]]
    assert cut == [[START_ID, CAT, END_ID, *[0] * 5], [START_ID, DOG, END_ID, *[0] * 5]]


def test_an_end_token_in_the_prompt_cuts_what_follows() -> None:
    assert clip_chunks("cat <|endoftext|> dog", length=7, pad=0, cut=True).ids.tolist() == [
        [START_ID, CAT, END_ID, 0, 0, 0, 0]
    ]


def test_break_is_a_word_where_chunks_are_not_broken() -> None:
    made = clip_chunks("a cat BREAK a dog", breaks=False)
    assert made.ids.shape == (1, 77)
    assert made.ids[0, 3] == clip_chunks("break").ids[0, 1]
    assert made.weights[0, 1:6].tolist() == [1, 1, -1, 1, 1]


def test_t5_has_an_end_token_and_pads_with_zeros() -> None:
    made = t5_chunks("a (lovely:1.3) cat", length=16)
    text = [t5_tokenizer().token_to_id(piece) for piece in ("▁", "a", "▁lovely", "▁cat")]
    assert made.ids[0].tolist() == [*text, 1, *[0] * 11]
    assert made.weights[0].tolist() == [1, 1, np.float32(1.3), *[1] * 13]


@pytest.mark.parametrize(("words", "chunks"), [(0, 1), (255, 1), (256, 2), (511, 3)])
def test_long_prompts_take_more_chunks_of_t5(words: int, chunks: int) -> None:
    made = t5_chunks(" ".join(["cat"] * words))
    assert made.ids.shape == made.weights.shape == (chunks, 256)
    assert (made.ids == 1).sum(axis=1).tolist() == [1] * chunks
    assert np.count_nonzero(made.ids > 1) == words


def test_a_tokenizer_of_another_encoder_is_refused() -> None:
    with pytest.raises(InvalidValue, match=r"startoftext.*another text encoder"):
        clip_chunks("a cat", tokenizer=t5_tokenizer())
    with pytest.raises(InvalidValue, match="</s>"):
        t5_chunks("a cat", tokenizer=Tokenizer(BPE()))
