"""From a prompt to what text encoders read: attention syntax, tokens in chunks, weights."""

from .attention import Piece, parse
from .chunks import Tokens, clip_chunks, t5_chunks
from .tokenizers import END_ID, START_ID, clip_tokenizer, t5_tokenizer, tokenizer_from
from .weights import apply_weights

__all__ = [
    "END_ID",
    "START_ID",
    "Piece",
    "Tokens",
    "apply_weights",
    "clip_chunks",
    "clip_tokenizer",
    "parse",
    "t5_chunks",
    "t5_tokenizer",
    "tokenizer_from",
]
