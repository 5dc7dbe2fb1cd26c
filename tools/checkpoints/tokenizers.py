"""The tokenizers that pipelines of diffusers want, made offline."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import tarfile
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from transformers import (
    BatchFeature,
    CLIPTokenizer,
    GemmaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    T5Tokenizer,
)
from transformers.convert_slow_tokenizer import generate_merges
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

WORDS = 49408
GEMMA_WORDS = 380
"""Of the tokenizer that is made in Gemma's place."""
VOCABULARIES = Path(__file__).parents[2] / "src" / "sdrpc" / "prompts" / "data"

QWEN_ADDED = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>",
    "<think>", "</think>",
]  # fmt: skip
"""As in the tokenizer_config.json of Qwen3's directory, 151643 and on."""
QWEN_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
"""What Qwen3's template makes of messages of system and user without tools."""


class QwenProcessor:
    """Qwen2.5-VL's processor: transformers' own one of pictures, with its tokens in texts. (The class that joins the
    two wants torchvision, for films.)"""

    def __init__(self) -> None:
        make: Any = Qwen2VLImageProcessorPil
        self.pictures, self.image = make(), "<|image_pad|>"

    def __call__(self, text: list[str], images: Any, **_: Any) -> BatchFeature:
        seen = self.pictures(images=images, return_tensors="pt")
        (words,) = text
        pieces = words.split(self.image)
        counts = [int(grid.prod()) // self.pictures.merge_size**2 for grid in seen["image_grid_thw"]]
        words = pieces[0] + "".join(self.image * count + piece for count, piece in zip(counts, pieces[1:], strict=True))
        return BatchFeature({**qwen_tokenizer()([words], return_tensors="pt"), **seen})


MISTRAL_SPECIAL = 1000
MISTRAL_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""As in the published tekken.json."""
MISTRAL_TEMPLATE = (
    "{{- '<s>' }}{%- for message in messages %}{%- if message.role == 'system' %}"
    "{{- '[SYSTEM_PROMPT]' + message.content[0].text + '[/SYSTEM_PROMPT]' }}{%- else %}"
    "{{- '[INST]' + message.content[0].text + '[/INST]' }}{%- endif %}{%- endfor %}"
)
"""What Mistral Small 3.2's template makes of messages of system and user."""


def clip_tokenizer(padding: str = "<|endoftext|>") -> Any:
    """CLIP's, from the package openai-clip's file of merges; ``padding`` is "!" for OpenCLIP's."""
    vocabulary, merges = _clip_vocabulary()
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), pad_token=padding, model_max_length=77)


@cache
def _clip_vocabulary() -> tuple[dict[str, int], list[Any]]:
    """Words and pairs. (The tokenizer itself is not kept: a pipeline tells it how long texts are.)"""
    # found without importing the package, which needs others
    path = Path(str(distribution("openai-clip").locate_file("clip/bpe_simple_vocab_16e6.txt.gz")))
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : 1 + WORDS - 2 * 256 - 2]
    merges: Any = [tuple(line.split()) for line in lines]
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return {word: number for number, word in enumerate(words)}, merges


def t5_tokenizer() -> Any:
    """T5's, from the vocabulary that sdrpc ships (its README says what the files are)."""
    vocabulary, charsmap = _vocabulary("t5.tar.xz")
    return T5Tokenizer(vocab=vocabulary, _spm_precompiled_charsmap=charsmap, model_max_length=512)


@cache
def qwen_tokenizer() -> Any:
    """Qwen3's, from the pairs that sdrpc ships."""
    lines = lzma.decompress((VOCABULARIES / "qwen_merges.txt.xz").read_bytes()).decode("utf-8").split("\n")
    merges: Any = [tuple(line.split(" ")) for line in lines]
    words = [*_byte_letters(), *map("".join, merges), *QWEN_ADDED]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, model_max_length=131072, extra_special_tokens=QWEN_ADDED
    )
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


