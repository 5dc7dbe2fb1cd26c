"""UMT5's encoder: transformers' UMT5EncoderModel. It is T5 1.1 of many languages, with distances in every block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...ggml.weight import Weight
from ..base import Component, Config, Found, Naming, Weights
from ..keys import table
from . import t5

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..base import Call


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of transformers' UMT5Config."""
    if found.count("encoder.block.") > 1 and t5.OWN_DISTANCES not in found.tensors:
        raise found.error("this is T5 and not UMT5, which has distances in every block")
    return t5.configured(found, told)


def build(config: Config) -> tuple[nn.Module, Call]:
    """Inputs: ids, int (1, length), and mask, int (1, length): 0 for padding, which no token sees, else 1. Output:
    hidden states after the final norm (1, length, d_model)."""
    from transformers import UMT5Config, UMT5EncoderModel

    def call(module: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (module(input_ids=ids, attention_mask=mask).last_hidden_state,)

    return UMT5EncoderModel(UMT5Config(**config)), call


_BLOCK = r"encoder.block.\1.layer"
_WAN = table(
    [
        (r"token_embedding\.weight", "shared.weight"),
        (r"norm\.weight", "encoder.final_layer_norm.weight"),
        *(
            (rf"blocks\.(\d+)\.{old}\.weight", rf"{_BLOCK}.{new}.weight")
            for old, new in {
                r"attn\.([qkvo])": r"0.SelfAttention.\2",
                r"pos_embedding\.embedding": "0.SelfAttention.relative_attention_bias",
                "norm1": "0.layer_norm", "norm2": "1.layer_norm", r"ffn\.gate\.0": "1.DenseReluDense.wi_0",
                r"ffn\.fc1": "1.DenseReluDense.wi_1", r"ffn\.fc2": "1.DenseReluDense.wo",
            }.items()
        ),
    ]
)  # fmt: skip
"""The names of Wan's own code."""


def _from_wan(weights: Weights) -> dict[str, Weight]:
    return t5.with_shared_embedding(_WAN(weights))


UMT5 = Component(
    "t5xxl",
    "UMT5-XXL text encoder",
    t5.PREFIXES,
    (*t5.NAMINGS, Naming("blocks.0.pos_embedding.embedding.weight", _from_wan)),
    _configure,
    build,
    "text_encoder",
)
