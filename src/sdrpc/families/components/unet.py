"""The UNet of Stable Diffusion 1.x, 2.x and XL: diffusers' UNet2DConditionModel.

Files have diffusers' names or those of the original code (LDM). The only thing about the latter that needs thought is
that LDM numbers blocks through where diffusers counts levels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ggml.weight import Weight
from .. import configs
from ..base import CONTROL, F32, Component, Config, Found, Inpainting, Naming, Weights
from ..keys import same

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..base import Call

GROUPS = 32
GUIDANCE = "time_embedding.cond_proj."
"""Of UNets that were distilled with guidance and are told it: latent consistency models."""
_EMA = "model_ema.diffusion_model"
"""What the averages of a training's weights are called, without dots in what follows."""
_EXTRA_INPUTS = {8: "InstructPix2Pix"}


Heads = Callable[[Sequence[int]], int | list[int]]
"""Channels per level → the number of attention heads, of all levels or of each."""


def eight_heads(_channels: Sequence[int]) -> int:
    """SD 1.x: eight heads at every level."""
    return 8


def heads_of_64(channels: Sequence[int]) -> list[int]:
    """SD 2.x and XL: heads of 64 channels."""
    return [max(1, width // 64) for width in channels]


def unet(heads: Heads, sample_size: int) -> Component:
    """The component of a family whose UNets have such ``heads`` and were trained on latents of ``sample_size``."""

    def configure(found: Found, told: Config) -> dict[str, Any]:
        return _configure(found, told, heads, sample_size)

    return Component(
        "diffusion",
        "diffusion model",
        ("model.diffusion_model.", "unet.", "diffusion_model.", _EMA, ""),
        (
            Naming("input_blocks.0.0.weight", _from_ldm, ldm_names),
            Naming("conv_in.weight", same),
            Naming("input_blocks00weight", _from_averages),
        ),
        configure,
        build,
        "unet",
    )


def has_size_conditions(found: Found) -> bool:
    """Whether it is told the picture's size and a pooled text, as SDXL's is."""
    return found.has("add_embedding.")


def context_width(found: Found) -> int:
    """The width of the texts that it attends to. Raises :class:`CheckpointError` if there are several or none."""
    widths = {
        weight.shape[1]
        for name, weight in found.tensors.items()
        if name.endswith(".attn2.to_k.weight") and len(weight.shape) == 2
    }
    if len(widths) != 1:
        raise found.error(f"the UNet attends to texts of several or no widths: {sorted(widths)}")
    return widths.pop()


def projects_by_matrix(found: Found) -> bool:
    """Whether its attention blocks begin with a linear layer (SD 2.x, XL) and not with a convolution (SD 1.x)."""
    return any(name.endswith(".proj_in.weight") and len(w.shape) == 2 for name, w in found.tensors.items())


def _configure(found: Found, told: Config, heads: Heads, sample_size: int) -> dict[str, Any]:
    """Arguments of diffusers' UNet2DConditionModel."""
    first, inputs, *_ = found.shape("conv_in.weight", 4)
    if inputs in _EXTRA_INPUTS:
        raise found.error(f"this is an {_EXTRA_INPUTS[inputs]} model; they are not supported")
    outputs, *_ = found.shape("conv_out.weight", 4)
    levels = range(found.count("down_blocks."))
    up = [found.has(f"up_blocks.{level}.attentions.") for level in levels]
    embedding, _ = found.shape("time_embedding.linear_1.weight", 2)
    own = {
        "sample_size": sample_size, "out_channels": outputs,
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in up],
        "time_embedding_dim": None if embedding == 4 * first else embedding,
    }  # fmt: skip
    if found.has(GUIDANCE):
        own["time_cond_proj_dim"] = found.shape(f"{GUIDANCE}weight", 2)[1]
    return down_path(found, told, heads) | configs.merged(found, own, told, ("sample_size",))


def down_path(found: Found, told: Config, heads: Heads) -> dict[str, Any]:
    """The arguments that the UNet has in common with ControlNets, which are copies of its way down."""
    inputs = found.shape("conv_in.weight", 4)[1]
    levels = range(found.count("down_blocks."))
    channels = [found.shape(f"down_blocks.{level}.resnets.0.conv1.weight", 4)[0] for level in levels]
    layers = [found.count(f"down_blocks.{level}.resnets.") for level in levels]
    down = [found.has(f"down_blocks.{level}.attentions.") for level in levels]
    depths = [found.count(f"down_blocks.{level}.attentions.0.transformer_blocks.") or 1 for level in levels]
    middle = found.count("mid_block.attentions.0.transformer_blocks.")
    if not down[-1] and middle:
        depths[-1] = middle  # diffusers gives the middle the last level's depth
    inferred = {
        "in_channels": inputs, "block_out_channels": channels,
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in down],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if found.has("mid_block.") else None,
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
        "cross_attention_dim": context_width(found), "attention_head_dim": heads(channels),
        "norm_num_groups": math.gcd(GROUPS, *channels), "norm_eps": 1e-5, "act_fn": "silu", "flip_sin_to_cos": True,
        "freq_shift": 0, "use_linear_projection": projects_by_matrix(found),
    } | _size_conditions(found, told)  # fmt: skip
    keys = ("attention_head_dim", "norm_num_groups", "norm_eps", "act_fn", "flip_sin_to_cos", "freq_shift")
    config = configs.merged(found, inferred, told, keys)
    configs.check_divides(found, config, "attention_head_dim", channels)
    configs.check_divides(found, config, "norm_num_groups", channels)
    return config


