"""What is between LTX-2's language model and its diffusion model: diffusers' LTX2TextConnectors. It makes of all hidden
states of a text what the film is told of it, and what the sound is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..base import F32, Component, Config, Found, Naming
from ..keys import same, table
from . import llm

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..base import Call

NAME = "connectors"
HEAD, HEADS = 128, 32
"""Width of its attention heads in LTX-2.0, and their number in 2.3: no shape tells them."""
SIDES = ("video", "audio")
TOKENS = 1024
"""Of a text with what stands for the rest."""
SCALE = 8
EPSILON = 1e-6


def _configure(found: Found, _told: Config) -> dict[str, Any]:
    """Arguments of diffusers' LTX2TextConnectors. How many hidden states of which width come in is the same to it where
    film and sound have matrices of their own (LTX-2.3): they are counted as one."""
    apart = found.has("video_text_proj_in.")
    config: dict[str, Any] = {"per_modality_projections": apart, "proj_bias": apart}
    for side in SIDES:
        projection = f"{side}_text_proj_in.weight" if apart else "text_proj_in.weight"
        width, inputs = found.shape(projection, 2)
        registers, inner = found.shape(f"{side}_connector.learnable_registers", 2)
        heads = HEADS if apart else max(1, width // HEAD)
        if inner != width or TOKENS % registers:
            reason = f"has {registers} registers of {inner} numbers for {TOKENS} tokens of {width}"
            raise found.error(reason, f"{side}_connector.learnable_registers")
        if width % (2 * heads) or (inputs % width and not apart):
            reason = f"makes {width} numbers of {inputs}, which are no {heads} heads, or no hidden states"
            raise found.error(reason, projection)
        config |= {
            "caption_channels": inputs if apart else width, "text_proj_in_factor": 1 if apart else inputs // width,
            f"{side}_hidden_dim": width, f"{side}_connector_num_attention_heads": heads,
            f"{side}_connector_attention_head_dim": width // heads,
            f"{side}_connector_num_layers": found.count(f"{side}_connector.transformer_blocks."),
            f"{side}_connector_num_learnable_registers": registers,
            f"{side}_gated_attn": found.has(f"{side}_connector.transformer_blocks.0.attn1.to_gate_logits."),
        }  # fmt: skip
    return config


def numbers(config: Config) -> int:
    """Of a token's hidden states together."""
    return int(config["caption_channels"] * config["text_proj_in_factor"])


def build(config: Config) -> tuple[nn.Module, Call]:
    """Inputs: hidden (1, length, hidden_size · states), as :func:`normalized` makes it, seen (1, length, 1), 1 for
    tokens of the text and 0 behind it, and, where film and sound have matrices of their own, scales (2,), what hidden
    is multiplied with for each. Outputs: what the film is told (1, 1024, width), and what the sound is.

    Behind the text stand registers, which are learnt; everything sees everything.
    """
    import diffusers.pipelines.ltx2.connectors as theirs
    import torch

    def call(
        module: Any, hidden: torch.Tensor, seen: torch.Tensor, scales: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        rest = TOKENS - hidden.shape[1]
        there = torch.nn.functional.pad(seen, (0, 0, 0, rest))

        def told(text: torch.Tensor, connector: Any) -> torch.Tensor:
            registers = connector.learnable_registers.repeat(TOKENS // connector.num_learnable_registers, 1)[None]
            text = torch.nn.functional.pad(text, (0, 0, 0, rest))
            states = text * there + registers * (1 - there)
            places = connector.rope(1, TOKENS, device=states.device)
            for block in connector.transformer_blocks:
                states = block(states, rotary_emb=places)
            normed: torch.Tensor = connector.norm_out(states)
            return normed

        if scales is None:
            film = sound = module.text_proj_in(hidden)
        else:
            film, sound = module.video_text_proj_in(hidden * scales[0]), module.audio_text_proj_in(hidden * scales[1])
        return told(film, module.video_connector), told(sound, module.audio_connector)

    make: Any = theirs.LTX2TextConnectors
    return make(**config, rope_type="split"), call


def inputs(config: Config, hidden: F32, states: int) -> dict[str, F32]:
    """What connectors are given of a text's hidden states (1, tokens, states · hidden_size)."""
    length = hidden.shape[1]
    more = ((0, 0), (0, -length % llm.LENGTHS), (0, 0))
    apart = bool(config["per_modality_projections"])
    normed = token_normalized(hidden, states) if apart else normalized(hidden, states)
    given = {"hidden": np.pad(normed, more), "seen": np.pad(np.ones((1, length, 1), np.float32), more)}
    if apart:
        widths = np.array([config[f"{side}_hidden_dim"] for side in SIDES])
        given["scales"] = np.sqrt(widths / (hidden.shape[2] // states)).astype(np.float32)
    return given


def normalized(hidden: F32, states: int) -> F32:
    """A text's hidden states (1, tokens, states · width), each around its mean in parts of its range, as numbers that
    stand side by side for each place: (1, tokens, width · states). That is for LTX-2.0."""
    apart = hidden.reshape(*hidden.shape[:2], states, -1)
    mean = apart.mean((1, 3), dtype=np.float64, keepdims=True)
    width = apart.max((1, 3), keepdims=True) - apart.min((1, 3), keepdims=True)
    return _side_by_side((apart - mean) / (width + EPSILON) * SCALE)


def token_normalized(hidden: F32, states: int) -> F32:
    """The same, each token's in parts of their root mean square, for LTX-2.3."""
    apart = hidden.reshape(*hidden.shape[:2], states, -1)
    squares = np.square(apart).mean(3, dtype=np.float64, keepdims=True)
    return _side_by_side(apart / np.sqrt(squares + EPSILON))


def _side_by_side(states: NDArray[np.floating[Any]]) -> F32:
    """(1, tokens, states, width) → (1, tokens, width · states)."""
    joined: F32 = states.swapaxes(2, 3).reshape(*states.shape[:2], -1).astype(np.float32)
    return joined


_KIND = r"(weight|bias)"
_INSIDE = r"(?:model\.diffusion_model\.)?"
_BLOCK = rf"{_INSIDE}(video|audio)_embeddings_connector\.transformer_1d_blocks\.(\d+)"
_BLOCKS = r"\1_connector.transformer_blocks.\2"
_ORIGINAL = table(
    [
        (r"text_embedding_projection\.aggregate_embed\.weight", "text_proj_in.weight"),
        (rf"text_embedding_projection\.(video|audio)_aggregate_embed\.{_KIND}", r"\1_text_proj_in.\2"),
        (rf"{_INSIDE}(video|audio)_embeddings_connector\.learnable_registers", r"\1_connector.learnable_registers"),
        (rf"{_BLOCK}\.attn1\.(q|k)_norm\.weight", rf"{_BLOCKS}.attn1.norm_\3.weight"),
        (rf"{_BLOCK}\.attn1\.to_(q|k|v|gate_logits)\.{_KIND}", rf"{_BLOCKS}.attn1.to_\3.\4"),
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
        Naming("text_embedding_projection.video_aggregate_embed.weight", _ORIGINAL),
        Naming("text_proj_in.weight", same),
        Naming("video_text_proj_in.weight", same),
    ),
    _configure,
    build,
    "connectors",
    within="diffusion",
)
