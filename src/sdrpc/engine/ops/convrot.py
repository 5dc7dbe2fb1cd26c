"""Products of integers: weights of 8 bits a number, with scales, and activations that are quantized when they come.

Both were rotated before (ConvRot, :func:`sdrpc.engine.arithmetic.rotated`), which spreads outliers.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from sdrpc.ggml.params import MulMat, Rotation
from sdrpc.ggml.rules.products import bytes_of_rows

from ..arithmetic import quotient, rotated
from ..deadline import checkpoint
from ..dtypes import shape_of
from ..operations import EngineOp
from ..values import Value
from .base import Kernel, kernel

EXACT_SUM = 1 << 10
"""So many products of two numbers of 8 bits sum up to 2²⁴ at most: exact in float32, in any order, which every device
multiplies; and TF32, which some do it in, still holds 8 bits. Of more, sums are added up as integers."""


def quantized(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The rows of ``x`` in int8, rotated, [rows, k], and each row's scale, [rows, 1]."""
    return whole(rotated(x.reshape(-1, x.shape[-1]), group))


def whole(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of ``x`` [rows, k] in int8, and each row's scale, [rows, 1]."""
    scale = quotient(x.abs().amax(1, keepdim=True), 127)
    numbers = x * torch.where(scale == 0, 0.0, 1 / scale)
    return numbers.round().clamp(-127, 127).to(torch.int8), scale


def _quantize_i8_convrot(v: Value[Rotation], x: Tensor) -> Tensor:
    """Rows and scales as bytes; those that fill up are zero."""
    numbers, scale = quantized(x, v.params.group)
    rows, k = numbers.shape
    start = bytes_of_rows(k, rows)
    packed = numbers.new_zeros(prod(v.ne))
    packed[: rows * k] = numbers.reshape(-1)
    packed[start : start + 4 * rows] = scale.reshape(-1).view(torch.int8)
    return packed.reshape(shape_of(v.ne))


def _unpacked(packed: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """What :func:`_quantize_i8_convrot` packed."""
    k, flat = packed.shape[-1], packed.reshape(-1)
    start = bytes_of_rows(k, rows)
    scale = flat[start : start + 4 * rows].clone()  # a view in float32 must lie at a multiple of 4
    return flat[: rows * k].reshape(rows, k), scale.view(torch.float32).reshape(rows, 1)


def sums(x: Tensor, w: Tensor) -> Tensor:
    """``x`` [n, k] · ``w`` [m, k]ᵀ, both in int8, exactly, in int32."""
    if _in_integers(x, w):
        return torch._int_mm(x, w.T)
    sums = torch.zeros(len(x), len(w), dtype=torch.int32, device=x.device)
    for part, weight in zip(torch.split(x, EXACT_SUM, 1), torch.split(w, EXACT_SUM, 1), strict=True):
        checkpoint()
        sums += F.linear(part.float(), weight.float()).int()
    return sums


def _in_integers(x: Tensor, w: Tensor) -> bool:
    """Whether CUDA's tensor cores multiply them as they are, on an H200 eight times as fast as in float32. That wants
    more than 16 rows, all else in whole eights, and matrices that lie densely and at multiples of 16."""
    return (
        x.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and len(x) > 16
        and not (len(w) | w.shape[1]) % 8
        and w.is_contiguous()
        and not (x.data_ptr() | w.data_ptr()) % 16
    )


def _mul_mat_i8(v: Value[MulMat], a: Tensor, b: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """b · aᵀ as integers, times the scales of b's rows and of a's, plus a bias."""
    weight = a[0, 0]
    if b.dtype is torch.int8:
        numbers, scale = _unpacked(b, prod(v.ne[1:]))
    else:
        numbers, scale = quantized(b, v.params.group or 1)
    y = sums(numbers, weight).float() * scale * scales.reshape(-1)
    return (y if bias is None else y + bias.reshape(-1)).reshape(shape_of(v.ne))


KERNELS: tuple[Kernel, ...] = (
    kernel("QUANTIZE_I8_CONVROT", Rotation, _quantize_i8_convrot),
    kernel(EngineOp.MUL_MAT_I8, MulMat, _mul_mat_i8),
)
