"""Gemma 2, a language model that encodes prompts: transformers' Gemma2Model.

Its vocabulary has terms of its own and is not shipped: the model's file brings it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from ...checkpoints.expressions import plus
from ...errors import MissingComponent
from ...ggml.weight import Weight
from ..base import Component, Config, Found, Naming, Weights
from ..keys import same
from . import llm

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..base import Call

HEAD = 256
"""Width of its attention heads, which no shape tells."""
START = "<bos>"
"""The token that a text begins with."""


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of transformers' Gemma2Config."""
    check_vocabulary(found, "gemma_2_2b")
    config = llm.inferred(found, HEAD) | {"rope_theta": 1e4, "rms_norm_eps": 1e-6}
    return llm.merged(found, config, told, ("gemma2",))


def check_vocabulary(found: Found, known: str) -> None:
    """Raises :class:`CheckpointError` for a file without a vocabulary. ``known``: what ComfyUI calls its file."""
    if not any(tokenizer.whole for tokenizer in found.checkpoint.tokenizers.values()):
        reason = "brings no vocabulary, which Gemma's terms keep out of sdrpc; files that have it: ComfyUI's"
        raise found.error(f"{reason} {known} .safetensors, GGUF, and directories with a tokenizer.json")


def build(config: Config) -> tuple[nn.Module, Call]:
    """Input: ids, int (1, length). Output as that of :func:`sdrpc.families.components.qwen3.build`; behind the last
    layer is the final norm.

    Every second layer sees 4096 tokens back; no text is as long. (As in transformers' usual attention, scores have no
    upper limit.)
    """
    import torch
    from torch import nn
    from transformers import Gemma2Config, Gemma2Model

    arguments = dict(config)
    states = arguments.pop("states")
    layers, whole = max(states), max(states) == arguments["num_hidden_layers"]
    arguments |= {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}

    def call(module: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = module(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        return (torch.cat([hidden[state] for state in states], -1),)

    module: Any = Gemma2Model(Gemma2Config(**arguments))
    if not whole:
        module.norm = nn.Identity()
    return module, call


def no_tokenizer() -> Tokenizer:
    """Stands for a vocabulary that is shipped."""
    raise MissingComponent(llm.NAME, "no vocabulary of Gemma's")


_NAMES = llm.gguf_names(
    {
        "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
    }
)  # fmt: skip


def _from_gguf(weights: Weights) -> dict[str, Weight]:
    """llama.cpp's converter adds the 1 to the weights of norms that the module adds."""
    return {name: plus(w, -1) if name.endswith("norm.weight") else w for name, w in _NAMES(weights).items()}


GEMMA2 = Component(
    llm.NAME,
    "Gemma 2 text encoder",
    llm.prefixes("gemma2_2b", "llm"),
    (
        Naming("layers.0.pre_feedforward_layernorm.weight", same),
        Naming("blk.0.post_ffw_norm.weight", _from_gguf, _NAMES.originals),
    ),
    _configure,
    build,
    "text_encoder",
    idle=("lm_head.",),
    sometimes=("layers.", "norm."),
)
