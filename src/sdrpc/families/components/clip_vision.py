"""What models of films see pictures with: CLIP's vision part (OpenCLIP-H), by transformers' class of it with a
projection."""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING, Any

from .. import configs
from ..base import Component, Config, Found, Naming
from ..keys import prefixed, same

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..base import Call

NAME = "clip_vision"
"""Of the component, and of the option that takes its file."""

HEAD_SIZE = 80
"""Of attention in OpenCLIP-H: no tensor tells it."""

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Of the colours (0 … 1) of the pictures that CLIP was trained with."""

_MODEL = "vision_model."


def normalized(picture: torch.Tensor) -> torch.Tensor:
    """A picture (1, 3, height, width) of -1 … 1 as CLIP is shown it."""
    import torch

    mean, deviation = (torch.tensor(numbers)[None, :, None, None] for numbers in (MEAN, DEVIATION))
    return (picture * 0.5 + 0.5 - mean) / deviation


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of transformers' CLIPVisionConfig."""
    width, _, patch, _ = found.shape(f"{_MODEL}embeddings.patch_embedding.weight", 4)
    places, _ = found.shape(f"{_MODEL}embeddings.position_embedding.weight", 2)
    inner, _ = found.shape(f"{_MODEL}encoder.layers.0.mlp.fc1.weight", 2)
    side, layers = isqrt(places - 1), found.count(f"{_MODEL}encoder.layers.")
    if places != side**2 + 1 or side < 1:
        raise found.error(f"has {places} places, which are no square and one more")
    inferred = {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // HEAD_SIZE), "image_size": side * patch, "patch_size": patch,
        "hidden_act": "gelu", "layer_norm_eps": 1e-5,
    }  # fmt: skip
    config = configs.merged(found, inferred, told, ("num_attention_heads", "hidden_act", "layer_norm_eps"))
    configs.check_divides(found, config, "num_attention_heads", [width])
    return config


def build(config: Config) -> tuple[nn.Module, Call]:
    """Input: a picture (1, 3, image_size, image_size) of -1 … 1. Output: the hidden states before the last layer (1,
    places, hidden_size)."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    def call(module: Any, picture: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen = module.vision_model(pixel_values=normalized(picture), output_hidden_states=True)
        return (seen.hidden_states[-2],)

    return CLIPVisionModelWithProjection(CLIPVisionConfig(**config)), call


CLIP_VISION = Component(
    NAME,
    "CLIP vision model",
    ("image_encoder.", "clip_vision.", "cond_stage_model.transformer.", ""),
    (
        Naming(f"{_MODEL}embeddings.patch_embedding.weight", same),
        Naming("embeddings.patch_embedding.weight", prefixed(_MODEL)),
    ),
    _configure,
    build,
    "image_encoder",
    idle=("visual_projection.", f"{_MODEL}post_layernorm."),
)
