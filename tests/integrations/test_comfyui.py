"""The ComfyUI node pack, with a real rpc-server, against what ComfyUI's classes do."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations import comfy_interface as comfy
from tests.support.process import ServerProcess

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"
HERE = torch.device("cpu")
TOLERANCE = 1e-5
"""Relative to the largest number: both sides compute in float32, in other orders."""


@pytest.fixture(scope="module")
def pack() -> Iterator[ModuleType]:
    """The folder, loaded as ComfyUI loads those in custom_nodes: as a package, by its path."""
    spec = importlib.util.spec_from_file_location("sdrpc_comfyui", PACK / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sdrpc_comfyui"] = module
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.startswith("sdrpc_comfyui")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def server(pack: ModuleType) -> Iterator[str]:
    with ServerProcess("--precision", "exact", "--device", "CPU") as process:
        yield f"127.0.0.1:{process.port}"
        for device in sys.modules["sdrpc_comfyui.nodes"].connected(f"127.0.0.1:{process.port}", "").values():
            device.close()


@pytest.fixture
def place(pack: ModuleType, server: str) -> Any:
    """The node, with the parts that it is given, on RPC0."""
    node = pack.NODE_CLASS_MAPPINGS["SdrpcPlace"]()

    def run(**parts: Any) -> tuple[Any, Any, Any]:
        options = {"servers": server, "key": "", "model_on": "RPC0", "clip_on": "RPC0", "vae_on": "RPC0"}
        placed: tuple[Any, Any, Any] = getattr(node, node.FUNCTION)(**options | parts)
        return placed

    return run


def model() -> Any:
    return comfy.ModelPatcher(comfy.BaseModel(), comfy.GPU, HERE)


def here(patcher: Any) -> Any:
    """A clone that computes in this process, to compare with."""
    clone = patcher.clone()
    clone.load_device = HERE
    return clone


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_a_diffusion_model_computes_on_the_server(place: Any) -> None:
    original = model()
    wanted = [comfy.sample(here(original)), comfy.sample(here(original), control=True)]
    placed, clip, vae = place(model=original)
    assert (clip, vae) == (None, None)
    network = placed.get_model_object("diffusion_model")
    assert isinstance(network, comfy.UNetModel)
    found = [comfy.sample(placed), comfy.sample(placed, control=True)]
    assert [difference(*each) < TOLERANCE for each in zip(found, wanted, strict=True)] == [True, True]
    assert original.load_device == comfy.GPU
    assert original.get_model_object("diffusion_model") is original.model.diffusion_model  # as it was


def test_a_lora_of_another_node_counts(place: Any) -> None:
    """ComfyUI adds it to the weights when it loads the model, and takes it off again."""
    original = model()
    name = "diffusion_model.unet.conv_in.weight"
    lora = {name: torch.randn(original.model.diffusion_model.unet.conv_in.weight.shape) * 0.1}
    placed = place(model=original)[0]
    patched, wanted = placed.clone(), here(original)
    patched.add_patches(lora)
    wanted.add_patches(lora)
    without = comfy.sample(placed)
    with_lora = comfy.sample(patched)
    assert difference(with_lora, comfy.sample(wanted)) < TOLERANCE
    assert difference(with_lora, without) > 100 * TOLERANCE
    torch.testing.assert_close(comfy.sample(placed), without, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"patches": {"attn1_patch": [lambda q, k, v, _: (q, k, v)]}},
        {"patches_replace": {"attn1": {("input", 1): lambda *_: None}}},
        {"wrappers": {"diffusion_model": {"key": [lambda *_: None]}}},
        {"something_new": {"hook": print}},
    ],
    ids=lambda options: str(*options),
)
def test_code_that_belongs_inside_is_refused_by_name(pack: ModuleType, options: dict[str, Any]) -> None:
    placing = sys.modules["sdrpc_comfyui.placing"]
    with pytest.raises(placing.NotRemote, match=next(iter(options))):
        placing.plain(options)


def test_options_that_are_numbers_stay(pack: ModuleType) -> None:
    numbers = {"rope_options": {"scale_x": 2.0}}
    others = {"sigmas": torch.ones(1), "patches": {}, "wrappers": {"outer_sample": 1}}
    assert sys.modules["sdrpc_comfyui.placing"].plain(numbers | others) == numbers


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("mask_dimensions", [None, 2, 3, 4])
def test_attention_is_comfys(pack: ModuleType, apart: bool, skip: bool, mask_dimensions: int | None) -> None:
    """Each form of the arguments, against the sums themselves in float64."""
    batch, heads, tokens, width = 2, 3, 5, 4
    q, k, v = torch.randn(3, batch, heads, tokens, width, dtype=torch.float64)
    shape = {2: (tokens, tokens), 3: (batch, tokens, tokens), 4: (batch, 1, tokens, tokens)}.get(mask_dimensions or 0)
    mask = None if shape is None else torch.randn(*shape, dtype=torch.float64)
    scores = q @ k.transpose(-1, -2) / width**0.5
    if mask is not None:
        scores = scores + (mask[:, None] if mask_dimensions == 3 else mask)
    out = scores.softmax(-1) @ v
    given = (q, k, v) if skip else tuple(t.transpose(1, 2).reshape(batch, tokens, heads * width) for t in (q, k, v))
    if apart and not skip:  # as SD 3's transformer has it
        given = (given[0], k.transpose(1, 2), v.transpose(1, 2))
    wanted = out if skip else out.transpose(1, 2).reshape(batch, tokens, heads * width)
    attention = sys.modules["sdrpc_comfyui.placing"].attention
    found = attention(None, *given, heads, mask=mask, skip_reshape=skip, skip_output_reshape=skip)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("skip", [False, True])
def test_heads_that_share_keys(pack: ModuleType, skip: bool) -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    given = (q, k, v) if skip else tuple(t.transpose(1, 2).flatten(2) for t in (q, k, v))
    attention = sys.modules["sdrpc_comfyui.placing"].attention
    found = attention(None, *given, 4, skip_reshape=skip, skip_output_reshape=True, enable_gqa=True)
    torch.testing.assert_close(found, wanted)


def test_text_encoders_and_a_vae_compute_on_the_server(place: Any) -> None:
    clip, vae = comfy.CLIP(), comfy.VAE()
    _, placed_clip, placed_vae = place(clip=clip, vae=vae)
    clip.patcher = here(clip.patcher)
    wanted = clip.encode([5, 8, 3])
    assert difference(placed_clip.encode([5, 8, 3]), wanted) < TOLERANCE
    latents, pixels = torch.randn(1, 4, 4, 4), torch.randn(1, 3, 16, 16)
    assert difference(placed_vae.decode(latents), vae.first_stage_model.decode(latents)) < TOLERANCE
    assert difference(placed_vae.encode(pixels), vae.first_stage_model.encode(pixels)) < TOLERANCE
    assert vae.device == comfy.GPU


def test_what_stays_here_is_left_alone(place: Any) -> None:
    original, vae = model(), comfy.VAE()
    assert place(model=original, vae=vae, model_on="here", vae_on=" Here ") == (original, None, vae)


def test_a_device_that_is_not_there_is_named(place: Any) -> None:
    with pytest.raises(KeyError, match="no device RPC7: there are CPU, RPC0"):
        place(model=model(), model_on="rpc7")


def test_the_loader_is_comfys_own_with_devices(pack: ModuleType, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lists ComfyUI's checkpoints, and has ComfyUI load them."""

    class CheckpointLoaderSimple:
        def load_checkpoint(self, ckpt_name: str) -> tuple[Any, ...]:
            assert ckpt_name == "a.safetensors"
            return model(), comfy.CLIP(), comfy.VAE(), "what a later version adds"

    monkeypatch.setitem(sys.modules, "nodes", SimpleNamespace(CheckpointLoaderSimple=CheckpointLoaderSimple))
    names = SimpleNamespace(get_filename_list=lambda folder: [f"{folder}/a.safetensors"])
    monkeypatch.setitem(sys.modules, "folder_paths", names)
    loader = pack.NODE_CLASS_MAPPINGS["SdrpcCheckpoint"]
    inputs = loader.INPUT_TYPES()["required"]
    assert inputs["ckpt_name"] == (["checkpoints/a.safetensors"],)
    defaults = {name: entry[1]["default"] for name, entry in inputs.items() if name != "ckpt_name"}
    parts = getattr(loader(), loader.FUNCTION)(ckpt_name="a.safetensors", **defaults | {"servers": server})
    assert len(parts) == len(loader.RETURN_TYPES) == 3
    assert comfy.sample(parts[0]).shape == (1, 4, 8, 8)


