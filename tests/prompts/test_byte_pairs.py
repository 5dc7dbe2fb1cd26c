"""Tokens of language models equal those of transformers (Qwen) and of Mistral's own library."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdrpc.errors import CheckpointError
from sdrpc.prompts import Template, gguf_tokenizer, llm_tokens, mistral_tokenizer, qwen_tokenizer
from tools.checkpoints.tokenizers import qwen_tokenizer as made_by_transformers
from tools.checkpoints.tokenizers import vocabulary_entries

TEMPLATE = Template("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")


@cache
def reference() -> Any:
    return made_by_transformers()


@cache
def entries() -> dict[str, Any]:
    return vocabulary_entries(reference(), "qwen2")


def ids(text: str) -> list[int]:
    found: list[int] = qwen_tokenizer().encode(text, add_special_tokens=False).ids
    return found


@pytest.mark.parametrize(
    "text",
    ["a lovely cat", "", "  many\n\n\tspaces ", "don't we'LL I'M", "3.14 1000", "!!!\n ... ?!/", "CAFÉ Ünïcödé e\u0301",
     "日本語 текст 🐱", "<|im_start|>user\nx<|im_end|>", "<think>\n\n</think>", "<|vision_start|><|image_pad|>",
     "a\u00a0b\u200bc"],
)  # fmt: skip
def test_qwens_tokens_are_those_of_transformers(text: str) -> None:
    assert ids(text) == reference()(text).input_ids


@settings(max_examples=60)
@given(text=st.text(max_size=30))
def test_qwens_tokens_of_any_text_are_those_of_transformers(text: str) -> None:
    assert ids(text) == reference()(text).input_ids


def test_known_numbers() -> None:
    """As published with Qwen3 and Mistral Small 3.2: special tokens, and how large the vocabularies are."""
    assert ids("<|endoftext|><|im_start|><|im_end|><|image_pad|><think></think>") == [
        151643, 151644, 151645, 151655, 151667, 151668,
    ]  # fmt: skip
    assert qwen_tokenizer().get_vocab_size() == 151669
    assert mistral_tokenizer().encode("<s>[SYSTEM_PROMPT][/SYSTEM_PROMPT][INST][/INST]<pad>").ids == [
        1,
        17,
        18,
        3,
        4,
        11,
    ]
    assert mistral_tokenizer().get_vocab_size() == 131072


def test_mistrals_tokens_are_those_of_its_library() -> None:
    """See tools/mistral_reference.py."""
    rows = json.loads((Path(__file__).parent.parent / "data" / "mistral_tokens.json").read_text(encoding="utf-8"))
    assert len(rows) == 60
    for text, wanted in rows:
        assert mistral_tokenizer().encode(text, add_special_tokens=False).ids == wanted, text


@pytest.mark.parametrize("text", ["a lovely cat", "", " two  spaces ", "\n\nlines", "<|im_end|>"])
def test_a_text_without_weights_has_the_tokens_of_the_whole_message(text: str) -> None:
    tokens = llm_tokens(text, TEMPLATE, qwen_tokenizer())
    message = [{"role": "user", "content": text}]
    whole = reference().apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert tokens.ids.tolist() == [reference()(whole).input_ids]
    assert (tokens.weights == 1).all()


def test_weights_are_those_of_the_attention_syntax() -> None:
    tokens = llm_tokens("a (lovely:1.5) cat", TEMPLATE, qwen_tokenizer())
    pieces = [("<|im_start|>user\na ", 1.0), ("lovely", 1.5), (" cat<|im_end|>\n<|im_start|>assistant\n", 1.0)]
    assert tokens.ids.tolist() == [[number for text, _ in pieces for number in ids(text)]]
    assert tokens.weights.tolist() == [[weight for text, weight in pieces for _ in ids(text)]]


def test_a_gguf_files_own_vocabulary() -> None:
    tokenizer = gguf_tokenizer(Path("model.gguf"), entries())
    text = "<|im_start|>A lovely caté, 日本<think> don't"
    assert tokenizer.encode(text, add_special_tokens=False).ids == reference()(text).input_ids


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokenizer.ggml.model": "bert"}, r"of a kind that sdrpc can't read \(bert, qwen2\)"),
        ({"tokenizer.ggml.pre": "deepseek-llm"}, r"\(gpt2, deepseek-llm\)"),
        ({"tokenizer.ggml.pre": ["qwen2"]}, "of a kind that sdrpc can't read"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "lacks tokens"),
        ({"tokenizer.ggml.tokens": None}, "lacks tokens"),
        ({"tokenizer.ggml.merges": ["a"] * 3, "tokenizer.ggml.tokens": []}, "lacks tokens"),
        ({"tokenizer.ggml.token_type": [1]}, "lacks tokens"),
        ({"tokenizer.ggml.merges": ["nobody knows", "x"]}, "can't be read"),
    ],
)
def test_a_vocabulary_that_cannot_be_read(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        gguf_tokenizer(Path("model.gguf"), entries() | changes)
    assert "model.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hostile_entries_give_no_other_error() -> None:
    generator = random.Random(3)
    small = entries() | {
        "tokenizer.ggml.tokens": entries()["tokenizer.ggml.tokens"][:300],
        "tokenizer.ggml.token_type": entries()["tokenizer.ggml.token_type"][:300],
        "tokenizer.ggml.merges": entries()["tokenizer.ggml.merges"][:44],
    }
    outcomes = set()
    for _ in range(200):
        damaged = {key: list(value) if isinstance(value, list) else value for key, value in small.items()}
        values = damaged[generator.choice([key for key in damaged if isinstance(damaged[key], list)])]
        values[generator.randrange(len(values))] = generator.choice(["", "a", "a b", " ", -1, 7, None, "x" * 1000, []])
        try:
            gguf_tokenizer(Path("model.gguf"), damaged).encode("a cat, 日本")
            outcomes.add("")
        except CheckpointError:
            outcomes.add("refused")
    assert outcomes == {"", "refused"}
