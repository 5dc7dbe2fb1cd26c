"""Files that do not make a model: one line that says what was seen and what is missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdrpc.errors import CheckpointError, MissingComponent, SdrpcError
from sdrpc.families.model import ModelFiles, open_model
from tools.checkpoints import make


def parts(family: str, folder: Path) -> ModelFiles:
    files = dict(make(family, folder / family, form="parts").files)
    return ModelFiles(diffusion_model=files.pop("diffusion"), **files)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return parts("sdxl", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return parts("flux1-dev", tmp_path_factory.mktemp("models"))


def refusal(files: ModelFiles) -> str:
    """The one line that refuses ``files``."""
    with pytest.raises(SdrpcError) as caught:
        open_model(files)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_they_are_models_as_they_are(sdxl: ModelFiles, flux: ModelFiles) -> None:
    assert open_model(sdxl).family.name == "sdxl"
    assert open_model(flux).family.name == "flux1"


def test_a_component_is_missing(sdxl: ModelFiles, flux: ModelFiles) -> None:
    for files, field in ((sdxl, "clip_g"), (flux, "t5xxl"), (flux, "vae")):
        with pytest.raises(MissingComponent) as caught:
            open_model(replace(files, **{field: None}))
        assert caught.value.field == field


def test_one_component_in_the_place_of_another(sdxl: ModelFiles, flux: ModelFiles) -> None:
    said = refusal(replace(flux, clip_l=flux.t5xxl))
    assert "has no CLIP-L text encoder, which FLUX.1 needs; what it has: T5-XXL text encoder (t5xxl)" in said
    said = refusal(replace(flux, t5xxl=flux.vae))
    assert "has no T5-XXL text encoder, which FLUX.1 needs; what it has: VAE (vae)" in said
    said = refusal(replace(sdxl, diffusion_model=sdxl.vae))
    assert "has no diffusion model; what it has: VAE (vae)" in said


def test_two_families_mixed(sdxl: ModelFiles, flux: ModelFiles) -> None:
    assert "vae gives" in refusal(replace(flux, vae=sdxl.vae))
    assert "diffusion gives 4 channels, but vae takes 16" in refusal(replace(sdxl, vae=flux.vae))
    said = refusal(replace(sdxl, clip_l=sdxl.clip_g))
    assert "clip_l and clip_g together" in said
    assert "do not belong to one Stable Diffusion XL" in said


def test_an_unknown_family(tmp_path: Path, sdxl: ModelFiles) -> None:
    strange = tmp_path / "strange.safetensors"
    save_file({"blocks.0.mixer.weight": torch.zeros(2, 2), "head.bias": torch.zeros(2)}, strange)
    said = refusal(replace(sdxl, diffusion_model=strange))
    assert "no diffusion model of a known family" in said
    assert "'blocks.0.mixer.weight'" in said


def test_a_shard_that_is_not_there(tmp_path: Path) -> None:
    folder = make("flux1-dev", tmp_path, form="sharded").files["model"]
    index = next((folder / "transformer").glob("*.index.json"))
    shard = sorted(set(json.loads(index.read_text())["weight_map"].values()))[-1]
    (folder / "transformer" / shard).unlink()
    with pytest.raises(CheckpointError, match=shard):
        open_model(ModelFiles(folder))


def test_a_shard_that_was_cut_off(tmp_path: Path) -> None:
    folder = make("flux1-dev", tmp_path, form="sharded").files["model"]
    shard = sorted((folder / "transformer").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=shard.name):
        open_model(ModelFiles(folder))