def test_loaders_of_parts_are_comfys_own_with_a_device(
    pack: ModuleType, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class UNETLoader:
        FUNCTION = "load_unet"

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"unet_name": (["a"],)}, "optional": {"weight_dtype": (["default"],)}}

        def load_unet(self, unet_name: str, weight_dtype: str = "") -> tuple[Any]:
            assert (unet_name, weight_dtype) == ("a", "default")
            return (original,)

    original = model()
    monkeypatch.setitem(sys.modules, "nodes", SimpleNamespace(UNETLoader=UNETLoader))
    loader = pack.NODE_CLASS_MAPPINGS["SdrpcUNET"]
    inputs = loader.INPUT_TYPES()
    assert list(inputs["required"]) == ["unet_name", "servers", "key", "on"]
    assert list(inputs["optional"]) == ["weight_dtype"]
    assert loader.RETURN_TYPES == ("MODEL",)
    given = {"unet_name": "a", "weight_dtype": "default", "servers": server, "key": ""}
    (placed,) = getattr(loader(), loader.FUNCTION)(on="RPC0", **given)
    assert difference(comfy.sample(placed), comfy.sample(here(original))) < TOLERANCE
    assert loader().load(on="here", **given) == (original,)


def test_nodes_are_shown_with_a_name(pack: ModuleType) -> None:
    assert pack.NODE_CLASS_MAPPINGS.keys() == pack.NODE_DISPLAY_NAME_MAPPINGS.keys()
    optional = pack.NODE_CLASS_MAPPINGS["SdrpcPlace"].INPUT_TYPES()["optional"]
    assert optional == {"model": ("MODEL",), "clip": ("CLIP",), "vae": ("VAE",)}
