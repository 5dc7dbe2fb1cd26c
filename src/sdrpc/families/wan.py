"""Wan 2.1 and 2.2: films of a text and of pictures (1.3B, 14B, A14B with a model for each half of the noise,
TI2V-5B)."""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InvalidValue, MissingComponent
from ..prompts import t5_chunks, umt5_tokenizer
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
from .components import clip_vision, film, t5, umt5
from .keys import same, table

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .base import Call

HEAD_SIZE = 128
"""Of attention in all published models: no tensor tells it."""
TIMESTEPS = 1000
TOKENS = 512
"""Of a text, as in Wan's own code, diffusers and stable-diffusion.cpp."""
MASKS = 4
"""Channels that say which frames of each latent one are given, beside their latents."""
PATCH = 2
"""Latents on a side that make one token."""

OTHERS = re.compile(r"\b(vace_|face_adapter|motion_encoder|casual_audio_encoder|control_adapter)")
"""Names that only models have which are told more: VACE, Animate, S2V, Fun Control."""

# The diffusion model --------------------------------------------------------------------------------------------------


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' WanTransformer3DModel."""
    inner, inputs, *patch = found.shape("patch_embedding.weight", 5)
    outputs, _ = found.shape("proj_out.weight", 2)
    _, frequencies = found.shape("condition_embedder.time_embedder.linear_1.weight", 2)
    _, text = found.shape("condition_embedder.text_embedder.linear_1.weight", 2)
    feed_forward, _ = found.shape("blocks.0.ffn.net.0.proj.weight", 2)
    if patch != [1, PATCH, PATCH]:
        raise found.error(f"makes tokens of {patch} latents, not of 1, {PATCH} and {PATCH}", "patch_embedding.weight")
    channels = outputs // PATCH**2
    if inputs not in (channels, 2 * channels + MASKS):
        reason = "this is a model neither of text nor of pictures to video"
        raise found.error(f"takes {inputs} channels and gives {channels}: {reason}")
    inferred = {
        "patch_size": patch, "in_channels": inputs, "out_channels": channels, "attention_head_dim": HEAD_SIZE,
        "num_attention_heads": inner // HEAD_SIZE, "text_dim": text, "freq_dim": frequencies, "ffn_dim": feed_forward,
        "num_layers": found.count("blocks."), "cross_attn_norm": found.has("blocks.0.norm2."), **_sees(found),
    }  # fmt: skip
    config = configs.merged(found, inferred, told, ("attention_head_dim", "num_attention_heads", "eps"))
    if config["num_attention_heads"] * config["attention_head_dim"] != inner or config["attention_head_dim"] % 2:
        raise found.error(f"heads of {config['attention_head_dim']} do not divide its width of {inner}")
    return config


def _sees(found: Found) -> dict[str, Any]:
    """What the configuration of a 2.1 has more that sees pictures by CLIP: one, or the first and the last."""
    if not found.has(f"{_EMBEDDER}."):
        return {}
    (width,) = found.shape(f"{_EMBEDDER}.norm1.weight", 1)
    _, inner = found.shape("blocks.0.attn2.add_k_proj.weight", 2)
    both = found.has(f"{_EMBEDDER}.pos_embed")
    places = found.shape(f"{_EMBEDDER}.pos_embed", 3)[1] if both else None
    return {"image_dim": width, "added_kv_proj_dim": inner, "pos_embed_seq_len": places}


_EMBEDDER = "condition_embedder.image_embedder"


