"""Number formats that keep a matrix in several tensors: codes, scales, and JSON that says what they are.

Written from the formats' descriptions, in double precision: cuBLAS's layout of block scales, OCP's MX formats, QLoRA
(arXiv:2305.14314), ConvRot (arXiv:2512.03673), and the names that ComfyUI and bitsandbytes give tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .names import Shape

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
NF4 = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip
FP4 = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12
H4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64) / 2


class Quantized(NamedTuple):
    """``tensors``: by what follows the layer's name (``.weight``, ``.weight_scale`` …). ``numbers``: what they mean,
    float32."""

    tensors: Mapping[str, Tensor]
    numbers: Tensor


def fp8_scaled(values: Tensor) -> Quantized:
    """8-bit floats and a scale, of the file's own marker (``scaled_fp8``)."""
    scale = (values.abs().amax() / 448).float()
    codes = (values / scale).to(torch.float8_e4m3fn)
    return Quantized({".weight": codes, ".scale_weight": scale}, (codes.double() * scale.double()).float())


def fp8_squares(values: Tensor) -> Quantized:
    """A scale for each 128×128 numbers, as DeepSeek and Qwen publish fp8."""
    rows, columns = values.shape
    padded = torch.nn.functional.pad(values, (0, -columns % 128, 0, -rows % 128))
    squares = padded.reshape(-(-rows // 128), 128, -(-columns // 128), 128)
    scale = (squares.abs().amax((1, 3)) / 448).float()
    each = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    codes = (values / each).to(torch.float8_e4m3fn)
    return Quantized({".weight": codes, ".weight_scale_inv": scale}, (codes.double() * each.double()).float())


def comfy_float8(values: Tensor) -> Quantized:
    made = fp8_scaled(values)
    codes, scale = made.tensors.values()
    tensors = {".weight": codes, ".weight_scale": scale, ".input_scale": torch.ones(())}
    return Quantized({**tensors, **_said(format="float8_e4m3fn")}, made.numbers)


def comfy_int8(values: Tensor) -> Quantized:
    """A scale for each row."""
    scale = (values.abs().amax(1, keepdim=True) / 127).float()
    codes = (values / scale).round().to(torch.int8)
    tensors = {".weight": codes, ".weight_scale": scale}
    return Quantized({**tensors, **_said(format="int8_tensorwise")}, (codes.double() * scale.double()).float())


def comfy_int8_convrot(values: Tensor) -> Quantized:
    """As :func:`comfy_int8`, of rows that were rotated in the largest groups that they are made of."""
    rows, columns = values.shape
    group = next(size for size in (256, 64, 16, 4) if columns % size == 0)
    rotation = H4
    while len(rotation) < group:
        rotation = torch.kron(rotation, H4)
    turned = (values.double().reshape(-1, group) @ rotation.T).reshape(rows, columns)
    made = comfy_int8(turned)
    back = (made.numbers.double().reshape(-1, group) @ rotation).reshape(rows, columns)
    said = _said(format="int8_tensorwise", convrot=True, convrot_groupsize=group)
    return Quantized({**made.tensors, **said}, back.float())


def comfy_mxfp8(values: Tensor) -> Quantized:
    blocks = values.double().reshape(len(values), -1, 32)
    exponent = (blocks.abs().amax(2) / 448).log2().ceil().clamp(-127, 127)
    scale = torch.exp2(exponent)[..., None]
    codes = (blocks / scale).float().to(torch.float8_e4m3fn)
    tensors = {".weight": codes.reshape(values.shape), ".weight_scale": _tiled((exponent + 127).to(torch.uint8))}
    numbers = (codes.double() * scale).reshape(values.shape).float()
    return Quantized({**tensors, **_said(format="mxfp8")}, numbers)


def comfy_nvfp4(values: Tensor) -> Quantized:
    blocks = values.double().reshape(len(values), -1, 16)
    whole = (values.abs().amax() / (448 * 6)).float()
    scales = (blocks.abs().amax(2) / 6 / whole.double()).float().to(torch.float8_e4m3fn)
    factor = (whole.double() * scales.double())[..., None]
    codes = ((blocks.abs() / factor)[..., None] - E2M1).abs().argmin(-1)
    numbers = (E2M1[codes] * blocks.sign() * factor).reshape(values.shape).float()
    signed = (codes + 8 * (blocks < 0)).to(torch.uint8).reshape(len(values), -1)
    tensors = {
        ".weight": _paired(signed), ".weight_scale": _tiled(scales.view(torch.uint8)).view(torch.float8_e4m3fn),
        ".weight_scale_2": whole,
    }  # fmt: skip
    return Quantized({**tensors, **_said(format="nvfp4")}, numbers)


def bnb_nf4(values: Tensor) -> Quantized:
    """With quantized scales."""
    return _bnb(values, "nf4", NF4, nested=True)


def bnb_fp4(values: Tensor) -> Quantized:
    return _bnb(values, "fp4", FP4, nested=False)


def _bnb(values: Tensor, kind: str, book: Tensor, nested: bool) -> Quantized:
    blocks = values.double().reshape(-1, 64)
    absmax = blocks.abs().amax(1)
    codes = ((blocks / absmax[:, None])[..., None] - book.double()).abs().argmin(-1).to(torch.uint8)
    said = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(values.shape)}
    if nested:
        offset, numbers = float(absmax.float().mean()), torch.linspace(-1, 1, 256)
        groups = torch.nn.functional.pad(absmax.float() - offset, (0, -len(absmax) % 256)).reshape(-1, 256)
        largest = groups.abs().amax(1)
        scales = (groups / largest[:, None]).nan_to_num()
        coded = (scales[..., None] - numbers).abs().argmin(-1).to(torch.uint8)
        absmax = (numbers.double()[coded.long()] * largest.double()[:, None]).reshape(-1)[: len(absmax)] + offset
        said |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        parts = {
            ".weight.absmax": coded.reshape(-1)[: len(absmax)], ".weight.nested_absmax": largest,
            ".weight.nested_quant_map": numbers,
        }  # fmt: skip
    else:
        absmax = absmax.float().double()
        parts = {".weight.absmax": absmax.float()}
    tensors = {
        ".weight": _paired(codes.reshape(1, -1)).reshape(-1, 1), ".weight.quant_map": book, **parts,
        f".weight.quant_state.bitsandbytes__{kind}": _json(said),
    }  # fmt: skip
    made = (book.double()[codes.long()] * absmax[:, None]).reshape(values.shape)
    return Quantized(tensors, made.float())


FORMATS: dict[str, tuple[Callable[[Tensor], Quantized], int]] = {
    "fp8-scaled": (fp8_scaled, 64), "fp8-squares": (fp8_squares, 64), "comfy-float8": (comfy_float8, 64),
    "comfy-int8": (comfy_int8, 32), "comfy-convrot": (comfy_int8_convrot, 64),
    "comfy-mxfp8": (comfy_mxfp8, 32), "comfy-nvfp4": (comfy_nvfp4, 64),
    "bnb-nf4": (bnb_nf4, 64), "bnb-fp4": (bnb_fp4, 64),
}  # fmt: skip
"""By name: what writes a matrix so, and of how many numbers its rows are a multiple."""


def fits(kind: str, name: str, shape: Shape) -> bool:
    """Whether a tensor is stored so: matrices of layers are."""
    return name.endswith(".weight") and len(shape) == 2 and shape[1] % FORMATS[kind][1] == 0


def _said(**values: object) -> dict[str, Tensor]:
    return {".comfy_quant": _json(values)}


def _json(values: Mapping[str, object]) -> Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def _paired(codes: Tensor) -> Tensor:
    """Two codes of four bits in a byte, the first one in its high half."""
    return codes[:, ::2] << 4 | codes[:, 1::2]


def _tiled(scales: Tensor) -> Tensor:
    """Scales of blocks as cuBLAS wants them: tiles of 128 rows and 4 columns, in which rows 32 apart lie together."""
    rows, columns = scales.shape
    padded = np.zeros((-(-rows // 128) * 128, -(-columns // 4) * 4), np.uint8)
    padded[:rows, :columns] = scales.numpy()
    tiles = padded.reshape(-1, 4, 32, padded.shape[1] // 4, 4)
    return torch.from_numpy(np.ascontiguousarray(tiles.transpose(0, 3, 2, 1, 4))).reshape(padded.shape)
