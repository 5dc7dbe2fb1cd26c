"""diffusers' own converters over proxies: the same tensors as from numbers, and no byte read at official sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.loaders import single_file_utils as converters

from sdrpc.errors import CheckpointError
from sdrpc.ggml.types import TYPES
from sdrpc.ggml.weight import View, Weight
from tests.checkpoints.test_expressions import address, numbers
from tests.support.proxies import converted

Shapes = Mapping[str, tuple[int, ...]]


def unreadable(start: int = 0, stop: int | None = None, /) -> Iterator[memoryview]:
    raise AssertionError("a byte was read")
    yield


def standing_for(shapes: Shapes) -> dict[str, Weight]:
    return {
        name: Weight(name, TYPES["BF16"], shape, unreadable, None, "m.safetensors") for name, shape in shapes.items()
    }


def flux(width: int, doubles: int, singles: int, inputs: int | None = None) -> dict[str, tuple[int, ...]]:
    """The tensors of FLUX.1 dev in its original names; ``inputs``: another width of what blocks read (the converter
    splits their outputs only, whose width it takes to be 3072)."""
    made: dict[str, tuple[int, ...]] = {}
    read = inputs or width

    def linear(name: str, outputs: int, inputs: int = read) -> None:
        made[f"{name}.weight"], made[f"{name}.bias"] = (outputs, inputs), (outputs,)

    for name, size in (("time_in", 256), ("guidance_in", 256), ("vector_in", 768)):
        linear(f"{name}.in_layer", width, size)
        linear(f"{name}.out_layer", width)
    linear("txt_in", width, 4096)
    linear("img_in", width, 64)
    for i in range(doubles):
        for side in ("img", "txt"):
            prefix = f"double_blocks.{i}.{side}"
            linear(f"{prefix}_mod.lin", 6 * width)
            linear(f"{prefix}_attn.qkv", 3 * width)
            linear(f"{prefix}_attn.proj", width)
            linear(f"{prefix}_mlp.0", 4 * width)
            linear(f"{prefix}_mlp.2", width, 4 * read)
            made |= {f"{prefix}_attn.norm.{part}_norm.scale": (128,) for part in ("query", "key")}
    for i in range(singles):
        linear(f"single_blocks.{i}.modulation.lin", 3 * width)
        linear(f"single_blocks.{i}.linear1", 7 * width)
        linear(f"single_blocks.{i}.linear2", width, 5 * read)
        made |= {f"single_blocks.{i}.norm.{part}_norm.scale": (128,) for part in ("query", "key")}
    linear("final_layer.linear", 64)
    linear("final_layer.adaLN_modulation.1", 2 * width)
    return made


_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0",
    "conv_out": "out.2",
}  # fmt: skip


def original(name: str, layers: int, attending: set[int]) -> str:
    """The original name of a UNet's tensor; ``attending``: up blocks that have attentions."""
    stem, leaf = name.rsplit(".", 1)
    if stem in _ENDS:
        return f"{_ENDS[stem]}.{leaf}"
    match = re.fullmatch(r"(down|mid|up)_block(?:s\.(\d+))?\.(resnets|attentions|\w+samplers)\.(\d+)\.(.+)", name)
    assert match
    side, kind, inner = match[1], match[3], match[5]
    block, layer = int(match[2] or 0), int(match[4])
    if kind == "resnets":
        inner = _RESNET[inner.split(".")[0]] + "." + leaf
    if side == "mid":
        return f"middle_block.{2 * layer if kind == 'resnets' else 1}.{inner}"
    if kind == "downsamplers":
        return f"input_blocks.{(layers + 1) * (block + 1)}.0.op.{leaf}"
    if kind == "upsamplers":
        return f"output_blocks.{(layers + 1) * (block + 1) - 1}.{2 if block in attending else 1}.conv.{leaf}"
    place = 0 if kind == "resnets" else 1
    number = 1 + block * (layers + 1) + layer if side == "down" else block * (layers + 1) + layer
    return f"{'input' if side == 'down' else 'output'}_blocks.{number}.{place}.{inner}"


SDXL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 2,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "use_linear_projection": True,
}  # fmt: skip
OFFICIAL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10), "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20), "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "block_out_channels": (32, 64, 64), "transformer_layers_per_block": (1, 1, 2), "cross_attention_dim": 16,
    "attention_head_dim": (4, 4, 4), "projection_class_embeddings_input_dim": 1552,
}  # fmt: skip


def unet(sizes: dict[str, Any]) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL, **sizes)


