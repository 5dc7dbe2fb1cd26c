"""T5's encoder, version 1.1: transformers' T5EncoderModel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...ggml.weight import Weight
from ...prompts import Tokens, apply_weights
from .. import configs
from ..base import F32, Component, Config, Encode, Found, Naming, Weights
from ..keys import table

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..base import Call


PADDING = 0
"""Number of the padding token."""
OWN_DISTANCES = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
"""UMT5's blocks have distances of their own, T5's all those of the first one."""


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of transformers' T5Config."""
    if OWN_DISTANCES in found.tensors:
        raise found.error("this is UMT5, which reads prompts for Wan, and not T5")
    return configured(found, told)


def configured(found: Found, told: Config) -> dict[str, Any]:
    """What the configurations of T5 and UMT5 have in common, which is all."""
    vocabulary, width = found.shape("shared.weight", 2)
    layer = "encoder.block.0.layer"
    inner, _ = found.shape(f"{layer}.0.SelfAttention.q.weight", 2)
    buckets, heads = found.shape(f"{layer}.0.SelfAttention.relative_attention_bias.weight", 2)
    gated = found.has(f"{layer}.1.DenseReluDense.wi_0.")
    feed_forward, _ = found.shape(f"{layer}.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight", 2)
    if inner % heads:
        raise found.error(f"the {found.component.title} has {heads} heads, which do not divide its width of {inner}")
    inferred = {
        "vocab_size": vocabulary, "d_model": width, "d_kv": inner // heads, "d_ff": feed_forward,
        "num_layers": found.count("encoder.block."), "num_heads": heads, "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }  # fmt: skip
    return configs.merged(found, inferred, told, ("relative_attention_max_distance", "layer_norm_epsilon"))


def build(config: Config) -> tuple[nn.Module, Call]:
    """Inputs: ids, int (1, length), and, where padding is not to be seen, mask, int (1, length): 0 for it, else 1.
    Output: hidden states after the final norm (1, length, d_model)."""
    from transformers import T5Config, T5EncoderModel

    def call(module: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        return (module(input_ids=ids, attention_mask=mask).last_hidden_state,)

    return T5EncoderModel(T5Config(**config)), call


def encode_chunks(encode: Encode, name: str, tokens: Tokens) -> list[F32]:
    """The hidden states (1, length, d_model) of each chunk of tokens, times the tokens' weights."""
    return [
        apply_weights(encode(name, {"ids": ids[None]})[0][0], weights)[None]
        for ids, weights in zip(tokens.ids, tokens.weights, strict=True)
    ]


def encode_masked_chunks(encode: Encode, name: str, tokens: Tokens) -> list[F32]:
    """The same of an encoder that does not see padding; zeros for that."""
    return [
        apply_weights(encode(name, {"ids": ids[None], "mask": used[None]})[0][0], weights)[None]
        * np.float32(used)[:, None]
        for ids, weights, used in zip(tokens.ids, tokens.weights, seen(tokens.ids), strict=True)
    ]


def seen(ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """Which tokens of chunks (chunks, length) are no padding, in the same shape: 1 up to a chunk's last end token."""
    ends = [np.flatnonzero(chunk != PADDING)[-1] for chunk in ids]
    return (np.arange(ids.shape[1]) <= np.array(ends)[:, None]).astype(np.int32)


_GGUF = table(
    [
        (r"token_embd\.weight", "shared.weight"),
        (r"enc\.output_norm\.weight", "encoder.final_layer_norm.weight"),
        *(
            (rf"enc\.blk\.(\d+)\.{old}\.weight", rf"encoder.block.\1.layer.{new}.weight")
            for old, new in {
                "attn_q": "0.SelfAttention.q", "attn_k": "0.SelfAttention.k", "attn_v": "0.SelfAttention.v",
                "attn_o": "0.SelfAttention.o", "attn_rel_b": "0.SelfAttention.relative_attention_bias",
                "attn_norm": "0.layer_norm", "ffn_gate": "1.DenseReluDense.wi_0", "ffn_up": "1.DenseReluDense.wi_1",
                "ffn_down": "1.DenseReluDense.wo", "ffn_norm": "1.layer_norm",
            }.items()
        ),
    ]
)  # fmt: skip
"""llama.cpp's names of T5's tensors."""


def with_shared_embedding(weights: Weights) -> dict[str, Weight]:
    """The token embedding has two names in the module; files have one of them or both."""
    names = ("shared.weight", "encoder.embed_tokens.weight")
    found = [weights[name] for name in names if name in weights]
    return dict(weights) | (dict.fromkeys(names, found[0]) if found else {})


PREFIXES = (
    "text_encoders.t5xxl.transformer.", "text_encoder_3.", "text_encoder_2.", "text_encoder.", "t5xxl.transformer.",
    "t5xxl.", "cond_stage_model.transformer.", "",
)  # fmt: skip
NAMINGS = (
    Naming("encoder.block.0.layer.0.SelfAttention.q.weight", with_shared_embedding),
    Naming("enc.blk.0.attn_q.weight", lambda weights: with_shared_embedding(_GGUF(weights))),
)

T5 = Component("t5xxl", "T5-XXL text encoder", PREFIXES, NAMINGS, _configure, build, "text_encoder_2")
