"""Stable Diffusion 3 and 3.5 (medium, large, Turbo). T5 may be left out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import zip_longest
from math import isqrt, prod
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoints.expressions import swap_halves
from ..errors import InvalidValue
from ..ggml.weight import Weight
from ..prompts import apply_weights, clip_chunks, t5_chunks
from . import colours, configs
from .base import (
    F32,
    Component,
    Conditions,
    Config,
    Defaults,
    Encode,
    Family,
    Found,
    Joint,
    Latents,
    Naming,
    Prompt,
    Weights,
    joined,
)
from .components import autoencoder, clip, t5
from .components.autoencoder import VAE
from .keys import same, table, thirds

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .base import Call

HEAD_SIZE = 64
"""Of attention, where no norm of queries tells."""
T5_TOKENS = 77
"""In a chunk, as in stable-diffusion.cpp."""
SKIPPED = "skip_layers"
"""Option of the diffusion model: numbers of blocks that it leaves out."""
PAD = 0
"""OpenCLIP-G's chunks are filled up with this token, CLIP-L's with end tokens."""

# The diffusion model --------------------------------------------------------------------------------------------------

_POSITIONS = "pos_embed.pos_embed"


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' SD3Transformer2DModel."""
    inner, inputs, patch, _ = found.shape("pos_embed.proj.weight", 4)
    outputs, _ = found.shape("proj_out.weight", 2)
    caption, context = found.shape("context_embedder.weight", 2)
    _, pooled = found.shape("time_text_embed.text_embedder.linear_1.weight", 2)
    if caption != inner:
        raise found.error(f"text has a width of {caption} and the picture of {inner}, which attend to each other")
    normed = "transformer_blocks.0.attn.norm_q.weight" in found.tensors
    head = found.shape("transformer_blocks.0.attn.norm_q.weight", 1)[0] if normed else HEAD_SIZE
    if inner % head:
        raise found.error(f"heads of {head} do not divide its width of {inner}")
    layers = found.count("transformer_blocks.")
    inferred = {
        "patch_size": patch, "in_channels": inputs, "out_channels": outputs // patch**2, "num_layers": layers,
        "attention_head_dim": head, "num_attention_heads": inner // head, "joint_attention_dim": context,
        "caption_projection_dim": caption, "pooled_projection_dim": pooled,
        "pos_embed_max_size": _side(found, inner), "qk_norm": "rms_norm" if normed else None,
        "dual_attention_layers": [n for n in range(layers) if found.has(f"transformer_blocks.{n}.attn2.")],
    }  # fmt: skip
    return configs.merged(found, inferred, told, ("sample_size",))


