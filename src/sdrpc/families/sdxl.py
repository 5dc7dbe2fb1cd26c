"""Stable Diffusion XL: base, its finetunes, Turbo and Lightning."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..prompts import apply_weights, clip_chunks
from . import colours
from .base import Conditions, Config, Defaults, Encode, Family, Found, Joint, Latents, Prompt, joined
from .components import clip, controlnet, unet
from .components.autoencoder import VAE
from .sd1 import UNET_JOINTS

PAD = 0
"""OpenCLIP-G's chunks are filled up with this token, CLIP-L's with end tokens."""


def conditions(encode: Encode, prompt: Prompt) -> Conditions:
    """Both encoders' hidden states of the last layer but one, without a final norm, side by side (1, tokens, 2048); the
    first chunk's text pooled by OpenCLIP-G (1, 1280); original size, crop and target size (1, 6), height first.

    An empty negative prompt is zeros, as in stable-diffusion.cpp; its pooled text is encoded.
    """
    skip = prompt.clip_skip if prompt.clip_skip >= 1 else 2
    length = encode.config("clip_l")["max_position_embeddings"]
    first = clip_chunks(prompt.text, learned=prompt.learned, length=length)
    second = clip_chunks(prompt.text, learned=prompt.learned, length=length, pad=PAD, cut=True)
    ours = clip.hidden_states(encode, "clip_l", first, skip=skip, final_norm=False)
    theirs, pooled = clip.hidden_and_pooled(encode, "clip_g", second, skip=skip, final_norm=False, pooled="projected")
    both = [np.concatenate(pair, axis=-1) for pair in zip(ours, theirs, strict=True)]
    context = joined(apply_weights(h[0], w)[None] for h, w in zip(both, first.weights, strict=True))
    if prompt.negative and not prompt.text:
        context = np.zeros_like(context)
    size = [prompt.height, prompt.width]
    told = {"context": context, "pooled": pooled, "sizes": np.array([[*size, 0, 0, *size]], np.float32)}
    return told | unet.guidance(encode.config("diffusion"), prompt.guidance)


def settings(found: Mapping[str, Found]) -> Defaults:
    """Finetunes that predict velocity carry a tensor that says so."""
    marks = found["diffusion"].checkpoint.tensors.keys() | found["diffusion"].checkpoint.skipped.keys()
    if "edm_vpred.sigma_max" in marks:
        return Defaults(size=1024, prediction="edm_v", scheduler="exponential")
    return Defaults(size=1024, prediction="v" if "v_pred" in marks else "eps", **unet.distilled(found["diffusion"]))


def _text_width(configs: Mapping[str, Config]) -> int:
    return int(configs["clip_l"]["hidden_size"]) + int(configs["clip_g"]["hidden_size"])


SDXL = Family(
    "sdxl",
    "Stable Diffusion XL",
    (clip.CLIP_L, clip.CLIP_G, controlnet.controlnet(unet.heads_of_64), unet.unet(unet.heads_of_64, 128), VAE),
    unet.has_size_conditions,
    conditions,
    Latents(scale=0.13025, colours=colours.SDXL),
    settings,
    (
        Joint(
            "clip_l and clip_g together", _text_width, "diffusion", lambda c: c["diffusion"]["cross_attention_dim"]
        ),
        Joint(
            "clip_g", lambda c: c["clip_g"]["projection_dim"], "diffusion", lambda c: unet.pooled_width(c["diffusion"]),
            "channels of pooled text",
        ),
        *UNET_JOINTS,
    ),
    aligned="sdxl",
    learns=("clip_l", "clip_g"),
    inpainting=unet.INPAINTING,
    controls=controlnet.CONTROLS,
    skips_clip=True,
    optional=frozenset({"control"}),
)  # fmt: skip
