"""Quantized types whose blocks have one scale: the legacy quants Q4_0 to Q8_1, Q8_K (which is what K-quants are
multiplied with), binary and ternary types, and float4 types.

The docstring of each reader gives the bytes of a block, in order, and what an element is: ``d`` is the block's scale,
``q`` the element's code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arithmetic import quotient
from .bits import (
    UE4M3,
    Blocks,
    as_bytes,
    as_half,
    as_ue4m3,
    constants,
    half,
    pack,
    pack_planes,
    planes,
    power,
    reinterpret,
    shaped,
    table,
    unpack,
)
from .search import away, in_order, inverse, nearest, peak

FLOAT4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice what four bits mean as a number of two bits of exponent and one of mantissa."""
FLOAT4_BETWEEN = (0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0)
"""The middles between :data:`FLOAT4`."""
POWERS = (1, 3, 9, 27, 81)
TERNARY = 243
"""3^5: five digits to base 3 are in a byte."""


def _halves(x: Tensor) -> Tensor:
    """[…, k / 2] bytes → […, k] of four bits: first all low ones, then all high ones."""
    return planes(x, 4).flatten(-2)


def _pack_halves(x: Tensor) -> Tensor:
    return pack_planes(shaped(x, 2, -1), 4)


def _bits(x: Tensor) -> Tensor:
    return unpack(x, 1).flatten(-2)


def _pack_bits(x: Tensor) -> Tensor:
    return pack(shaped(x, -1, 8), 1)


# one scale, or scale and least, of 32


def read_q4_0(b: Blocks) -> Tensor:
    """d f16 | 16 bytes: d (q - 8). Element i is the low half of byte i, element 16 + i its high half."""
    return half(b[:, :2]) * (_halves(b[:, 2:]).float() - 8)


def read_q4_1(b: Blocks) -> Tensor:
    """d f16 | m f16 | 16 bytes, halves as in Q4_0: d q + m."""
    return half(b[:, :2]) * _halves(b[:, 4:]).float() + half(b[:, 2:4])


def read_q5_0(b: Blocks) -> Tensor:
    """d f16 | 4 bytes: bit i is the fifth bit of element i | 16 bytes, halves as in Q4_0: d (q - 16)."""
    return half(b[:, :2]) * ((_halves(b[:, 6:]) | (_bits(b[:, 2:6]) << 4)).float() - 16)


def read_q5_1(b: Blocks) -> Tensor:
    """d f16 | m f16 | 4 bytes of fifth bits | 16 bytes, halves as in Q4_0: d q + m."""
    return half(b[:, :2]) * (_halves(b[:, 8:]) | (_bits(b[:, 4:8]) << 4)).float() + half(b[:, 2:4])


def read_q8_0(b: Blocks) -> Tensor:
    """d f16 | 32 of int8: d q."""
    return half(b[:, :2]) * b[:, 2:].view(torch.int8).float()


def read_q8_1(b: Blocks) -> Tensor:
    """d f16 | d times the sum of all q, f16 | 32 of int8: d q."""
    return half(b[:, :2]) * b[:, 4:].view(torch.int8).float()


def read_q8_k(b: Blocks) -> Tensor:
    """d f32 | 256 of int8 | the sums of each 16 of them, int16: d q."""
    return reinterpret(b[:, :4], torch.float32) * b[:, 4:260].view(torch.int8).float()


