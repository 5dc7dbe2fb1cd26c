"""What the transformers of FLUX.1 and of models made from it share: tokens, positions, sizes and names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...checkpoints.expressions import split, swap_halves
from ...ggml.weight import Weight
from .. import configs
from ..base import Config, Found
from ..keys import Rule, thirds

if TYPE_CHECKING:
    import torch

PATCH = 2
"""Latents on a side that make one token."""

# Configuration --------------------------------------------------------------------------------------------------------


def inferred(found: Found) -> dict[str, Any]:
    """Arguments that the classes have in common, from the shapes of the tensors."""
    inner, inputs = found.shape("x_embedder.weight", 2)
    outputs, _ = found.shape("proj_out.weight", 2)
    _, context = found.shape("context_embedder.weight", 2)
    (head,) = found.shape("transformer_blocks.0.attn.norm_q.weight", 1)
    if inner % head:
        raise found.error(f"heads of {head} do not divide its width of {inner}")
    return {
        "patch_size": 1, "in_channels": inputs, "out_channels": outputs,
        "num_layers": found.count("transformer_blocks."),
        "num_single_layers": found.count("single_transformer_blocks."),
        "attention_head_dim": head, "num_attention_heads": inner // head, "joint_attention_dim": context,
        "axes_dims_rope": configs.axes(head, 7, 16),
    }  # fmt: skip


def merged(found: Found, config: dict[str, Any], told: Config, axes: int = 3) -> dict[str, Any]:
    """The configuration with what only the file can say: how the positions of ``axes`` kinds share a head."""
    config = configs.merged(found, config, told, ("axes_dims_rope",))
    configs.check_axes(found, config, "axes_dims_rope", config["attention_head_dim"], axes)
    return config


def takes(key: str) -> Callable[[Mapping[str, Config]], int]:
    """A number of the diffusion model's configuration, for :class:`sdrpc.families.base.Joint`."""
    return lambda configs: int(configs["diffusion"][key])


# Tokens ---------------------------------------------------------------------------------------------------------------