def build(config: Config) -> tuple[nn.Module, Call]:
    """Inputs: latents (1 or batch, channels, frames, height, width), timestep (1 or batch,) of 0 … 1000, context
    (batch, tokens, 4096). Output: the velocity (batch, channels, frames, height, width).

    Models of pictures to video get ``given`` (batch, 4 + channels, frames, height, width): which frames are given, and
    latents of them; those of 2.1 also ``image`` (batch, places, 1280), what CLIP sees of the pictures. TI2V-5B may get
    ``first`` (batch, channels, 1, height, width): its first latent frame is that one, without any noise, and its
    velocity goes there at once.
    """
    import diffusers
    import torch

    def call(
        module: Any,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        given: torch.Tensor | None = None,
        first: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        batch = context.shape[0]
        shown, times = latents.expand(batch, -1, -1, -1, -1), timestep.expand(batch)
        if given is not None:
            shown = torch.cat((shown, given), 1)
        if first is not None:
            shown = torch.cat((first, shown[:, :, 1:]), 2)
            frames, height, width = latents.shape[2:]
            noisy = torch.ones(frames, height // PATCH * (width // PATCH))
            noisy[0] = 0
            times = times[:, None] * noisy.reshape(1, -1)
        if image is not None and config.get("pos_embed_seq_len"):  # two pictures, which the class wants as a batch
            image = image.reshape(2 * batch, image.shape[1] // 2, image.shape[2])
        predicted = module(
            hidden_states=shown,
            timestep=times,
            encoder_hidden_states=context,
            encoder_hidden_states_image=image,
            return_dict=False,
        )[0]
        if first is not None:
            there = (latents[:, :, :1] - first) * (TIMESTEPS / timestep.reshape(-1, 1, 1, 1, 1))
            predicted = torch.cat((there, predicted[:, :, 1:]), 2)
        return (predicted,)

    make: Any = diffusers.WanTransformer3DModel
    return make(**config), call


_BLOCK = r"blocks\.(\d+)"
_ATTENTION = {r"self_attn\.": "attn1.", r"cross_attn\.": "attn2."}
_PARTS = {
    **{rf"{letter}\.": f"to_{letter}." for letter in "qkv"},
    r"o\.": "to_out.0.", r"norm_q\.": "norm_q.", r"norm_k\.": "norm_k.",
    r"k_img\.": "add_k_proj.", r"v_img\.": "add_v_proj.", r"norm_k_img\.": "norm_added_k.",
}  # fmt: skip
_KIND = r"(weight|bias)"
_ORIGINAL = table(
    [
        *(
            (rf"{_BLOCK}\.{attention}{part}{_KIND}", rf"blocks.\1.{new}{inner}\2")
            for attention, new in _ATTENTION.items()
            for part, inner in _PARTS.items()
        ),
        # cross-attention's norm is the third in the file and the second in the class
        (rf"{_BLOCK}\.norm3\.{_KIND}", r"blocks.\1.norm2.\2"),
        (rf"{_BLOCK}\.ffn\.0\.{_KIND}", r"blocks.\1.ffn.net.0.proj.\2"),
        (rf"{_BLOCK}\.ffn\.2\.{_KIND}", r"blocks.\1.ffn.net.2.\2"),
        (rf"{_BLOCK}\.modulation", r"blocks.\1.scale_shift_table"),
        (rf"patch_embedding\.{_KIND}", r"patch_embedding.\1"),
        *(
            (rf"{old}\.{_KIND}", rf"condition_embedder.{new}.\1")
            for old, new in {
                r"time_embedding\.0": "time_embedder.linear_1", r"time_embedding\.2": "time_embedder.linear_2",
                r"text_embedding\.0": "text_embedder.linear_1", r"text_embedding\.2": "text_embedder.linear_2",
                r"time_projection\.1": "time_proj", r"img_emb\.proj\.0": "image_embedder.norm1",
                r"img_emb\.proj\.1": "image_embedder.ff.net.0.proj", r"img_emb\.proj\.3": "image_embedder.ff.net.2",
                r"img_emb\.proj\.4": "image_embedder.norm2",
            }.items()
        ),
        (rf"head\.head\.{_KIND}", r"proj_out.\1"),
        (r"img_emb\.emb_pos", "condition_embedder.image_embedder.pos_embed"),
        ("head.modulation", "scale_shift_table"),
    ]
)  # fmt: skip
"""The names of Wan's own code."""

TRANSFORMER = Component(
    "diffusion",
    "diffusion model",
    ("model.diffusion_model.", "diffusion_model.", "transformer_2.", "transformer.", "net.", ""),
    (
        Naming("blocks.0.self_attn.q.weight", _ORIGINAL),
        Naming("blocks.0.attn2.norm_k.weight", same),
    ),
    _configure,
    build,
    "transformer",
    blocks={"blocks": "num_layers"},
)

_BOTH = "transformer_2.patch_embedding.weight"
"""Diffusers' directories of 2.2 have the model for high noise where others have their only one."""


def _high_noise_in_whole(names: Collection[str]) -> tuple[str, ...]:
    return ("transformer.",) if _BOTH in names else ("model.high_noise_diffusion_model.",)


HIGH_NOISE = replace(
    TRANSFORMER, name="high_noise_diffusion", title="diffusion model for high noise", whole=_high_noise_in_whole
)
"""2.2's A14B: what predicts while there is much noise."""

# The family -----------------------------------------------------------------------------------------------------------


def recognizes(diffusion: Found) -> bool:
    """Not the models that take more than text and pictures."""
    others = any(OTHERS.search(name) for name in diffusion.checkpoint.tensors)
    return not others and "condition_embedder.time_proj.weight" in diffusion.tensors


def conditions(encode: Encode, prompt: Prompt) -> Conditions:
    """UMT5's hidden states (1, tokens, 4096), zeros for padding. HTML's entities are read and white space is one space,
    as in diffusers' pipeline."""
    text = " ".join(html.unescape(html.unescape(prompt.text)).split())
    tokens = t5_chunks(text, length=TOKENS, tokenizer=umt5_tokenizer())
    return {"context": joined(t5.encode_masked_chunks(encode, "t5xxl", tokens))}


def takes(configs: Configs, frames: int) -> bool:
    """Models of pictures to video do, and TI2V-5B for more than one picture."""
    return _of_pictures(configs) or (_both(configs) and frames > 1)


def _of_pictures(configs: Configs) -> bool:
    return bool(configs["diffusion"]["in_channels"] != configs["diffusion"]["out_channels"])


def _both(configs: Configs) -> bool:
    """TI2V-5B, which is told by its autoencoder."""
    return bool(configs["vae"]["is_residual"])


def check_begun(configs: Configs, frames: int, first: bool, last: bool) -> None:
    """Models of pictures to video need one to begin with, and take one to end with, but for those of 2.1, which see
    either one or both; TI2V-5B takes the former."""
    if _of_pictures(configs) and not first:
        raise InvalidValue("init_image", "none", "this model makes films of pictures: name the one to begin with")
    if first and frames > 1 and not takes(configs, frames):
        raise InvalidValue("init_image", "a picture", "this model makes films of texts alone, others of pictures (I2V)")
    if last and (frames == 1 or not _of_pictures(configs)):
        raise InvalidValue("end_image", "a picture", "only films of models of pictures to video (I2V) have an end")
    if not configs["diffusion"].get("image_dim"):
        return
    both = configs["diffusion"]["pos_embed_seq_len"] is not None
    if both != last:
        reason = "this model wants one to end with, too (FLF2V)" if both else "this model sees the first one alone"
        raise InvalidValue("end_image", "a picture" if last else "none", reason)
    if clip_vision.NAME not in configs:
        raise MissingComponent(clip_vision.NAME, "no CLIP vision model, which this Wan 2.1 sees pictures with", "model")


def begun(encode: EncodeFilm, configs: Configs, first: F32, last: F32 | None, frames: int) -> Conditions:
    """``given`` of models of pictures to video, with ``image`` for those of 2.1, ``first`` of TI2V-5B, as in diffusers'
    pipeline."""
    if not _of_pictures(configs):
        return {"first": encode(first, None, 1)}
    latents = encode(first, last, frames)
    known = np.zeros((1, MASKS, *latents.shape[2:]), np.float32)
    known[:, :, 0] = 1
    if last is not None:
        known[:, -1, -1] = 1
    given = {"given": np.concatenate((known, latents), 1)}
    if not configs["diffusion"].get("image_dim"):
        return given
    return {**given, "image": encode.see(clip_vision.NAME, configs[clip_vision.NAME]["image_size"])}


def settings(found: Mapping[str, Found]) -> Defaults:
    """The shift is that of stable-diffusion.cpp; sizes, frames and guidance are those of diffusers' pipelines."""
    common: dict[str, Any] = {
        "sampler": "euler", "cfg_scale": 5.0, "prediction": "sd3_flow", "flow_shift": 5.0
    }  # fmt: skip
    if found["vae"].has("decoder.up_blocks.0.upsampler."):  # 2.2's own autoencoder: TI2V-5B
        return Defaults(size=(1280, 704), frames=121, fps=24, **common)
    of_pictures = found["diffusion"].shape("patch_embedding.weight", 5)[1] == 2 * 16 + MASKS
    return Defaults(size=(832, 480), frames=81, fps=16, moe_boundary=0.9 if of_pictures else 0.875, **common)


def _alike(key: str) -> Joint:
    """Both diffusion models take and give the same."""
    return Joint(
        "high_noise_diffusion",
        lambda c: int(c["high_noise_diffusion"][key]),
        "diffusion",
        lambda c: int(c["diffusion"][key]),
        f"({key})",
    )


def _places(configs: Configs) -> int:
    """That CLIP has in a picture, with the one for all of it."""
    config = configs[clip_vision.NAME]
    return int((config["image_size"] // config["patch_size"]) ** 2 + 1)


WAN = Family(
    "wan",
    "Wan",
    (umt5.UMT5, clip_vision.CLIP_VISION, HIGH_NOISE, TRANSFORMER, film.VAE),
    recognizes,
    conditions,
    Latents(scale=1.0, multiple=16, films=True),
    settings,
    (
        Joint("t5xxl", lambda c: c["t5xxl"]["d_model"], "diffusion", lambda c: c["diffusion"]["text_dim"]),
        Joint("vae", lambda c: c["vae"]["z_dim"], "diffusion", lambda c: c["diffusion"]["out_channels"]),
        Joint(
            clip_vision.NAME,
            lambda c: c[clip_vision.NAME]["hidden_size"],
            "diffusion",
            # 2.2's models do without, and don't mind one
            lambda c: c["diffusion"].get("image_dim") or c[clip_vision.NAME]["hidden_size"],
        ),
        Joint(
            clip_vision.NAME,
            lambda c: 2 * _places(c),
            "diffusion",
            lambda c: c["diffusion"].get("pos_embed_seq_len") or 2 * _places(c),
            "places of two pictures",
        ),
        *map(_alike, ("in_channels", "out_channels", "text_dim")),
    ),
    optional=frozenset({"high_noise_diffusion", clip_vision.NAME}),
    begun=Begun(check_begun, takes, begun),
)
