"""Stable Diffusion 2.x: OpenCLIP-H's last layer but one, noise (base) or velocity (768-v) as prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..prompts import apply_weights, clip_chunks
from .base import Conditions, Config, Defaults, Encode, Found, Predict, Prompt, joined
from .components import clip, controlnet, unet
from .components.autoencoder import VAE
from .sd1 import SD1

PAD = 0
"""OpenCLIP fills up chunks with this token ("!"), CLIP with end tokens."""


def recognizes(diffusion: Found) -> bool:
    return not unet.has_size_conditions(diffusion) and unet.projects_by_matrix(diffusion)


LAYERS = 24
"""Of OpenCLIP-H. transformers' form of SD 2.x's text encoder has one less, because nothing uses the last one."""


def lacks_last_layer(found: Found) -> bool:
    """Whether it is transformers' form: by its depth, and for models of other sizes by its names."""
    layers = found.count("text_model.encoder.layers.")
    original = any(".resblocks." in weight.name for weight in found.tensors.values())
    return layers == LAYERS - 1 or (layers != LAYERS and not original)


def _configure(found: Found, told: Config) -> dict[str, Any]:
    config = clip.OPENCLIP_H.configure(found, told)
    return config | {"missing_layers": 1 if lacks_last_layer(found) else 0}


TEXT_ENCODER = replace(clip.OPENCLIP_H, configure=_configure)


def conditions(encode: Encode, prompt: Prompt) -> Conditions:
    """As SD 1.x's, but of the last layer but one."""
    config = encode.config("clip_l")
    tokens = clip_chunks(prompt.text, learned=prompt.learned, length=config["max_position_embeddings"], pad=PAD)
    skip = (prompt.clip_skip if prompt.clip_skip >= 1 else 2) - config["missing_layers"]
    hidden = clip.hidden_states(encode, "clip_l", tokens, skip=skip, final_norm=True)
    weighted = [apply_weights(h[0], w)[None] for h, w in zip(hidden, tokens.weights, strict=True)]
    return {"context": joined(weighted), **unet.guidance(encode.config("diffusion"), prompt.guidance)}


def settings(found: Mapping[str, Found]) -> Defaults:
    """Files of base and 768-v have the same tensors."""
    return Defaults(size=512, prediction=None, **unet.distilled(found["diffusion"]))


def probe(predict: Predict, config: Config) -> str:
    """``v`` or ``eps``, as stable-diffusion.cpp finds out: at the highest level of noise, of latents and text of 0.5, a
    model that predicts velocity gives about minus the latents' content, one that predicts noise about the latents."""
    latents = np.full((1, config["in_channels"], 8, 8), 0.5, np.float32)
    context = np.full((1, 2, config["cross_attention_dim"]), 0.5, np.float32)
    predicted = predict(latents, np.array([999], np.float32), {"context": context})
    return "v" if float((predicted - latents).mean(dtype=np.float64)) < -1 else "eps"


SD2 = replace(
    SD1,
    name="sd2",
    title="Stable Diffusion 2.x",
    components=(TEXT_ENCODER, controlnet.controlnet(unet.heads_of_64), unet.unet(unet.heads_of_64, 64), VAE),
    recognizes=recognizes,
    conditions=conditions,
    settings=settings,
    probe=probe,
)
