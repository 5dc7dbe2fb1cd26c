"""Qwen3, a language model that encodes prompts: transformers' Qwen3Model without its final norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..base import Component, Config, Found, Naming
from ..keys import same
from . import llm

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..base import Call


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of transformers' Qwen3Config."""
    (head,) = found.shape("layers.0.self_attn.q_norm.weight", 1)
    config = llm.inferred(found, head) | {"rope_theta": 1e6, "rms_norm_eps": 1e-6}
    return llm.merged(found, config, told, ("qwen3",))


def build(config: Config) -> tuple[nn.Module, Call]:
    """Inputs: ids, int (1, length), and, where some are padding, mask (1, 1, length, length), which is added to scores.
    Output: the hidden states that ``states`` names, side by side (1, length, states · hidden_size); 1 is the result of
    the first layer. Layers behind the last of them are not there."""
    import torch
    from torch import nn
    from transformers import Qwen3Config, Qwen3Model

    arguments = dict(config)
    states = arguments.pop("states")
    arguments["num_hidden_layers"] = max(states)

    def call(module: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        options = {"use_cache": False, "output_hidden_states": True}
        hidden = module(input_ids=ids, attention_mask=mask, **options).hidden_states
        return (torch.cat([hidden[state] for state in states], -1),)

    module: Any = Qwen3Model(Qwen3Config(**arguments))
    module.norm = nn.Identity()
    return module, call


QWEN3 = Component(
    llm.NAME,
    "Qwen3 text encoder",
    llm.prefixes("qwen3_4b", "qwen3_8b", "llm"),
    (
        Naming("layers.0.self_attn.q_norm.weight", same),
        Naming("blk.0.attn_q_norm.weight", llm.from_gguf),
    ),
    _configure,
    build,
    "text_encoder",
    idle=("norm.", "lm_head."),
    sometimes=("layers.",),
)