def _size_conditions(found: Found, told: Config) -> dict[str, Any]:
    if not has_size_conditions(found):
        return {}
    _, width = found.shape("add_embedding.linear_1.weight", 2)
    each = told.get("addition_time_embed_dim", 256)
    if type(each) is not int or not 0 < 6 * each < width:
        raise found.error(f"addition_time_embed_dim of the {found.component.title} can't be {each!r}")
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": each,
        "projection_class_embeddings_input_dim": width,
    }


def distilled(found: Found) -> dict[str, Any]:
    """What a request means where it says nothing, if the UNet is told guidance: as diffusers' pipeline for LCM."""
    return {"sampler": "lcm", "steps": 4, "cfg_scale": 1.0, "guidance": 8.5} if found.has(GUIDANCE) else {}


def guidance(config: Config, scale: float) -> dict[str, F32]:
    """The condition ``guidance`` (1, width) of UNets that are told it: sines, then cosines of 1000 · (scale - 1)."""
    width = config.get("time_cond_proj_dim", 0)
    if not width:
        return {}
    half = width // 2
    frequencies = np.exp(np.arange(half, dtype=np.float32) * np.float32(-math.log(10000) / max(1, half - 1)))
    angles = np.float32(1000 * (scale - 1)) * frequencies
    told = np.concatenate([np.sin(angles), np.cos(angles), np.zeros(width % 2, np.float32)])
    return {"guidance": told[None]}


def inpaints(config: Config) -> bool:
    """Whether it is shown, beside latents, a mask and other latents."""
    return int(config["in_channels"]) == 2 * int(config["out_channels"]) + 1


def latent_channels(config: Config) -> int:
    """Of the latents that it takes the noise out of."""
    return int(config["out_channels" if inpaints(config) else "in_channels"])


def _around(mask: F32, latents: F32) -> F32:
    """The mask's pixel in the corner of each latent, then the latents: (1, 1 + channels, h, w)."""
    pixels = mask.shape[2] // latents.shape[2]
    return np.concatenate([mask[:, :, ::pixels, ::pixels], latents], 1)


INPAINTING = Inpainting(inpaints, _around)


def pooled_width(config: Config) -> int:
    """Of the pooled text that an XL UNet is told: what the six sizes leave of its input."""
    return int(config["projection_class_embeddings_input_dim"]) - 6 * int(config["addition_time_embed_dim"])


