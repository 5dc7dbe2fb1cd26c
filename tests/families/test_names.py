"""Names are rewritten as diffusers' own conversion of single files rewrites them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

from sdrpc.checkpoints.checkpoint import Checkpoint
from sdrpc.errors import CheckpointError
from sdrpc.families.base import Component, Found, find
from sdrpc.families.components import clip
from sdrpc.families.components.autoencoder import VAE
from sdrpc.families.components.qwen3 import QWEN3
from sdrpc.families.sd1 import SD1
from sdrpc.ggml.types import F16, TYPES, Type
from sdrpc.ggml.weight import Weight

UNET = SD1.diffusion


def no_bytes(*_: Any) -> Any:
    pytest.fail("names and shapes are enough")


def weight(name: str, shape: tuple[int, ...], kind: Type = F16) -> Weight:
    return Weight(name, kind, shape, no_bytes)


class Handle:
    """Stands for a tensor: diffusers' conversion moves it about and squeezes it."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape, self.ndim = name, shape, len(shape)

    def __getitem__(self, _: object) -> Handle:
        return self


def checkpoint(shapes: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """A checkpoint of names and shapes without any bytes."""
    return Checkpoint(Path("model.safetensors"), {name: weight(name, shape) for name, shape in shapes.items()})


def shapes_of(maker: ModuleType, size: str) -> dict[str, tuple[int, ...]]:
    return {entry.name: entry.shape for entry in maker.entries(maker.SIZES[size])}


@pytest.mark.parametrize("size", ["full", "tiny"])
def test_ldm_names_become_those_of_diffusers(size: str, maker: ModuleType) -> None:
    shapes = shapes_of(maker, size)
    file = checkpoint(shapes)
    handles = {name: Handle(name, shape) for name, shape in shapes.items()}
    for component, convert in ((UNET, convert_ldm_unet_checkpoint), (VAE, convert_ldm_vae_checkpoint)):
        found = find(component, file)
        assert found is not None
        theirs = convert(dict(handles), config=component.configure(found, {}))
        assert {new: w.name for new, w in found.tensors.items()} == {new: h.name for new, h in theirs.items()}


@pytest.mark.parametrize("prefix", clip.CLIP_L.prefixes)
@pytest.mark.parametrize("inner", ["", "text_model."])
def test_text_encoders_under_any_prefix(prefix: str, inner: str) -> None:
    found = find(clip.CLIP_L, checkpoint({f"{prefix}{inner}embeddings.token_embedding.weight": (8, 4), "x": (1,)}))
    assert found is not None
    assert "text_model.embeddings.token_embedding.weight" in found.tensors


@pytest.mark.parametrize("prefix", UNET.prefixes)
def test_unets_under_any_prefix(prefix: str, maker: ModuleType) -> None:
    shapes = shapes_of(maker, "tiny")
    ldm = {prefix + n.removeprefix("model.diffusion_model."): s for n, s in shapes.items() if "diffusion_model" in n}
    reference, found = find(UNET, checkpoint(shapes)), find(UNET, checkpoint(ldm))
    assert found is not None
    assert reference is not None
    assert found.shapes == reference.shapes
    diffusers = find(UNET, checkpoint({prefix + name: shape for name, shape in found.shapes.items()}))
    assert diffusers is not None
    assert diffusers.shapes == found.shapes


def test_old_names_of_a_vaes_attention() -> None:
    old = {f"decoder.mid_block.attentions.0.{name}.weight": (4, 4) for name in ("query", "key", "value", "proj_attn")}
    found = find(VAE, checkpoint(old | {"decoder.mid_block.resnets.0.conv1.weight": (4, 4, 3, 3)}))
    assert found is not None
    assert {name.split(".", 4)[4] for name in found.tensors if "attentions" in name} == {
        "to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight",
    }  # fmt: skip


def test_a_component_that_is_not_there() -> None:
    assert find(VAE, checkpoint({"conv_in.weight": (4, 4, 3, 3)})) is None


def found(tensors: dict[str, Any], skipped: dict[str, str] | None = None, component: Component = UNET) -> Found:
    return Found(component, Checkpoint(Path("a.gguf"), {}, skipped or {}), tensors)


@pytest.mark.parametrize(("stored", "wanted"), [((4, 4, 1, 1), (4, 4)), ((4, 4), (4, 4, 1, 1)), ((4,), (4,))])
def test_kernels_of_one_tap_are_matrices(stored: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    taken = found({"w": weight("file.w", stored)}).take({"w": wanted})["w"]
    assert (taken.name, taken.shape) == ("file.w", wanted)


def test_missing_and_misshapen_tensors_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"'conv\.weight'.*missing"):
        found({}).take({"conv.weight": (4, 4)})
    with pytest.raises(CheckpointError, match=r"'file\.w'.*\[4, 5\].*\[4, 4\]"):
        found({"w": weight("file.w", (4, 5))}).take({"w": (4, 4)})
    with pytest.raises(CheckpointError, match="F8_E8M0"):
        found({}, {"model.conv.weight": "F8_E8M0"}).take({"conv.weight": (4, 4)})


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K"])
def test_counted_bytes_are_those_of_every_picture(kind: str) -> None:
    """A language model's head, which no picture needs, does not count."""
    tensors = {
        "embed_tokens.weight": weight("a", (4, 256), TYPES[kind]),
        "lm_head.weight": weight("b", (4, 256), TYPES[kind]),
    }
    assert found(tensors, component=QWEN3).nbytes() == TYPES[kind].row_bytes(4 * 256)
