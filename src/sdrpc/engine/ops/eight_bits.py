"""Products with weights of 8 bits a number as they are: activations become 8 bits a number when they come.

Tensor cores multiply 8-bit floats and integers twice as fast as 16-bit floats, and weights are read as half the bytes.
Each row of activations gets its own scale, as in ComfyUI. Sums are float32, or of integers exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdrpc.ggml.params import MulMat

from ..blocks.eight_bits import EIGHT_BITS, unpack
from ..dtypes import shape_of
from ..operations import EngineOp
from ..values import Value
from .base import Autocast, Kernel, kernel, operand
from .convrot import quantized, sums

E4M3_LARGEST = 448.0
SMALLEST = torch.finfo(torch.float32).tiny
"""Of scales: the reciprocal of a smaller one may be infinite."""


def _product(v: Value[MulMat], a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """b · aᵀ, plus a bias. ``a``: packed rows (:mod:`sdrpc.engine.blocks.eight_bits`)."""
    weight = operand(v, 0)
    kind, k = EIGHT_BITS[weight.type.name], weight.ne[0]
    x = b.reshape(-1, k).float()
    numbers, scales = unpack(a, kind, k)
    if kind.dtype is torch.int8:
        codes, scale = quantized(x, kind.group)
        y = sums(codes, numbers).float() * scale
    else:
        codes, scale = _floats8(x)
        one = torch.ones((), device=x.device)
        y = torch._scaled_mm(codes, numbers.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True) * scale
    y = y * scales
    if bias is not None:
        y = y + bias.reshape(-1)
    return y.reshape(shape_of(v.ne))


def _floats8(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of ``x`` in float8_e4m3fn, [rows, k], and each row's scale, [rows, 1]."""
    scale = (x.abs().amax(1, keepdim=True) / E4M3_LARGEST).clamp_min(SMALLEST)
    numbers = x * (1 / scale)
    return numbers.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn), scale


KERNELS: tuple[Kernel, ...] = (kernel(EngineOp.PRODUCT_8BIT, MulMat, _product, Autocast.NARROW, raw=(0,)),)