def _side(found: Found, width: int) -> int:
    """Rows and columns of the square table of positions, (1, side · side, width)."""
    stored = found.tensors.get(_POSITIONS)
    if stored is None:
        raise found.error(f"the {found.component.title} has no such tensor", _POSITIONS)
    side = isqrt(prod(stored.shape) // width)
    if not side or prod(stored.shape) != side * side * width:
        raise found.error(f"is {list(stored.shape)}, not a square of positions of {width} each", stored.name)
    return side


def build(config: Config) -> tuple[nn.Module, Call]:
    """Inputs: latents (1 or batch, channels, height, width), timestep (1 or batch,) of 0 … 1000, context (batch,
    tokens, joint_attention_dim), pooled (batch, pooled_projection_dim). Output: the velocity (batch, channels, height,
    width).

    The table of positions is part of the file: the module gets one of that size without numbers instead of computing
    it (which ``sample_size`` decides about), which takes gigabytes for SD 3.5 medium.
    """
    import diffusers
    import torch

    skipped = list(config.get(SKIPPED, ()))

    def call(
        module: Any, latents: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, pooled: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        batch = context.shape[0]
        return (
            module(
                hidden_states=latents.expand(batch, -1, -1, -1),
                timestep=timestep.expand(batch),
                encoder_hidden_states=context,
                pooled_projections=pooled,
                skip_layers=skipped or None,
                return_dict=False,
            )[0],
        )

    make: Any = diffusers.SD3Transformer2DModel
    arguments = {name: value for name, value in config.items() if name not in ("sample_size", SKIPPED)}
    module = make(**{**arguments, "pos_embed_max_size": 1})
    side, positions = config["pos_embed_max_size"], module.pos_embed
    positions.pos_embed_max_size = side
    positions.pos_embed = torch.empty(1, side * side, positions.pos_embed.shape[-1])
    return module, call


_JOINT, _BLOCK = r"joint_blocks\.(\d+)", r"transformer_blocks.\1"
_BOTH = ("weight", "bias")
_LINEAR = {
    r"x_embedder\.proj": "pos_embed.proj", "context_embedder": "context_embedder",
    r"t_embedder\.mlp\.0": "time_text_embed.timestep_embedder.linear_1",
    r"t_embedder\.mlp\.2": "time_text_embed.timestep_embedder.linear_2",
    r"y_embedder\.mlp\.0": "time_text_embed.text_embedder.linear_1",
    r"y_embedder\.mlp\.2": "time_text_embed.text_embedder.linear_2",
    r"final_layer\.linear": "proj_out",
    rf"{_JOINT}\.x_block\.adaLN_modulation\.1": f"{_BLOCK}.norm1.linear",
    rf"{_JOINT}\.x_block\.attn\.proj": f"{_BLOCK}.attn.to_out.0",
    rf"{_JOINT}\.x_block\.attn2\.proj": f"{_BLOCK}.attn2.to_out.0",
    rf"{_JOINT}\.x_block\.mlp\.fc1": f"{_BLOCK}.ff.net.0.proj",
    rf"{_JOINT}\.x_block\.mlp\.fc2": f"{_BLOCK}.ff.net.2",
    rf"{_JOINT}\.context_block\.adaLN_modulation\.1": f"{_BLOCK}.norm1_context.linear",
    rf"{_JOINT}\.context_block\.attn\.proj": f"{_BLOCK}.attn.to_add_out",
    rf"{_JOINT}\.context_block\.mlp\.fc1": f"{_BLOCK}.ff_context.net.0.proj",
    rf"{_JOINT}\.context_block\.mlp\.fc2": f"{_BLOCK}.ff_context.net.2",
}  # fmt: skip
_QKV = {
    r"x_block\.attn": ("attn.to_q", "attn.to_k", "attn.to_v"),
    r"x_block\.attn2": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    r"context_block\.attn": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_NORMS = {
    r"x_block\.attn": "attn.norm_", r"x_block\.attn2": "attn2.norm_", r"context_block\.attn": "attn.norm_added_",
}  # fmt: skip


def _swapped(weight: Weight) -> tuple[Weight, ...]:
    return (swap_halves(weight),)


_ORIGINAL = table(
    [
        ("pos_embed", _POSITIONS),
        *((rf"{old}\.(weight|bias)", rf"{new}.\{old.count('(') + 1}") for old, new in _LINEAR.items()),
        *(
            (rf"{_JOINT}\.{old}\.qkv\.{kind}", [f"{_BLOCK}.{name}.{kind}" for name in names], thirds)
            for old, names in _QKV.items()
            for kind in _BOTH
        ),
        *((rf"{_JOINT}\.{old}\.ln_([qk])\.weight", rf"{_BLOCK}.{new}\2.weight") for old, new in _NORMS.items()),
        *((rf"final_layer\.adaLN_modulation\.1\.{kind}", f"norm_out.linear.{kind}", _swapped) for kind in _BOTH),
    ]
)
"""Stability AI's names. Its final layer gives shift and scale, diffusers' scale and shift."""

_CONTEXT_NORM = re.compile(r"(transformer_blocks\.\d+)\.norm1_context\.linear\.(?:weight|bias)")


def _original(weights: Weights) -> dict[str, Weight]:
    """The last block gives no text: the norm of its text has, as the final layer, a shift and a scale alone."""
    found = _ORIGINAL(weights)
    for name, weight in found.items():
        match = _CONTEXT_NORM.fullmatch(name)
        if match and f"{match[1]}.attn.to_add_out.weight" not in found:
            found[name] = swap_halves(weight)
    return found


TRANSFORMER = Component(
    "diffusion",
    "diffusion model",
    ("model.diffusion_model.", "diffusion_model.", "transformer.", "net.", ""),
    (Naming("joint_blocks.0.x_block.attn.qkv.weight", _original, _ORIGINAL.originals), Naming(_POSITIONS, same)),
    _configure,
    build,
    "transformer",
    blocks={"transformer_blocks": "num_layers"},
)

# The family -----------------------------------------------------------------------------------------------------------

T5 = replace(t5.T5, told_as="text_encoder_3")


def recognizes(diffusion: Found) -> bool:
    """Not its ControlNets, which have no last layer."""
    return {"transformer_blocks.0.norm1_context.linear.weight", "proj_out.weight"} <= diffusion.tensors.keys()


def conditions(encode: Encode, prompt: Prompt) -> Conditions:
    """Hidden states (1, tokens, 4096): of each chunk CLIP's tokens, then T5's 77; and the pooled texts of CLIP-L,
    without a projection, and of OpenCLIP-G, with its own, side by side (1, 2048).

    CLIP's tokens have the hidden states of both encoders, of the last layer but one and without a final norm, side by
    side and then zeros. Without T5 its tokens are zeros, as in stable-diffusion.cpp. Where CLIP and T5 need different
    numbers of chunks, the last ones are of one of them alone.

    Raises :class:`InvalidValue` for a picture larger than the table of positions.
    """
    config = encode.config("diffusion")
    _check_size(prompt, config["pos_embed_max_size"] * config["patch_size"] * autoencoder.pixels(encode.config("vae")))
    pooled: list[F32] = []
    hidden: list[list[F32]] = []
    skip = prompt.clip_skip if prompt.clip_skip >= 1 else 2
    length = encode.config("clip_l")["max_position_embeddings"]
    for name, pad, output in (("clip_l", clip.END_OF_TEXT, "pooled"), ("clip_g", PAD, "projected")):
        tokens = clip_chunks(prompt.text, length=length, pad=pad, breaks=False)
        states, text = clip.hidden_and_pooled(encode, name, tokens, skip=skip, final_norm=False, pooled=output)
        hidden.append([apply_weights(h[0], w)[None] for h, w in zip(states, tokens.weights, strict=True)])
        pooled.append(text)
    width = config["joint_attention_dim"]
    clips = [_widened(np.concatenate(pair, axis=-1), width) for pair in zip(*hidden, strict=True)]
    texts = _t5_chunks(encode, prompt.text) or [np.zeros((1, T5_TOKENS, width), np.float32)] * len(clips)
    chunks = [chunk for pair in zip_longest(clips, texts) for chunk in pair if chunk is not None]
    return {"context": joined(chunks), "pooled": np.concatenate(pooled, axis=-1)}


def _check_size(prompt: Prompt, largest: int) -> None:
    for field, side in (("width", prompt.width), ("height", prompt.height)):
        if side > largest:
            raise InvalidValue(field, side, f"this model has positions for pictures of up to {largest} pixels")


def _t5_chunks(encode: Encode, text: str) -> list[F32]:
    """T5's hidden states of each chunk (1, 77, d_model); none without T5."""
    if not encode.has("t5xxl"):
        return []
    return t5.encode_chunks(encode, "t5xxl", t5_chunks(text, length=T5_TOKENS))


def _widened(hidden: F32, width: int) -> F32:
    """(1, tokens, channels) with zeros behind its channels."""
    return np.pad(hidden, ((0, 0), (0, 0), (0, width - hidden.shape[-1])))


def settings(_: Mapping[str, Found]) -> Defaults:
    """Turbo has the tensors of large: it is for those who draw with it to ask for 4 steps without guidance."""
    return Defaults(size=1024, sampler="euler", prediction="sd3_flow", flow_shift=3.0)


def _taken_by_attention(configs: Mapping[str, Config]) -> int:
    return int(configs["diffusion"]["joint_attention_dim"])


def _text_width(configs: Mapping[str, Config]) -> int:
    """What both CLIPs give is filled up to the width of the text, which has to have room for it."""
    given = int(configs["clip_l"]["hidden_size"]) + int(configs["clip_g"]["hidden_size"])
    return max(given, _taken_by_attention(configs))


def _pooled_width(configs: Mapping[str, Config]) -> int:
    return int(configs["clip_l"]["hidden_size"]) + int(configs["clip_g"]["projection_dim"])


SD3 = Family(
    "sd3",
    "Stable Diffusion 3.x",
    (clip.CLIP_L, clip.CLIP_G, T5, TRANSFORMER, VAE),
    recognizes,
    conditions,
    Latents(scale=1.5305, shift=0.0609, multiple=16, colours=colours.SD3),
    settings,
    (
        Joint("clip_l and clip_g together", _text_width, "diffusion", _taken_by_attention),
        Joint(
            "clip_l and clip_g together", _pooled_width, "diffusion", lambda c: c["diffusion"]["pooled_projection_dim"],
            "channels of pooled text",
        ),
        Joint("t5xxl", lambda c: c["t5xxl"]["d_model"], "diffusion", _taken_by_attention),
        Joint("vae", lambda c: c["vae"]["latent_channels"], "diffusion", lambda c: c["diffusion"]["in_channels"]),
        Joint("diffusion", lambda c: c["diffusion"]["out_channels"], "vae", lambda c: c["vae"]["latent_channels"]),
    ),
    optional=frozenset({"t5xxl"}),
    skips_clip=True,
    skips_layers=True,
)  # fmt: skip
