"""Krea 2 (Raw and Turbo): 28 blocks of text and picture in one row; of twelve of Qwen3-VL's layers it reads the results
for each token of the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..checkpoints.expressions import reshape
from ..errors import InvalidValue
from ..ggml.weight import Weight
from ..prompts import qwen_tokenizer
from . import configs
from .base import Component, Conditions, Config, Defaults, Encode, Family, Found, Joint, Latents, Naming, Prompt
from .components import film, flux, llm
from .components.qwen3_vl import QWEN3_VL
from .keys import Rule, same, table
from .qwen_image import HIDDEN, TEMPLATE

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .base import Call

PATCH = flux.PATCH
TOKENS = 512
"""Of a text, at most, as in diffusers."""
STATES = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
"""Qwen3-VL's layers whose results are read."""
MODULATIONS = 6
"""Vectors that a block adds to what follows from the timestep."""

# The diffusion model --------------------------------------------------------------------------------------------------


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' Krea2Transformer2DModel."""
    inner, inputs = found.shape("img_in.weight", 2)
    keys, _ = found.shape("transformer_blocks.0.attn.to_k.weight", 2)
    (head,) = found.shape("transformer_blocks.0.attn.norm_q.weight", 1)
    feed_forward, _ = found.shape("transformer_blocks.0.ff.gate.weight", 2)
    _, frequencies = found.shape("time_embed.linear_1.weight", 2)
    fusion = "text_fusion.layerwise_blocks.0"
    text_inner, text = found.shape(f"{fusion}.ff.gate.weight", 2)
    text_keys, _ = found.shape(f"{fusion}.attn.to_k.weight", 2)
    (text_head,) = found.shape(f"{fusion}.attn.norm_q.weight", 1)
    _, layers = found.shape("text_fusion.projector.weight", 2)
    if any(width % of for width, of in ((inner, head), (keys, head), (text, text_head), (text_keys, text_head))):
        raise found.error(f"widths of {inner} and {text} with heads of {head} and {text_head} make no sense")
    inferred = {
        "in_channels": inputs, "num_layers": found.count("transformer_blocks."), "attention_head_dim": head,
        "num_attention_heads": inner // head, "num_key_value_heads": keys // head, "intermediate_size": feed_forward,
        "timestep_embed_dim": frequencies, "text_hidden_dim": text, "num_text_layers": layers,
        "text_num_attention_heads": text // text_head, "text_num_key_value_heads": text_keys // text_head,
        "text_intermediate_size": text_inner,
        "num_layerwise_text_blocks": found.count("text_fusion.layerwise_blocks."),
        "num_refiner_text_blocks": found.count("text_fusion.refiner_blocks."),
        "axes_dims_rope": configs.axes(head, 3, 8),
    }  # fmt: skip
    config = configs.merged(found, inferred, told, ("axes_dims_rope", "norm_eps"))
    configs.check_axes(found, config, "axes_dims_rope", head)
    return config


