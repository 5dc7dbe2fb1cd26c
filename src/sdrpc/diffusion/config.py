"""What a model is: configurations of diffusers' and transformers' modules, inferred from names and shapes of tensors.

Any width and depth of the SD 1.x family: fewer layers, levels without attention, no middle block, tiny ones. What
shapes can't tell has the family's value, unless the file says otherwise: its metadata entry ``sdrpc.config`` may hold a
JSON object, ``{"prediction": "eps" or "v", "scaling_factor": 0.18215, "unet": {...}, "vae": {...}, "text_encoder":
{...}}``, whose inner objects are arguments of UNet2DConditionModel, AutoencoderKL and CLIPTextConfig, such as
``attention_head_dim`` (diffusers' name for the number of heads), ``norm_num_groups``, ``num_attention_heads`` or the
UNet's ``sample_size`` (of the latents that it was trained at). A diffusers directory says all of it in its own
config.json files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..errors import CheckpointError
from .names import PartTensors

METADATA_KEY = "sdrpc.config"

Shapes = Mapping[str, tuple[int, ...]]
Arguments = Mapping[str, Any]

HEADS = 8
GROUPS = 32
SCALING_FACTOR = 0.18215
TEXT_HEAD_SIZE = 64
MAX_SAMPLE_SIZE = 2048
"""Latents on a side that a file may say that it was trained at: pictures of 16,384 pixels."""

_STRANGERS = (
    (r"\.joint_blocks\.", "Stable Diffusion 3"),
    (r"double_stream_modulation_img", "Flux 2"),
    (r"double_blocks\.", "Flux"),
    (r"conditioner\.embedders\.|label_emb\.|add_embedding\.|cond_stage_model\.1\.", "Stable Diffusion XL"),
    (r"cond_stage_model\.model\.", "Stable Diffusion 2"),
    (r"time_mixer\.mix_factor|time_mix_blocks", "Stable Video Diffusion"),
    (r"\.cross_attn\.norm_k\.", "Wan"),
    (r"transformer_blocks\.0\.img_mod\.", "Qwen Image"),
    (r"cap_embedder\.", "Z-Image or Lumina"),
    (r"encoder\.block\.0\.layer\.0\.SelfAttention", "a T5 text encoder"),
    (r"control_model\.|controlnet_cond_embedding", "a ControlNet"),
    (r"lora_(up|down|A|B)\b|lora_unet_", "a LoRA"),
)  # fmt: skip
"""Models of other families, by a name that only they have, in the order in which they are told apart."""

_EXTRA_INPUTS = {9: "inpainting", 8: "InstructPix2Pix"}


@dataclass(frozen=True)
class FileConfig:
    """What a file says about itself beyond its tensors."""

    prediction: str = "eps"
    scaling_factor: float | None = None
    parts: Mapping[str, Arguments] = field(default_factory=dict)


def refuse_strangers(checkpoint: Checkpoint) -> None:
    """Raises :class:`CheckpointError` that names the family when the file belongs to another one than SD 1.x."""
    names = "\n".join([*checkpoint.tensors, *checkpoint.skipped])
    for pattern, family in _STRANGERS:
        if re.search(pattern, names):
            raise CheckpointError(checkpoint.path, f"this is {family}; only the SD 1.x family is supported")


def file_config(checkpoint: Checkpoint) -> FileConfig:
    """What the file's metadata or, for a diffusers directory, its JSON files say.

    Raises :class:`CheckpointError` for metadata that can't be understood.
    """
    if checkpoint.configs:
        scheduler = checkpoint.configs.get("scheduler", {})
        prediction = {"epsilon": "eps", "v_prediction": "v"}.get(scheduler.get("prediction_type", "epsilon"), "?")
        if prediction == "?":
            raise CheckpointError(checkpoint.path, f"prediction type {scheduler['prediction_type']!r} is not supported")
        return FileConfig(prediction, checkpoint.configs.get("vae", {}).get("scaling_factor"), checkpoint.configs)
    text = checkpoint.metadata.get(METADATA_KEY)
    if text is None:
        return FileConfig()
    try:
        content = json.loads(text)
        prediction = content.get("prediction", "eps")
        scaling = content.get("scaling_factor")
        parts = {part: dict(content.get(part, {})) for part in ("unet", "vae", "text_encoder")}
        scaling = None if scaling is None else float(scaling)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(checkpoint.path, f"metadata {METADATA_KEY!r} is not understood: {error}") from error
    if prediction not in ("eps", "v"):
        raise CheckpointError(checkpoint.path, f"metadata {METADATA_KEY!r}: prediction is eps or v, not {prediction!r}")
    return FileConfig(prediction, scaling, parts)


# Each part ------------------------------------------------------------------------------------------------------------


def text_encoder_config(part: PartTensors, said: Arguments) -> dict[str, Any]:
    """Arguments of transformers' CLIPTextConfig."""
    shapes = part.shapes
    vocabulary, width = _shape(part, "embeddings.token_embedding.weight", 2)
    positions, _ = _shape(part, "embeddings.position_embedding.weight", 2)
    layers = _count(shapes, r"encoder\.layers\.(\d+)\.")
    inner, _ = _shape(part, "encoder.layers.0.mlp.fc1.weight", 2)
    inferred = {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "max_position_embeddings": positions, "num_attention_heads": max(1, width // TEXT_HEAD_SIZE),
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": width,
    }  # fmt: skip
    config = _merged(part, inferred, said, ("num_attention_heads", "hidden_act", "layer_norm_eps"))
    _divides(part, config["num_attention_heads"], [width], "num_attention_heads")
    return config


def unet_config(part: PartTensors, said: Arguments) -> dict[str, Any]:
    """Arguments of diffusers' UNet2DConditionModel."""
    shapes = part.shapes
    first, inputs, *_ = _shape(part, "conv_in.weight", 4)
    if inputs in _EXTRA_INPUTS:
        raise CheckpointError(part.checkpoint.path, f"this is an {_EXTRA_INPUTS[inputs]} model; they are not supported")
    outputs, *_ = _shape(part, "conv_out.weight", 4)
    levels = range(_count(shapes, r"down_blocks\.(\d+)\."))
    channels = [_shape(part, f"down_blocks.{level}.resnets.0.conv1.weight", 4)[0] for level in levels]
    layers = [_count(shapes, rf"down_blocks\.{level}\.resnets\.(\d+)\.") for level in levels]
    down = [_has(shapes, f"down_blocks.{level}.attentions.") for level in levels]
    up = [_has(shapes, f"up_blocks.{level}.attentions.") for level in levels]
    embedding, _ = _shape(part, "time_embedding.linear_1.weight", 2)
    contexts = {shape[1] for name, shape in shapes.items() if name.endswith(".attn2.to_k.weight") and len(shape) == 2}
    if len(contexts) != 1:
        raise CheckpointError(part.checkpoint.path, f"the UNet attends to texts of several or no widths: {contexts}")
    depth = {int(m[1]) for name in shapes if (m := re.search(r"\.transformer_blocks\.(\d+)\.", name))}
    inferred = {
        "sample_size": 64, "in_channels": inputs, "out_channels": outputs, "block_out_channels": channels,
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in down],
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in up],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if _has(shapes, "mid_block.") else None,
        "transformer_layers_per_block": len(depth), "cross_attention_dim": contexts.pop(),
        "attention_head_dim": HEADS, "norm_num_groups": _groups(channels), "norm_eps": 1e-5, "act_fn": "silu",
        "flip_sin_to_cos": True, "freq_shift": 0,
        "use_linear_projection": any(n.endswith(".proj_in.weight") and len(s) == 2 for n, s in shapes.items()),
        "time_embedding_dim": None if embedding == 4 * first else embedding,
    }  # fmt: skip
    told = (
        "sample_size",
        "attention_head_dim",
        "norm_num_groups",
        "norm_eps",
        "act_fn",
        "flip_sin_to_cos",
        "freq_shift",
    )
    config = _merged(part, inferred, said, told)
    _divides(part, config["attention_head_dim"], channels, "attention_head_dim")
    _divides(part, config["norm_num_groups"], channels, "norm_num_groups")
    return config


