"""PixArt-Sigma and PixArt-Alpha: a transformer that attends to T5's text, at 1024×1024 told of the picture's size in
Alpha's case."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..prompts import t5_chunks
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
    joined,
)
from .components import flux, t5
from .components.autoencoder import VAE
from .keys import halves, same, table, thirds

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .base import Call

HEAD = 72
"""Width of an attention head, which no shape tells."""
PATCH = 2
"""Latents on a side that make one token."""
SAMPLE_SIZE = 128
"""Latents on a side that a model was trained at, where nothing tells."""
ALPHA_TOKENS, SIGMA_TOKENS = 120, 300
"""Of a text, in a chunk."""
UNSEEN = -10000.0
"""Added to the scores of padding, as in diffusers."""
BETAS = (0.0001, 0.02)

# The diffusion model --------------------------------------------------------------------------------------------------

_EMBEDDING = "adaln_single.emb"
_NO_TEXT = "caption_projection.y_embedding"
"""What stands for no text in training, a row for each token. No picture needs it; its rows tell Alpha from Sigma."""
_PLACES = "pos_embed.pos_embed"
"""A table of positions that some files have, and the module makes itself."""


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' PixArtTransformer2DModel."""
    if found.has("compressing."):
        raise found.error("compresses keys and values (PixArt-Sigma of 2K and 4K); it is not supported")
    inner, channels, *_ = found.shape("pos_embed.proj.weight", 4)
    outputs, _ = found.shape("proj_out.weight", 2)
    _, text = found.shape("caption_projection.linear_1.weight", 2)
    inferred = {
        "in_channels": channels, "out_channels": outputs // PATCH**2, "num_layers": found.count("transformer_blocks."),
        "attention_head_dim": HEAD, "cross_attention_dim": inner, "caption_channels": text,
        "use_additional_conditions": found.has(f"{_EMBEDDING}.resolution_embedder."),
        "sample_size": configs.sample_size(found, _PLACES, PATCH, SAMPLE_SIZE),
    }  # fmt: skip
    config = configs.merged(found, inferred, told, ("attention_head_dim", "sample_size", "interpolation_scale"))
    configs.check_divides(found, config, "attention_head_dim", [inner])
    if config["out_channels"] not in (channels, 2 * channels):
        raise found.error(f"gives {config['out_channels']} channels for {channels}, with or without variances")
    return config | {"num_attention_heads": inner // config["attention_head_dim"]}


def build(config: Config) -> tuple[nn.Module, Call]:
    """Inputs: latents (1 or batch, channels, height, width), timestep (1 or batch,) of 0 … 999, context (batch, tokens,
    4096), mask (batch, tokens), which is added to the scores of the text's tokens, and, of models that are told it,
    size (batch, 2): height and width of the picture in pixels. Output: the noise (batch, channels, height, width),
    without the variances that the module gives behind it."""
    import diffusers

    def call(
        module: Any,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        mask: torch.Tensor,
        size: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        batch = context.shape[0]
        told = {"resolution": size, "aspect_ratio": None if size is None else size[:, :1] / size[:, 1:]}
        predicted = module(
            latents.expand(batch, -1, -1, -1),
            encoder_hidden_states=context,
            timestep=timestep.expand(batch),
            added_cond_kwargs=told,
            encoder_attention_mask=mask[:, None],
            return_dict=False,
        )[0]
        return (predicted[:, : config["in_channels"]],)

    make: Any = diffusers.PixArtTransformer2DModel
    return make(**config), call


_BLOCK, _BLOCKS = r"blocks\.(\d+)", r"transformer_blocks.\1"
_LINEAR = {
    r"x_embedder\.proj": "pos_embed.proj",
    r"y_embedder\.y_proj\.fc1": "caption_projection.linear_1",
    r"y_embedder\.y_proj\.fc2": "caption_projection.linear_2",
    r"t_block\.1": "adaln_single.linear",
    **{
        rf"{old}_embedder\.mlp\.{layer}": f"{_EMBEDDING}.{new}_embedder.linear_{number}"
        for old, new in {"t": "timestep", "csize": "resolution", "ar": "aspect_ratio"}.items()
        for number, layer in enumerate((0, 2), 1)
    },
    rf"{_BLOCK}\.attn\.proj": f"{_BLOCKS}.attn1.to_out.0",
    rf"{_BLOCK}\.cross_attn\.q_linear": f"{_BLOCKS}.attn2.to_q",
    rf"{_BLOCK}\.cross_attn\.proj": f"{_BLOCKS}.attn2.to_out.0",
    rf"{_BLOCK}\.mlp\.fc1": f"{_BLOCKS}.ff.net.0.proj",
    rf"{_BLOCK}\.mlp\.fc2": f"{_BLOCKS}.ff.net.2",
    r"final_layer\.linear": "proj_out",
}
_ORIGINAL = table(
    [
        *flux.linear(_LINEAR),
        *(
            (rf"{_BLOCK}\.attn\.qkv\.{kind}", [f"{_BLOCKS}.attn1.to_{name}.{kind}" for name in "qkv"], thirds)
            for kind in flux.BOTH
        ),
        *(
            (
                rf"{_BLOCK}\.cross_attn\.kv_linear\.{kind}",
                [f"{_BLOCKS}.attn2.to_{name}.{kind}" for name in "kv"],
                halves,
            )
            for kind in flux.BOTH
        ),
        (rf"{_BLOCK}\.scale_shift_table", f"{_BLOCKS}.scale_shift_table"),
        (r"final_layer\.scale_shift_table", "scale_shift_table"),
        (r"y_embedder\.y_embedding", _NO_TEXT),
        (r"pos_embed", _PLACES),
        (rf"{_BLOCK}\.attn\.sr\.(weight|bias)", r"compressing.\1.\2"),
    ]
)
"""PixArt's names."""

TRANSFORMER = Component(
    "diffusion",
    "diffusion model",
    flux.PREFIXES,
    (
        Naming("blocks.0.cross_attn.kv_linear.weight", _ORIGINAL),
        Naming(f"{_EMBEDDING}.timestep_embedder.linear_1.weight", same),
    ),
    _configure,
    build,
    "transformer",
    idle=(_NO_TEXT, _PLACES),
    blocks={"transformer_blocks": "num_layers"},
)

# The families ---------------------------------------------------------------------------------------------------------


def _is_pixart(diffusion: Found) -> bool:
    """Not LTX-Video, whose first layer is no convolution, nor Sana, whose blocks have more of them."""
    needed = {"pos_embed.proj.weight", "transformer_blocks.0.ff.net.2.weight", "caption_projection.linear_1.weight"}
    return needed <= diffusion.tensors.keys()


def is_alpha(diffusion: Found) -> bool:
    """Whether it is Alpha, which has the tensors of Sigma: it is told the size of a picture, or a directory says so, or
    what stands for no text has as many tokens as it reads."""
    pipeline = diffusion.checkpoint.configs.get("", {}).get("_class_name")
    none = diffusion.tensors.get(_NO_TEXT)
    return _is_pixart(diffusion) and (
        diffusion.has(f"{_EMBEDDING}.resolution_embedder.")
        or pipeline == "PixArtAlphaPipeline"
        or (none is not None and none.shape[0] == ALPHA_TOKENS)
    )


def is_sigma(diffusion: Found) -> bool:
    return _is_pixart(diffusion) and not is_alpha(diffusion)


def _conditions(length: int) -> Callable[[Encode, Prompt], Conditions]:
    def conditions(encode: Encode, prompt: Prompt) -> Conditions:
        """T5's hidden states (1, tokens, 4096), which of them are no padding (1, tokens), and the size (1, 2)."""
        tokens = t5_chunks(prompt.text, length=length)
        mask = np.where(t5.seen(tokens.ids).reshape(1, -1), np.float32(0), np.float32(UNSEEN))
        told: dict[str, F32] = {"context": joined(t5.encode_masked_chunks(encode, "t5xxl", tokens)), "mask": mask}
        if encode.config("diffusion")["use_additional_conditions"]:
            told["size"] = np.array([[prompt.height, prompt.width]], np.float32)
        return told

    return conditions


def settings(_: Mapping[str, Found]) -> Defaults:
    """The guidance and the sampler are those of the authors' pipelines."""
    return Defaults(size=1024, sampler="dpm++2m", steps=20, cfg_scale=4.5)


PIXART_SIGMA = Family(
    "pixart-sigma",
    "PixArt-Sigma",
    (replace(t5.T5, told_as="text_encoder"), TRANSFORMER, VAE),
    is_sigma,
    _conditions(SIGMA_TOKENS),
    Latents(scale=0.13025, multiple=16, colours=colours.SDXL),
    settings,
    (
        Joint("t5xxl", lambda c: c["t5xxl"]["d_model"], "diffusion", flux.takes("caption_channels")),
        Joint("vae", lambda c: c["vae"]["latent_channels"], "diffusion", flux.takes("in_channels")),
    ),
    betas=BETAS,
)
"""With SDXL's autoencoder."""

PIXART_ALPHA = replace(
    PIXART_SIGMA,
    name="pixart-alpha",
    title="PixArt-Alpha",
    recognizes=is_alpha,
    conditions=_conditions(ALPHA_TOKENS),
    latents=Latents(scale=0.18215, multiple=16, colours=colours.SD1),
)
"""With Stable Diffusion's."""
