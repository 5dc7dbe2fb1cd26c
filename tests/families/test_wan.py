"""Wan: what shapes and names tell, what the model is told about a prompt, and its autoencoder both ways."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from sdrpc.checkpoints.checkpoint import Checkpoint
from sdrpc.diffusion.drawable import settings_of
from sdrpc.diffusion.request import Request
from sdrpc.errors import CheckpointError, InvalidValue, MissingComponent
from sdrpc.families.base import F32, Config, Found, Prompt, find
from sdrpc.families.components import film, t5, umt5
from sdrpc.families.components.autoencoder import ENCODES
from sdrpc.families.model import ModelFiles, open_model
from sdrpc.families.wan import TRANSFORMER, conditions, recognizes
from sdrpc.ggml.types import F16
from sdrpc.ggml.weight import Weight
from sdrpc.prompts import umt5_tokenizer
from tools.checkpoints import FAMILIES, Made, make, names
from tools.checkpoints.families import AutoencoderKLWan, Component, saved_tensors
from tools.checkpoints.tokenizers import umt5_tokenizer as transformers_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make("wan", tmp_path_factory.mktemp("wan"), form="parts")


def opened(files: dict[str, Path], **others: Path) -> Any:
    files = files | others
    return open_model(ModelFiles(diffusion_model=files["diffusion"], vae=files["vae"], t5xxl=files["t5xxl"]))


def in_a_file(component: Component) -> Checkpoint:
    """A checkpoint with the shapes of a component in its original names, and no numbers."""
    shapes = component.shapes()
    entries = {entry.name: entry.shape(shapes) for entry in component.alone(shapes)}
    return Checkpoint(Path("m"), {name: Weight(name, F16, shape, lambda *_: ()) for name, shape in entries.items()})


def part(name: str, size: str) -> Component:
    return next(component for component in FAMILIES["wan"].of_size(size) if component.name == name)


def found_in(component: Any, checkpoint: Checkpoint) -> Found:
    found = find(component, checkpoint)
    assert found is not None
    return found


@pytest.mark.parametrize(("size", "heads", "layers", "inner"), [("full", 40, 40, 13824), ("small", 12, 30, 8960)])
def test_published_models_are_told_by_their_shapes(size: str, heads: int, layers: int, inner: int) -> None:
    found = found_in(TRANSFORMER, in_a_file(part("diffusion", size)))
    assert recognizes(found)
    config = TRANSFORMER.configure(found, {})
    assert (config["num_attention_heads"], config["num_layers"], config["ffn_dim"]) == (heads, layers, inner)
    assert (config["in_channels"], config["text_dim"], config["cross_attn_norm"]) == (16, 4096, True)
    with torch.device("meta"):
        module, _ = TRANSFORMER.build(config)
    assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == found.shapes


def residual() -> Any:
    """2.2's autoencoder."""
    return AutoencoderKLWan(
        base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
        scale_factor_spatial=16, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
        temperal_downsample=[False, True, True],
    )  # fmt: skip


RESIDUAL = Component("vae", "vae", residual, names.film_vae, names.film_vae)


@pytest.mark.parametrize("component", [part("vae", "full"), part("vae", "tiny"), RESIDUAL])
def test_an_autoencoder_is_told_by_its_shapes(component: Component) -> None:
    found = found_in(film.VAE, in_a_file(component))
    config = film.VAE.configure(found, {})
    with torch.device("meta"):
        module, _ = film.build(config)
        wanted = component.build().config
    assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == found.shapes
    for key in ("dim_mult", "num_res_blocks", "temperal_downsample", "scale_factor_spatial", "scale_factor_temporal"):
        assert list(np.atleast_1d(config[key])) == list(np.atleast_1d(wanted[key])), key


def test_names_become_those_of_diffusers_own_conversion() -> None:
    """Wan 2.1's; of its autoencoder diffusers' leaves one kind of name out in part, shortcuts of the encoder."""
    of_pictures = next(c for c in FAMILIES["wan2.1-i2v"].of_size("full") if c.name == "diffusion")
    for component, ours, convert in (
        (part("diffusion", "small"), TRANSFORMER, convert_wan_transformer_to_diffusers),
        (of_pictures, TRANSFORMER, convert_wan_transformer_to_diffusers),
        (part("vae", "full"), film.VAE, convert_wan_vae_to_diffusers),
    ):
        file = in_a_file(component)
        theirs = convert({name: torch.empty(weight.shape, device="meta") for name, weight in file.tensors.items()})
        assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == found_in(ours, file).shapes


