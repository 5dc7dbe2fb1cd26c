"""Blocks of quantized weights as floats, on the device, without a loop over blocks.

The layouts are those of ggml-common.h (``block_q4_0`` and so on), the arithmetic that of ggml-quants.c: each function
gets [n, bytes of a block] of uint8 and returns [n, elements of a block] of float32, bit for bit as ggml does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdrpc.errors import UnsupportedOperation
from sdrpc.ggml.tensor import Dims
from sdrpc.ggml.types import Type

from .dtypes import shape_of

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def half(x: Tensor) -> Tensor:
    """[…, 2 k] bytes → […, k] float32, read as float16."""
    return x.contiguous().view(torch.float16).float()


def nibbles(x: Tensor) -> Tensor:
    """[n, k] bytes → [n, 2 k]: all low halves, then all high halves."""
    return torch.cat((x & 15, x >> 4), -1)


def bits(x: Tensor) -> Tensor:
    """[n, k] bytes → [n, 8 k] bits, the lowest of the first byte first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=x.device)
    return ((x[..., None] >> shifts) & 1).flatten(-2)


def fields(x: Tensor, width: int) -> Tensor:
    """[…, k] bytes → […, 8 / width, k]: for each shift 0, width … that field of every byte."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=x.device)[:, None]
    return (x[..., None, :] >> shifts) & ((1 << width) - 1)


def table(values: tuple[int, ...], x: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=x.device)[x.long()]


def _q4_0(b: Tensor) -> Tensor:
    return half(b[:, :2]) * (nibbles(b[:, 2:]).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return half(b[:, :2]) * nibbles(b[:, 4:]).float() + half(b[:, 2:4])


def _q5_0(b: Tensor) -> Tensor:
    return half(b[:, :2]) * ((nibbles(b[:, 6:]) | (bits(b[:, 2:6]) << 4)).float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    return half(b[:, :2]) * (nibbles(b[:, 8:]) | (bits(b[:, 4:8]) << 4)).float() + half(b[:, 2:4])


def _q8_0(b: Tensor) -> Tensor:
    return half(b[:, :2]) * b[:, 2:].view(torch.int8).float()


def _iq4_nl(b: Tensor) -> Tensor:
    return half(b[:, :2]) * table(IQ4_VALUES, nibbles(b[:, 2:]))


def _mxfp4(b: Tensor) -> Tensor:
    exponent = b[:, :1].int()
    # 2^(e - 128), the type's values being doubled; the two smallest exponents give denormals
    raw = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return raw.contiguous().view(torch.float32) * table(MXFP4_VALUES, nibbles(b[:, 1:]))


def _q2_k(b: Tensor) -> Tensor:
    scales, quants, d, low = b[:, :16], b[:, 16:80], half(b[:, 80:82]), half(b[:, 82:84])
    scale = d * (scales & 15).float()  # [n, 16]: one for 16 elements
    least = low * (scales >> 4).float()
    q = fields(quants.reshape(-1, 2, 32), 2).reshape(-1, 16, 16).float()
    return (scale[..., None] * q - least[..., None]).flatten(1)


def _q3_k(b: Tensor) -> Tensor:
    mask, quants, packed, d = b[:, :32], b[:, 32:96], b[:, 96:108], half(b[:, 108:110])
    low = torch.cat((packed[:, :8] & 15, packed[:, :8] >> 4), -1)
    high = fields(packed[:, 8:], 2).reshape(-1, 16)
    scale = d * ((low | (high << 4)).int() - 32).float()
    q = fields(quants.reshape(-1, 2, 32), 2).reshape(-1, 16, 16).int()
    missing = (fields(mask, 1).reshape(-1, 16, 16).int() ^ 1) << 2
    return (scale[..., None] * (q - missing).float()).flatten(1)


def _scales_k4(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and minima of Q4_K and Q5_K from their twelve bytes."""
    d, m, md = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = torch.cat((d & 63, (md & 15) | ((d >> 2) & 48)), -1)
    least = torch.cat((m & 63, (md >> 4) | ((m >> 2) & 48)), -1)
    return scale.float(), least.float()


def _q4_k(b: Tensor) -> Tensor:
    scale, least = _scales_k4(b[:, 4:16])
    q = fields(b[:, 16:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32).float()
    return ((half(b[:, :2]) * scale)[..., None] * q - (half(b[:, 2:4]) * least)[..., None]).flatten(1)


def _q5_k(b: Tensor) -> Tensor:
    scale, least = _scales_k4(b[:, 4:16])
    q = fields(b[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32) | (fields(b[:, 16:48], 1) << 4)
    return ((half(b[:, :2]) * scale)[..., None] * q.float() - (half(b[:, 2:4]) * least)[..., None]).flatten(1)


def _q6_k(b: Tensor) -> Tensor:
    low = fields(b[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 8, 32)
    high = fields(b[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 8, 32)
    scale = half(b[:, 208:]) * b[:, 192:208].view(torch.int8).float()
    q = ((low | (high << 4)).int() - 32).float().reshape(-1, 16, 16)
    return (scale[..., None] * q).flatten(1)


def _iq4_xs(b: Tensor) -> Tensor:
    high = b[:, 2:4].contiguous().view(torch.int16).int()
    shifts = torch.arange(0, 16, 2, dtype=torch.int32, device=b.device)
    low = torch.stack((b[:, 4:8] & 15, b[:, 4:8] >> 4), -1).flatten(1).int()
    scale = half(b[:, :2]) * ((low | (((high >> shifts) & 3) << 4)) - 32).float()
    return (scale[..., None] * table(IQ4_VALUES, fields(b[:, 8:].reshape(-1, 8, 16), 4).flatten(2))).flatten(1)


DEQUANTIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "IQ4_NL": _iq4_nl, "MXFP4": _mxfp4,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_XS": _iq4_xs,
}  # fmt: skip
"""The quantized types that can be read, by name."""


def dequantize(raw: Tensor, type: Type, ne: Dims) -> Tensor:
    """``raw`` [n3, n2, n1, bytes of a row] of uint8 → float32 of shape ``ne``. Raises
    :class:`UnsupportedOperation` for a type that is not in :data:`DEQUANTIZE`."""
    if type.name not in DEQUANTIZE:
        raise UnsupportedOperation(f"weights of type {type}")
    return DEQUANTIZE[type.name](raw.reshape(-1, type.size)).reshape(shape_of(ne))
