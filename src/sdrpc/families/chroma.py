"""Chroma: FLUX.1 schnell's blocks, whose modulation one small network makes; T5 alone reads the prompt."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..prompts import t5_chunks
from . import colours
from .base import Component, Conditions, Config, Defaults, Encode, Family, Found, Joint, Latents, Naming, Prompt, joined
from .components import flux, t5
from .components.autoencoder import VAE
from .keys import same, table

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .base import Call

T5_TOKENS = 512
"""In a chunk, as in stable-diffusion.cpp and in diffusers."""
SEEN_PADDING = 1
"""Tokens of padding that the diffusion model sees: it was trained so (stable-diffusion.cpp's --chroma-t5-mask-pad)."""

# The diffusion model --------------------------------------------------------------------------------------------------

_APPROXIMATOR = "distilled_guidance_layer"
"""The network that makes shifts, scales and gates from the timestep and the number of each of them."""


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' ChromaTransformer2DModel."""
    _, numbers = found.shape(f"{_APPROXIMATOR}.in_proj.weight", 2)
    hidden, _ = found.shape(f"{_APPROXIMATOR}.layers.0.linear_1.weight", 2)
    if numbers % 8:
        reason = f"takes {numbers} numbers, which are no four embeddings of sines and cosines"
        raise found.error(reason, f"{_APPROXIMATOR}.in_proj.weight")
    config = flux.inferred(found) | {
        "approximator_num_channels": numbers, "approximator_hidden_dim": hidden,
        "approximator_layers": found.count(f"{_APPROXIMATOR}.layers."),
    }  # fmt: skip
    return flux.merged(found, config, told)


class _OfKeys:
    """An attention processor that adds ``keys`` (batch, 1, queries or 1, keys), an argument of its own, to the scores.

    The mask that the module takes itself is applied to queries too: those of unseen tokens would see nothing, and have
    no softmax. What becomes of them does not matter, for no token sees them.
    """

    def __init__(self, attend: Any) -> None:
        self._attend = attend

    def __call__(
        self,
        attention: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: None = None,  # noqa: ARG002  the module passes it by name
        image_rotary_emb: Any = None,
        keys: torch.Tensor | None = None,
    ) -> Any:
        return self._attend(attention, hidden_states, encoder_hidden_states, keys, image_rotary_emb)


def build(config: Config) -> tuple[nn.Module, Call]:
    """Inputs: latents (1 or batch, channels, height, width), timestep (1 or batch,) of 0 … 1, context (batch, tokens,
    4096), mask (batch, tokens), which is added to the scores of the text's tokens: 0, or -inf for those that are not
    seen. Output: the velocity (batch, channels, height, width)."""
    import diffusers
    import torch
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    def call(
        module: Any, latents: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        height, width = latents.shape[2:]
        batch = context.shape[0]
        tokens, places = flux.to_tokens(latents.expand(batch, -1, -1, -1)), flux.places(height, width)
        keys = torch.cat((mask, torch.zeros(batch, len(places))), 1)
        length = keys.shape[1]
        predicted = module(
            hidden_states=tokens,
            timestep=timestep.expand(batch),
            encoder_hidden_states=context,
            img_ids=places,
            txt_ids=torch.zeros(context.shape[1], 3),
            # for all queries at once, so that it is there once and not once in every block
            joint_attention_kwargs={"keys": keys[:, None, None].expand(batch, 1, length, length)},
            return_dict=False,
        )[0]
        return (flux.to_latents(predicted, height, width),)

    make: Any = diffusers.ChromaTransformer2DModel
    attention: Any = FluxAttnProcessor
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*FluxPosEmbed", FutureWarning)  # diffusers' warning of its own import
        module = make(**config)
    module.set_attn_processor(_OfKeys(attention()))
    return module, call


_ORIGINAL = table(
    [
        *flux.RULES,
        *flux.linear(
            {rf"{_APPROXIMATOR}\.{layer}": f"{_APPROXIMATOR}.{layer}" for layer in ("in_proj", "out_proj")}
            | {
                rf"{_APPROXIMATOR}\.layers\.(\d+)\.{layer}_layer": rf"{_APPROXIMATOR}.layers.\1.linear_{number}"
                for number, layer in enumerate(("in", "out"), 1)
            }
        ),
        (rf"{_APPROXIMATOR}\.norms\.(\d+)\.(?:scale|weight)", rf"{_APPROXIMATOR}.norms.\1.weight"),
    ]
)


TRANSFORMER = Component(
    "diffusion",
    "diffusion model",
    flux.PREFIXES,
    (
        Naming(f"{_APPROXIMATOR}.layers.0.in_layer.weight", _ORIGINAL),
        Naming(f"{_APPROXIMATOR}.layers.0.linear_1.weight", same),
    ),
    _configure,
    build,
    "transformer",
    blocks=flux.BLOCKS,
)

# The family -----------------------------------------------------------------------------------------------------------


def recognizes(diffusion: Found) -> bool:
    """Not Chroma Radiance, which draws pixels and has another input layer."""
    return "x_embedder.weight" in diffusion.tensors


def seen(ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """The mask (1, tokens) of chunks of tokens (chunks, length): 0, and -inf for the padding behind its first token.

    Padding stands behind the last end token alone. As in stable-diffusion.cpp and diffusers' ChromaPipeline.
    """
    tokens = ids.reshape(-1)
    used = np.flatnonzero(tokens != t5.PADDING)[-1] + 1
    mask = np.full((1, tokens.size), -np.inf, np.float32)
    mask[:, : used + SEEN_PADDING] = 0
    return mask


def conditions(encode: Encode, prompt: Prompt) -> Conditions:
    """T5's hidden states (1, tokens, 4096) and which of them are seen (1, tokens).

    T5 itself reads the padding, as in stable-diffusion.cpp (without --chroma-enable-t5-mask); in diffusers it doesn't.
    """
    tokens = t5_chunks(prompt.text, length=T5_TOKENS)
    return {"context": joined(t5.encode_chunks(encode, "t5xxl", tokens)), "mask": seen(tokens.ids)}


def settings(_: Mapping[str, Found]) -> Defaults:
    """The shift is that of stable-diffusion.cpp, the guidance that of its documentation."""
    return Defaults(size=1024, sampler="euler", cfg_scale=4.0, prediction="flux_flow", flow_shift=1.0)


CHROMA = Family(
    "chroma",
    "Chroma",
    (replace(t5.T5, told_as="text_encoder"), TRANSFORMER, VAE),
    recognizes,
    conditions,
    Latents(scale=0.3611, shift=0.1159, multiple=16, colours=colours.FLUX1),
    settings,
    (
        Joint("t5xxl", lambda c: c["t5xxl"]["d_model"], "diffusion", flux.takes("joint_attention_dim")),
        Joint("diffusion", flux.takes("out_channels"), "diffusion", flux.takes("in_channels")),
        Joint("vae", lambda c: c["vae"]["latent_channels"] * flux.PATCH**2, "diffusion", flux.takes("out_channels")),
    ),
)
