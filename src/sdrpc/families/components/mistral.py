"""Mistral Small 3, a language model that encodes prompts: transformers' MistralModel without its final norm."""

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

HEAD = 128
"""Width of its attention heads, which no shape tells."""


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of transformers' MistralConfig."""
    inner = told.get("text_config")  # of a model that can see
    config = llm.inferred(found, HEAD) | {"rope_theta": 1e9, "rms_norm_eps": 1e-5, "sliding_window": None}
    return llm.merged(found, config, inner if isinstance(inner, Mapping) else told, ("llama",))


def build(config: Config) -> tuple[nn.Module, Call]:
    """Inputs: ids, int (1, length), mask (1, 1, length, length), which is added to scores, and seen (1, length): 1, or
    0 for padding before the text. Output as that of :func:`sdrpc.families.components.qwen3.build`.

    Padding before a text sees nothing at all: transformers' attention gives zeros for it. The mask, which has to leave
    something to see, lets it see itself; ``seen`` makes zeros of that.
    """
    import torch
    from torch import nn
    from transformers import MistralConfig, MistralModel

    arguments = dict(config)
    states = arguments.pop("states")
    arguments["num_hidden_layers"] = max(states)
    module: Any = MistralModel(MistralConfig(**arguments))
    module.norm = nn.Identity()
    attended: list[torch.Tensor] = []

    def zeros_for_padding(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0] * attended[-1][..., None],)

    for layer in module.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(zeros_for_padding)

    def call(module: Any, ids: torch.Tensor, mask: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, ...]:
        attended[:] = [seen]
        options = {"use_cache": False, "output_hidden_states": True}
        hidden = module(input_ids=ids, attention_mask=mask, **options).hidden_states
        return (torch.cat([hidden[state] for state in states], -1),)

    return module, call


_LANGUAGE = ("language_model.model.", "model.language_model.")
"""What stands before its names in files of Mistral Small 3.1 and later, which can see."""

MISTRAL = Component(
    llm.NAME,
    "Mistral text encoder",
    (
        *(f"{outer}{inner}" for outer in ("text_encoder.", "") for inner in _LANGUAGE),
        *llm.prefixes("mistral3_24b", "llm"),
    ),
    (
        Naming("layers.0.self_attn.q_proj.weight", same),
        Naming("blk.0.attn_q.weight", llm.from_gguf),
    ),
    _configure,
    build,
    "text_encoder",
    idle=("norm.", "lm_head."),
    sometimes=("layers.",),
)