def test_a_picture_is_encoded_as_by_diffusers_and_back(made: Made) -> None:
    theirs = made.component("vae")
    config = opened(made.files)["vae"].config
    picture = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        module, encode = film.build({**config, ENCODES: True})
        module.load_state_dict(theirs.state_dict())
        (told,) = encode(module, picture)
        _, decode = film.build(config)
        (back,) = decode(module, told[:, :16])
        wanted = theirs.encode(picture[:, :, None]).latent_dist
        mean, deviation = (torch.tensor(theirs.config[key])[:, None, None] for key in ("latents_mean", "latents_std"))
        decoded = theirs.decode(wanted.mean).sample[:, :, 0]
    torch.testing.assert_close(told[:, :16] * deviation + mean, wanted.mean[:, :, 0], rtol=1e-4, atol=1e-4)
    spread = torch.exp(0.5 * told[:, 16:]) * deviation
    torch.testing.assert_close(spread, wanted.std[:, :, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(back, decoded, rtol=1e-4, atol=1e-4)


def test_squares_of_pixels_are_those_of_diffusers() -> None:
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify

    pixels = torch.rand(1, 3, 2, 8, 6)
    squares = patchify(pixels, 2)
    assert torch.equal(film._squares(pixels, 2), squares)
    assert torch.equal(film._pixels(squares, 2), unpatchify(squares, 2)[0].transpose(0, 1))


# Prompts --------------------------------------------------------------------------------------------------------------


class Encoder:
    """Stands for UMT5: hidden states that depend on token and mask alone."""

    def __init__(self) -> None:
        self.read: list[tuple[NDArray[Any], NDArray[Any]]] = []

    def __call__(self, component: str, inputs: Any, **options: Any) -> tuple[F32, ...]:
        assert component == "t5xxl"
        self.read.append((inputs["ids"], inputs["mask"]))
        return (np.sin(inputs["ids"][..., None] + np.arange(4)).astype(np.float32) + 2,)

    def config(self, component: str) -> Config:
        raise AssertionError

    def has(self, component: str) -> bool:
        raise AssertionError

    pictures: tuple[F32, ...] = ()

    def tokenizer(self, component: str) -> None:
        raise AssertionError


def test_padding_is_masked_and_zero() -> None:
    encoder = Encoder()
    told = conditions(encoder, Prompt("a  lovely\n&amp;amp; small cat ", 64, 64, -1, 3.5))
    ((ids, mask),) = encoder.read
    wanted = transformers_tokenizer()("a lovely & small cat").input_ids
    assert ids[0, : len(wanted)].tolist() == wanted
    assert not ids[0, len(wanted) :].any()
    assert mask.tolist() == [[1] * len(wanted) + [0] * (512 - len(wanted))]
    context = told["context"]
    assert context.shape == (1, 512, 4)
    assert context.dtype == np.float32
    assert context[0, : len(wanted)].all()
    assert not context[0, len(wanted) :].any()


def test_weights_change_what_they_stand_at() -> None:
    plain = conditions(Encoder(), Prompt("cat a", 64, 64, -1, 3.5))["context"][0]
    heavy = conditions(Encoder(), Prompt("(cat:1.5) a", 64, 64, -1, 3.5))["context"][0]
    ratio = (heavy[:2] / plain[:2]).mean(axis=1)
    assert ratio[0] / ratio[1] == pytest.approx(1.5, rel=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a lovely cat",
        "色调艳丽，过曝，静态",
        "Ünïcode  naïve",
        "日本語 текст 🐱",
        "① Ａ ½",
    ],
)
def test_tokens_are_those_of_the_published_tokenizer(text: str) -> None:
    assert umt5_tokenizer().encode(text, add_special_tokens=False).ids == transformers_tokenizer()(text).input_ids[:-1]
    assert umt5_tokenizer().get_vocab_size() == 256300


# Wrong files ----------------------------------------------------------------------------------------------------------


def test_umt5_in_wans_own_names_is_read_as_the_same(made: Made, tmp_path: Path) -> None:
    inner = {
        "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding", "layer.0.layer_norm": "norm1",
        "layer.1.layer_norm": "norm2", "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
        "layer.1.DenseReluDense.wi_1": "ffn.fc1", "layer.1.DenseReluDense.wo": "ffn.fc2", "shared": "token_embedding",
        "encoder.final_layer_norm": "norm",
    } | {f"layer.0.SelfAttention.{letter}": f"attn.{letter}" for letter in "qkvo"}  # fmt: skip
    renamed = {}
    for name, tensor in load_file(made.files["t5xxl"]).items():
        original = name.replace("encoder.block.", "blocks.")
        for theirs, ours in inner.items():
            original = original.replace(theirs, ours)
        renamed[original] = tensor
    renamed.pop("encoder.embed_tokens.weight", None)
    save_file(renamed, tmp_path / "models_t5.safetensors")
    usual, other = opened(made.files), opened(made.files, t5xxl=tmp_path / "models_t5.safetensors")
    assert other["t5xxl"].config == usual["t5xxl"].config
    assert other["t5xxl"].found.shapes == usual["t5xxl"].found.shapes


def test_a_model_that_sees_pictures_needs_what_it_sees_them_with(tmp_path: Path) -> None:
    files = make("wan2.1-i2v", tmp_path, form="parts").files
    files["diffusion_model"] = files.pop("diffusion")
    shown = Request("a cat", init_image=np.zeros((64, 64, 3), np.uint8), video_frames=5)
    assert settings_of(open_model(ModelFiles(**files)), shown, video=True).video_frames == 5
    broken = load_file(files["clip_vision"]) | {"vision_model.embeddings.position_embedding.weight": torch.zeros(9, 80)}
    save_file(broken, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="has 9 places, which are no square and one more"):
        open_model(ModelFiles(**files | {"clip_vision": tmp_path / "other.safetensors"}))
    both = load_file(files["diffusion_model"]) | {"img_emb.emb_pos": torch.zeros(1, 513, 80)}
    save_file(both, tmp_path / "both.safetensors")
    with pytest.raises(CheckpointError, match="clip_vision gives 514 places of two pictures, but diffusion takes 513"):
        open_model(ModelFiles(**files | {"diffusion_model": tmp_path / "both.safetensors"}))
    del files["clip_vision"]
    with pytest.raises(MissingComponent, match=r"no CLIP vision model.* \(clip_vision or model\)"):
        settings_of(open_model(ModelFiles(**files)), shown, video=True)
    with pytest.raises(InvalidValue, match="high_noise_steps 2: there is no model for high noise"):
        settings_of(open_model(ModelFiles(**files)), replace(shown, high_noise_steps=2), video=True)


def test_t5_and_umt5_are_not_taken_for_each_other(made: Made, tmp_path: Path) -> None:
    other = make("chroma", tmp_path / "chroma", form="parts").files["t5xxl"]
    with pytest.raises(CheckpointError, match="this is T5 and not UMT5"):
        opened(made.files, t5xxl=other)
    found = found_in(t5.T5, opened(made.files)["t5xxl"].found.checkpoint)
    with pytest.raises(CheckpointError, match="this is UMT5, which reads prompts for Wan, and not T5"):
        t5.T5.configure(found, {})
    assert umt5.UMT5.name == t5.T5.name


@pytest.mark.parametrize(
    ("name", "title"),
    [("vace_blocks.0.before_proj.weight", "Wan VACE"), ("face_adapter.fuser_blocks.0.q_norm.weight", "Wan Animate")],
)
def test_models_that_are_told_more_are_refused_by_name(name: str, title: str, made: Made, tmp_path: Path) -> None:
    save_file(load_file(made.files["diffusion"]) | {name: torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=f"this is {title}, which sdrpc does not draw with"):
        opened(made.files, diffusion=tmp_path / "other.safetensors")


def test_an_autoencoder_of_pictures_is_refused(made: Made, tmp_path: Path) -> None:
    other = make("chroma", tmp_path / "chroma", form="parts").files["vae"]
    with pytest.raises(CheckpointError, match="has no VAE of films, which Wan needs"):
        opened(made.files, vae=other)


def test_what_a_request_means(made: Made) -> None:
    model = opened(made.files)
    assert (model.size, model.frames, model.defaults.frames, model.defaults.fps) == ((832, 480), 4, 81, 16)
    assert saved_tensors(made.component("vae")).keys() == model["vae"].found.tensors.keys()