def to_tokens(latents: torch.Tensor) -> torch.Tensor:
    """Latents (batch, channels, height, width) → (batch, height · width / 4, 4 · channels): 2×2 latents are a token."""
    batch, channels, height, width = latents.shape
    rows, columns = height // PATCH, width // PATCH
    squares = latents.reshape(batch, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(batch, rows * columns, channels * PATCH * PATCH)


def to_latents(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The reverse of :func:`to_tokens`: (batch, channels, height, width)."""
    batch, rows, columns = tokens.shape[0], height // PATCH, width // PATCH
    channels = tokens.shape[2] // PATCH**2
    squares = tokens.reshape(batch, rows, columns, channels, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(batch, channels, height, width)


def places(height: int, width: int, number: int = 0, top: int = 0, left: int = 0) -> torch.Tensor:
    """The position of each token of a picture of so many latents: (tokens, 3) of (``number``, row, column), rows and
    columns from ``top`` and ``left`` (in latents) on."""
    import torch

    rows, columns = height // PATCH, width // PATCH
    found = torch.zeros(rows, columns, 3)
    found[..., 0] = number
    found[..., 1] += torch.arange(rows)[:, None] + top // PATCH
    found[..., 2] += torch.arange(columns)[None] + left // PATCH
    return found.reshape(rows * columns, 3)


def beside(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Top and left of reference pictures of these heights and widths, which all have the number 1: each to the right of
    those before or below them, where that makes the smaller whole. As in stable-diffusion.cpp and ComfyUI."""
    found: list[tuple[int, int]] = []
    bottom = right = 0
    for height, width in sizes:
        top, left = (0, right) if height + bottom > width + right else (bottom, 0)
        bottom, right = max(bottom, top + height), max(right, left + width)
        found.append((top, left))
    return found


# Names ----------------------------------------------------------------------------------------------------------------


def _single(weight: Weight) -> tuple[Weight, ...]:
    """A single block's first matrix makes queries, keys, values (as wide as the model) and the MLP's input (four times
    as wide)."""
    rows = (weight.shape or (0,))[0]
    width = rows // 7
    return split(weight, [width, width, width, rows - 3 * width])


def _qkv(kinds: tuple[str, ...], source: str, target: str, names: tuple[str, str, str]) -> list[Rule]:
    return [(rf"{source}\.{kind}", [rf"{target}.{name}.{kind}" for name in names], thirds) for kind in kinds]


BOTH = ("weight", "bias")
DOUBLE, SINGLE = r"double_blocks\.(\d+)", r"single_blocks\.(\d+)"
DOUBLES, SINGLES = r"transformer_blocks.\1", r"single_transformer_blocks.\1"
_LINEAR = {
    rf"{DOUBLE}\.img_attn\.proj": f"{DOUBLES}.attn.to_out.0",
    rf"{DOUBLE}\.txt_attn\.proj": f"{DOUBLES}.attn.to_add_out",
    "txt_in": "context_embedder",
    "img_in": "x_embedder",
    r"final_layer\.linear": "proj_out",
}
_MLPS = {
    rf"{DOUBLE}\.img_mlp\.0": f"{DOUBLES}.ff.net.0.proj",
    rf"{DOUBLE}\.img_mlp\.2": f"{DOUBLES}.ff.net.2",
    rf"{DOUBLE}\.txt_mlp\.0": f"{DOUBLES}.ff_context.net.0.proj",
    rf"{DOUBLE}\.txt_mlp\.2": f"{DOUBLES}.ff_context.net.2",
    rf"{SINGLE}\.linear2": f"{SINGLES}.proj_out",
}  # fmt: skip


def linear(names: dict[str, str]) -> list[Rule]:
    """The rules for weights and biases of layers, from patterns (with one number or none) to the module's names."""
    return [(rf"{old}\.(weight|bias)", rf"{new}.\{old.count('(') + 1}") for old, new in names.items()]


def _swapped(weight: Weight) -> tuple[Weight, ...]:
    return (swap_halves(weight),)


LAST_NORM: tuple[Rule, ...] = tuple(
    (rf"final_layer\.adaLN_modulation\.1\.{kind}", f"norm_out.linear.{kind}", _swapped) for kind in BOTH
)
"""Black Forest Labs' final layer gives shift and scale, diffusers' scale and shift."""

COMMON: tuple[Rule, ...] = (
    *linear(_LINEAR),
    *_qkv(BOTH, rf"{DOUBLE}\.img_attn\.qkv", f"{DOUBLES}.attn", ("to_q", "to_k", "to_v")),
    *_qkv(BOTH, rf"{DOUBLE}\.txt_attn\.qkv", f"{DOUBLES}.attn", ("add_q_proj", "add_k_proj", "add_v_proj")),
    *(
        (rf"{DOUBLE}\.{stream}_attn\.norm\.{old}_norm\.(?:scale|weight)", f"{DOUBLES}.attn.{new}.weight")
        for stream, old, new in (
            ("img", "query", "norm_q"), ("img", "key", "norm_k"),
            ("txt", "query", "norm_added_q"), ("txt", "key", "norm_added_k"),
        )
    ),
    *(
        (rf"{SINGLE}\.norm\.{old}_norm\.(?:scale|weight)", f"{SINGLES}.attn.{new}.weight")
        for old, new in (("query", "norm_q"), ("key", "norm_k"))
    ),
)  # fmt: skip
"""From Black Forest Labs' names to those of diffusers' classes: what all of these transformers have."""

RULES: tuple[Rule, ...] = (
    *COMMON,
    *linear(_MLPS),
    *(
        (
            rf"{SINGLE}\.linear1\.{kind}",
            [
                rf"{SINGLES}.{name}.{kind}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            ],
            _single,
        )
        for kind in BOTH
    ),
)  # fmt: skip
"""What FLUX.1 and Chroma have besides."""

_EMBEDDERS = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
MODULATION: tuple[Rule, ...] = tuple(
    linear(
        {
            rf"{DOUBLE}\.img_mod\.lin": f"{DOUBLES}.norm1.linear",
            rf"{DOUBLE}\.txt_mod\.lin": f"{DOUBLES}.norm1_context.linear",
            rf"{SINGLE}\.modulation\.lin": f"{SINGLES}.norm.linear",
        }
        | {
            rf"{old}\.{layer}_layer": f"time_text_embed.{new}.linear_{number}"
            for old, new in _EMBEDDERS.items()
            for number, layer in enumerate(("in", "out"), 1)
        }
    )
)
"""What FLUX.1 has and Chroma has not: blocks that are told time and text by layers of their own."""

BLOCKS = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}
"""The lists of blocks, and what the configuration calls their lengths."""

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "net.", "")
