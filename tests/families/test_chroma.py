"""Chroma: which tokens its diffusion model sees, and what it computes with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ChromaPipeline
from safetensors.torch import load_file, save_file

from sdrpc.errors import CheckpointError
from sdrpc.families import chroma
from sdrpc.families.model import ModelFiles, open_model
from sdrpc.prompts import t5_chunks
from tools.checkpoints import Made, make

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make("chroma", tmp_path_factory.mktemp("chroma"), form="parts", type="F32")


def opened(files: dict[str, Path]) -> Any:
    return open_model(ModelFiles(diffusion_model=files["diffusion"], vae=files["vae"], t5xxl=files["t5xxl"]))


@pytest.mark.parametrize("text", ["", "cat", "a lovely cat, in the style of nobody", "cat " * 509, "cat " * 511])
def test_the_same_tokens_are_seen_as_in_diffusers(text: str, made: Made) -> None:
    """Texts of none to 511 tokens, the last two of which leave one token of padding, and none."""
    pipeline: ChromaPipeline = made.pipeline()
    _, wanted = pipeline._get_t5_prompt_embeds(text, max_sequence_length=chroma.T5_TOKENS)
    mask = chroma.seen(t5_chunks(text, length=chroma.T5_TOKENS).ids)
    assert mask.dtype == np.float32
    assert set(np.unique(mask)) <= {0, -np.inf}
    assert np.array_equal(mask == 0, wanted.numpy().astype(bool))


def test_padding_stands_behind_the_last_chunk_alone() -> None:
    ids = t5_chunks("cat " * 600, length=chroma.T5_TOKENS).ids
    mask = chroma.seen(ids)
    assert ids.shape == (2, 512)
    assert mask.shape == (1, 1024)
    used = 600 + 2  # an end token in each chunk
    assert np.array_equal(mask[0] == 0, np.arange(1024) < used + 1)


def test_masked_keys_are_what_the_module_itself_makes_of_a_mask(made: Made) -> None:
    """With a mask of bools, which hides queries as well; two texts of different lengths, a picture of odd sizes."""
    config = opened(made.files)["diffusion"].config
    theirs = made.component("diffusion")
    ours, call = chroma.build(config)
    ours.load_state_dict(theirs.state_dict())
    rng = torch.Generator().manual_seed(5)
    latents, context = torch.randn(2, 16, 6, 10, generator=rng), torch.randn(2, 7, 64, generator=rng)
    timestep, used = torch.tensor([0.7]), torch.tensor([[2], [5]])
    seen = torch.arange(7)[None] < used
    places = torch.tensor([(0.0, row, column) for row in range(3) for column in range(5)])
    with torch.no_grad():
        (mine,) = call(ours, latents, timestep, context, torch.where(seen, 0.0, -torch.inf))
        wanted = theirs(
            hidden_states=ChromaPipeline._pack_latents(latents, 2, 16, 6, 10),
            timestep=timestep.expand(2),
            encoder_hidden_states=context,
            img_ids=places,
            txt_ids=torch.zeros(7, 3),
            attention_mask=torch.cat((seen, torch.ones(2, 15, dtype=torch.bool)), 1),
            return_dict=False,
        )[0]
    torch.testing.assert_close(
        mine, ChromaPipeline._unpack_latents(wanted, 6 * 8, 10 * 8, 8), rtol=1e-4, atol=1e-5 * float(wanted.abs().max())
    )


def test_what_a_request_means(made: Made) -> None:
    model = opened(made.files)
    assert model.family.name == "chroma"
    assert (model.scale, model.shift, model.size) == (0.3611, 0.1159, (1024, 1024))
    said = model.defaults
    assert (said.sampler, said.cfg_scale, said.prediction, said.flow_shift) == ("euler", 4.0, "flux_flow", 1.0)


def changed(made: Made, folder: Path, **changes: torch.Tensor | None) -> dict[str, Path]:
    """The files with some tensors of the diffusion model others or new; None: left out."""
    weights = load_file(made.files["diffusion"])
    for name, tensor in changes.items():
        weights.pop(name, None)
        if tensor is not None:
            weights[name] = tensor
    save_file(weights, folder / "changed.safetensors")
    return {**made.files, "diffusion": folder / "changed.safetensors"}


def test_what_makes_no_embeddings_is_refused(made: Made, tmp_path: Path) -> None:
    name = "distilled_guidance_layer.in_proj.weight"
    with pytest.raises(CheckpointError, match=rf"{name}.*takes 60 numbers"):
        opened(changed(made, tmp_path, **{name: torch.zeros(96, 60)}))


def test_a_text_encoder_of_another_width_is_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="t5xxl gives 64 channels, but diffusion takes 72"):
        opened(changed(made, tmp_path, **{"txt_in.weight": torch.zeros(256, 72)}))


def test_chroma_radiance_is_refused_by_name(made: Made, tmp_path: Path) -> None:
    """It has Chroma's blocks, and draws pixels."""
    pixels = {"img_in_patch.weight": torch.zeros(256, 3, 16, 16), "nerf_blocks.0.norm.scale": torch.zeros(64)}
    with pytest.raises(CheckpointError, match="this is Chroma Radiance"):
        opened(changed(made, tmp_path, **{"img_in.weight": None, **pixels}))


def test_a_directory_says_what_shapes_do_not(tmp_path: Path) -> None:
    files = make("chroma", tmp_path, form="diffusers").files
    path = files["model"] / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"axes_dims_rope": [32, 48, 48]}))
    path = files["model"] / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"relative_attention_max_distance": 64}))
    model = open_model(ModelFiles(files["model"]))
    assert model["diffusion"].config["axes_dims_rope"] == [32, 48, 48]
    assert model["t5xxl"].config["relative_attention_max_distance"] == 64


def test_layers_that_cannot_be_read_are_not_left_out(made: Made, tmp_path: Path) -> None:
    names = [name for name in load_file(made.files["diffusion"]) if name.startswith("distilled_guidance_layer.layers.")]
    unreadable = {name: torch.zeros(1, dtype=torch.complex64) for name in names}
    with pytest.raises(CheckpointError, match=r"layers\.0\.linear_1\.weight"):
        opened(changed(made, tmp_path, **unreadable))
