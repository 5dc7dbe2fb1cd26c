"""LTX-Video 0.9.x: films of a text, or of a text and the picture that they begin with (2B and 13B, distilled ones
too)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InvalidValue
from ..prompts import t5_chunks
from . import configs
from .base import (
    F32,
    Begun,
    Component,
    Conditions,
    Config,
    Configs,
    Defaults,
    Encode,
    EncodeFilm,
    Family,
    Found,
    Joint,
    Latents,
    Naming,
    Prompt,
    joined,
)
from .components import film_ltx, flux, t5
from .keys import same, table

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .base import Call

HEADS = 32
"""Of attention in all published models: no tensor tells it."""
TIMESTEPS = 1000
TOKENS = 128
"""Of a text, in a chunk."""
UNSEEN = -10000.0
"""Added to the scores of padding, as in diffusers."""

# The diffusion model --------------------------------------------------------------------------------------------------

_TIME = "time_embed.emb.timestep_embedder.linear_1.weight"


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' LTXVideoTransformer3DModel."""
    inner, inputs = found.shape("proj_in.weight", 2)
    outputs, _ = found.shape("proj_out.weight", 2)
    _, text = found.shape("caption_projection.linear_1.weight", 2)
    _, seen = found.shape("transformer_blocks.0.attn2.to_k.weight", 2)
    inferred = {
        "in_channels": inputs, "out_channels": outputs, "num_attention_heads": HEADS,
        "attention_head_dim": inner // HEADS, "cross_attention_dim": seen, "caption_channels": text,
        "num_layers": found.count("transformer_blocks."),
    }  # fmt: skip
    config = configs.merged(found, inferred, told, ("num_attention_heads", "attention_head_dim"))
    if config["num_attention_heads"] * config["attention_head_dim"] != inner or inner % 2:
        heads = f"{config['num_attention_heads']} heads of {config['attention_head_dim']}"
        raise found.error(f"{heads} do not make up its width of {inner}")
    if outputs != inputs or seen != inner:
        raise found.error(f"takes {inputs} channels and gives {outputs}, and sees texts in {seen} numbers, not {inner}")
    return config


