"""Sana: what shapes and names tell, what the model is told about a prompt, and what of other models is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_autoencoder_dc_checkpoint_to_diffusers,
    convert_sana_transformer_to_diffusers,
)
from safetensors.torch import load_file, save_file

from sdrpc.checkpoints.checkpoint import Checkpoint
from sdrpc.diffusion.session import Session
from sdrpc.engine.device import LocalDevice
from sdrpc.engine.precision import EXACT
from sdrpc.errors import CheckpointError, InvalidValue
from sdrpc.families.base import Component, Found, Prompt, find
from sdrpc.families.components.autoencoder_dc import VAE
from sdrpc.families.model import ModelFiles, open_model
from sdrpc.families.registry import FAMILIES
from sdrpc.families.sana import INSTRUCTION, SANA, TRANSFORMER, conditions
from sdrpc.ggml.types import F16
from sdrpc.ggml.weight import Weight
from sdrpc.runtime.cache import Cache
from tests.families.stands_for_gemma import Encoder
from tools.checkpoints import FAMILIES as CHECKPOINTS
from tools.checkpoints import Made, make

DC: Any = diffusers.AutoencoderDC


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make("sana", tmp_path_factory.mktemp("sana"), form="parts")


def files(made: Made, **others: Path) -> ModelFiles:
    named = made.files | others
    return ModelFiles(diffusion_model=named["diffusion"], vae=named["vae"], llm=named["llm"])


def found(component: Component, shapes: dict[str, tuple[int, ...]], **configs: Any) -> Found:
    weights = {name: Weight(name, F16, shape, lambda *_: ()) for name, shape in shapes.items()}
    one = find(component, Checkpoint(Path("m"), weights, configs=configs))
    assert one is not None
    return one


def full(family: str, component: Component, more: dict[str, tuple[int, ...]] | None = None) -> Found:
    """A component of full size in its own file, as names and shapes."""
    part = next(c for c in CHECKPOINTS[family].of_size("full") if c.name == component.name)
    shapes = part.shapes()
    return found(component, {e.name: e.shape(shapes) for e in part.alone(shapes)} | (more or {}))


def of_meta(module: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def on_meta(one: Found) -> dict[str, Any]:
    return {weight.name: torch.empty(weight.shape, device="meta") for weight in one.checkpoint.tensors.values()}


@pytest.mark.parametrize(("family", "layers", "norm"), [("sana", 20, None), ("sana-1.5", 60, "rms_norm_across_heads")])
def test_the_published_models_are_told_by_their_shapes(family: str, layers: int, norm: str | None) -> None:
    one = full(family, TRANSFORMER, {"pos_embed": (1, 32**2, 2240)})
    seen = {each.name: find(each.diffusion, one.checkpoint) for each in FAMILIES}
    assert [each.name for each in FAMILIES if (f := seen[each.name]) and each.recognizes(f)] == ["sana"]
    config = TRANSFORMER.configure(one, {})
    assert (config["num_attention_heads"], config["num_cross_attention_heads"]) == (70, 20)
    assert (config["num_layers"], config["qk_norm"], config["sample_size"]) == (layers, norm, 32)
    with torch.device("meta"):
        module, _ = TRANSFORMER.build(config)
    idle = ("pos_embed", "caption_projection.y_embedding")
    assert of_meta(module) == {name: shape for name, shape in one.shapes.items() if name not in idle}
    if norm is None:  # diffusers' converter leaves 1.5's norms out
        theirs = convert_sana_transformer_to_diffusers(on_meta(one))
        assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == of_meta(module)


@pytest.mark.parametrize(("side", "size", "stretch", "shift"), [(16, 512, None, 3.0), (128, 4096, 2, 6.0)])
def test_a_table_of_positions_tells_the_size(side: int, size: int, stretch: int | None, shift: float) -> None:
    one = full("sana", TRANSFORMER, {"pos_embed": (1, side**2, 2240)})
    config = TRANSFORMER.configure(one, {})
    assert (config["sample_size"] * 32, config["interpolation_scale"]) == (size, stretch)
    assert SANA.settings({"diffusion": one}).flow_shift == shift
    said = found(TRANSFORMER, one.shapes, scheduler={"flow_shift": 6.0})
    assert SANA.settings({"diffusion": said}).flow_shift == 6.0


def test_the_published_autoencoder_is_told_by_its_shapes() -> None:
    one = full("sana", VAE)
    config = VAE.configure(one, {})
    theirs = convert_autoencoder_dc_checkpoint_to_diffusers(on_meta(one))
    with torch.device("meta"):
        module, _ = VAE.build(config)
    assert of_meta(module) == {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    one.take(of_meta(module))
    assert (VAE.pixels(config), VAE.channels(config)) == (32, 32)


@pytest.mark.parametrize("resize", [("Conv", "interpolate"), ("pixel_unshuffle", "pixel_shuffle")])
@pytest.mark.parametrize("scales", [(), (5,), (3, 5)])
def test_any_autoencoder_of_the_class(resize: tuple[str, str], scales: tuple[int, ...]) -> None:
    """The module that its shapes and its configuration give has these shapes."""
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (16, 32),
            "layers_per_block": (1, 2), "qkv_multiscales": ((), scales),
        }.items()
    }  # fmt: skip
    with torch.device("meta"):
        theirs = DC(
            latent_channels=8, attention_head_dim=16, downsample_block_type=resize[0], upsample_block_type=resize[1],
            **sides,
        )  # fmt: skip
        for shapes in (of_meta(theirs), {n: s for n, s in of_meta(theirs).items() if n.startswith("decoder.")}):
            config = VAE.configure(found(VAE, shapes), {"attention_head_dim": 16, "decoder_conv_act_fn": "silu"})
            ours, _ = VAE.build(config)
            assert shapes.items() <= of_meta(ours).items()
            assert (config["upsample_block_type"], config["decoder_conv_act_fn"]) == (resize[1], "silu")


def test_pictures_become_latents(made: Made, tmp_path: Path) -> None:
    """As the class makes them, without a variance: the mean is what there is."""
    picture = np.random.default_rng(3).uniform(-1, 1, (1, 3, 64, 96)).astype(np.float32)
    device = LocalDevice("CPU", torch.device("cpu"), EXACT)
    with Session.open(files(made), device, Cache(tmp_path)) as session:
        latents = session._vae.encode(picture)
    device.close()
    wanted = made.component("vae").encode(torch.from_numpy(picture)).latent.numpy() * 0.41407
    assert latents.shape == (1, 32, 2, 3)
    np.testing.assert_allclose(latents, wanted, atol=1e-4 * np.abs(wanted).max())  # sums in float32, in another order


def test_prompts_stand_behind_an_instruction_and_negative_ones_alone() -> None:
    """Of the instruction its first and its last token are read."""
    encode = Encoder(26).tokenizer("llm").encode
    instruction = encode(f"<bos>{INSTRUCTION}", add_special_tokens=False).ids
    for negative, before in ((False, [instruction[0], instruction[-1]]), (True, instruction[:1])):
        told = conditions(Encoder(26), Prompt(" A Cat", 64, 64, -1, 3.5, negative))
        length = int(told["seen"].sum())
        assert told["context"].shape[1] == told["seen"].shape[1] == length + -length % 64
        words = encode(f"<bos>{'' if negative else INSTRUCTION}a cat", add_special_tokens=False).ids
        assert told["context"][0, :length, 0].tolist() == before + words[len(instruction) if not negative else 1 :]
        assert not told["context"][0, length:].any()
    with pytest.raises(InvalidValue, match="tokens with those around it; Sana reads 300"):
        conditions(Encoder(26), Prompt("q" * 300, 64, 64, -1, 3.5))


def test_parts_that_do_not_belong_are_refused(made: Made, tmp_path: Path) -> None:
    for part, name, shape, reason in (
        ("diffusion", "cfg_embedder.mlp.0.weight", (96, 256), "is Sana-Sprint"),
        ("diffusion", "x_embedder.proj.weight", (96, 16, 1, 1), "in 16 channels and 32 out"),
        ("diffusion", "x_embedder.proj.weight", (100, 32, 1, 1), r"is 32, which does not divide \[100\]"),
        ("diffusion", "pos_embed", (7,), "is no table of positions"),
        ("diffusion", "y_embedder.y_proj.fc1.weight", (96, 48), "llm gives 64 channels, but diffusion takes 48"),
        ("vae", "decoder.project_in.main.conv.weight", (32, 16, 3, 3), "vae gives 16 channels, but diffusion takes 32"),
        ("vae", "decoder.project_in.main.conv.weight", (32, 5, 3, 3), "latents of 5 make no DC-AE"),
        ("vae", "decoder.stages.0.op_list.1.main.conv2.norm.running_mean", (8,), "normalizes batches"),
    ):
        save_file(load_file(made.files[part]) | {name: torch.zeros(shape)}, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match=reason):
            open_model(files(made, **{part: tmp_path / "other.safetensors"}))


@pytest.mark.parametrize("said", [["silu"], "tanh", ["silu", 3, "silu", "silu", "silu", "silu"], {"a": 1}])
def test_activations_that_make_no_sense(said: Any) -> None:
    with pytest.raises(CheckpointError, match="decoder_act_fns of the DC-AE"):
        VAE.configure(full("sana", VAE), {"decoder_act_fns": said})
