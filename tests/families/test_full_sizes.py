"""Models at their published sizes, as names and shapes without any bytes, have the published configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sdrpc.checkpoints.checkpoint import Checkpoint
from sdrpc.families.base import ModuleSpec, find
from sdrpc.families.registry import FAMILIES
from sdrpc.ggml.types import BF16
from sdrpc.ggml.weight import Weight
from tools.checkpoints import FAMILIES as CHECKPOINTS
from tools.checkpoints.families import Component

QWEN3_4B = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
}  # fmt: skip

QWEN3_8B = QWEN3_4B | {"hidden_size": 4096, "intermediate_size": 12288}
MISTRAL = {
    "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1e9, "rms_norm_eps": 1e-5,
}  # fmt: skip


def flux2(heads: int, layers: int, single_layers: int, text: int, guidance: bool = False) -> dict[str, Any]:
    return {
        "in_channels": 128, "out_channels": 128, "num_layers": layers, "num_single_layers": single_layers,
        "attention_head_dim": 128, "num_attention_heads": heads, "joint_attention_dim": text, "mlp_ratio": 3.0,
        "timestep_guidance_channels": 256, "axes_dims_rope": [32, 32, 32, 32], "guidance_embeds": guidance,
    }  # fmt: skip


FLUX2_VAE = {
    "latent_channels": 32, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32,
    "use_quant_conv": True, "use_post_quant_conv": True, "batch_norm_eps": 1e-4, "patch_size": [2, 2],
}  # fmt: skip

PUBLISHED: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "z-image": (
        "zimage",
        {
            "diffusion": {
                "in_channels": 16, "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30,
                "cap_feat_dim": 2560, "axes_dims": [32, 48, 48],
            },
            "llm": QWEN3_4B,
        },
    ),
    "flux2-klein-4b": ("flux2-klein", {"diffusion": flux2(24, 5, 20, 7680), "llm": QWEN3_4B, "vae": FLUX2_VAE}),
    "flux2-klein-9b": ("flux2-klein", {"diffusion": flux2(32, 8, 24, 12288), "llm": QWEN3_8B, "vae": FLUX2_VAE}),
    "flux2-dev": ("flux2", {"diffusion": flux2(48, 8, 48, 15360, True), "llm": MISTRAL, "vae": FLUX2_VAE}),
}  # fmt: skip
"""By checkpoint: the family, and of its components' configurations (config.json of the published directories) what
their modules are made with."""


def no_bytes(*_: Any) -> Any:
    pytest.fail("names and shapes are enough")


def checkpoint(component: Component, whole: bool) -> Checkpoint:
    """A file of the component in its full size, in BF16: as a part of a whole one, or alone."""
    shapes = component.shapes()
    naming = component.whole if whole else component.alone
    names = {entry.name: entry.shape(shapes) for entry in naming(shapes)}
    return Checkpoint(Path("model"), {name: Weight(name, BF16, shape, no_bytes) for name, shape in names.items()})


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "alone"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_configurations_are_the_published_ones(name: str, whole: bool) -> None:
    family_name, wanted = PUBLISHED[name]
    family = next(family for family in FAMILIES if family.name == family_name)
    for made in CHECKPOINTS[name].of_size("full"):
        component = family.component(made.name)
        found = find(component, checkpoint(made, whole))
        assert found is not None, made.name
        assert made.name != "diffusion" or family.recognizes(found)
        config = component.configure(found, {})
        assert {key: config[key] for key in wanted.get(made.name, {})} == wanted.get(made.name, {})
        wanted_shapes = _parameters(ModuleSpec(component, config), made.name)
        assert found.take(wanted_shapes).keys() == wanted_shapes.keys()


def _parameters(module: ModuleSpec, name: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's parameters that a picture needs."""
    if name == "llm":
        module = ModuleSpec(module.component, {**module.config, "states": [module.config["num_hidden_layers"]]})
    with torch.device("meta"):
        built, _ = module.build()
    idle = module.component.idle
    return {name: tuple(p.shape) for name, p in built.named_parameters() if not name.startswith(idle)}