def build(config: Config) -> tuple[nn.Module, Call]:
    """Inputs: latents (1 or batch, channels, height, width), timestep (1 or batch,), context (batch, length, width);
    for XL also pooled (batch, width) and sizes (batch, 6), pixels, for inpainting models around (batch, 1 + channels,
    height, width), guidance (batch, width) as :func:`guidance` gives it, and control_0 … what a ControlNet gives, in
    its order. Output: the prediction (batch, channels, height, width)."""
    import diffusers
    import torch

    def call(
        module: Any,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        pooled: torch.Tensor | None = None,
        sizes: torch.Tensor | None = None,
        around: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        **controls: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        batch = context.shape[0]
        latents, timestep = latents.expand(batch, -1, -1, -1), timestep.expand(batch)
        if around is not None:
            latents = torch.cat((latents, around), 1)
        *down, middle = (controls[f"{CONTROL}{n}"] for n in range(len(controls))) if controls else (None,)
        predicted = module(
            latents,
            timestep,
            context,
            timestep_cond=guidance,
            added_cond_kwargs=added(pooled, sizes),
            down_block_additional_residuals=down or None,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        return (predicted,)

    make: Any = diffusers.UNet2DConditionModel
    return make(**config), call


def added(pooled: torch.Tensor | None = None, sizes: torch.Tensor | None = None) -> dict[str, Any] | None:
    """What XL's models are told besides."""
    return None if pooled is None else {"text_embeds": pooled, "time_ids": sizes}


# LDM's names ----------------------------------------------------------------------------------------------------------

_ENDS = {
    "time_embed.0.": "time_embedding.linear_1.", "time_embed.2.": "time_embedding.linear_2.",
    "time_embed.cond_proj.": GUIDANCE,
    "label_emb.0.0.": "add_embedding.linear_1.", "label_emb.0.2.": "add_embedding.linear_2.",
    "input_blocks.0.0.": "conv_in.", "out.0.": "conv_norm_out.", "out.2.": "conv_out.",
    "middle_block.0.": "mid_block.resnets.0.", "middle_block.1.": "mid_block.attentions.0.",
    "middle_block.2.": "mid_block.resnets.1.",
}  # fmt: skip

_RESNET = {
    "in_layers.0.": "norm1.", "in_layers.2.": "conv1.", "emb_layers.1.": "time_emb_proj.", "out_layers.0.": "norm2.",
    "out_layers.3.": "conv2.", "skip_connection.": "conv_shortcut.",
}  # fmt: skip

_SAMPLER = {"op.": "conv."}

_BLOCK = re.compile(r"(input|output)_blocks\.(\d{1,4})\.(\d)\.")


def _from_ldm(weights: Weights) -> dict[str, Weight]:
    return {new: weights[old] for old, new in renamed(weights).items()}


_WORDS = re.compile(
    r"(?:input|output)_blocks(?=(\d+)(\d))|label_emb(?=(\d)(\d))|time_embed|middle_block|transformer_blocks|"
    r"(?:in|out|emb)_layers|skip_connection|proj_(?:in|out)|attn[12]|to_(?:q|k|v|out)|ff|net|norm[123]?|proj|op|conv|"
    r"cond_proj|out|weight|bias|\d+"
)
"""What LDM's names consist of."""


def _from_averages(weights: Weights) -> dict[str, Weight]:
    return _from_ldm({dotted(name): weight for name, weight in weights.items()})


def dotted(name: str) -> str:
    """``input_blocks111transformer_blocks0norm1weight`` → ``input_blocks.11.1.transformer_blocks.0.norm1.weight``: of
    two numbers that follow each other, which is a block's and its piece's, the second one has one digit."""
    words = []
    position = 0
    while match := _WORDS.match(name, position):
        numbers = [number for number in match.groups() if number]
        words += [match[0], *numbers]
        position = match.end() + sum(map(len, numbers))
    return ".".join(words) + name[position:]


def renamed(names: Iterable[str]) -> dict[str, str]:
    """LDM's names → diffusers', for those that are understood."""
    names = list(names)
    prefixes = _ENDS | _blocks(names)
    found = {}
    for name in names:
        match = _BLOCK.match(name)
        old = match[0] if match and match[0] in prefixes else next((p for p in _ENDS if name.startswith(p)), None)
        if old is None:
            continue
        new, rest = prefixes[old], name.removeprefix(old)
        inner_rules = _RESNET if ".resnets." in new else _SAMPLER
        inner = next((p for p in inner_rules if rest.startswith(p)), "")
        found[name] = new + inner_rules.get(inner, "") + rest.removeprefix(inner)
    return found


def _blocks(names: list[str]) -> dict[str, str]:
    """``input_blocks.4.1.`` → ``down_blocks.1.attentions.0.`` and so on, by walking through the blocks in order."""
    inner: dict[tuple[str, int, int], str] = {}
    for name in names:
        if match := _BLOCK.match(name):
            inner[match[1], int(match[2]), int(match[3])] = _kind(inner, match, name)
    found: dict[str, str] = {}
    for side, blocks in (("input", "down_blocks"), ("output", "up_blocks")):
        level = position = 0
        numbers = sorted({block for s, block, _ in inner if s == side and (side == "output" or block > 0)})
        for block in numbers:
            kinds = {place: kind for (s, b, place), kind in inner.items() if (s, b) == (side, block)}
            sampler = "downsamplers" if side == "input" else "upsamplers"
            for place, kind in sorted(kinds.items()):
                target = f"{sampler}.0" if kind == "sampler" else f"{kind}.{position}"
                found[f"{side}_blocks.{block}.{place}."] = f"{blocks}.{level}.{target}."
            position += 1
            if "sampler" in kinds.values():
                level, position = level + 1, 0
    return found


def _kind(inner: Mapping[tuple[str, int, int], str], match: re.Match[str], name: str) -> str:
    """Whether a block's piece is a resnet, an attention, or what changes the size: told by any of its tensors."""
    rest = name[match.end() :]
    if rest.startswith(("op.", "conv.")):
        return "sampler"
    if rest.startswith(tuple(_RESNET)):
        return "resnets"
    return inner.get((match[1], int(match[2]), int(match[3])), "attentions")


_PIECE = re.compile(r"(down|up)_blocks\.(\d{1,4})\.(resnets|attentions|downsamplers|upsamplers)\.(\d{1,4})\.")


def ldm_names(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """LDM's names for the tensors of a UNet whose names are diffusers', with those: the way back of :func:`renamed`."""
    names = list(names)
    beginnings = {new: old for old, new in _ENDS.items()} | _numbered(names)
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        piece = _PIECE.match(name)
        new = (
            piece[0]
            if piece and piece[0] in beginnings
            else next((p for p in _ENDS.values() if name.startswith(p)), "")
        )
        if new:
            rules = _RESNET if ".resnets." in new else _SAMPLER if "downsamplers" in new else {}
            inner = {theirs: ours for ours, theirs in rules.items()}
            rest = name.removeprefix(new)
            theirs = next((part for part in inner if rest.startswith(part)), "")
            found[beginnings[new] + inner.get(theirs, "") + rest.removeprefix(theirs)] = (name,)
    return found


_ORDER = ("resnets", "attentions", "downsamplers", "upsamplers")


def _numbered(names: Iterable[str]) -> dict[str, str]:
    """``down_blocks.1.attentions.0.`` → ``input_blocks.4.1.`` and so on. Resnets and downsamplers begin a block, what
    follows them belongs to it."""
    pieces = {match[0]: match for name in names if (match := _PIECE.match(name))}

    def order(match: re.Match[str]) -> tuple[int, float, int]:
        return int(match[2]), math.inf if "samplers" in match[3] else int(match[4]), _ORDER.index(match[3])

    found: dict[str, str] = {}
    for side, blocks, first in (("down", "input", 1), ("up", "output", 0)):
        block, place = first - 1, 0
        for match in sorted((match for match in pieces.values() if match[1] == side), key=order):
            block, place = (block + 1, 0) if match[3] in ("resnets", "downsamplers") else (block, place + 1)
            found[match[0]] = f"{blocks}_blocks.{block}.{place}."
    return found