def build(config: Config) -> tuple[nn.Module, Call]:
    """Inputs: latents (1 or batch, channels, frames, height, width), timestep (1 or batch,) of 0 … 1000, context
    (batch, tokens, 4096), mask (batch, tokens), which is added to the scores of the text's tokens, and pace (batch, 3):
    from one latent to the next, seconds, and pixels down and across. Output: the velocity (batch, channels, frames,
    height, width).

    With ``first`` (batch, channels, 1, height, width) the first latent frame is that one, without any noise, and its
    velocity goes there at once.
    """
    import diffusers
    import torch

    def call(
        module: Any,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        mask: torch.Tensor,
        pace: torch.Tensor,
        first: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        batch, (_, channels, *shape) = context.shape[0], latents.shape
        frames, height, width = shape
        shown, times = latents.expand(batch, -1, -1, -1, -1), timestep.expand(batch)[:, None]
        if first is not None:
            shown = torch.cat((first, shown[:, :, 1:]), 2)
            noisy = torch.ones(frames, height * width)
            noisy[0] = 0
            times = times * noisy.reshape(1, -1)
        places = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij")).reshape(1, 3, -1)
        predicted = module(
            shown.reshape(batch, channels, -1).transpose(1, 2),
            encoder_hidden_states=context,
            timestep=times,
            encoder_attention_mask=mask[:, None],
            video_coords=places * pace[:, :, None],
            return_dict=False,
        )[0]
        predicted = predicted.transpose(1, 2).reshape(batch, channels, *shape)
        if first is not None:
            there = (latents[:, :, :1] - first) * (TIMESTEPS / timestep.reshape(-1, 1, 1, 1, 1))
            predicted = torch.cat((there, predicted[:, :, 1:]), 2)
        return (predicted,)

    make: Any = diffusers.LTXVideoTransformer3DModel
    return make(**config), call


_BLOCK, _BLOCKS = r"transformer_blocks\.(\d+)", r"transformer_blocks.\1"
_KIND = r"(weight|bias)"
_ORIGINAL = table(
    [
        (rf"patchify_proj\.{_KIND}", r"proj_in.\1"),
        (rf"adaln_single\.linear\.{_KIND}", r"time_embed.linear.\1"),
        (
            rf"adaln_single\.emb\.timestep_embedder\.linear_(1|2)\.{_KIND}",
            r"time_embed.emb.timestep_embedder.linear_\1.\2",
        ),
        (rf"caption_projection\.linear_(1|2)\.{_KIND}", r"caption_projection.linear_\1.\2"),
        (rf"{_BLOCK}\.(attn1|attn2)\.(q|k)_norm\.weight", rf"{_BLOCKS}.\2.norm_\3.weight"),
        (rf"{_BLOCK}\.(attn1|attn2)\.to_(q|k|v)\.{_KIND}", rf"{_BLOCKS}.\2.to_\3.\4"),
        (rf"{_BLOCK}\.(attn1|attn2)\.to_out\.0\.{_KIND}", rf"{_BLOCKS}.\2.to_out.0.\3"),
        (rf"{_BLOCK}\.ff\.net\.0\.proj\.{_KIND}", rf"{_BLOCKS}.ff.net.0.proj.\2"),
        (rf"{_BLOCK}\.ff\.net\.2\.{_KIND}", rf"{_BLOCKS}.ff.net.2.\2"),
        (rf"{_BLOCK}\.scale_shift_table", rf"{_BLOCKS}.scale_shift_table"),
        ("scale_shift_table", "scale_shift_table"),
        (rf"proj_out\.{_KIND}", r"proj_out.\1"),
    ]
)
"""The names of Lightricks' own code."""

TRANSFORMER = Component(
    "diffusion",
    "diffusion model",
    flux.PREFIXES,
    (Naming("patchify_proj.weight", _ORIGINAL), Naming(_TIME, same)),
    _configure,
    build,
    "transformer",
    blocks={"transformer_blocks": "num_layers"},
)

# The family -----------------------------------------------------------------------------------------------------------


def recognizes(diffusion: Found) -> bool:
    """Not LTX-2, which draws sound as well."""
    sounds = any("audio_" in name for name in diffusion.checkpoint.tensors)
    return not sounds and {"proj_in.weight", _TIME, "caption_projection.linear_1.weight"} <= diffusion.tensors.keys()


def conditions(encode: Encode, prompt: Prompt) -> Conditions:
    """T5's hidden states (1, tokens, 4096), which of them are no padding (1, tokens), and how far latents are from each
    other (1, 3): positions are seconds and pixels."""
    tokens = t5_chunks(prompt.text, length=TOKENS)
    mask = np.where(t5.seen(tokens.ids).reshape(1, -1), np.float32(0), np.float32(UNSEEN))
    vae = encode.config("vae")
    side = film_ltx.pixels(vae)
    pace = np.array([[film_ltx.frames(vae) / prompt.fps, side, side]], np.float32)
    return {"context": joined(t5.encode_chunks(encode, "t5xxl", tokens)), "mask": mask, "pace": pace}


def check_begun(_configs: Configs, _frames: int, _first: bool, last: bool) -> None:
    """Every model takes a picture to begin with."""
    if last:
        raise InvalidValue("end_image", "a picture", "LTX-Video is shown what a film begins with, no end")


def takes(_configs: Configs, frames: int) -> bool:
    """Films; a single picture is drawn from another one as by models of pictures."""
    return frames > 1


def begun(encode: EncodeFilm, _configs: Configs, first: F32, _last: F32 | None, _frames: int) -> Conditions:
    """The first latent frame, as in diffusers' pipeline (which draws it of what the VAE tells, where this is the
    mean)."""
    return {"first": encode(first, None, 1)}


def settings(_: Mapping[str, Found]) -> Defaults:
    """Those of diffusers' pipelines, with the authors' levels of noise."""
    return Defaults(
        size=(704, 512), sampler="euler", scheduler="ltx2", cfg_scale=3.0, prediction="sd3_flow", flow_shift=1.0,
        frames=161, fps=25,
    )  # fmt: skip


LTX_VIDEO = Family(
    "ltx-video",
    "LTX-Video",
    (replace(t5.T5, told_as="text_encoder"), TRANSFORMER, film_ltx.VAE),
    recognizes,
    conditions,
    Latents(scale=1.0, multiple=32, films=True),
    settings,
    (
        Joint("t5xxl", lambda c: c["t5xxl"]["d_model"], "diffusion", flux.takes("caption_channels")),
        Joint("vae", lambda c: c["vae"]["latent_channels"], "diffusion", flux.takes("in_channels")),
    ),
    begun=Begun(check_begun, takes, begun),
)
