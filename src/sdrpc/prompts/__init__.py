"""From a prompt to what text encoders read: attention syntax, tokens in chunks, weights."""

from .attention import Piece, parse
from .byte_pairs import gguf_tokenizer, mistral_tokenizer, qwen_tokenizer
from .chunks import Template, Tokens, clip_chunks, llm_tokens, number_of, t5_chunks
from .sentence_pieces import sentencepiece_tokenizer
from .tokenizers import END_ID, START_ID, clip_tokenizer, t5_tokenizer, tokenizer_from, umt5_tokenizer, whole_tokenizer
from .weights import apply_weights

__all__ = [
    "END_ID",
    "START_ID",
    "Piece",
    "Template",
    "Tokens",
    "apply_weights",
    "clip_chunks",
    "clip_tokenizer",
    "gguf_tokenizer",
    "llm_tokens",
    "mistral_tokenizer",
    "number_of",
    "parse",
    "qwen_tokenizer",
    "sentencepiece_tokenizer",
    "t5_chunks",
    "t5_tokenizer",
    "tokenizer_from",
    "umt5_tokenizer",
    "whole_tokenizer",
]