def vae_config(part: PartTensors, said: Arguments) -> dict[str, Any]:
    """Arguments of diffusers' AutoencoderKL, of which only the decoder has to be there."""
    shapes = part.shapes
    levels = _count(shapes, r"decoder\.up_blocks\.(\d+)\.")
    channels = [_shape(part, f"decoder.up_blocks.{level}.resnets.0.conv1.weight", 4)[0] for level in range(levels)][
        ::-1
    ]
    _, latent, *_ = _shape(part, "decoder.conv_in.weight", 4)
    image, *_ = _shape(part, "decoder.conv_out.weight", 4)
    inferred = {
        "in_channels": image, "out_channels": image, "latent_channels": latent, "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": _count(shapes, r"decoder\.up_blocks\.0\.resnets\.(\d+)\.") - 1,
        "mid_block_add_attention": _has(shapes, "decoder.mid_block.attentions."),
        "use_post_quant_conv": _has(shapes, "post_quant_conv."), "use_quant_conv": _has(shapes, "quant_conv."),
        "norm_num_groups": _groups(channels), "act_fn": "silu", "sample_size": 512,
    }  # fmt: skip
    config = _merged(part, inferred, said, ("norm_num_groups", "act_fn"))
    _divides(part, config["norm_num_groups"], channels, "norm_num_groups")
    return config


_ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu", "quick_gelu")


def _merged(part: PartTensors, inferred: dict[str, Any], said: Arguments, told: Sequence[str]) -> dict[str, Any]:
    """What shapes say, and of what they can't tell (``told``) what the file says."""
    told_here = {key: said[key] for key in told if said.get(key) is not None}
    for key, value in told_here.items():
        if not _sensible(key, value):
            raise CheckpointError(part.checkpoint.path, f"{key} of the {part.part.title} can't be {value!r}")
    return inferred | told_here


def _sensible(key: str, value: object) -> bool:
    """Whether a value is of its argument's kind; numbers that divide channels are checked against them later."""
    if key in ("act_fn", "hidden_act"):
        return value in _ACTIVATIONS
    if key.endswith("eps"):
        return isinstance(value, float) and 0 < value < 1
    if key == "flip_sin_to_cos":
        return isinstance(value, bool)
    if key == "sample_size":
        sides = value if isinstance(value, list) and len(value) == 2 else [value]
        return all(type(side) is int and 1 <= side <= MAX_SAMPLE_SIZE for side in sides)
    return isinstance(value, int | list)


def _shape(part: PartTensors, name: str, dimensions: int) -> tuple[int, ...]:
    weight = part.tensors.get(name)
    if weight is None:
        raise CheckpointError(part.checkpoint.path, "is missing", name)
    if len(weight.shape) != dimensions or 0 in weight.shape:
        raise CheckpointError(
            part.checkpoint.path, f"is {list(weight.shape)}, not of {dimensions} dimensions", weight.name
        )
    return weight.shape


def _count(shapes: Shapes, pattern: str) -> int:
    """How far the numbers go, from 0 without a gap, in the names that begin with ``pattern``."""
    numbers = {match[1] for name in shapes if (match := re.match(pattern, name))}
    return next(count for count in range(len(numbers) + 1) if str(count) not in numbers)


def _has(shapes: Shapes, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in shapes)


def _groups(channels: Sequence[int]) -> int:
    return math.gcd(GROUPS, *channels)


def _divides(part: PartTensors, divisor: object, numbers: Sequence[int], key: str) -> None:
    divisors = divisor if isinstance(divisor, list) else [divisor] * len(numbers)
    what = f"{key} of the {part.part.title} is {divisor!r}"
    if len(divisors) != len(numbers) or not all(isinstance(each, int) and each > 0 for each in divisors):
        raise CheckpointError(part.checkpoint.path, f"{what}, not a number above 0")
    if any(number % each for number, each in zip(numbers, divisors, strict=True)):
        hint = f"the file's metadata {METADATA_KEY!r} can say another"
        raise CheckpointError(part.checkpoint.path, f"{what}, which does not divide {list(numbers)}; {hint}")
