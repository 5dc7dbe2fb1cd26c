"""Gemma 3, a language model that encodes prompts: transformers' Gemma3TextModel.

Its vocabulary has terms of its own and is not shipped: the model's file brings it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..base import Config, Found, Naming
from ..keys import same
from . import gemma2, llm

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..base import Call

NEAR = 1e4
"""Base of the rotary positions of layers that see what is near, five of six."""
STRETCH = 8.0
"""By which the positions of the others are stretched in models that see pictures, as that of 12B does."""


def _configure(found: Found, _told: Config) -> dict[str, Any]:
    """Arguments of transformers' Gemma3TextConfig."""
    if "layers.0.self_attn.q_norm.weight" not in found.tensors:
        raise found.error("this is Gemma 2, and not Gemma 3")
    gemma2.check_vocabulary(found, "gemma_3_12B_it")
    config = llm.inferred(found, gemma2.HEAD) | {"rope_theta": 1e6, "rms_norm_eps": 1e-6}
    return llm.merged(found, config, {}, ("gemma3",))


def build(config: Config) -> tuple[nn.Module, Call]:
    """Input: ids, int (1, length). Output: the hidden states (1, length, states · hidden_size) that ``states`` of the
    configuration names, side by side: 0 of the tokens, 1 of the first layer …, the last one behind the final norm.

    Five of six layers see 1024 tokens back; no text is longer.
    """
    import torch
    from transformers import Gemma3TextConfig, Gemma3TextModel

    arguments = dict(config)
    states = arguments.pop("states")
    arguments["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": STRETCH, "rope_theta": arguments.pop("rope_theta")},
        "sliding_attention": {"rope_type": "default", "rope_theta": NEAR},
    }

    def call(module: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = module(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        return (torch.cat([hidden[state] for state in states], -1),)

    return Gemma3TextModel(Gemma3TextConfig(**arguments)), call


GEMMA3 = replace(
    gemma2.GEMMA2,
    title="Gemma 3 text encoder",
    prefixes=(
        "text_encoder.model.language_model.", "text_encoder.language_model.model.",
        *llm.prefixes("gemma3_12b", "llm")[:-2], "model.language_model.", "language_model.model.",
        *llm.prefixes()[-2:],
    ),
    namings=(
        Naming("layers.0.pre_feedforward_layernorm.weight", same),
        gemma2.GEMMA2.namings[1],
    ),
    configure=_configure,
    build=build,
    idle=("lm_head.",),
    sometimes=(),
)  # fmt: skip