def _centred(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The scale that brings the peak of each block to -top, and the levels from 0 to 2 top - 1."""
    scale = quotient(peak(x, 1), -top)
    levels = (x * inverse(scale) + (top + 0.5)).int().clamp(0, 2 * top - 1)
    return scale, levels


def _ranged(x: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, least and levels from 0 to top that take the whole range of each block."""
    least = x.gather(1, x.argmin(1, keepdim=True))  # the first of several, which may be zeros of different sign
    scale = quotient(x.amax(1, keepdim=True) - least + 0.0, top)  # no zero with a sign
    return scale, least, ((x - least) * inverse(scale) + 0.5).int().clamp(0, top)


def write_q4_0(x: Tensor) -> Blocks:
    scale, levels = _centred(x, 8)
    return torch.cat((as_half(scale), _pack_halves(levels)), 1)


def write_q4_1(x: Tensor) -> Blocks:
    scale, least, levels = _ranged(x, 15)
    return torch.cat((as_half(scale), as_half(least), _pack_halves(levels)), 1)


def write_q5_0(x: Tensor) -> Blocks:
    scale, levels = _centred(x, 16)
    return torch.cat((as_half(scale), _pack_bits(levels >> 4), _pack_halves(levels & 15)), 1)


def write_q5_1(x: Tensor) -> Blocks:
    scale, least, levels = _ranged(x, 31)
    return torch.cat((as_half(scale), as_half(least), _pack_bits(levels >> 4), _pack_halves(levels & 15)), 1)


def _signed_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and levels from -127 to 127 (as ggml's vector code: halves go to even)."""
    largest = x.abs().amax(1, keepdim=True)
    return quotient(largest, 127), (x * inverse(largest, 127)).round().to(torch.int8)


def write_q8_0(x: Tensor) -> Blocks:
    scale, levels = _signed_bytes(x)
    return torch.cat((as_half(scale), as_bytes(levels)), 1)


def write_q8_1(x: Tensor) -> Blocks:
    scale, levels = _signed_bytes(x)
    total = levels.sum(1, keepdim=True, dtype=torch.int32) * scale
    return torch.cat((as_half(scale), as_half(total), as_bytes(levels)), 1)


def write_q8_k(x: Tensor) -> Blocks:
    by = inverse(peak(x, 1), -127)
    levels = nearest(by * x).clamp(max=127).to(torch.int8)
    totals = shaped(levels, 16, 16).sum(-1, dtype=torch.int16)
    return torch.cat((as_bytes(inverse(by)), as_bytes(levels), as_bytes(totals)), 1)


# one, two bits; three values


def read_q1_0(b: Blocks) -> Tensor:
    """d f16 | 128 bits: d or -d."""
    return half(b[:, :2]) * (_bits(b[:, 2:]).float() * 2 - 1)


def read_q2_0(b: Blocks) -> Tensor:
    """d f16 | 16 bytes of four elements, the lowest bits first: d (q - 1)."""
    return half(b[:, :2]) * (unpack(b[:, 2:], 2).flatten(1).float() - 1)


def read_tq2_0(b: Blocks) -> Tensor:
    """64 bytes | d f16: d (q - 1). Of each 32 bytes the lowest two bits are 32 elements, the next two the next 32 …"""
    return half(b[:, 64:]) * (planes(shaped(b[:, :64], 2, 32), 2).flatten(1).float() - 1)


def _digits(x: Tensor, n: int) -> Tensor:
    """[m, k] bytes → [m, n k]: the first digits to base 3 of the fractions x / 256, a digit of all bytes after the
    other."""
    powers = constants(POWERS[:n], x.device).to(torch.uint8)[:, None]
    return ((x[:, None] * powers).to(torch.int16) * 3 >> 8).flatten(1)


def _pack_digits(x: Tensor, k: int) -> Tensor:
    """[m, n k] digits → [m, k] bytes: the fraction, rounded up, that :func:`_digits` reads."""
    digits = shaped(x, -1, k).int()
    powers = constants(POWERS[::-1][: digits.shape[1]], x.device).int()[:, None]
    number: Tensor = (digits * powers).sum(1, dtype=torch.int32)
    return ((number * 256 + (TERNARY - 1)) // TERNARY).to(torch.uint8)


def read_tq1_0(b: Blocks) -> Tensor:
    """48 bytes of five digits to base 3 | 4 bytes of four | d f16: d (digit - 1). The first digits of 32 bytes are 32
    elements, their second digits the next 32 …; then the same of 16 bytes, and of the last 4."""
    digits = torch.cat((_digits(b[:, :32], 5), _digits(b[:, 32:48], 5), _digits(b[:, 48:52], 4)), 1)
    return half(b[:, 52:]) * (digits.float() - 1)


def write_q1_0(x: Tensor) -> Blocks:
    scale = quotient(in_order(x.abs().T)[:, None], x.shape[1])
    return torch.cat((as_half(scale), _pack_bits(x >= 0)), 1)


def _to_largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest absolute value of each block, and all of them as parts of it, rounded: -1, 0, 1."""
    largest = x.abs().amax(1, keepdim=True)
    return as_half(largest), away(x * inverse(largest))


def write_q2_0(x: Tensor) -> Blocks:
    scale, signs = _to_largest(x)
    return torch.cat((scale, pack(shaped(signs + 1, -1, 4), 2)), 1)


def write_tq2_0(x: Tensor) -> Blocks:
    scale, signs = _to_largest(x)
    return torch.cat((pack_planes(shaped(signs + 1, 2, 4, 32), 2).flatten(1), scale), 1)


def write_tq1_0(x: Tensor) -> Blocks:
    scale, signs = _to_largest(x)
    digits = signs + 1
    parts = ((digits[:, :160], 32), (digits[:, 160:240], 16), (digits[:, 240:], 4))
    return torch.cat((*(_pack_digits(part, k) for part, k in parts), scale), 1)


# float4


def read_mxfp4(b: Blocks) -> Tensor:
    """exponent, 1 byte | 16 bytes of float4 (e2m1), halves as in Q4_0: 2^(exponent - 127) times that."""
    return power(b[:, :1]) * table(FLOAT4, _halves(b[:, 1:]))


def read_nvfp4(b: Blocks) -> Tensor:
    """4 scales (e4m3 without sign), each of 16 elements | for each 8 bytes of float4, halves as in Q4_0."""
    values = table(FLOAT4, _halves(shaped(b[:, 4:], 4, 8)))
    return (table(UE4M3, b[:, :4])[..., None] * values).flatten(1)


def _nearest_float4(x: Tensor, scale: Tensor) -> Tensor:
    """Codes of the nearest of :data:`FLOAT4` times ``scale``; between two the smaller one, zero without a sign."""
    size = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for middle in FLOAT4_BETWEEN:
        code += size > middle * scale
    return torch.where((scale == 0) | (code == 0), 0, code + 8 * (x < 0))


def write_mxfp4(x: Tensor) -> Blocks:
    largest = x.abs().amax(1, keepdim=True)
    exponent = torch.where(largest > 0, largest.log2().floor() + 125, 0.0).int().to(torch.uint8)
    return torch.cat((exponent, _pack_halves(_nearest_float4(x, power(exponent)))), 1)


def write_nvfp4(x: Tensor) -> Blocks:
    groups = shaped(x, 4, 16)
    scales = as_ue4m3(quotient(groups.abs().amax(2), 6))
    codes = _nearest_float4(groups, table(UE4M3, scales)[..., None])
    return torch.cat((scales, _pack_halves(codes).flatten(1)), 1)


READ = {
    "Q4_0": read_q4_0, "Q4_1": read_q4_1, "Q5_0": read_q5_0, "Q5_1": read_q5_1, "Q8_0": read_q8_0, "Q8_1": read_q8_1,
    "Q8_K": read_q8_k, "Q1_0": read_q1_0, "Q2_0": read_q2_0, "TQ1_0": read_tq1_0, "TQ2_0": read_tq2_0,
    "MXFP4": read_mxfp4, "NVFP4": read_nvfp4,
}  # fmt: skip

WRITE = {
    "Q4_0": write_q4_0, "Q4_1": write_q4_1, "Q5_0": write_q5_0, "Q5_1": write_q5_1, "Q8_0": write_q8_0,
    "Q8_1": write_q8_1, "Q8_K": write_q8_k, "Q1_0": write_q1_0, "Q2_0": write_q2_0, "TQ1_0": write_tq1_0,
    "TQ2_0": write_tq2_0, "MXFP4": write_mxfp4, "NVFP4": write_nvfp4,
}  # fmt: skip
