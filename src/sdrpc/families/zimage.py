"""Z-Image and Z-Image-Turbo: one stream of picture and text; Qwen3 reads the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InvalidValue
from ..prompts import Template, qwen_tokenizer
from . import colours, configs
from .base import Component, Conditions, Config, Defaults, Encode, Family, Found, Joint, Latents, Naming, Prompt
from .components import llm
from .components.autoencoder import VAE
from .components.qwen3 import QWEN3
from .keys import same, table, thirds

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .base import Call

PATCH = 2
"""Latents on a side that make one token."""
TOKENS = 32
"""Text and picture are filled up to a multiple of so many tokens, with one that was learnt."""
TIMESTEPS = 1000
POSITIONS = [1536, 1024, 1024]
"""Of text and behind it, of rows and of columns: the diffusion model has no others. The first is the published one, the
others have room for every picture that can be asked for."""
TEMPLATE = Template("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")

# The diffusion model --------------------------------------------------------------------------------------------------

_EMBEDDER, _FINAL = "all_x_embedder.2-1", "all_final_layer.2-1"


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' ZImageTransformer2DModel."""
    if found.has("siglip_embedder."):
        raise found.error("this is Z-Image Omni; it is not supported")
    dim, inputs = found.shape(f"{_EMBEDDER}.weight", 2)
    (context,) = found.shape("cap_embedder.0.weight", 1)
    (head,) = found.shape("layers.0.attention.norm_q.weight", 1)
    if dim % head or inputs % PATCH**2:
        raise found.error(f"a width of {dim} with heads of {head} and tokens of {inputs} numbers makes no sense")
    inferred = {
        "in_channels": inputs // PATCH**2, "dim": dim, "n_layers": found.count("layers."),
        "n_refiner_layers": found.count("noise_refiner."), "n_heads": dim // head, "n_kv_heads": dim // head,
        "cap_feat_dim": context, "axes_dims": configs.axes(head, 3, 8), "axes_lens": POSITIONS,
    }  # fmt: skip
    config = configs.merged(found, inferred, told, ("axes_dims", "rope_theta", "norm_eps"))
    configs.check_axes(found, config, "axes_dims", head)
    return config


def build(config: Config) -> tuple[nn.Module, Call]:
    """Inputs: latents (1 or batch, channels, height, width), timestep (1 or batch,) of 0 … 1000, context (batch,
    tokens, cap_feat_dim) with a multiple of 32 tokens, padding (batch, tokens): 1 where the context is filled up, else
    0. Output: the velocity (batch, channels, height, width).

    The module finds out itself where a text ends, from its length; that would take a graph for each length.
    """
    import diffusers
    import torch

    make: Any = diffusers.ZImageTransformer2DModel
    module = make(**config)
    ends: list[torch.Tensor] = []

    def fill_up(_: Any, __: Any, embedded: torch.Tensor) -> Any:
        filled = ends[-1].reshape(-1, 1)
        return embedded * (1 - filled) + module.cap_pad_token * filled

    module.cap_embedder.register_forward_hook(fill_up)

    def call(
        module: Any, latents: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, padding: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        batch = context.shape[0]
        ends[:] = [padding]
        pictures = latents.expand(batch, -1, -1, -1)[:, :, None].unbind(0)
        predicted = module(
            list(pictures), (TIMESTEPS - timestep.expand(batch)) / TIMESTEPS, list(context.unbind(0)), return_dict=False
        )[0]
        return (-torch.stack(predicted)[:, :, 0],)

    return module, call


_BLOCK = r"((?:layers|noise_refiner|context_refiner)\.\d+)"
_ORIGINAL = table(
    [
        (r"x_embedder\.(weight|bias)", rf"{_EMBEDDER}.\1"),
        (r"final_layer\.(linear|adaLN_modulation\.1)\.(weight|bias)", rf"{_FINAL}.\1.\2"),
        (rf"{_BLOCK}\.attention\.qkv\.weight", [rf"\1.attention.to_{name}.weight" for name in "qkv"], thirds),
        (rf"{_BLOCK}\.attention\.out\.weight", r"\1.attention.to_out.0.weight"),
        (rf"{_BLOCK}\.attention\.([qk])_norm\.weight", r"\1.attention.norm_\2.weight"),
        (rf"{_BLOCK}\.(?:attention_norm[12]|ffn_norm[12]|feed_forward\.w[123])\.weight", r"\g<0>"),
        (rf"{_BLOCK}\.adaLN_modulation\.0\.(?:weight|bias)", r"\g<0>"),
        (r"(?:t_embedder\.mlp\.[02]|cap_embedder\.[01])\.(?:weight|bias)|x_pad_token|cap_pad_token", r"\g<0>"),
    ]
)

TRANSFORMER = Component(
    "diffusion",
    "diffusion model",
    ("model.diffusion_model.", "diffusion_model.", "transformer.", "net.", ""),
    (Naming("layers.0.attention.qkv.weight", _ORIGINAL), Naming(f"{_EMBEDDER}.weight", same)),
    _configure,
    build,
    "transformer",
    blocks={"layers": "n_layers"},
)

# The family -----------------------------------------------------------------------------------------------------------


def recognizes(diffusion: Found) -> bool:
    """Not Lumina 2, which fills nothing up."""
    return {"cap_pad_token", f"{_EMBEDDER}.weight"} <= diffusion.tensors.keys()


def conditions(encode: Encode, prompt: Prompt) -> Conditions:
    """Hidden states of Qwen3's last layer but one (1, tokens, hidden_size), filled up with zeros to a multiple of 32
    tokens, and where that is (1, tokens). Raises :class:`InvalidValue` for a text that is too long."""
    states = [encode.config(llm.NAME)["num_hidden_layers"] - 1]
    hidden = llm.hidden_states(encode, prompt.text, TEMPLATE, qwen_tokenizer, states)
    length = hidden.shape[1]
    more = -length % TOKENS
    if length + more + 1 >= POSITIONS[0]:
        reason = f"has {length} tokens with its template; Z-Image has positions for {POSITIONS[0] - TOKENS}"
        raise InvalidValue("negative_prompt" if prompt.negative else "prompt", prompt.text, reason)
    padding = np.zeros((1, length + more), np.float32)
    padding[:, length:] = 1
    return {"context": np.pad(hidden, ((0, 0), (0, more), (0, 0))), "padding": padding}


def settings(found: Mapping[str, Found]) -> Defaults:
    """Turbo's: eight steps without guidance. Z-Image has the same tensors, and is told by its directory alone, whose
    scheduler has a shift of 6: it draws as its authors recommend."""
    shift = found["diffusion"].checkpoint.configs.get("scheduler", {}).get("shift")
    if shift == 6:
        return Defaults(size=1024, sampler="euler", steps=50, cfg_scale=5.0, prediction="sd3_flow", flow_shift=6.0)
    return Defaults(size=1024, sampler="euler", steps=8, cfg_scale=1.0, prediction="sd3_flow", flow_shift=3.0)


Z_IMAGE = Family(
    "zimage",
    "Z-Image",
    (QWEN3, TRANSFORMER, VAE),
    recognizes,
    conditions,
    Latents(scale=0.3611, shift=0.1159, multiple=16, colours=colours.FLUX1),
    settings,
    (
        Joint(llm.NAME, lambda c: c[llm.NAME]["hidden_size"], "diffusion", lambda c: c["diffusion"]["cap_feat_dim"]),
        Joint("vae", lambda c: c["vae"]["latent_channels"], "diffusion", lambda c: c["diffusion"]["in_channels"]),
    ),
)
