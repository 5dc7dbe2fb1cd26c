"""Qwen2.5-VL, a language model that encodes prompts: the part of transformers' Qwen2_5_VLModel that reads text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..base import Component, Config, Found, Naming
from ..keys import same
from . import llm

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..base import Call

HEAD_SIZE = 128
"""Of attention in all published sizes: no tensor tells it."""


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of transformers' Qwen2_5_VLTextConfig."""
    inner = told.get("text_config")
    said = dict(inner) if isinstance(inner, Mapping) else dict(told)
    config = llm.inferred(found, HEAD_SIZE) | {"rope_theta": 1e6, "rms_norm_eps": 1e-6}
    if config["num_attention_heads"] * HEAD_SIZE != config["hidden_size"]:
        raise found.error(f"heads of {HEAD_SIZE} do not make up its width of {config['hidden_size']}")
    del config["head_dim"]  # the class divides the width by the number of heads
    return llm.merged(found, config, said, ("qwen2vl",))


def build(config: Config) -> tuple[nn.Module, Call]:
    """Input: ids, int (1, length); where pictures are among the words also kept (1, length, 1) and added (1, length,
    hidden_size): what of a word's vector stays, and what is added; and positions, int (3, 1, length), in time, in rows
    and in columns, which are the same for text. Output: the hidden states behind the final norm (1, length,
    hidden_size).
    """
    from transformers import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    arguments = {name: value for name, value in config.items() if name not in ("states", "rope_theta")}
    positions = {
        "rope_type": "default", "rope_theta": config["rope_theta"],
        "mrope_section": [HEAD_SIZE // 8, HEAD_SIZE * 3 // 16, HEAD_SIZE * 3 // 16],
    }  # fmt: skip

    def call(
        module: Any,
        ids: torch.Tensor,
        kept: torch.Tensor | None = None,
        added: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        if kept is None or added is None:
            return (module(input_ids=ids, use_cache=False).last_hidden_state,)
        words = module.embed_tokens(ids) * kept + added
        return (module(inputs_embeds=words, position_ids=positions, use_cache=False).last_hidden_state,)

    make: Any = Qwen2_5_VLTextModel
    return make(Qwen2_5_VLTextConfig(**arguments, rope_parameters=positions)), call


_NESTED = ("text_encoder.model.language_model.", "model.language_model.", "language_model.")

QWEN25 = Component(
    llm.NAME,
    "Qwen2.5-VL text encoder",
    (*_NESTED, *llm.prefixes("qwen25_7b", "qwen2vl", "llm")),
    (
        Naming("layers.0.self_attn.q_proj.bias", same),
        Naming("blk.0.attn_q.bias", llm.from_gguf),
    ),
    _configure,
    build,
    "text_encoder",
    idle=("lm_head.", "visual."),
)
