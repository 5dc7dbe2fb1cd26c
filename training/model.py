"""The small model's modules, and its file: an SD 1.x checkpoint, read by what reads SD 1.5."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor, nn

from sdrpc.families.base import Found
from sdrpc.families.configs import METADATA_KEY
from sdrpc.families.model import ModelFiles, open_model
from sdrpc.families.sd1 import SD1
from sdrpc.prompts.tokenizers import VOCABULARY

SCALING_FACTOR = SD1.latents.scale
"""What the VAE's latents are multiplied with to be the diffusion model's."""
SIDE = 128
"""Pixels of a picture's side."""
FACTOR = 8
"""Pixels for each latent, in both directions."""
LATENTS = 4
POSITIONS = 77

CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"
UNET: dict[str, Any] = {
    "sample_size": SIDE // FACTOR, "in_channels": LATENTS, "out_channels": LATENTS, "layers_per_block": 2,
    "block_out_channels": [96, 96, 128], "attention_head_dim": 4, "cross_attention_dim": 96, "norm_num_groups": 8,
    "down_block_types": [kind.format("Down") for kind in (CROSS, CROSS, PLAIN)],
    "up_block_types": [kind.format("Up") for kind in (PLAIN, CROSS, CROSS)],
}  # fmt: skip
VAE: dict[str, Any] = {
    "sample_size": SIDE, "in_channels": 3, "out_channels": 3, "latent_channels": LATENTS, "layers_per_block": 1,
    "block_out_channels": [32, 64, 64, 96], "norm_num_groups": 8,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": POSITIONS, "projection_dim": 96, "hidden_act": "quick_gelu",
    "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407,
}  # fmt: skip

UNTOLD = {
    "unet": ("sample_size", "attention_head_dim", "norm_num_groups"),
    "vae": ("norm_num_groups",),
    "text_encoder": ("num_attention_heads",),
}
"""What the shapes of tensors can't tell: stands in the file's metadata."""


def unet() -> nn.Module:
    """Predicts the noise: latents [n, 4, 16, 16], timesteps [n], text [n, 77, 96] → [n, 4, 16, 16]."""
    import diffusers

    make: Any = diffusers.UNet2DConditionModel
    made: nn.Module = make(**UNET)
    return made


def vae() -> nn.Module:
    """Pictures [n, 3, 128, 128] of -1 to 1 ↔ latents [n, 4, 16, 16]."""
    import diffusers

    make: Any = diffusers.AutoencoderKL
    made: nn.Module = make(**VAE)
    return made


def text_encoder() -> nn.Module:
    """Token numbers [n, 77] → hidden states [n, 77, 96]."""
    from transformers import CLIPTextConfig, CLIPTextModel

    model = CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER))
    inner: nn.Module = getattr(model, "text_model", model)  # transformers 5 has no such layer in between any more
    return inner


