"""Models from files: what is inferred, which parts go together, what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from sdrpc.checkpoints.checkpoint import Checkpoint
from sdrpc.errors import CheckpointError, MissingComponent
from sdrpc.families.base import find
from sdrpc.families.components.unet import dotted
from sdrpc.families.configs import METADATA_KEY
from sdrpc.families.model import Model, ModelComponent, ModelFiles, open_model
from sdrpc.families.sd1 import SD1
from sdrpc.ggml.types import F16
from sdrpc.ggml.weight import Weight

Weights = dict[str, Any]
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."


def no_bytes(*_: Any) -> Any:
    pytest.fail("names and shapes are enough")


def saved(path: Path, weights: Weights, config: object = None) -> Path:
    save_file(weights, path, None if config is None else {METADATA_KEY: json.dumps(config)})
    return path


def only(weights: Weights, prefix: str, keep: bool = True) -> Weights:
    """The tensors under a prefix, with it or without."""
    return {n if keep else n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}


def built(component: ModelComponent) -> tuple[Any, Any]:
    options = {"outputs": ["hidden"], "skip": 1, "final_norm": True} if component.name == "clip_l" else {}
    return component.module(**options).build()


def fits(model: Model) -> None:
    """Every parameter of the modules is in the files, in its shape."""
    for component in model.components.values():
        module, _ = built(component)
        wanted = {name: tuple(p.shape) for name, p in module.named_parameters() if "text_projection" not in name}
        assert component.found.take(wanted).keys() == wanted.keys()


def test_a_whole_model(tiny: Path) -> None:
    model = open_model(ModelFiles(tiny))
    fits(model)
    assert (model.family, model.defaults.prediction, model.scale) == (SD1, "eps", 0.18215)
    config = model["diffusion"].config
    assert config["block_out_channels"] == [32, 64, 128]
    assert config["down_block_types"] == [
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ]
    taken = [weight for component in model.components.values() for weight in component.found.tensors.values()]
    assert model.unused(taken) == {}
    assert model.unused([]) == {}, "nothing was drawn"
    everything = model.unused(next(iter(part.found.tensors.values())) for part in model.components.values())[tiny]
    assert f"{UNET}out.0.bias" in everything
    assert not any(name.startswith(f"{VAE}encoder") for name in everything), "it belongs to the VAE"


def test_configurations_are_those_of_sd_1_5(maker: ModuleType) -> None:
    """What is inferred for the full-size model builds the modules that Hugging Face's own configurations build."""
    entries = {e.name: Weight(e.name, F16, e.shape, no_bytes) for e in maker.entries(maker.SIZES["full"])}
    file = Checkpoint(Path("sd15.safetensors"), entries)
    found = {c: find(c, file) for c in SD1.components}
    configs = {c.name: c.configure(its, {}) for c, its in found.items() if its is not None}
    del configs["clip_l"]["eos_token_id"]
    with torch.device("meta"):
        theirs = {
            "diffusion": UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8),
            "vae": AutoencoderKL(
                down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                block_out_channels=[128, 256, 512, 512], layers_per_block=2,
            ),
            "clip_l": CLIPTextModel(
                CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
            ),
        }  # fmt: skip
        ours = {
            "diffusion": UNet2DConditionModel(**configs["diffusion"]),
            "vae": AutoencoderKL(**configs["vae"]),
            "clip_l": CLIPTextModel(CLIPTextConfig(**configs["clip_l"])),
        }
    for part, module in ours.items():
        assert {n: p.shape for n, p in module.named_parameters()} == {
            n: p.shape for n, p in theirs[part].named_parameters()
        }
        assert repr(module) == repr(theirs[part])


def test_a_file_with_the_averages_of_a_training_alone(tiny: Path, tiny_weights: Weights, tmp_path: Path) -> None:
    """Their names have no dots. Where both are there, it is the others that count."""
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): weight
        for name, weight in only(tiny_weights, UNET).items()
    }
    others = {name: weight for name, weight in tiny_weights.items() if not name.startswith(UNET)}
    usual = open_model(ModelFiles(tiny))["diffusion"].found.tensors
    model = open_model(ModelFiles(saved(tmp_path / "ema.safetensors", others | averages)))
    fits(model)
    found = model["diffusion"].found.tensors
    assert {name: bytes(w.data()) for name, w in found.items()} == {name: bytes(w.data()) for name, w in usual.items()}
    zeros = {name: torch.zeros_like(weight) for name, weight in averages.items()}
    both = open_model(ModelFiles(saved(tmp_path / "both.safetensors", tiny_weights | zeros)))["diffusion"].found.tensors
    assert any(any(w.data()) for w in both.values())


