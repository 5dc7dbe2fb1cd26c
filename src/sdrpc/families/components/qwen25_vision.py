"""What Qwen2.5-VL sees pictures with: transformers' Qwen2_5_VisionTransformerPretrainedModel, whose results stand among
the words that the language model reads (``qwen25.py``)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ...checkpoints.expressions import concat, reshape
from ...ggml.weight import Weight
from ...prompts import number_of
from ..base import F32, Component, Config, Encode, Found, Naming, Weights
from ..keys import same, substituted
from . import llm
from .clip_vision import normalized

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..base import Call

NAME = "llm_vision"
"""Of the component, and of the option that takes its file."""

HEAD_SIZE = 80
"""Of attention in all published sizes, as the following numbers are: no tensor tells them."""
PATCH = 14
"""Pixels on a side that make one patch."""
WINDOW = 112
"""Pixels on a side that patches attend within, but in every eighth block."""
WHOLE_BLOCKS = 8
MERGED = 2
"""Patches on a side that make one token for the language model."""
SIDE = PATCH * MERGED
"""Pixels on a side that make one token."""
MOST_PIXELS, LEAST_PIXELS = SIDE**2 * 1280, (2 * SIDE) ** 2
"""That a picture may have, as the published processor is told."""

IMAGE = "<|image_pad|>"
BEFORE, BEHIND = "<|vision_start|>", "<|vision_end|>"

# The module -----------------------------------------------------------------------------------------------------------


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of transformers' Qwen2_5_VLVisionConfig."""
    width, colours, frames, patch, other = found.shape("patch_embed.proj.weight", 5)
    inner, _ = found.shape("blocks.0.mlp.gate_proj.weight", 2)
    outputs, merged = found.shape("merger.mlp.2.weight", 2)
    blocks = found.count("blocks.")
    if width % HEAD_SIZE or merged != width * MERGED**2 or (colours, patch, other) != (3, PATCH, PATCH):
        raise found.error(f"its width of {width} and patches of {colours}×{patch}×{other} are not Qwen2.5-VL's")
    said = told.get("vision_config")
    whole = said.get("fullatt_block_indexes") if isinstance(said, Mapping) else None
    if whole is None:
        whole = list(range(WHOLE_BLOCKS - 1, blocks, WHOLE_BLOCKS))
    if not isinstance(whole, list) or not all(type(number) is int for number in whole):
        raise found.error(f"fullatt_block_indexes of the {found.component.title} can't be {whole!r}")
    return {
        "depth": blocks, "hidden_size": width, "intermediate_size": inner, "num_heads": width // HEAD_SIZE,
        "patch_size": patch, "temporal_patch_size": frames, "spatial_merge_size": MERGED, "window_size": WINDOW,
        "out_hidden_size": outputs, "fullatt_block_indexes": whole,
    }  # fmt: skip


