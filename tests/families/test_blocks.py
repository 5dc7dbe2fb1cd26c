"""Transformers some of their blocks at a time: put together they are the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdrpc.families.base import Component, ModuleSpec
from sdrpc.families.blocks import BLOCKS, STATE
from sdrpc.families.flux1 import TRANSFORMER as FLUX1
from sdrpc.families.flux2 import TRANSFORMER as FLUX2
from sdrpc.families.registry import FAMILIES
from sdrpc.families.sd3 import TRANSFORMER as SD3

FLUX = {
    "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 24,
}  # fmt: skip
MODELS: dict[str, tuple[Component, dict[str, Any], int]] = {
    "text beside the picture": (
        FLUX1, {**FLUX, "axes_dims_rope": [4, 6, 6], "pooled_projection_dim": 8, "guidance_embeds": False}, 4
    ),
    "text before the picture": (
        FLUX2, {**FLUX, "axes_dims_rope": [4, 4, 4, 4], "in_channels": 4, "guidance_embeds": False}, 4
    ),
    "no text behind the last": (
        SD3, {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16,
              "num_attention_heads": 2, "joint_attention_dim": 24, "caption_projection_dim": 32,
              "pooled_projection_dim": 8, "pos_embed_max_size": 8}, 3
    ),
}  # fmt: skip
"""By what their blocks give: configurations, and how many blocks there are."""


@pytest.mark.parametrize("name", MODELS)
def test_parts_are_the_whole(name: str) -> None:
    component, config, count = MODELS[name]
    random = torch.Generator().manual_seed(3)
    inputs = {"latents": torch.randn(1, 4, 4, 6, generator=random), "timestep": torch.tensor([0.4]),
              "context": torch.randn(2, 5, 24, generator=random)}  # fmt: skip
    if "pooled_projection_dim" in config:
        inputs["pooled"] = torch.randn(2, 8, generator=random)
    module, whole = ModuleSpec(component, config).build()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.1, generator=random)
        if component is SD3:
            module.pos_embed.pos_embed = torch.randn(1, 64, 32, generator=random)

    @torch.no_grad()
    def part(first: int, mark: int, **more: torch.Tensor) -> tuple[torch.Tensor, ...]:
        _, call = ModuleSpec(component, {**config, BLOCKS: [first, mark]}).build()
        found: tuple[torch.Tensor, ...] = call(module, **inputs, **more)
        return found

    with torch.no_grad():
        (wanted,) = whole(module, **inputs)
    for first, last in ((1, count), (count - 1, count), (1, 2), (1, count - 1)):
        state, change = part(0, first)
        assert change.shape[1] == state.shape[1] - 5, "of the picture alone"
        predicted, added = part(first, last, **{STATE: state}) if first < last else (wanted, state * 0)
        torch.testing.assert_close(predicted, wanted)
        assert added.shape == state.shape
        (again,) = part(last, last, **{STATE: state + added})
        torch.testing.assert_close(again, wanted, rtol=1e-4, atol=1e-4)
        (other,) = part(last, last, **{STATE: state})
        assert first == last or (other - wanted).abs().max() > 1e-3, "what was left out counts"


def test_which_families_have_blocks() -> None:
    without = {family.name for family in FAMILIES if not family.diffusion.blocks}
    assert without == {"sd1", "sd2", "sdxl", "ltx2"}
