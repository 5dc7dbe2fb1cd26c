"""LTX-Video: what shapes and names tell, what the model is told about a prompt, and its autoencoder both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ltx_transformer_checkpoint_to_diffusers,
    convert_ltx_vae_checkpoint_to_diffusers,
)
from safetensors.torch import load_file, save_file

from sdrpc.checkpoints.checkpoint import Checkpoint
from sdrpc.diffusion.drawable import settings_of
from sdrpc.diffusion.predictions import prediction
from sdrpc.diffusion.request import Request
from sdrpc.diffusion.schedules import make_sigmas
from sdrpc.errors import CheckpointError, InvalidValue
from sdrpc.families.base import F32, Config, Found, Prompt, find
from sdrpc.families.components import film_ltx
from sdrpc.families.components.autoencoder import ENCODES
from sdrpc.families.components.film import FRAMES
from sdrpc.families.ltx import LTX_VIDEO, TRANSFORMER, conditions
from sdrpc.families.model import Model, ModelFiles, open_model
from sdrpc.families.registry import FAMILIES
from sdrpc.ggml.types import F16
from sdrpc.ggml.weight import Weight
from tools.checkpoints import FAMILIES as CHECKPOINTS
from tools.checkpoints import Made, make
from tools.checkpoints.families import Component

VERSIONS = ("ltx-video", "ltx-video-13b")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    return {name: make(name, tmp_path_factory.mktemp(name), form="parts") for name in VERSIONS}


def opened(files: dict[str, Path], **others: Path) -> Model:
    files = files | others
    return open_model(ModelFiles(diffusion_model=files["diffusion"], vae=files["vae"], t5xxl=files["t5xxl"]))


def part(family: str, name: str) -> Component:
    """Of full size."""
    return next(component for component in CHECKPOINTS[family].of_size("full") if component.name == name)


def in_a_file(component: Component, prefix: str = "") -> Checkpoint:
    """A checkpoint with the shapes of a component in its original names, and no numbers."""
    shapes = component.shapes()
    entries = {prefix + entry.name: entry.shape(shapes) for entry in component.alone(shapes)}
    return Checkpoint(Path("m"), {name: Weight(name, F16, shape, lambda *_: ()) for name, shape in entries.items()})


def found_in(component: Any, checkpoint: Checkpoint) -> Found:
    found = find(component, checkpoint)
    assert found is not None
    return found


def shapes_of(component: Any, config: Config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        module, _ = component.build(config)
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(
    ("family", "head", "layers", "scales"), [("ltx-video", 64, 28, [1, 1, 1, 1]), ("ltx-video-13b", 128, 48, [2, 2, 2])]
)
def test_published_models_are_told_by_their_shapes(family: str, head: int, layers: int, scales: list[int]) -> None:
    found = found_in(TRANSFORMER, in_a_file(part(family, "diffusion")))
    seen = {each.name: find(each.diffusion, found.checkpoint) for each in FAMILIES}
    assert [each.name for each in FAMILIES if (one := seen[each.name]) and each.recognizes(one)] == ["ltx-video"]
    config = TRANSFORMER.configure(found, {})
    assert (config["attention_head_dim"], config["num_layers"], config["caption_channels"]) == (head, layers, 4096)
    assert shapes_of(TRANSFORMER, config) == found.shapes
    vae = found_in(film_ltx.VAE, in_a_file(part(family, "vae")))
    config = film_ltx.VAE.configure(vae, {})
    assert shapes_of(film_ltx.VAE, config) == vae.shapes
    assert config["upsample_factor"] == scales
    assert (film_ltx.VAE.pixels(config), film_ltx.VAE.frames(config)) == (32, 8)
    with torch.device("meta"):
        wanted = part(family, "vae").build().config
    assert {name: wanted[name] for name in config} == {
        name: tuple(value) if isinstance(value, list) else value for name, value in config.items()
    }


@pytest.mark.parametrize("family", VERSIONS)
def test_names_become_those_of_diffusers_own_conversion(family: str) -> None:
    for name, ours, prefix, convert in (
        ("diffusion", TRANSFORMER, "", convert_ltx_transformer_checkpoint_to_diffusers),
        ("vae", film_ltx.VAE, "vae.", convert_ltx_vae_checkpoint_to_diffusers),
    ):
        file = in_a_file(part(family, name), prefix)
        theirs = convert({name: torch.empty(weight.shape, device="meta") for name, weight in file.tensors.items()})
        assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == found_in(ours, file).shapes


@pytest.mark.parametrize("family", VERSIONS)
def test_a_picture_is_encoded_as_by_diffusers_and_a_film_decoded(family: str, made: dict[str, Made]) -> None:
    theirs = made[family].component("vae")
    config = opened(made[family].files)["vae"].config
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 3, 32, 64, generator=generator) * 2 - 1
    latents = torch.randn(1, 128, 3, 1, 2, generator=generator)
    mean, deviation = (each[None, :, None, None, None] for each in (theirs.latents_mean, theirs.latents_std))
    with torch.no_grad():
        module, encode = film_ltx.build({**config, ENCODES: True})
        module.load_state_dict(theirs.state_dict())
        (told,) = encode(module, picture)
        _, encode_film = film_ltx.build({**config, ENCODES: True, FRAMES: 1})
        (first,) = encode_film(module, picture)
        _, decode = film_ltx.build(config)
        frames = decode(module, latents)
        wanted = theirs.encode(picture[:, :, None]).latent_dist
        level = torch.zeros(1) if config["timestep_conditioning"] else None
        film = theirs.decode(latents * deviation + mean, level).sample[0].transpose(0, 1)
    assert [len(each) for each in frames] == [1, 8, 8]
    torch.testing.assert_close(torch.cat(frames), film.clamp(-1, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first * deviation + mean, wanted.mean, rtol=1e-4, atol=1e-4)
    assert torch.equal(first[:, :, 0], told[:, :128])
    spread = torch.exp(0.5 * told[:, 128:]) * deviation[:, :, 0]
    torch.testing.assert_close(spread, wanted.std[:, :, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frames", [1, 7, 21])
def test_levels_of_noise_are_those_of_diffusers(frames: int) -> None:
    """Its pipeline's: evenly spaced, shifted by the number of tokens of all frames, and stretched to 0.1."""
    scheduler = CHECKPOINTS["ltx-video"].scheduler()
    tokens = 352  # 704×512
    shift = 0.95 + (frames * tokens - 1024) * (2.05 - 0.95) / (4096 - 1024)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 20, 20), mu=shift)
    sigmas = make_sigmas("ltx2", 20, prediction("sd3_flow"), tokens=tokens, frames=frames)
    np.testing.assert_allclose(sigmas, scheduler.sigmas.numpy(), rtol=1e-5)


