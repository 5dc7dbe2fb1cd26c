"""Names of tensors: from what files call them to what the modules of diffusers and transformers call them.

SD 1.x files have the names of the original code (LDM) or those of diffusers, each part under some prefix or none. One
table of rules per part rewrites LDM names; the only thing that needs thought is where LDM numbers blocks through and
diffusers counts levels. The rules are tested against diffusers' own conversion of single files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from ..checkpoints.checkpoint import Checkpoint
from ..errors import CheckpointError
from ..ggml.weight import Weight

Rename = Callable[[Iterable[str]], Mapping[str, str]]
"""(a file's names without prefix) → those that are understood, with the module's names for them."""


@dataclass(frozen=True)
class Part:
    """A part of the model: where files keep it, and how they name its tensors.

    ``option``: sd-cli's option for a file of its own. ``prefixes``: in order of preference. ``namings``: pairs of a
    tensor that tells a naming from others, and the rules for it. ``idle``: beginnings of names of what belongs to it
    without being needed for every picture.
    """

    name: str
    title: str
    option: str
    prefixes: tuple[str, ...]
    namings: tuple[tuple[str, Rename], ...]
    idle: tuple[str, ...] = ()


@dataclass(frozen=True)
class PartTensors:
    """A part's tensors in a checkpoint, by the names of the module's parameters (diffusers', transformers')."""

    part: Part
    checkpoint: Checkpoint
    tensors: Mapping[str, Weight]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: weight.shape for name, weight in self.tensors.items()}

    def take(self, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Weight]:
        """The weights of a module whose parameters are ``wanted``, in its shapes and with the file's names inside.

        Dimensions of one element may be missing or too many (1×1 convolutions that are stored as matrices, and the
        other way round). Raises :class:`CheckpointError` that names the first tensor that is missing or misshapen.
        """
        taken: dict[str, Weight] = {}
        for name, shape in wanted.items():
            weight = self.tensors.get(name)
            if weight is None:
                raise CheckpointError(self.checkpoint.path, self._why_missing(name), name)
            if _squeezed(weight.shape) != _squeezed(shape):
                reason = f"is {list(weight.shape)}, but the rest of the model needs {list(shape)}"
                raise CheckpointError(self.checkpoint.path, reason, weight.name)
            taken[name] = replace(weight, shape=shape)
        return taken

    @property
    def idle(self) -> set[str]:
        """The file's names of tensors that belong to the part without being needed for every picture."""
        return {weight.name for name, weight in self.tensors.items() if name.startswith(self.part.idle)}

    def _why_missing(self, name: str) -> str:
        for skipped, dtype in self.checkpoint.skipped.items():
            if skipped.rsplit(".", 2)[-2:] == name.rsplit(".", 2)[-2:]:
                return f"is missing; the file has {skipped!r} as {dtype}, which ggml does not have: convert it to F16"
        return "is missing"


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def find(part: Part, checkpoint: Checkpoint) -> PartTensors | None:
    """The part in a checkpoint, or None."""
    names = checkpoint.tensors.keys() | checkpoint.skipped.keys()
    for prefix in part.prefixes:
        for anchor, rename in part.namings:
            if prefix + anchor not in names:
                continue
            inside = [name.removeprefix(prefix) for name in checkpoint.tensors if name.startswith(prefix)]
            renamed = rename(inside)
            tensors = {new: checkpoint.tensors[prefix + old] for old, new in renamed.items()}
            return PartTensors(part, checkpoint, tensors)
    return None


def _same(names: Iterable[str]) -> dict[str, str]:
    return {name: name for name in names}


# UNet -----------------------------------------------------------------------------------------------------------------

_UNET_ENDS = {
    "time_embed.0.": "time_embedding.linear_1.", "time_embed.2.": "time_embedding.linear_2.",
    "input_blocks.0.0.": "conv_in.", "out.0.": "conv_norm_out.", "out.2.": "conv_out.",
    "middle_block.0.": "mid_block.resnets.0.", "middle_block.1.": "mid_block.attentions.0.",
    "middle_block.2.": "mid_block.resnets.1.",
}  # fmt: skip

_RESNET = {
    "in_layers.0.": "norm1.", "in_layers.2.": "conv1.", "emb_layers.1.": "time_emb_proj.", "out_layers.0.": "norm2.",
    "out_layers.3.": "conv2.", "skip_connection.": "conv_shortcut.",
}  # fmt: skip

_SAMPLER = {"op.": "conv."}

_UNET_BLOCK = re.compile(r"(input|output)_blocks\.(\d{1,4})\.(\d)\.")


def _rename_unet(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    prefixes = _UNET_ENDS | _unet_blocks(names)
    renamed = {}
    for name in names:
        match = _UNET_BLOCK.match(name)
        old = match[0] if match and match[0] in prefixes else next((p for p in _UNET_ENDS if name.startswith(p)), None)
        if old is None:
            continue
        new, rest = prefixes[old], name.removeprefix(old)
        inner_rules = _RESNET if ".resnets." in new else _SAMPLER
        inner = next((p for p in inner_rules if rest.startswith(p)), "")
        rest = inner_rules.get(inner, "") + rest.removeprefix(inner)
        renamed[name] = new + rest
    return renamed


def _unet_blocks(names: list[str]) -> dict[str, str]:
    """``input_blocks.4.1.`` → ``down_blocks.1.attentions.0.`` and so on, by walking through the blocks in order."""
    inner: dict[tuple[str, int, int], str] = {}
    for name in names:
        if match := _UNET_BLOCK.match(name):
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


# VAE ------------------------------------------------------------------------------------------------------------------

_VAE_RULES = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\.down\.(\d+)\.block\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
        (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
        (r"\.up\.(\d+)\.block\.(\d+)\.", r".up_blocks.\1.resnets.\2."),
        (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
        (r"(attentions\.0)\.norm\.", r"\1.group_norm."),
        (r"(attentions\.0)\.([qkv])\.", r"\1.to_\2."),
        (r"(attentions\.0)\.proj_out\.", r"\1.to_out.0."),
    )
]

_UP = re.compile(r"\.up_blocks\.(\d{1,4})\.")

_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""What early diffusers files call a VAE's attention."""


def _modernized(names: Iterable[str]) -> dict[str, str]:
    renamed = {name: name for name in names}
    for old, new in _OLD_ATTENTION.items():
        renamed |= {name: name.replace(old, new) for name in renamed if old in name}
    return renamed


def _rename_vae(names: Iterable[str]) -> dict[str, str]:
    renamed = {}
    for name in names:
        new = name
        for pattern, replacement in _VAE_RULES:
            new = pattern.sub(replacement, new)
        renamed[name] = new
    # LDM counts the decoder's levels from the fine end, diffusers from the coarse one
    last = max((int(match[1]) for new in renamed.values() if (match := _UP.search(new))), default=0)
    return {old: _UP.sub(lambda m: f".up_blocks.{last - int(m[1])}.", new) for old, new in renamed.items()}


# The parts -----------------------------------------------------------------------------------------------------------

TEXT_ENCODER = Part(
    "text_encoder",
    "text encoder",
    "--clip_l",
    (
        "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.", "text_encoder.text_model.",
        "text_encoder.", "te.text_model.", "text_encoders.clip_l.transformer.text_model.",
        "clip_l.transformer.text_model.", "text_model.", "",
    ),
    (("embeddings.token_embedding.weight", _same),),
    idle=("encoder.layers.",),
)  # fmt: skip

UNET = Part(
    "unet",
    "diffusion model",
    "--diffusion-model",
    ("model.diffusion_model.", "unet.", "diffusion_model.", ""),
    (("input_blocks.0.0.weight", _rename_unet), ("conv_in.weight", _same)),
)

VAE = Part(
    "vae",
    "VAE",
    "--vae",
    ("first_stage_model.", "vae.", ""),
    (
        ("decoder.mid.block_1.conv1.weight", _rename_vae),
        ("decoder.mid_block.resnets.0.conv1.weight", _modernized),
    ),
    idle=("encoder.", "quant_conv."),
)

PARTS = (TEXT_ENCODER, UNET, VAE)