def build(config: Config) -> tuple[nn.Module, Call]:
    """Inputs: latents (1 or batch, channels, height, width), timestep (1 or batch,) of 0 … 1, context (batch, tokens,
    12 · 2560). Output: the velocity (batch, channels, height, width).

    Text has the position (0, 0, 0), a token of the picture (0, row, column).
    """
    import diffusers
    import torch

    def call(
        module: Any, latents: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        height, width = latents.shape[2:]
        batch, length = context.shape[:2]
        predicted = module(
            hidden_states=flux.to_tokens(latents.expand(batch, -1, -1, -1)),
            encoder_hidden_states=context.reshape(batch, length, config["num_text_layers"], -1),
            timestep=timestep.expand(batch),
            position_ids=torch.cat((torch.zeros(length, 3), flux.places(height, width))),
            return_dict=False,
        )[0]
        return (flux.to_latents(predicted, height, width),)

    make: Any = diffusers.Krea2Transformer2DModel
    return make(**config), call


def _table(weight: Weight) -> tuple[Weight, ...]:
    """Files have a block's six vectors in one."""
    (width, *others) = weight.shape or (0,)
    return (weight if others or width % MODULATIONS else reshape(weight, (MODULATIONS, width // MODULATIONS)),)


def _blocks(old: str, new: str) -> list[Rule]:
    parts = {
        **{rf"attn\.w{letter}\.weight": f"attn.to_{letter}.weight" for letter in "qkv"},
        r"attn\.wo\.weight": "attn.to_out.0.weight", r"attn\.gate\.weight": "attn.to_gate.weight",
        r"attn\.qknorm\.qnorm\.scale": "attn.norm_q.weight", r"attn\.qknorm\.knorm\.scale": "attn.norm_k.weight",
        r"prenorm\.scale": "norm1.weight", r"postnorm\.scale": "norm2.weight",
        **{rf"mlp\.{part}\.weight": f"ff.{part}.weight" for part in ("gate", "up", "down")},
    }  # fmt: skip
    return [(rf"{old}\.(\d+)\.{theirs}", rf"{new}.\1.{ours}") for theirs, ours in parts.items()]


_LINEAR = {
    "first": "img_in", r"tmlp\.0": "time_embed.linear_1", r"tmlp\.2": "time_embed.linear_2",
    r"tproj\.1": "time_mod_proj", r"txtmlp\.1": "txt_in.linear_1", r"txtmlp\.3": "txt_in.linear_2",
    r"last\.linear": "final_layer.linear",
}  # fmt: skip
_ORIGINAL = table(
    [
        *_blocks("blocks", "transformer_blocks"),
        *_blocks(r"txtfusion\.layerwise_blocks", "text_fusion.layerwise_blocks"),
        *_blocks(r"txtfusion\.refiner_blocks", "text_fusion.refiner_blocks"),
        *flux.linear(_LINEAR),
        (r"blocks\.(\d+)\.mod\.lin", r"transformer_blocks.\1.scale_shift_table", _table),
        (r"txtfusion\.projector\.weight", "text_fusion.projector.weight"),
        (r"txtmlp\.0\.scale", "txt_in.norm.weight"),
        (r"last\.norm\.scale", "final_layer.norm.weight"),
        (r"last\.modulation\.lin", "final_layer.scale_shift_table"),
    ]
)
"""Krea's names."""

TRANSFORMER = Component(
    "diffusion",
    "diffusion model",
    flux.PREFIXES,
    (Naming("txtfusion.projector.weight", _ORIGINAL), Naming("text_fusion.projector.weight", same)),
    _configure,
    build,
    "transformer",
    blocks={"transformer_blocks": "num_layers"},
)

# The family -----------------------------------------------------------------------------------------------------------


def recognizes(diffusion: Found) -> bool:
    return {"text_fusion.projector.weight", "img_in.weight"} <= diffusion.tensors.keys()


def conditions(encode: Encode, prompt: Prompt) -> Conditions:
    """Hidden states of twelve of Qwen3-VL's layers, side by side (1, tokens, 12 · hidden_size), without those of the
    template before the text. Raises :class:`InvalidValue` for a text that is too long.

    (In diffusers texts are filled up to 512 tokens in their middle, which neither model sees.)"""
    context = llm.hidden_states(encode, prompt.text, TEMPLATE, qwen_tokenizer, STATES)[:, HIDDEN:]
    if context.shape[1] > TOKENS:
        reason = f"has {context.shape[1]} tokens with the end of its template; Krea 2 reads {TOKENS}"
        raise InvalidValue("negative_prompt" if prompt.negative else "prompt", prompt.text, reason)
    return {"context": context}


def settings(found: Mapping[str, Found]) -> Defaults:
    """Turbo's: eight steps without guidance. Raw has the same tensors, and is told by its directory alone, which says
    that it is not distilled: it draws as its authors recommend (whose guidance counts from 0), with the shift of a
    picture of 1024×1024."""
    common: dict[str, Any] = {"size": 1024, "sampler": "euler", "prediction": "flux_flow"}
    if found["diffusion"].checkpoint.configs.get("", {}).get("is_distilled") is False:
        return Defaults(steps=28, cfg_scale=5.5, flow_shift=0.90625, **common)
    return Defaults(steps=8, cfg_scale=1.0, flow_shift=1.15, **common)


KREA2 = Family(
    "krea2",
    "Krea 2",
    (llm.reading(QWEN3_VL, *STATES), TRANSFORMER, film.VAE),
    recognizes,
    conditions,
    Latents(scale=1.0, multiple=16),
    settings,
    (
        Joint(llm.NAME, lambda c: c[llm.NAME]["hidden_size"], "diffusion", flux.takes("text_hidden_dim")),
        Joint("diffusion", flux.takes("num_text_layers"), llm.NAME, lambda _: len(STATES), "layers of text"),
        Joint("vae", lambda c: c["vae"]["z_dim"] * PATCH**2, "diffusion", flux.takes("in_channels")),
    ),
)