# What is told ---------------------------------------------------------------------------------------------------------


class Encoder:
    """Stands for T5: hidden states that are the tokens' numbers."""

    pictures: tuple[F32, ...] = ()

    def __call__(self, component: str, inputs: Any, **options: Any) -> tuple[F32, ...]:
        assert component == "t5xxl"
        assert inputs.keys() == {"ids"}, "T5 reads the padding as well"
        return (np.repeat(inputs["ids"][..., None] + 7.0, 4, axis=2).astype(np.float32),)

    def config(self, component: str) -> Config:
        assert component == "vae"
        return {"patch_size": 4, "decoder_spatio_temporal_scaling": [True, True, True]}

    def tokenizer(self, component: str) -> None:
        return None

    def has(self, component: str) -> bool:
        raise AssertionError


def test_padding_is_read_and_not_seen_and_positions_are_seconds_and_pixels() -> None:
    told = conditions(Encoder(), Prompt("a lovely cat", 64, 96, -1, 3.5, fps=25))
    shapes = {"context": (1, 128, 4), "mask": (1, 128), "pace": (1, 3)}
    assert {name: each.shape for name, each in told.items()} == shapes
    used = int((told["mask"] == 0).sum())
    assert told["mask"].tolist() == [[0.0] * used + [-10000.0] * (128 - used)]
    assert told["context"][0, used:].tolist() == [[7.0] * 4] * (128 - used)
    np.testing.assert_array_equal(told["pace"], np.array([[8 / 25, 32, 32]], np.float32))
    longer = conditions(Encoder(), Prompt("cat " * 128, 64, 96, -1, 3.5, fps=50))
    assert longer["context"].shape == (1, 256, 4)
    assert longer["pace"][0, 0] == np.float32(8 / 50)