def build(config: Config) -> tuple[nn.Module, Call]:
    """Input: a picture (1, 3, height, width) of -1 … 1, whose sides are multiples of two patches. Output: its tokens
    for the language model (1, rows · columns, out_hidden_size), a square of 2×2 patches each."""
    import torch
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    patch, frames = config["patch_size"], config["temporal_patch_size"]

    def call(module: Any, picture: torch.Tensor) -> tuple[torch.Tensor, ...]:
        _, colours, height, width = picture.shape
        rows, columns = height // patch, width // patch
        squares = normalized(picture).reshape(colours, rows // MERGED, MERGED, patch, columns // MERGED, MERGED, patch)
        squares = squares.permute(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns, colours, 1, patch**2)
        patches = squares.expand(-1, -1, frames, -1).reshape(rows * columns, -1)
        return (module(patches, torch.tensor([[1, rows, columns]])).pooler_output[None],)

    make: Any = Qwen2_5_VisionTransformerPretrainedModel
    return make(Qwen2_5_VLVisionConfig(**config)), call


# Pictures among words -------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What is seen of a picture: (rows · columns, hidden_size)."""

    tokens: F32
    rows: int
    columns: int

    @property
    def text(self) -> str:
        """What stands for it in a text."""
        return f"{BEFORE}{IMAGE * len(self.tokens)}{BEHIND}"


def size(width: int, height: int, pixels: int, multiple: int) -> tuple[int, int]:
    """Width and height of about so many ``pixels`` in the shape of a picture, multiples of ``multiple``."""
    wide = math.sqrt(pixels * width / height)
    sides = wide, wide * height / width
    return max(1, round(sides[0] / multiple)) * multiple, max(1, round(sides[1] / multiple)) * multiple


def processed_size(width: int, height: int) -> tuple[int, int]:
    """Width and height that transformers' processor of Qwen2.5-VL scales a picture to: multiples of a token's side."""
    found = max(SIDE, round(width / SIDE) * SIDE), max(SIDE, round(height / SIDE) * SIDE)
    pixels = found[0] * found[1]
    if LEAST_PIXELS <= pixels <= MOST_PIXELS:
        return found
    factor = math.sqrt((MOST_PIXELS if pixels > MOST_PIXELS else LEAST_PIXELS) / (width * height))
    whole = math.floor if pixels > MOST_PIXELS else math.ceil
    return max(SIDE, whole(width * factor / SIDE) * SIDE), max(SIDE, whole(height * factor / SIDE) * SIDE)


def see(encode: Encode) -> list[Seen]:
    """What Qwen2.5-VL sees of a request's pictures."""
    return [
        Seen(encode(NAME, {"picture": picture})[0][0], picture.shape[2] // SIDE, picture.shape[3] // SIDE)
        for picture in encode.pictures
    ]


def among(seen: Sequence[Seen]) -> llm.Beside:
    """The language model's inputs beside tokens that begin with the :attr:`Seen.text` of each picture, in order."""

    def beside(ids: NDArray[np.int32], tokenizer: Tokenizer) -> dict[str, NDArray[Any]]:
        if not seen:
            return {}
        tokens = np.concatenate([each.tokens for each in seen])
        here = np.flatnonzero(ids[0] == number_of(tokenizer, IMAGE))[: len(tokens)]
        kept = np.ones((1, ids.shape[1], 1), np.float32)
        added = np.zeros((1, ids.shape[1], tokens.shape[1]), np.float32)
        kept[0, here], added[0, here] = 0, tokens
        return {"kept": kept, "added": added, "positions": positions(ids.shape[1], here, seen)}

    return beside


def positions(length: int, here: NDArray[np.intp], seen: Sequence[Seen]) -> NDArray[np.int32]:
    """Of ``length`` tokens in time, in rows and in columns (3, 1, length). ``here``: the places of all pictures'
    tokens. A picture is at one time; the text behind it goes on after its longer side."""
    found = np.zeros((3, length), np.int32)
    at = now = 0
    for each, places in zip(seen, np.split(here, np.cumsum([len(one.tokens) for one in seen])[:-1]), strict=True):
        first, count = int(places[0]), len(places)
        found[:, at:first] = now + np.arange(first - at)
        now += first - at
        square = np.arange(count)
        found[:, first : first + count] = now + np.stack((square * 0, square // each.columns, square % each.columns))
        at, now = first + count, now + max(each.rows, each.columns)
    found[:, at:] = now + np.arange(length - at)
    return found[:, None]


# Names ----------------------------------------------------------------------------------------------------------------

_renamed = substituted(
    [
        (r"^v\.post_ln\.", "merger.ln_q."), (r"^mm\.", "merger.mlp."), (r"^v\.blk\.", "blocks."),
        (r"\.attn_out\.", ".attn.proj."), (r"\.ffn_(gate|up|down)\.", r".mlp.\1_proj."), (r"\.ln([12])\.", r".norm\1."),
    ]
)  # fmt: skip
_QUERIES = re.compile(r"v\.blk\.(\d{1,3})\.attn_q\.(weight|bias)")
_PATCHES = ("v.patch_embd.weight", "v.patch_embd.weight.1")


def _from_gguf(weights: Weights) -> dict[str, Weight]:
    """llama.cpp's names: queries, keys and values apart, and of patches a tensor for each of two frames."""
    found = {_renamed(name): weight for name, weight in weights.items()}
    for name in weights:
        match = _QUERIES.fullmatch(name)
        apart = [weights.get(name.replace("attn_q", f"attn_{letter}")) for letter in "qkv"]
        if match and all(apart):
            found[f"blocks.{match[1]}.attn.qkv.{match[2]}"] = concat([weight for weight in apart if weight])
    halves = [weights[name] for name in _PATCHES if name in weights]
    if len(halves) == len(_PATCHES) and all(len(half.shape) == 4 for half in halves):
        frames = [reshape(half, (*half.shape[:2], 1, *half.shape[2:])) for half in halves]
        found["patch_embed.proj.weight"] = concat(frames, dim=2)
    return found


_WHOLE = tuple(f"text_encoders.{name}.{inner}" for name in ("qwen25_7b", "llm") for inner in ("transformer.", ""))
_LANGUAGE = (*_WHOLE, "text_encoder.", "text_encoder.model.", "model.", "")

VISION = Component(
    NAME,
    "vision part of Qwen2.5-VL",
    (*(f"{language}visual." for language in _LANGUAGE), *_WHOLE, ""),
    (
        Naming("merger.ln_q.weight", same),
        Naming("v.patch_embd.weight.1", _from_gguf),
    ),
    _configure,
    build,
    "text_encoder",
    within=llm.NAME,
)