def test_names_without_dots(maker: ModuleType) -> None:
    """Of the full-size model, which has numbers of two digits, and of XL's, with its further layers."""
    names = [e.name.removeprefix(UNET) for e in maker.entries(maker.SIZES["full"]) if e.name.startswith(UNET)]
    names += ["label_emb.0.0.weight", "label_emb.0.2.bias", "input_blocks.7.1.transformer_blocks.9.ff.net.2.bias"]
    names += ["input_blocks.8.1.transformer_blocks.11.attn2.to_out.0.weight", "time_embed.cond_proj.weight"]
    assert [dotted(name.replace(".", "")) for name in names] == names


def test_parts_from_files_of_their_own(tiny_weights: Weights, tmp_path: Path) -> None:
    """With and without the prefixes that they have in a whole model."""
    for keep in (True, False):
        files = ModelFiles(
            diffusion_model=saved(tmp_path / f"u{keep}.safetensors", only(tiny_weights, UNET, keep)),
            vae=saved(tmp_path / f"v{keep}.safetensors", only(tiny_weights, VAE, keep)),
            clip_l=saved(tmp_path / f"c{keep}.safetensors", only(tiny_weights, TEXT, keep)),
        )
        fits(open_model(files))


def test_a_part_of_its_own_goes_first(tiny: Path, tiny_weights: Weights, tmp_path: Path) -> None:
    other = saved(tmp_path / "vae.safetensors", only(tiny_weights, VAE), {"scaling_factor": 0.5})
    model = open_model(ModelFiles(tiny, vae=other))
    assert model.scale == 0.5
    assert model["vae"].found.checkpoint.path == other
    assert model["diffusion"].found.checkpoint.path == tiny


@pytest.mark.parametrize("form", ["gguf", "diffusers"])
def test_other_forms_give_the_same_model(
    form: str, maker: ModuleType, tiny: Path, tiny_weights: Weights, tmp_path: Path
) -> None:
    path = tmp_path / ("model.gguf" if form == "gguf" else "model")
    if form == "gguf":
        maker.write_gguf(path, tiny_weights, None)
    else:
        maker.write_diffusers(path, tiny_weights)
    model, reference = open_model(ModelFiles(path)), open_model(ModelFiles(tiny))
    fits(model)
    for name, component in model.components.items():
        expected = reference[name]
        assert component.config == expected.config
        for key, weight in component.found.tensors.items():
            assert bytes(weight.data()) == bytes(expected.found.tensors[key].data())


