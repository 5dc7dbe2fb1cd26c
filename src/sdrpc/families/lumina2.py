"""Lumina-Image 2.0: one stream of picture and text, each refined before; Gemma 2 reads the prompt behind a system
prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..checkpoints.expressions import split
from ..errors import CheckpointError, InvalidValue
from ..ggml.weight import Weight
from ..prompts import Template
from . import colours, configs
from .base import Component, Conditions, Config, Defaults, Encode, Family, Found, Joint, Latents, Naming, Prompt
from .components import flux, gemma2, llm
from .components.autoencoder import VAE
from .keys import same, table

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .base import Call

PATCH = flux.PATCH
TOKENS = 256
"""Of a text, at most, with its template."""
TIMESTEPS = 1000
THETA = 10000
"""Base of positions."""
SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts."
)
TEMPLATE = Template(f"{gemma2.START}{SYSTEM} <Prompt Start> ", "")
NEGATIVE = Template(gemma2.START, "")
"""Negative prompts stand alone, as in diffusers."""

# The diffusion model --------------------------------------------------------------------------------------------------

_EMBEDDER = "time_caption_embed.caption_embedder"


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' Lumina2Transformer2DModel."""
    width, inputs = found.shape("x_embedder.weight", 2)
    (text,) = found.shape(f"{_EMBEDDER}.0.weight", 1)
    keys, _ = found.shape("layers.0.attn.to_k.weight", 2)
    (head,) = found.shape("layers.0.attn.norm_q.weight", 1)
    feed_forward, _ = found.shape("layers.0.feed_forward.linear_1.weight", 2)
    if width % head or keys % head or (width % keys if keys else True) or inputs % PATCH**2:
        raise found.error(f"a width of {width} with heads of {head}, {keys} keys, tokens of {inputs} makes no sense")
    inferred = {
        "in_channels": inputs // PATCH**2, "hidden_size": width, "num_layers": found.count("layers."),
        "num_refiner_layers": found.count("noise_refiner."), "num_attention_heads": width // head,
        "num_kv_heads": keys // head, "cap_feat_dim": text, "axes_dim_rope": [head // 3 // 2 * 2] * 3,
        # the class rounds (4 · width · multiplier) up to a multiple of this
        "multiple_of": feed_forward, "ffn_dim_multiplier": 0.5 / width,
    }  # fmt: skip
    config = configs.merged(found, inferred, told, ("axes_dim_rope", "norm_eps"))
    configs.check_axes(found, config, "axes_dim_rope", head)
    return config