def stored(path: Path) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Text encoder, UNet and VAE of a file that :func:`write` made, f32, not to be trained."""
    found = open_model(ModelFiles(path)).components
    return (
        filled(text_encoder(), found["clip_l"].found, "text_model."),
        filled(unet(), found["diffusion"].found),
        filled(vae(), found["vae"].found),
    )


def filled(module: nn.Module, found: Found, prefix: str = "") -> nn.Module:
    """The module with a file's weights, f32, not to be trained. ``prefix``: what the file's names have more."""
    state = module.state_dict()
    taken = found.take({prefix + name: tuple(weight.shape) for name, weight in state.items()})
    for name, weight in state.items():
        source = taken[prefix + name]
        numbers = dequantize(np.frombuffer(source.data(), np.uint8), GGMLQuantizationType[source.type.name])
        weight.copy_(torch.from_numpy(numbers).reshape(weight.shape))
    return module.eval().requires_grad_(False)


def standardize(vae: nn.Module, mean: Tensor, deviation: Tensor) -> None:
    """Make each channel of the latents, times SD's own factor, of mean 0 and deviation 1, changing no picture.

    ``mean`` and ``deviation`` [4] are the channels' own. Two convolutions of one pixel take it up: the encoder's last
    gives (z - mean) / (deviation · 0.18215), of means; the logarithms of variances move with them; the decoder's first
    takes it back.
    """
    scale = 1 / (deviation * SCALING_FACTOR)
    after: Any = vae.quant_conv
    before: Any = vae.post_quant_conv
    with torch.no_grad():
        after.weight[:LATENTS] *= scale[:, None, None, None]
        after.bias[:LATENTS] = (after.bias[:LATENTS] - mean) * scale
        after.bias[LATENTS:] += 2 * scale.log()
        before.bias += (before.weight[:, :, 0, 0] * mean).sum(1)
        before.weight /= scale[:, None, None]


# The names that SD 1.x checkpoints have -------------------------------------------------------------------------------

_UNET_PREFIX, _VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
_TEXT_PREFIX = "cond_stage_model.transformer.text_model."

_UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
_VAE_WORDS = (
    (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"), (r"up_blocks\.(\d+)\.resnets", r"up.\1.block"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"), ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"),
    ("group_norm", "norm"), (r"to_out\.0", "proj_out"), (r"to_([qkv])\b", r"\1"),
)  # fmt: skip


def _unet_name(name: str) -> str:
    for ours, theirs in _UNET_ENDS.items():
        name = re.sub(rf"^{re.escape(ours)}\b", theirs, name)
    layers = UNET["layers_per_block"]
    if match := re.match(r"down_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
        level, kind, number, rest = int(match[1]), match[2], int(match[3]), match[4]
        if kind == "downsamplers":
            return f"input_blocks.{(level + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
        name = f"input_blocks.{1 + level * (layers + 1) + number}.{int(kind == 'attentions')}.{rest}"
    elif match := re.match(r"up_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
        level, kind, number, rest = int(match[1]), match[2], int(match[3]), match[4]
        if kind == "upsamplers":
            place = 2 if UNET["up_block_types"][level] == CROSS.format("Up") else 1
            return f"output_blocks.{level * (layers + 1) + layers}.{place}.{rest}"
        name = f"output_blocks.{level * (layers + 1) + number}.{int(kind == 'attentions')}.{rest}"
    for ours, theirs in _UNET_RESNET.items():
        name = re.sub(rf"\.{ours}\b(?!.*transformer)", f".{theirs}", name) if "transformer_blocks" not in name else name
    return name


def _vae_name(name: str) -> str:
    for ours, theirs in _VAE_WORDS:
        name = re.sub(ours, theirs, name)
    last = len(VAE["block_out_channels"]) - 1  # counted from the picture here, from the latents there
    return re.sub(r"decoder\.up\.(\d+)", lambda match: f"decoder.up.{last - int(match[1])}", name)


def tensors(text_encoder: nn.Module, unet: nn.Module, vae: nn.Module) -> dict[str, Tensor]:
    """Every weight of the modules by its name in SD 1.x checkpoints, f16."""
    made = {_UNET_PREFIX + _unet_name(name): weight for name, weight in unet.state_dict().items()}
    for name, weight in vae.state_dict().items():
        renamed = _vae_name(name)
        matrix = ".mid.attn_1." in renamed and weight.dim() == 2
        made[_VAE_PREFIX + renamed] = weight[:, :, None, None] if matrix else weight
    made |= {_TEXT_PREFIX + name: weight for name, weight in text_encoder.state_dict().items() if "ids" not in name}
    return {name: weight.detach().to("cpu", torch.float16).contiguous() for name, weight in made.items()}


def write(path: Path, weights: Mapping[str, Tensor], colours: tuple[list[list[float]], list[float]],
          about: Mapping[str, str]) -> None:  # fmt: skip
    """The file: weights, what shapes can't tell of them, the latents' colours (factors, what is added), and ``about``,
    more metadata."""
    from safetensors.torch import save_file

    configs = {"unet": UNET, "vae": VAE, "text_encoder": TEXT_ENCODER}
    untold = {part: {key: configs[part][key] for key in keys} for part, keys in UNTOLD.items()}
    said = {**untold, "latent_rgb_factors": colours[0], "latent_rgb_factors_bias": colours[1]}
    save_file(dict(weights), path, {METADATA_KEY: json.dumps(said), **about})