@cache
def mistral_tokenizer() -> Any:
    """Mistral Small 3's, from the tokens that sdrpc ships; the pairs that are joined follow from their order."""
    tokens = lzma.decompress((VOCABULARIES / "mistral_tokens.txt.xz").read_bytes()).decode("utf-8").split("\n")
    numbers = {token: number for number, token in enumerate(tokens)}
    special = tokens[:MISTRAL_SPECIAL]
    merges = [
        (token[:at], token[at:])
        for token in tokens[MISTRAL_SPECIAL:]
        for at in sorted(_cuts(token, numbers), key=lambda at: numbers[token[:at]])
    ]
    made = Tokenizer(BPE(vocab=numbers, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(MISTRAL_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=made, bos_token="<s>", pad_token="<pad>", padding_side="left")
    tokenizer.chat_template = MISTRAL_TEMPLATE
    return tokenizer


def _cuts(token: str, numbers: dict[str, int]) -> list[int]:
    """Where ``token`` falls into two others."""
    return [at for at in range(1, len(token)) if token[:at] in numbers and token[at:] in numbers]


def vocabulary_entries(tokenizer: Any, words: str) -> dict[str, Any]:
    """A tokenizer of pairs of bytes as the entries of a GGUF file; ``words``: llama.cpp's name for how it falls into
    words."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    numbers = tokenizer.get_vocab()
    added = {token["content"] for token in whole["added_tokens"]}
    tokens = sorted(numbers, key=numbers.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": words,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in added else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in whole["model"]["merges"]],
    }


@cache
def gemma_pieces() -> bytes:
    """A model of sentencepiece's with Gemma's special tokens and settings, of few pieces: Gemma's own has terms."""
    sentences = ["a lovely cat in the style of nobody, blurry and dark", "an assistant designed to generate images"]
    made = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 20), model_writer=made, model_type="bpe", vocab_size=GEMMA_WORDS,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False, split_by_whitespace=False,
        normalization_rule_name="identity", user_defined_symbols=["\n\n", "▁▁"], minloglevel=2,
    )  # fmt: skip
    return made.getvalue()


def gemma_entries() -> dict[str, Any]:
    """The same as the entries of a GGUF file."""
    pieces = sentencepiece_model_pb2.ModelProto.FromString(gemma_pieces()).pieces  # type: ignore[attr-defined]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece.piece for piece in pieces],
        "tokenizer.ggml.scores": [piece.score for piece in pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in pieces],
        "tokenizer.ggml.add_space_prefix": False,
    }


@cache
def gemma_tokenizer() -> Any:
    """transformers' class with the same pieces, by its own conversion; as published it begins texts with <bos>."""
    pieces = sentencepiece_model_pb2.ModelProto.FromString(gemma_pieces()).pieces  # type: ignore[attr-defined]
    numbers = {piece.piece: number for number, piece in enumerate(pieces)}
    scores = {piece.piece: piece.score for piece in pieces if piece.type == 1}
    merges = generate_merges(numbers, scores)
    make: Any = GemmaTokenizer
    tokenizer = make(vocab=numbers, merges=merges, model_max_length=8192)
    tokenizer.add_tokens([AddedToken(piece.piece, normalized=True) for piece in pieces if piece.type == 4])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", numbers["<bos>"])]
    )
    return tokenizer


@cache
def umt5_tokenizer() -> Any:
    """UMT5's, likewise, as its published tokenizer.json has it: no map of characters, runs of spaces are one."""
    vocabulary, _ = _vocabulary("umt5.tar.xz")
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    make: Any = PreTrainedTokenizerFast
    return make(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


@cache
def _vocabulary(archive: str) -> tuple[Any, bytes]:
    """Pieces with their scores, and sentencepiece's map of characters, if there is one."""
    with tarfile.open(VOCABULARIES / archive, "r:xz") as opened:
        files = {member.name: file.read() for member in opened if (file := opened.extractfile(member)) is not None}
    scores = np.frombuffer(files["scores.f32"], "<f4").tolist()
    return list(zip(files["pieces.txt"].decode().split("\n"), scores, strict=True)), files.get("charsmap.bin", b"")


def _byte_letters() -> list[str]:
    """The characters that stand for bytes, in the vocabulary's order: printable ones as themselves, then the rest."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(code) for code in printable] + [chr(256 + number) for number in range(256 - len(printable))]