def in_original_names(module: UNet2DConditionModel) -> dict[str, tuple[int, ...]]:
    return {
        f"model.diffusion_model.{original(name, 2, {0, 1})}": tuple(tensor.shape)
        for name, tensor in module.state_dict().items()
    }


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_flux_at_its_official_size() -> None:
    with torch.device("meta"):
        module = FluxTransformer2DModel(guidance_embeds=True)
    made = converted(converters.convert_flux_transformer_checkpoint_to_diffusers, standing_for(flux(3072, 19, 38)))
    assert {name: weight.shape for name, weight in made.items()} == shapes_of(module)


def test_sdxl_at_its_official_size() -> None:
    module = unet(OFFICIAL)
    made = converted(converters.convert_ldm_unet_checkpoint, standing_for(in_original_names(module)), config=SDXL)
    assert {name: weight.shape for name, weight in made.items()} == shapes_of(module)


@pytest.mark.parametrize(
    ("convert", "shapes", "options"),
    [
        (converters.convert_flux_transformer_checkpoint_to_diffusers, flux(3072, 1, 1, 4), {}),
        (converters.convert_ldm_unet_checkpoint, in_original_names(unet(SMALL)), {"config": SDXL}),
        (
            converters.convert_z_image_transformer_checkpoint_to_diffusers,
            {"layers.0.attention.qkv.weight": (96, 32), "layers.0.attention.out.weight": (32, 32)},
            {},
        ),
        (
            converters.convert_flux2_transformer_checkpoint_to_diffusers,
            {"double_blocks.0.img_attn.qkv.weight": (96, 32), "final_layer.adaLN_modulation.1.weight": (64, 32)},
            {},
        ),
    ],
    ids=["FLUX.1", "SDXL", "Z-Image", "FLUX.2"],
)
def test_the_same_tensors_as_from_numbers(convert: Callable[..., Any], shapes: Shapes, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    data = {name: rng.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}
    weights = {
        name: Weight(name, TYPES["F16"], shapes[name], View(memoryview(array).cast("B") if array.ndim else array.data))
        for name, array in data.items()
    }
    expected = convert({name: torch.from_numpy(array) for name, array in data.items()}, **options)
    made = converted(convert, weights, **options)
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert made[name].shape == tuple(tensor.shape)
        assert np.array_equal(numbers(made[name]), tensor.numpy())
    assert weights.keys() == data.keys()
    source = {address(w.data()): w.nbytes for w in weights.values()}
    begins = [address(view) for w in made.values() for view in w.pieces()]
    assert all(any(at <= begin < at + size for at, size in source.items()) for begin in begins)


def test_blocks_stay_blocks() -> None:
    w = Weight("qkv", TYPES["Q8_0"], (96, 64), View(memoryview(bytes(96 * 68))))
    made = converted(lambda tensors: dict(zip("qkv", tensors["qkv"].chunk(3), strict=True)), {"qkv": w})
    assert [(made[name].type.name, made[name].shape) for name in "qkv"] == [("Q8_0", (32, 64))] * 3


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, 3:-4].T, lambda x: x.reshape(4, -1, 5), lambda x: x.permute(1, 0), lambda x: x[2],
        lambda x: x[:, -1], lambda x: torch.cat([x[5:], x[:5]], 0),
        lambda x: x.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1), lambda x: torch.stack([x, x], -1),
        lambda x: x.half(), lambda x: x[None, :, :, None].squeeze(-1).squeeze(), lambda x: torch.stack([x, x], 0),
        lambda x: x.contiguous().clone().detach().to("cpu"), lambda x: x.split(7, 1)[1], lambda x: x.unbind(0)[3],
    ],
)  # fmt: skip
def test_operations_of_converters(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    array = np.random.default_rng(0).normal(size=(12, 20)).astype(np.float32)
    made = converted(
        lambda t: {"y": function(t["x"])}, {"x": Weight("x", TYPES["F32"], (12, 20), View(memoryview(array).cast("B")))}
    )
    expected = function(torch.from_numpy(array))
    assert made["y"].shape == tuple(expected.shape)
    assert np.array_equal(numbers(made["y"]), expected.numpy())


@pytest.mark.parametrize(
    ("convert", "reason"),
    [
        (lambda t: {"y": t["x"] * 2}, r"m\.safetensors: tensor 'x': aten\.mul"),
        (lambda t: {"y": t["x"][::2]}, "every 2th element"),
        (lambda t: {"y": t.pop("z")}, r"m\.safetensors: tensor 'z': is missing"),
        (lambda t: {"y": t["x"].view(5, 5)}, "another number of elements than"),
        (lambda t: {"y": torch.split(t["x"], [1, 2])}, "be split into"),
        (lambda t: {"y": t["x"][9]}, "shapes of this family"),
    ],
)
def test_what_has_no_expression(convert: Callable[..., Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        converted(convert, standing_for({"x": (8, 8)}))
