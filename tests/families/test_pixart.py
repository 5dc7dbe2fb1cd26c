"""PixArt: what shapes and names tell, what the model is told about a prompt, and what of other models is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from sdrpc.checkpoints.checkpoint import Checkpoint
from sdrpc.diffusion.predictions import NoiseScale
from sdrpc.errors import CheckpointError
from sdrpc.families.base import F32, Config, Found, Prompt, find
from sdrpc.families.model import ModelFiles, open_model
from sdrpc.families.pixart import BETAS, PIXART_ALPHA, PIXART_SIGMA, TRANSFORMER
from sdrpc.families.registry import FAMILIES
from sdrpc.ggml.types import F16
from sdrpc.ggml.weight import Weight
from tools.checkpoints import FAMILIES as CHECKPOINTS
from tools.checkpoints import Made, make

NO_TEXT = "y_embedder.y_embedding"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make("pixart-sigma", tmp_path_factory.mktemp("pixart"), form="parts")


def full(name: str, diffusers_names: bool = False, pipeline: str | None = None, no_text: bool = True) -> Found:
    """The diffusion model of full size in its own file, as names and shapes."""
    part = next(c for c in CHECKPOINTS[name].of_size("full") if c.name == "diffusion")
    shapes = part.shapes()
    entries = {entry.name: entry.shape(shapes) for entry in part.alone(shapes)}
    names = shapes if diffusers_names else entries
    weights = {n: Weight(n, F16, s, lambda *_: ()) for n, s in names.items() if no_text or "y_embedding" not in n}
    found = find(
        TRANSFORMER, Checkpoint(Path("m"), weights, configs={"": {"_class_name": pipeline}} if pipeline else {})
    )
    assert found is not None
    return found


@pytest.mark.parametrize("diffusers_names", [False, True])
@pytest.mark.parametrize("family", [PIXART_SIGMA, PIXART_ALPHA], ids=["sigma", "alpha"])
def test_the_published_models_are_told_by_their_tensors(family: Any, diffusers_names: bool) -> None:
    found = full(family.name, diffusers_names)
    seen = {each.name: find(each.diffusion, found.checkpoint) for each in FAMILIES}
    assert [each.name for each in FAMILIES if (one := seen[each.name]) and each.recognizes(one)] == [family.name]
    config = TRANSFORMER.configure(found, {})
    assert (config["num_attention_heads"], config["num_layers"], config["out_channels"]) == (16, 28, 8)
    assert config["use_additional_conditions"] == (family is PIXART_ALPHA)
    with torch.device("meta"):
        module, _ = TRANSFORMER.build(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes == {name: shape for name, shape in found.shapes.items() if "y_embedding" not in name}


def test_alpha_that_is_told_no_sizes_is_told_by_its_directory_or_its_table() -> None:
    assert PIXART_SIGMA.recognizes(full("pixart-sigma", True, "PixArtSigmaPipeline", no_text=False))
    assert PIXART_ALPHA.recognizes(full("pixart-sigma", True, "PixArtAlphaPipeline", no_text=False))
    found = full("pixart-sigma", no_text=False)
    assert PIXART_SIGMA.recognizes(found)
    table = {"caption_projection.y_embedding": Weight(NO_TEXT, F16, (120, 4096), lambda *_: ())}
    assert PIXART_ALPHA.recognizes(Found(TRANSFORMER, found.checkpoint, {**found.tensors, **table}))


class Encoder:
    """Stands for T5: hidden states that are the tokens' numbers."""

    pictures: tuple[F32, ...] = ()

    def __init__(self, sizes: bool) -> None:
        self._sizes = sizes

    def __call__(self, component: str, inputs: Any, **options: Any) -> tuple[F32, ...]:
        assert not options
        assert inputs["mask"].sum() == (inputs["ids"] != 0).sum()
        return (np.repeat(inputs["ids"][..., None] + 7.0, 4, axis=2).astype(np.float32),)

    def config(self, component: str) -> Config:
        return {"use_additional_conditions": self._sizes}

    def tokenizer(self, component: str) -> None:
        return None

    def has(self, component: str) -> bool:
        raise AssertionError


@pytest.mark.parametrize(("family", "length"), [(PIXART_SIGMA, 300), (PIXART_ALPHA, 120)], ids=["sigma", "alpha"])
def test_padding_is_not_seen_and_long_texts_are_chunks(family: Any, length: int) -> None:
    told = family.conditions(Encoder(False), Prompt("a lovely cat", 64, 96, -1, 3.5))
    assert told.keys() == {"context", "mask"}
    used = int((told["context"][0, :, 0] != 0).sum())
    assert told["context"].shape == (1, length, 4)
    assert told["mask"].tolist() == [[0.0] * used + [-10000.0] * (length - used)]
    told = family.conditions(Encoder(True), Prompt("cat " * length, 64, 96, -1, 3.5))
    assert told["context"].shape == (1, 2 * length, 4)
    assert told["mask"][0, :length].tolist() == [0.0] * length
    assert told["size"].tolist() == [[96.0, 64.0]]


def test_the_levels_of_noise_are_those_of_diffusers() -> None:
    theirs = EulerDiscreteScheduler(beta_start=BETAS[0], beta_end=BETAS[1], beta_schedule="linear")
    wanted = ((1 - theirs.alphas_cumprod) / theirs.alphas_cumprod).sqrt().numpy()
    np.testing.assert_allclose(NoiseScale(*BETAS, linear=True).sigmas, wanted, rtol=1e-4)  # of 1 - 0.9993


def test_what_a_file_says_of_its_size(made: Made, tmp_path: Path) -> None:
    tensors = load_file(made.files["diffusion"])
    assert opened(made.files).size == (1024, 1024)
    save_file(tensors | {"pos_embed": torch.zeros(1, 32 * 32, 144)}, tmp_path / "other.safetensors")
    assert opened(made.files, diffusion=tmp_path / "other.safetensors").size == (512, 512)


def test_parts_that_do_not_belong_are_refused(made: Made, tmp_path: Path) -> None:
    tensors = load_file(made.files["diffusion"])
    for name, shape, reason in (
        ("pos_embed", (1, 0, 144), "is no table of positions"),
        ("pos_embed", (144,), "is no table of positions"),
        ("blocks.0.attn.sr.weight", (144, 1, 2, 2), "compresses keys and values"),
        ("x_embedder.proj.weight", (100, 4, 2, 2), r"is 72, which does not divide \[100\]"),
        ("final_layer.linear.weight", (12, 144), "gives 3 channels for 4"),
        ("y_embedder.y_proj.fc1.weight", (144, 48), "t5xxl gives 64 channels, but diffusion takes 48"),
    ):
        save_file(tensors | {name: torch.zeros(shape)}, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match=reason):
            opened(made.files, diffusion=tmp_path / "other.safetensors")


def opened(files: dict[str, Path], **others: Path) -> Any:
    files = files | others
    return open_model(ModelFiles(diffusion_model=files["diffusion"], vae=files["vae"], t5xxl=files["t5xxl"]))
