"""Formats that keep numbers and scales apart, against their dequantization in double precision (tools/checkpoints)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sdrpc.checkpoints.checkpoint import Checkpoint, open_checkpoint
from sdrpc.checkpoints.expressions import cast, rows
from sdrpc.errors import CheckpointError
from sdrpc.ggml.types import F32
from sdrpc.ggml.weight import Weight
from tools.checkpoints.formats import FORMATS, bnb_nf4, comfy_int8, comfy_int8_convrot, comfy_nvfp4, fp8_scaled

HELD = {
    "fp8-scaled": "F8_E4M3_SCALED", "fp8-squares": "F8_E4M3_SCALED", "comfy-float8": "F8_E4M3_SCALED",
    "comfy-int8": "Q8_0", "comfy-convrot": "I8_CONVROT", "comfy-mxfp8": "MXFP8", "comfy-nvfp4": "NVFP4_SCALED",
    "bnb-nf4": "NF4", "bnb-fp4": "FP4",
}  # fmt: skip
BITS = {
    "F8_E4M3_SCALED": 8.5, "Q8_0": 8.5, "I8_CONVROT": 8.125, "MXFP8": 8.25, "NVFP4_SCALED": 5, "NF4": 4.5, "FP4": 4.5,
}  # fmt: skip
LARGEST = {"Q8_0": 2.0**-11, "I8_CONVROT": 2.0**-20, "NF4": 2.0**-21}
"""Of the largest number, how far off others may be: scales of 11 bits, and sums that cancel."""

PARTS = (".scale_weight", ".weight_scale", ".weight_scale_inv", ".weight_scale_2")
"""What scales numbers."""

Tensors = dict[str, torch.Tensor]


def matrix(rows: int = 136, columns: int = 512) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator) * 0.1


def layer(tensors: Mapping[str, torch.Tensor], name: str = "l") -> Tensors:
    return {name + ending: tensor for ending, tensor in tensors.items()}


def read(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Checkpoint:
    save_file(tensors, path / "a.safetensors", metadata)
    return open_checkpoint(path / "a.safetensors")


def numbers(w: Weight) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(cast(w, F32).data(), np.float32).reshape(w.shape).copy())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(136, 512), (300, 256)])
def test_every_format_is_what_it_says_and_stays_small(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    """Products of two float32 numbers, or of three, are rounded once or twice."""
    made = FORMATS[name][0](matrix(*shape))
    checkpoint = read(tmp_path, {**layer(made.tensors), "l.bias": torch.ones(shape[0]), "n": torch.ones(3)})
    assert sorted(checkpoint.tensors) == ["l.bias", "l.weight", "n"]
    assert not checkpoint.skipped
    weight = checkpoint.tensors["l.weight"]
    assert (weight.type.name, weight.shape, weight.before) == (HELD[name], shape, None)
    assert weight.nbytes == BITS[HELD[name]] / 8 * shape[0] * shape[1]
    largest = float(made.numbers.abs().max()) * LARGEST.get(HELD[name], 0)
    torch.testing.assert_close(numbers(weight), made.numbers, rtol=4 * 2.0**-24, atol=largest)
    whole = bytes(weight.data())
    for start, stop in ((0, 1), (1000, 20_001), (len(whole) - 3, len(whole))):
        assert b"".join(weight.pieces(start, stop)) == whole[start:stop]
    assert torch.equal(numbers(rows(weight, 129, 131)), numbers(weight)[129:131])


@pytest.mark.parametrize("columns", [80, 24])
@pytest.mark.parametrize("name", ["fp8-scaled", "fp8-squares", "comfy-int8", "comfy-convrot", "comfy-nvfp4"])
def test_rows_that_are_no_whole_blocks_are_f16(name: str, columns: int, tmp_path: Path) -> None:
    if columns % 16 and name == "comfy-nvfp4":
        return
    made = FORMATS[name][0](matrix(7, columns))
    weight = read(tmp_path, layer(made.tensors)).tensors["l.weight"]
    assert (weight.type.name, weight.shape) == ("F16", (7, columns))
    stored = sum(made.tensors[end].nbytes for end in made.tensors if end in (".weight", *PARTS))
    assert weight.before is not None
    assert weight.before.bits == 8 * stored / (7 * columns)
    group = {80: 16, 24: 4}[columns]
    assert weight.before.format.endswith(f"groups of {group}" if name == "comfy-convrot" else f"in rows of {columns}")
    torch.testing.assert_close(numbers(weight), made.numbers, rtol=2.0**-11, atol=1e-6)


def test_scales_that_are_too_large_for_blocks(tmp_path: Path) -> None:
    made = FORMATS["comfy-int8"][0](matrix(4, 64) * 1e8)
    weight = read(tmp_path, layer(made.tensors)).tensors["l.weight"]
    assert weight.type.name == "BF16"
    assert weight.before is not None
    assert weight.before.format == "I8 with scales that F16 does not hold"
    torch.testing.assert_close(numbers(weight), made.numbers, rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("name", ["l.weight_scale", "l.weight_scale_inv"])
def test_other_names_of_a_scale(name: str, tmp_path: Path) -> None:
    made = FORMATS["fp8-scaled"][0](matrix())
    tensors = layer(made.tensors)
    tensors[name] = tensors.pop("l.scale_weight")
    checkpoint = read(tmp_path, tensors)
    assert list(checkpoint.tensors) == ["l.weight"]
    torch.testing.assert_close(numbers(checkpoint.tensors["l.weight"]), made.numbers, rtol=4 * 2.0**-24, atol=0)


@pytest.mark.parametrize(("columns", "held"), [(320, "F8_E4M3_SCALED"), (200, "F16")])
def test_squares_at_the_edges(columns: int, held: str, tmp_path: Path) -> None:
    """The last rows and columns are no whole squares; scales may be in BF16."""
    made = FORMATS["fp8-squares"][0](matrix(200, columns))
    scales = made.tensors[".weight_scale_inv"].bfloat16()
    each = scales.double().repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :columns]
    weight = read(tmp_path, layer({**made.tensors, ".weight_scale_inv": scales})).tensors["l.weight"]
    assert (weight.type.name, weight.shape) == (held, (200, columns))
    wanted = (made.tensors[".weight"].double() * each).float()
    torch.testing.assert_close(numbers(weight), wanted, rtol=2.0**-11 if held == "F16" else 2.0**-22, atol=1e-6)
    part = torch.cat([numbers(rows(weight, first, first + 50)) for first in range(0, 200, 50)])
    assert torch.equal(part, numbers(weight))


def test_integers_in_squares(tmp_path: Path) -> None:
    codes = torch.randint(-128, 128, (130, 160), dtype=torch.int8)
    scales = torch.tensor([[0.5, 2.0], [1.0, 0.25]])
    weight = read(tmp_path, {"l.weight": codes, "l.weight_scale_inv": scales}).tensors["l.weight"]
    each = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:130, :160]
    assert weight.type.name == "Q8_0"
    assert torch.equal(numbers(weight), codes * each)


def test_what_is_said_in_the_header(tmp_path: Path) -> None:
    """For layers without what stands before all names, too; a name alone is a format."""
    four, eight = comfy_nvfp4(matrix()), comfy_int8_convrot(matrix())
    tensors = {**layer(four.tensors, "model.diffusion_model.a"), **layer(eight.tensors, "model.diffusion_model.b")}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("comfy_quant")}
    convrot = {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 256}}
    said = {"format_version": "1.0", "layers": {"a": "nvfp4", "model.diffusion_model.b": convrot, "absent": {}}}
    found = read(tmp_path, tensors, {"_quantization_metadata": json.dumps(said)}).tensors
    assert {name[-8]: weight.type.name for name, weight in found.items()} == {"a": "NVFP4_SCALED", "b": "I8_CONVROT"}
    torch.testing.assert_close(numbers(found["model.diffusion_model.a.weight"]), four.numbers, rtol=1e-6, atol=0)


def test_a_scale_in_another_shard(tmp_path: Path) -> None:
    made = bnb_nf4(matrix())
    for i, (name, tensor) in enumerate(layer(made.tensors).items(), 1):
        save_file({name: tensor}, tmp_path / f"m-{i:05}-of-{len(made.tensors):05}.safetensors")
    weight = open_checkpoint(tmp_path / "m-00001-of-00006.safetensors").tensors["l.weight"]
    torch.testing.assert_close(numbers(weight), made.numbers, rtol=1e-6, atol=0)


def test_eight_bits_of_bitsandbytes(tmp_path: Path) -> None:
    made = comfy_int8(matrix())
    largest = made.tensors[".weight_scale"].reshape(-1) * 127
    tensors = {
        "l.weight": made.tensors[".weight"],
        "l.SCB": largest,
        "l.weight_format": torch.zeros((), dtype=torch.uint8),
    }
    checkpoint = read(tmp_path, tensors)
    assert list(checkpoint.tensors) == ["l.weight"]
    torch.testing.assert_close(numbers(checkpoint.tensors["l.weight"]), made.numbers, rtol=2.0**-11, atol=4e-6)


def test_integers_whose_scales_f16_does_not_hold(tmp_path: Path) -> None:
    """What Q8_0 would make coarser than its 8 bits is computed instead."""
    made = comfy_int8(matrix(8, 64) * 1e-6)
    weight = read(tmp_path, layer(made.tensors)).tensors["l.weight"]
    assert weight.type.name == "BF16"
    torch.testing.assert_close(numbers(weight), made.numbers, rtol=2.0**-8, atol=0)


@pytest.mark.parametrize(("blocksize", "book"), [(32, "usual"), (64, "another")])
def test_blocks_that_no_type_has_are_f16(blocksize: int, book: str, tmp_path: Path) -> None:
    codes = torch.randint(0, 256, (64 * 32, 1), dtype=torch.uint8)
    absmax = torch.rand(64 * 64 // blocksize)
    numbers_of = torch.linspace(-1, 1, 16) if book == "another" else bnb_nf4(matrix()).tensors[".weight.quant_map"]
    said = {"quant_type": "nf4", "blocksize": blocksize, "dtype": "float16", "shape": [64, 64]}
    tensors = {
        "w": codes, "w.absmax": absmax, "w.quant_map": numbers_of,
        "w.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8),
    }  # fmt: skip
    weight = read(tmp_path, tensors).tensors["w"]
    pairs = torch.stack((codes >> 4, codes & 15), -1).reshape(-1, blocksize).long()
    assert weight.type.name == "F16"
    assert torch.equal(numbers(weight), (numbers_of[pairs] * absmax[:, None]).half().float().reshape(64, 64))


# what does not belong together ----------------------------------------------------------------------------------------


def said(tensors: Tensors, ending: str, **changes: Any) -> Tensors:
    """``tensors`` with other values in the JSON of the one whose name ends so."""
    (name,) = [name for name in tensors if ending in name]
    values = {**json.loads(bytes(tensors[name].numpy())), **changes}
    return {**tensors, name: torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)}


def without(tensors: Tensors, ending: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(ending)}


NVFP4 = layer(comfy_nvfp4(matrix(64, 64)).tensors)
INT8 = layer(comfy_int8(matrix(64, 64)).tensors)
CONVROT = layer(comfy_int8_convrot(matrix(64, 256)).tensors)
MXFP8 = layer(FORMATS["comfy-mxfp8"][0](matrix(64, 64)).tensors)
NF4 = layer(bnb_nf4(matrix(64, 64)).tensors)
FP8 = layer(fp8_scaled(matrix(64, 64)).tensors)

WRONG: dict[str, tuple[Tensors, str]] = {
    "no scale": (without(INT8, ".weight_scale"), r"'l\.weight': has no 'l\.weight_scale', which scales it"),
    "no second scale": (without(NVFP4, "_2"), r"'l\.weight': has no 'l\.weight_scale_2'"),
    "scales of blocks that are too few": (
        {**NVFP4, "l.weight_scale": torch.zeros(64, 4, dtype=torch.uint8)},
        r"has scales of blocks I8 \[64, 4\], not of",
    ),
    "wide scales of blocks": ({**MXFP8, "l.weight_scale": torch.zeros(128, 4)}, r"has scales of blocks F32 \[128, 4\]"),
    "a scale for each column": ({**INT8, "l.weight_scale": torch.ones(1, 64)}, r"has scales F32 \[1, 64\]; one F32"),
    "scales of blocks for whole rows": ({**FP8, "l.scale_weight": torch.ones(64, 2)}, r"has scales F32 \[64, 2\]"),
    "scales of small squares": (
        {**without(FP8, ".scale_weight"), "l.weight_scale_inv": torch.ones(2, 2)},
        r"has scales F32 \[2, 2\]; .* one for each 128×128",
    ),
    "integers for scales of squares": (
        {"l.weight": torch.zeros(256, 64).to(torch.float8_e4m3fn), "l.weight_scale_inv": torch.ones(2, 1).int()},
        r"has scales I32 \[2, 1\]; .* one for each 128×128",
    ),
    "several scales of the tensor": (
        {**NVFP4, "l.weight_scale_2": torch.ones(2)}, r"has a scale of its tensor F32 \[2\]",
    ),
    "an unknown format": (said(INT8, "comfy_quant", format="int3"), r"'l\.weight': is of the format 'int3'; there are"),
    "a format that is none": (said(INT8, "comfy_quant", format=[1] * 99), r"is of the format '\[1, 1.{35}'; there are"),
    "another type": (said(INT8, "comfy_quant", format="nvfp4", x=1), r"has no 'l\.weight_scale_2'"),
    "floats for integers": (
        said(MXFP8, "comfy_quant", format="int8_tensorwise"), r"is F8_E4M3, where its format has I8",
    ),
    "groups of three": (
        said(CONVROT, "comfy_quant", convrot_groupsize=3), r"has rotated groups of 3 numbers; there are 4,",
    ),
    "groups larger than rows": (
        said(CONVROT, "comfy_quant", convrot_groupsize=1024), r"\[64, 256\], which is no matrix with",
    ),
    "groups of text": (
        said(CONVROT, "comfy_quant", convrot_groupsize="x" * 99), r"has rotated groups of 'x{40}' numbers",
    ),
    "no JSON": ({**INT8, "l.comfy_quant": torch.zeros(9, dtype=torch.uint8)}, r"'l\.comfy_quant': damaged: is no JSON"),
    "a list": ({**INT8, "l.comfy_quant": torch.tensor([91, 93], dtype=torch.uint8)}, r"damaged: is no JSON object"),
    "deep JSON": (
        {**INT8, "l.comfy_quant": torch.full((60_000,), 91, dtype=torch.uint8)}, r"damaged: is no JSON",
    ),
    "a book of JSON": (
        {**INT8, "l.comfy_quant": torch.zeros(1 << 17, dtype=torch.uint8)}, r"is 131,072 bytes of JSON; at most 65,536",
    ),
    "JSON for nothing": (without(INT8, "l.weight"), r"says how 'l\.weight' is quantized, which is not there"),
    "scales of inputs": (
        {**NVFP4, "l.pre_quant_scale": torch.ones(64)}, r"has scales of its inputs \(pre_quant_scale\), which are not",
    ),
    "a shape that is too large": (
        said(NF4, "nf4", shape=[1 << 20, 1 << 20]), r"has '?.*absmax'|numbers in blocks of 64",
    ),
    "a shape of another tensor": (
        said(NF4, "nf4", shape=[64, 63]), r"'l\.weight': has U8 \[64\] as '\.absmax', not 63",
    ),
    "a negative shape": (said(NF4, "nf4", shape=[-64, -64]), r"gives '\[-64, -64\]' for a shape"),
    "a block of no numbers": (said(NF4, "nf4", blocksize=0), r"gives '0' for a block's size"),
    "an endless offset": (
        said(NF4, "nf4", nested_offset=float("inf")), r"'256' and 'inf' for a block's size and an offset",
    ),
    "no largest numbers": (without(NF4, ".weight.absmax"), r"'l\.weight': has no '\.absmax', not 64 numbers U8"),
    "no book": (without(NF4, ".nested_quant_map"), r"has no 'l\.weight\.nested_quant_map'"),
    "a book of 15": (
        {**NF4, "l.weight.quant_map": torch.ones(15)}, r"has '\.quant_map' F32 \[15\], not 16 numbers F32",
    ),
    "a state for nothing": (without(NF4, "l.weight"), r"says how 'l\.weight' is quantized, which is not there"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_belong_together_is_named(name: str, tmp_path: Path) -> None:
    tensors, message = WRONG[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, tensors)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"layers": 3}', '{"layers": {"l": 3}}', "[" * 100_000], ids=["empty", "list", "3", "l", "deep"]
)
def test_a_header_that_makes_no_sense(text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"damaged: its _quantization_metadata"):
        read(tmp_path, without(INT8, "comfy_quant"), {"_quantization_metadata": text})