def test_metadata_says_what_shapes_cannot(tiny_weights: Weights, tmp_path: Path) -> None:
    said = {
        "prediction": "v", "scaling_factor": 0.25, "unet": {"attention_head_dim": 4, "norm_num_groups": 16},
        "text_encoder": {"num_attention_heads": 2, "hidden_size": 99}, "vae": {"norm_num_groups": 8},
    }  # fmt: skip
    model = open_model(ModelFiles(saved(tmp_path / "a.safetensors", tiny_weights, said)))
    assert (model.defaults.prediction, model.scale) == ("v", 0.25)
    unet, text = model["diffusion"].config, model["clip_l"].config
    assert (unet["attention_head_dim"], unet["norm_num_groups"]) == (4, 16)
    assert (text["num_attention_heads"], text["hidden_size"]) == (2, 64)
    assert model["vae"].config["norm_num_groups"] == 8


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"prediction": "flow"}, "one of eps, v"),
        ({"unet": {"attention_head_dim": 5}}, "does not divide"),
        ({"unet": {"norm_num_groups": 0}}, "above 0"),
        ({"vae": {"norm_num_groups": 7}}, "does not divide"),
        ({"text_encoder": {"num_attention_heads": "many"}}, "can't be 'many'"),
        ({"unet": {"act_fn": "__import__"}}, "act_fn of the diffusion model can't be"),
        ({"unet": {"attention_head_dim": [2, 2]}}, "above 0"),
        ({"vae": {"act_fn": 1}}, "can't be 1"),
        ({"unet": {"sample_size": 0}}, "sample_size of the diffusion model can't be 0"),
        ({"unet": {"sample_size": 1 << 40}}, "sample_size"),
        ({"unet": {"sample_size": True}}, "sample_size"),
        ({"unet": {"sample_size": [16]}}, "sample_size"),
        ({"unet": {"sample_size": [16, "16"]}}, "sample_size"),
        ({"scaling_factor": "x"}, "not understood"),
        ({"unet": 3}, "not understood"),
        ([1], "not understood"),
        ({"scaling_factor": 10**400}, "not understood"),
        ({"scaling_factor": 0}, "not understood: scaling_factor is 0"),
        ({"scaling_factor": float("nan")}, "not understood: scaling_factor is nan"),
        ({"shift_factor": float("-inf")}, "not understood: shift_factor is -inf"),
        ({"latent_rgb_factors": 1}, "not understood"),
        ({"latent_rgb_factors": [[0, 0]] * 4}, "finite numbers, for each channel"),
        ({"latent_rgb_factors": [[0, 0, "nan"]] * 4}, "finite numbers, for each channel"),
        ({"latent_rgb_factors": [[0, 0, 10**400]] * 4}, "not understood"),
        ({"latent_rgb_factors": [[0, 0, 0]] * 4, "latent_rgb_factors_bias": None}, "not understood"),
        ({"latent_rgb_factors": [[0, 0, 0]] * 5}, "of 5 channels, but its latents have 4"),
    ],
)
def test_metadata_that_makes_no_sense(said: object, reason: str, tiny_weights: Weights, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", tiny_weights, said)
    with pytest.raises(CheckpointError, match=reason):
        open_model(ModelFiles(path))


@pytest.mark.parametrize(
    ("said", "size"), [({}, (512, 512)), ({"sample_size": 16}, (128, 128)), ({"sample_size": [32, 16]}, (128, 256))]
)
def test_the_size_that_a_model_was_trained_at(
    said: dict[str, Any], size: tuple[int, int], tiny_weights: Weights, tmp_path: Path
) -> None:
    """Latents, height before width as diffusers has them; the tiny VAE makes 8 pixels of one."""
    assert open_model(ModelFiles(saved(tmp_path / "a.safetensors", tiny_weights, {"unet": said}))).size == size


def without_middle(weights: Weights) -> Weights:
    return {name: weight for name, weight in weights.items() if "middle_block" not in name}


def narrow_time(weights: Weights) -> Weights:
    """A time embedding of another width than four times the first level's."""

    def changed(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name.startswith(f"{UNET}time_embed"):
            return weight[:96, :96] if name.endswith("2.weight") else weight[:96]
        return weight[:, :96] if name.endswith("emb_layers.1.weight") else weight

    return {name: changed(name, weight).clone() for name, weight in weights.items()}


@pytest.mark.parametrize("change", [without_middle, narrow_time])
def test_unusual_members_of_the_family(
    change: Callable[[Weights], Weights], tiny_weights: Weights, tmp_path: Path
) -> None:
    fits(open_model(ModelFiles(saved(tmp_path / "a.safetensors", change(tiny_weights)))))


def test_other_sizes(maker: ModuleType, tmp_path: Path) -> None:
    """Other depths, levels that attend, and widths."""
    for number, changes in enumerate(
        (
            {"unet_levels": (1, 2), "attends": 1},
            {"unet_layers": 2, "text_layers": 1},
            {"unet_levels": (1, 1, 2), "attends": 3},
        )
    ):
        maker.SIZES["other"] = replace(maker.SIZES["tiny"], **changes)
        fits(open_model(ModelFiles(saved(tmp_path / f"{number}.safetensors", maker.tensors("other")))))


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("model.diffusion_model.nerf_blocks.0.param_generator.weight", "Chroma Radiance"),
        ("caption_projection.0.linear.weight", "HiDream"),
        ("lora_unet_down_blocks_0.lora_up.weight", "a LoRA, .* by <lora:NAME:1> in a prompt"),
        ("control_model.input_hint_block.0.weight", "a ControlNet, .* by control_net"),
        ("emb_params", "a learnt word .* by its name in a prompt"),
        ("model.1.sub.0.RDB1.conv1.0.weight", "a network that enlarges pictures, .* by upscale_model"),
        ("ip_adapter.1.to_k_ip.weight", "an IP-Adapter"),
    ],
)
def test_other_families_are_refused_by_name(name: str, family: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", {name: torch.zeros(1)})
    with pytest.raises(CheckpointError, match=family):
        open_model(ModelFiles(path))


def test_parts_that_were_not_needed_are_not_unused(tiny_weights: Weights, tmp_path: Path) -> None:
    """Such as what decodes sound, in a picture of LTX-2."""
    path = saved(tmp_path / "a.safetensors", tiny_weights | {"stray": torch.zeros(1)})
    model = open_model(ModelFiles(path))
    assert model.unused(model["diffusion"].found.tensors.values()) == {path: ["stray"]}


def test_files_that_the_model_has_no_use_for_are_named(
    tiny: Path, tiny_weights: Weights, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(tmp_path / "t5.safetensors", only(tiny_weights, TEXT))
    open_model(ModelFiles(tiny, clip_l=path, t5xxl=path))
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: Stable Diffusion 1.x has no use for it (t5xxl)"
    ]


def test_models_of_other_inputs_are_refused_by_name(tiny_weights: Weights, tmp_path: Path) -> None:
    name = f"{UNET}input_blocks.0.0.weight"
    path = saved(tmp_path / "a.safetensors", tiny_weights | {name: torch.zeros(32, 8, 3, 3)})
    with pytest.raises(CheckpointError, match="InstructPix2Pix"):
        open_model(ModelFiles(path))


def test_parts_that_are_missing(tiny_weights: Weights, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", only(tiny_weights, UNET))
    with pytest.raises(MissingComponent, match=r"a\.safetensors: has no CLIP-L text encoder.*\(clip_l\)"):
        open_model(ModelFiles(path))
    with pytest.raises(MissingComponent, match=r"clip_l or model"):
        open_model(ModelFiles(diffusion_model=path))
    with pytest.raises(MissingComponent, match=r"no diffusion model.*diffusion_model or model"):
        open_model(ModelFiles(vae=path))
    text = saved(tmp_path / "text.safetensors", only(tiny_weights, TEXT))
    with pytest.raises(CheckpointError, match=r"has no VAE.*what it has: diffusion model"):
        open_model(ModelFiles(path, clip_l=text, vae=path))


def test_parts_that_do_not_fit(maker: ModuleType, tiny_weights: Weights, tmp_path: Path) -> None:
    maker.SIZES["wider"] = replace(maker.SIZES["tiny"], text=128)
    text = saved(tmp_path / "text.safetensors", only(maker.tensors("wider"), TEXT))
    path = saved(tmp_path / "a.safetensors", tiny_weights)
    with pytest.raises(CheckpointError, match="clip_l gives 128 channels, but diffusion takes 64"):
        open_model(ModelFiles(path, clip_l=text))


def test_numbers_in_names_cannot_make_a_model_huge(tiny_weights: Weights, tmp_path: Path) -> None:
    strangers = {
        f"{UNET}input_blocks.1.0.in_layers.{'9' * 5000}.weight", f"{UNET}input_blocks.{'9' * 5000}.0.op.weight",
        f"{VAE}decoder.up.999999999.block.0.conv1.weight", f"{TEXT}encoder.layers.999999999.mlp.fc1.weight",
        f"{VAE}decoder.up.0.block.{'9' * 5000}.conv1.weight",
    }  # fmt: skip
    path = saved(tmp_path / "a.safetensors", tiny_weights | {name: torch.zeros(1) for name in strangers})
    model = open_model(ModelFiles(path))
    fits(model)
    assert len(model["clip_l"].config) < 20
    assert model["clip_l"].config["num_hidden_layers"] == 2
