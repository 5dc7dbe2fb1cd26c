"""Small Stable Diffusion 1.x parts with random weights, as diffusers and transformers make them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel


def unet(widths: tuple[int, ...] = (16, 32), layers: int = 1, heads: int = 2, **options: Any) -> UNet2DConditionModel:
    """Cross attention everywhere but at the lowest resolution, as in Stable Diffusion 1.x."""
    attention = len(widths) - 1
    return randomized(
        UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=widths,
            layers_per_block=layers,
            down_block_types=("CrossAttnDownBlock2D",) * attention + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attention,
            cross_attention_dim=24,
            attention_head_dim=heads,
            norm_num_groups=8,
            **options,
        )
    )


def vae(widths: tuple[int, ...] = (16, 16, 32), layers: int = 1) -> AutoencoderKL:
    return randomized(
        AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=widths,
            layers_per_block=layers,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            norm_num_groups=8,
            sample_size=32,
        )
    )


def text_encoder(width: int = 24, layers: int = 2, **options: Any) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=99,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=3,
        max_position_embeddings=77,
        **{"bos_token_id": 97, "eos_token_id": 98, **options},
    )
    return randomized(CLIPTextModel(config))


def randomized(module: Any) -> Any:
    """Weights that keep values near one through any depth, and biases that matter."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0, parameter[0].numel() ** -0.5, generator)
        else:
            nn.init.normal_(parameter, 0.5, 0.3, generator)
    return module.eval().requires_grad_(False)
