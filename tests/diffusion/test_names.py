"""Names are rewritten as diffusers' own conversion of single files rewrites them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

from sdrpc.checkpoints.checkpoint import Checkpoint
from sdrpc.diffusion import names
from sdrpc.diffusion.config import unet_config, vae_config
from sdrpc.errors import CheckpointError
from sdrpc.ggml.types import F16, TYPES
from sdrpc.ggml.weight import View, Weight


class Handle:
    """Stands for a tensor: diffusers' conversion moves it about and squeezes it."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape, self.ndim = name, shape, len(shape)

    def __getitem__(self, _: object) -> Handle:
        return self


def checkpoint(shapes: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """A checkpoint of names and shapes without any bytes."""
    tensors = {name: Weight(name, F16, shape, View(memoryview(b""))) for name, shape in shapes.items()}
    return Checkpoint(Path("model.safetensors"), tensors)


def shapes_of(maker: ModuleType, size: str) -> dict[str, tuple[int, ...]]:
    return {entry.name: entry.shape for entry in maker.entries(maker.SIZES[size])}


@pytest.mark.parametrize("size", ["full", "tiny"])
def test_ldm_names_become_those_of_diffusers(size: str, maker: ModuleType) -> None:
    shapes = shapes_of(maker, size)
    file = checkpoint(shapes)
    handles = {name: Handle(name, shape) for name, shape in shapes.items()}
    for part, infer, convert in (
        (names.UNET, unet_config, convert_ldm_unet_checkpoint),
        (names.VAE, vae_config, convert_ldm_vae_checkpoint),
    ):
        found = names.find(part, file)
        assert found is not None
        theirs = convert(dict(handles), config=infer(found, {}))
        assert {new: weight.name for new, weight in found.tensors.items()} == {
            new: handle.name for new, handle in theirs.items()
        }


@pytest.mark.parametrize("prefix", names.TEXT_ENCODER.prefixes)
def test_text_encoders_under_any_prefix(prefix: str) -> None:
    found = names.find(
        names.TEXT_ENCODER, checkpoint({f"{prefix}embeddings.token_embedding.weight": (8, 4), "x": (1,)})
    )
    assert found is not None
    assert "embeddings.token_embedding.weight" in found.tensors


@pytest.mark.parametrize("prefix", names.UNET.prefixes)
def test_unets_under_any_prefix(prefix: str, maker: ModuleType) -> None:
    shapes = shapes_of(maker, "tiny")
    ldm = {prefix + n.removeprefix("model.diffusion_model."): s for n, s in shapes.items() if "diffusion_model" in n}
    reference = names.find(names.UNET, checkpoint(shapes))
    found = names.find(names.UNET, checkpoint(ldm))
    assert found is not None
    assert reference is not None
    assert found.shapes == reference.shapes
    diffusers = names.find(names.UNET, checkpoint({prefix + name: shape for name, shape in found.shapes.items()}))
    assert diffusers is not None
    assert diffusers.shapes == found.shapes


def test_old_names_of_a_vaes_attention() -> None:
    old = {f"decoder.mid_block.attentions.0.{name}.weight": (4, 4) for name in ("query", "key", "value", "proj_attn")}
    found = names.find(names.VAE, checkpoint(old | {"decoder.mid_block.resnets.0.conv1.weight": (4, 4, 3, 3)}))
    assert found is not None
    assert {name.split(".", 4)[4] for name in found.tensors if "attentions" in name} == {
        "to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight",
    }  # fmt: skip


def test_a_part_that_is_not_there() -> None:
    assert names.find(names.VAE, checkpoint({"conv_in.weight": (4, 4, 3, 3)})) is None


def part(tensors: dict[str, Any], skipped: dict[str, str] | None = None) -> names.PartTensors:
    return names.PartTensors(names.UNET, Checkpoint(Path("a.gguf"), {}, skipped or {}), tensors)


def weight(shape: tuple[int, ...], kind: str = "F16") -> Weight:
    return Weight("file.w", TYPES[kind], shape, View(memoryview(b"")))


@pytest.mark.parametrize(("stored", "wanted"), [((4, 4, 1, 1), (4, 4)), ((4, 4), (4, 4, 1, 1)), ((4,), (4,))])
def test_kernels_of_one_tap_are_matrices(stored: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    taken = part({"w": weight(stored)}).take({"w": wanted})["w"]
    assert (taken.name, taken.shape) == ("file.w", wanted)


def test_missing_and_misshapen_tensors_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"'conv\.weight'.*missing"):
        part({}).take({"conv.weight": (4, 4)})
    with pytest.raises(CheckpointError, match=r"'file\.w'.*\[4, 5\].*\[4, 4\]"):
        part({"w": weight((4, 5))}).take({"w": (4, 4)})
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        part({}, {"model.conv.weight": "F8_E4M3"}).take({"conv.weight": (4, 4)})
