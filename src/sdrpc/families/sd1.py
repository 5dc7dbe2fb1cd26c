"""Stable Diffusion 1.x and what was made of it: any width and depth, distilled ones too."""

from __future__ import annotations

from collections.abc import Mapping

from ..prompts import apply_weights, clip_chunks
from . import colours
from .base import Conditions, Defaults, Encode, Family, Found, Joint, Latents, Prompt, joined
from .components import clip, controlnet, unet
from .components.autoencoder import VAE

CONTEXT = 1024
"""Texts of this width are SD 2's, of 768 SD 1's; of models of other sizes the first layer of attention tells."""


def recognizes(diffusion: Found) -> bool:
    if unet.has_size_conditions(diffusion):
        return False
    width = unet.context_width(diffusion)
    return width == 768 or (width != CONTEXT and not unet.projects_by_matrix(diffusion))


def conditions(encode: Encode, prompt: Prompt) -> Conditions:
    """Each chunk's hidden states after the final norm, weighted, joined: (1, tokens, width)."""
    length = encode.config("clip_l")["max_position_embeddings"]
    tokens = clip_chunks(prompt.text, learned=prompt.learned, length=length)
    hidden = clip.hidden_states(encode, "clip_l", tokens, skip=max(prompt.clip_skip, 1), final_norm=True)
    weighted = [apply_weights(h[0], w)[None] for h, w in zip(hidden, tokens.weights, strict=True)]
    return {"context": joined(weighted), **unet.guidance(encode.config("diffusion"), prompt.guidance)}


def settings(found: Mapping[str, Found]) -> Defaults:
    return Defaults(size=512, **unet.distilled(found["diffusion"]))


UNET_JOINTS = (
    Joint(
        "diffusion",
        lambda c: c["diffusion"]["out_channels"],
        "diffusion",
        lambda c: unet.latent_channels(c["diffusion"]),
    ),
    Joint("diffusion", lambda c: c["diffusion"]["out_channels"], "vae", lambda c: c["vae"]["latent_channels"]),
    *controlnet.JOINTS,
)
"""Of all families with a UNet."""

SD1 = Family(
    "sd1",
    "Stable Diffusion 1.x",
    (clip.CLIP_L, controlnet.controlnet(unet.eight_heads), unet.unet(unet.eight_heads, 64), VAE),
    recognizes,
    conditions,
    Latents(scale=0.18215, colours=colours.SD1),
    settings,
    (
        Joint(
            "clip_l", lambda c: c["clip_l"]["hidden_size"], "diffusion", lambda c: c["diffusion"]["cross_attention_dim"]
        ),
        *UNET_JOINTS,
    ),
    aligned="sd1",
    learns=("clip_l",),
    inpainting=unet.INPAINTING,
    controls=controlnet.CONTROLS,
    skips_clip=True,
    optional=frozenset({"control"}),
)
