"""What is between LTX-2's language model and its diffusion model: diffusers' LTX2TextConnectors. It makes of all hidden
states of a text what the film is told of it, and what the sound is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .. import configs
from ..base import F32, Component, Config, Found, Naming
from ..keys import same, table

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..base import Call

NAME = "connectors"
HEAD = 128
"""Width of its attention heads, which no shape tells."""
TOKENS = 1024
"""Of a text with what stands for the rest."""
SCALE = 8
EPSILON = 1e-6

_HEAD = "video_connector_attention_head_dim"


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' LTX2TextConnectors."""
    width, inputs = found.shape("text_proj_in.weight", 2)
    if inputs % width:
        raise found.error(f"joins {inputs} numbers, which are no hidden states of {width}", "text_proj_in.weight")
    head = {_HEAD: told.get(_HEAD) or HEAD}
    configs.check_divides(found, head, _HEAD, [width])
    inferred: dict[str, Any] = {"caption_channels": width, "text_proj_in_factor": inputs // width}
    for side in ("video_connector", "audio_connector"):
        registers, inner = found.shape(f"{side}.learnable_registers", 2)
        if inner != width or TOKENS % registers:
            reason = f"has {registers} registers of {inner} numbers for {TOKENS} tokens of {width}"
            raise found.error(reason, f"{side}.learnable_registers")
        inferred |= {
            f"{side}_num_layers": found.count(f"{side}.transformer_blocks."),
            f"{side}_num_learnable_registers": registers, f"{side}_attention_head_dim": head[_HEAD],
            f"{side}_num_attention_heads": width // head[_HEAD],
        }  # fmt: skip
    return inferred


def build(config: Config) -> tuple[nn.Module, Call]:
    """Inputs: hidden (1, length, hidden_size · states), as :func:`normalized` makes it, and seen (1, length, 1), 1 for
    tokens of the text and 0 behind it. Outputs: what the film is told (1, 1024, hidden_size), and what the sound is.

    Behind the text stand registers, which are learnt; everything sees everything.
    """
    import diffusers.pipelines.ltx2.connectors as theirs
    import torch

    def call(module: Any, hidden: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rest = TOKENS - hidden.shape[1]
        text = torch.nn.functional.pad(module.text_proj_in(hidden), (0, 0, 0, rest))
        there = torch.nn.functional.pad(seen, (0, 0, 0, rest))

        def told(connector: Any) -> torch.Tensor:
            registers = connector.learnable_registers.repeat(TOKENS // connector.num_learnable_registers, 1)[None]
            states = text * there + registers * (1 - there)
            places = connector.rope(1, TOKENS, device=states.device)
            for block in connector.transformer_blocks:
                states = block(states, rotary_emb=places)
            normed: torch.Tensor = connector.norm_out(states)
            return normed

        return told(module.video_connector), told(module.audio_connector)

    make: Any = theirs.LTX2TextConnectors
    return make(**config, rope_type="split"), call


def normalized(hidden: F32, states: int) -> F32:
    """A text's hidden states (1, tokens, states · width), each around its mean in parts of its range, as numbers that
    stand side by side for each place: (1, tokens, width · states)."""
    apart = hidden.reshape(*hidden.shape[:2], states, -1)
    mean = apart.mean((1, 3), dtype=np.float64, keepdims=True)
    width = apart.max((1, 3), keepdims=True) - apart.min((1, 3), keepdims=True)
    scaled = (apart - mean) / (width + EPSILON) * SCALE
    joined: F32 = scaled.swapaxes(2, 3).reshape(hidden.shape).astype(np.float32)
    return joined


_KIND = r"(weight|bias)"
_INSIDE = r"(?:model\.diffusion_model\.)?"
_BLOCK = rf"{_INSIDE}(video|audio)_embeddings_connector\.transformer_1d_blocks\.(\d+)"
_BLOCKS = r"\1_connector.transformer_blocks.\2"
_ORIGINAL = table(
    [
        (r"text_embedding_projection\.aggregate_embed\.weight", "text_proj_in.weight"),
        (rf"{_INSIDE}(video|audio)_embeddings_connector\.learnable_registers", r"\1_connector.learnable_registers"),
        (rf"{_BLOCK}\.attn1\.(q|k)_norm\.weight", rf"{_BLOCKS}.attn1.norm_\3.weight"),
        (rf"{_BLOCK}\.attn1\.to_(q|k|v)\.{_KIND}", rf"{_BLOCKS}.attn1.to_\3.\4"),
        (rf"{_BLOCK}\.attn1\.to_out\.0\.{_KIND}", rf"{_BLOCKS}.attn1.to_out.0.\3"),
        (rf"{_BLOCK}\.ff\.net\.0\.proj\.{_KIND}", rf"{_BLOCKS}.ff.net.0.proj.\3"),
        (rf"{_BLOCK}\.ff\.net\.2\.{_KIND}", rf"{_BLOCKS}.ff.net.2.\3"),
    ]
)
"""The names of Lightricks' own code; most of them stand with the diffusion model's."""

CONNECTORS = Component(
    NAME,
    "text connectors",
    ("connectors.", ""),
    (
        Naming("text_embedding_projection.aggregate_embed.weight", _ORIGINAL),
        Naming("text_proj_in.weight", same),
    ),
    _configure,
    build,
    "connectors",
    within="diffusion",
)