def test_what_a_request_means(made: dict[str, Made]) -> None:
    model = opened(made["ltx-video"].files)
    assert (model.size, model.frames, model.defaults.frames, model.defaults.fps) == ((704, 512), 8, 161, 25)
    settings = settings_of(model, Request("a cat", width=100, height=33, video_frames=16), video=True)
    assert (settings.width, settings.height, settings.video_frames, settings.scheduler) == (128, 64, 9, "ltx2")


# Wrong files ----------------------------------------------------------------------------------------------------------


def test_a_picture_to_end_with_is_refused(made: dict[str, Made]) -> None:
    shown = Request("a cat", init_image=np.zeros((64, 64, 3), np.uint8), end_image=np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(InvalidValue, match="LTX-Video is shown what a film begins with, no end"):
        settings_of(opened(made["ltx-video"].files), shown, video=True)


@pytest.mark.parametrize(
    ("part", "name", "shape", "reason"),
    [
        ("diffusion", "patchify_proj.weight", (100, 128), "32 heads of 3 do not make up its width of 100"),
        ("diffusion", "proj_out.weight", (64, 128), "takes 128 channels and gives 64"),
        ("diffusion", "caption_projection.linear_1.weight", (128, 48), "t5xxl gives 64 channels, but diffusion .* 48"),
        ("vae", "decoder.up_blocks.0.res_blocks.0.per_channel_scale1", (32, 1, 1), r"noise .* \(LTX-Video 0\.9\.1\)"),
        ("vae", "decoder.conv_out.conv.weight", (50, 8, 3, 3, 3), "gives 50 channels, which are no squares of pixels"),
        ("vae", "per_channel_statistics.mean-of-means", (16,), "is of 16 channels, but latents have 128"),
        ("vae", "decoder.up_blocks.2.conv.conv.weight", (99, 32, 3, 3, 3), "level 1 makes 99 channels of 32"),
        ("vae", "decoder.conv_in.conv.weight", (16, 128, 3, 3, 3), "but it begins with 16"),
    ],
)  # fmt: skip
def test_parts_that_do_not_belong_are_refused(
    part: str, name: str, shape: tuple[int, ...], reason: str, made: dict[str, Made], tmp_path: Path
) -> None:
    files = made["ltx-video"].files
    save_file(load_file(files[part]) | {name: torch.zeros(shape)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=reason):
        opened(files, **{part: tmp_path / "other.safetensors"})


def test_an_encoder_that_joins_other_places_is_refused(made: dict[str, Made], tmp_path: Path) -> None:
    files = made["ltx-video-13b"].files
    wrong = {"encoder.down_blocks.1.conv.conv.weight": torch.zeros(5, 8, 3, 3, 3)}
    save_file(load_file(files["vae"]) | wrong, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"channels join .* places, not 2, 4 or 8"):
        opened(files, vae=tmp_path / "other.safetensors")


def test_a_decoder_that_looks_only_back_is_refused(made: dict[str, Made]) -> None:
    found = opened(made["ltx-video"].files)["vae"].found
    with pytest.raises(CheckpointError, match="decodes without looking ahead"):
        film_ltx.VAE.configure(found, {"decoder_causal": True})


def test_an_autoencoder_of_other_films_is_refused(made: dict[str, Made], tmp_path: Path) -> None:
    other = make("wan", tmp_path / "wan", form="parts").files["vae"]
    with pytest.raises(CheckpointError, match="has no VAE of LTX-Video, which LTX-Video needs"):
        opened(made["ltx-video"].files, vae=other)


def test_loras_are_found_by_both_kinds_of_names() -> None:
    (original, theirs) = TRANSFORMER.namings
    names = ["transformer_blocks.3.attn1.to_q.weight", "transformer_blocks.0.attn2.norm_k.weight", "proj_in.weight"]
    assert original.originals(names) == {
        names[0]: (names[0],), "transformer_blocks.0.attn2.k_norm.weight": (names[1],),
        "patchify_proj.weight": (names[2],),
    }  # fmt: skip
    assert LTX_VIDEO.diffusion is TRANSFORMER
    assert theirs.anchor.startswith("time_embed.")
