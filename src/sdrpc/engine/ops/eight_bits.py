"""Products with weights of 8 bits a number as they are: activations become 8 bits a number when they come.

Tensor cores multiply 8-bit floats and integers twice as fast as 16-bit floats, and weights are read as half the bytes.
Each row of activations gets its own scale, as in ComfyUI. Sums are float32, or of integers exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdrpc.ggml.params import MulMat

from ..arithmetic import turned
from ..blocks.eight_bits import EIGHT_BITS, unpack
from ..dtypes import shape_of
from ..operations import EngineOp
from ..values import Value
from .base import Autocast, Kernel, kernel, operand
from .convrot import sums, whole

E4M3_LARGEST = 448.0
SMALLEST = torch.finfo(torch.float32).tiny
"""Of scales: the reciprocal of a smaller one may be infinite."""


def _product(v: Value[MulMat], a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """b · aᵀ, plus a bias. ``a``: packed rows (:mod:`sdrpc.engine.blocks.eight_bits`)."""
    weight = operand(v, 0)
    kind, k = EIGHT_BITS[weight.type.name], weight.ne[0]
    x = b.reshape(-1, k)
    numbers, scales = unpack(a, kind, k)
    if kind.dtype is torch.int8:
        codes, scale = whole(turned(x.float(), kind.group))
        y = _scaled(sums(codes, numbers) * scale, scales, bias)
    else:
        codes, scale = _floats8(x)
        multiply = floats_by_rows if _scales_rows(x.device) else floats_then_scales
        y = multiply(codes, scale, numbers, scales, bias)
    return y.reshape(shape_of(v.ne))


def _floats8(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of ``x`` in float8_e4m3fn, [rows, k], and each row's scale, [rows, 1]. Without a whole copy of ``x`` in
    float32 or of its magnitudes: memory is what this waits for."""
    largest = torch.linalg.vector_norm(x, float("inf"), 1, keepdim=True, dtype=torch.float32)
    scale = (largest / E4M3_LARGEST).clamp_min(SMALLEST)
    return (x * (1 / scale)).to(torch.float8_e4m3fn), scale


def _scales_rows(device: torch.device) -> bool:
    """Whether the product itself takes scales of rows and columns: from Hopper on."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def floats_by_rows(x: Tensor, scale: Tensor, w: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``x`` [n, k] · ``w`` [m, k]ᵀ, both in 8-bit floats, times ``scale`` [n, 1] and ``scales`` [m], plus ``bias``, in
    bfloat16."""
    added = None if bias is None else bias.reshape(-1).to(torch.bfloat16)
    return torch._scaled_mm(x, w.T, scale, scales[None], bias=added, out_dtype=torch.bfloat16, use_fast_accum=True)


def floats_then_scales(x: Tensor, scale: Tensor, w: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """The same with scales in steps of their own, in float32."""
    one = torch.ones((), device=x.device)
    y = torch._scaled_mm(x, w.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    return _scaled(y * scale, scales, bias)


def _scaled(y: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``y`` with its columns times ``scales``, plus a bias, in one step."""
    return y * scales if bias is None else torch.addcmul(bias.reshape(-1), y, scales)


KERNELS: tuple[Kernel, ...] = (kernel(EngineOp.PRODUCT_8BIT, MulMat, _product, Autocast.NARROW, raw=(0,)),)