def build(config: Config) -> tuple[nn.Module, Call]:
    """Inputs: latents (1 or batch, channels, height, width), timestep (1 or batch,) of 0 … 1000, context (batch,
    tokens, cap_feat_dim), seen (batch, tokens): 1, or 0 behind the end of a text. Output: the velocity (batch,
    channels, height, width).

    Positions: token n of a text (n, 0, 0), one of the picture (length of the text, row, column). The module wants to
    know a text's length as it is captured; that would take a graph for each.
    """
    import diffusers
    import torch
    from diffusers.models.transformers.transformer_lumina2 import Lumina2AttnProcessor2_0
    from torch import nn

    frequencies = [THETA ** -(torch.arange(0, axis, 2).double() / axis) for axis in config["axes_dim_rope"]]

    def angles(places: list[torch.Tensor]) -> torch.Tensor:
        """Of positions (…, tokens), one tensor for each axis: (…, tokens, head / 2)."""
        parts = [at[..., None] * f.float() for at, f in zip(places, frequencies, strict=True)]
        return torch.cat(parts, -1)

    def turned(angle: torch.Tensor) -> torch.Tensor:
        return torch.polar(torch.ones_like(angle), angle)

    class Positions(nn.Module):
        """Stands for the module's own: texts keep the tokens that are not seen."""

        def forward(self, latents: torch.Tensor, seen: torch.Tensor) -> tuple[Any, ...]:
            batch, channels, height, width = latents.shape
            rows, columns, length = height // PATCH, width // PATCH, seen.shape[1]
            squares = latents.view(batch, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 3, 5, 1)
            tokens = squares.flatten(3).flatten(1, 2)
            count = rows * columns
            zeros = torch.zeros(batch, length)
            text = angles([torch.arange(length).float().expand(batch, -1), zeros, zeros])
            picture = angles(
                [
                    seen.sum(1, keepdim=True).expand(-1, count),
                    torch.arange(rows).float().repeat_interleave(columns).expand(batch, -1),
                    torch.arange(columns).float().repeat(rows).expand(batch, -1),
                ]
            )
            both = turned(torch.cat((text, picture), 1))
            return tokens, turned(text), turned(picture), both, [length] * batch, [length + count] * batch

    keys: list[torch.Tensor] = []

    class Seeing:
        """The module's own processor of attention, for queries that do not see some tokens of the text."""

        def __init__(self) -> None:
            make: Any = Lumina2AttnProcessor2_0
            self._attend = make()

        def __call__(
            self,
            attention: Any,
            hidden_states: torch.Tensor,
            encoder_hidden_states: torch.Tensor,
            attention_mask: None = None,  # noqa: ARG002  the module passes it by name
            image_rotary_emb: torch.Tensor | None = None,
        ) -> Any:
            return self._attend(attention, hidden_states, encoder_hidden_states, keys[-1], image_rotary_emb)

    def call(
        module: Any, latents: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, seen: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        batch, (height, width) = context.shape[0], latents.shape[2:]
        keys[:] = [torch.cat((seen, torch.ones(batch, height // PATCH * (width // PATCH))), 1)]
        predicted = module(
            hidden_states=latents.expand(batch, -1, -1, -1),
            timestep=(TIMESTEPS - timestep.expand(batch)) / TIMESTEPS,
            encoder_hidden_states=context,
            encoder_attention_mask=seen,
            return_dict=False,
        )[0]
        return (-predicted,)

    make: Any = diffusers.Lumina2Transformer2DModel
    module = make(**config)
    module.rope_embedder = Positions()
    for layer in module.layers:
        layer.attn.set_processor(Seeing())
    return module, call


def _qkv(weight: Weight) -> tuple[Weight, ...]:
    """Queries are as many as numbers come in; keys and values share the rest."""
    if len(weight.shape) != 2:
        raise CheckpointError(weight.file, f"{list(weight.shape)} is no matrix", weight.name)
    rows, width = weight.shape
    keys = (rows - width) // 2
    return split(weight, [width, keys, keys])


_BLOCK = r"((?:layers|noise_refiner|context_refiner)\.\d+)"
_ORIGINAL = table(
    [
        *flux.linear(
            {
                "x_embedder": "x_embedder", r"cap_embedder\.1": f"{_EMBEDDER}.1",
                **{
                    rf"t_embedder\.mlp\.{layer}": f"time_caption_embed.timestep_embedder.linear_{number}"
                    for number, layer in enumerate((0, 2), 1)
                },
                r"final_layer\.adaLN_modulation\.1": "norm_out.linear_1", r"final_layer\.linear": "norm_out.linear_2",
            }
        ),
        (r"cap_embedder\.0\.weight", f"{_EMBEDDER}.0.weight"),
        (rf"{_BLOCK}\.attention\.qkv\.weight", [rf"\1.attn.to_{name}.weight" for name in "qkv"], _qkv),
        (rf"{_BLOCK}\.attention\.out\.weight", r"\1.attn.to_out.0.weight"),
        (rf"{_BLOCK}\.attention\.([qk])_norm\.weight", r"\1.attn.norm_\2.weight"),
        (r"(context_refiner\.\d+)\.attention_norm1\.weight", r"\1.norm1.weight"),
        (rf"{_BLOCK}\.attention_norm1\.weight", r"\1.norm1.norm.weight"),
        (rf"{_BLOCK}\.attention_norm2\.weight", r"\1.norm2.weight"),
        (rf"{_BLOCK}\.(ffn_norm[12])\.weight", r"\1.\2.weight"),
        (rf"{_BLOCK}\.feed_forward\.w([123])\.weight", r"\1.feed_forward.linear_\2.weight"),
        (rf"{_BLOCK}\.adaLN_modulation\.1\.(weight|bias)", r"\1.norm1.linear.\2"),
        (r"norm_final\.weight|cap_pad_token", r"\g<0>"),
    ]
)  # fmt: skip
"""Lumina's names."""

TRANSFORMER = Component(
    "diffusion",
    "diffusion model",
    flux.PREFIXES,
    (Naming("layers.0.attention.qkv.weight", _ORIGINAL), Naming(f"{_EMBEDDER}.0.weight", same)),
    _configure,
    build,
    "transformer",
    idle=("norm_final.",),
    blocks={"layers": "num_layers"},
)

# The family -----------------------------------------------------------------------------------------------------------


def recognizes(diffusion: Found) -> bool:
    """Not Z-Image, which fills texts up."""
    return f"{_EMBEDDER}.0.weight" in diffusion.tensors and "cap_pad_token" not in diffusion.tensors


def conditions(encode: Encode, prompt: Prompt) -> Conditions:
    """Hidden states of Gemma's last layer but one (1, tokens, hidden_size), filled up with zeros to a multiple of 64
    tokens, and which of them are the text's (1, tokens). Raises :class:`InvalidValue` for a text that is too long."""
    states = [encode.config(llm.NAME)["num_hidden_layers"] - 1]
    template = NEGATIVE if prompt.negative else TEMPLATE
    hidden = llm.hidden_states(encode, prompt.text, template, gemma2.no_tokenizer, states)
    length = hidden.shape[1]
    if length > TOKENS:
        reason = f"has {length} tokens with its template; Lumina 2 reads {TOKENS}"
        raise InvalidValue("negative_prompt" if prompt.negative else "prompt", prompt.text, reason)
    context, seen = llm.filled(hidden)
    return {"context": context, "seen": seen}


def settings(_: Mapping[str, Found]) -> Defaults:
    """As its authors recommend; they also make guided predictions as long as those of the prompt, which is not done
    here."""
    return Defaults(size=1024, sampler="euler", steps=30, cfg_scale=4.0, prediction="sd3_flow", flow_shift=6.0)


LUMINA2 = Family(
    "lumina2",
    "Lumina-Image 2.0",
    (gemma2.GEMMA2, TRANSFORMER, VAE),
    recognizes,
    conditions,
    Latents(scale=0.3611, shift=0.1159, multiple=16, colours=colours.FLUX1),
    settings,
    (
        Joint(llm.NAME, lambda c: c[llm.NAME]["hidden_size"], "diffusion", flux.takes("cap_feat_dim")),
        Joint("vae", lambda c: c["vae"]["latent_channels"], "diffusion", flux.takes("in_channels")),
    ),
)
