"""What blocks are made of, both ways: small numbers in bytes, and the floats of two bytes and of one.

Bytes are uint8; a block's bytes are the last dimension.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

Blocks = Tensor
"""[n, bytes of a block] of uint8."""

UE4M3_LARGEST, UE4M3_NAN, UE4M3_BIAS = 0x7E, 0x7F, 120
"""Codes of unsigned e4m3: 448, and no number; how much less its exponents are than those of float32."""


def shaped(x: Tensor, *shape: int) -> Tensor:
    """``x`` with its last dimension as several."""
    return x.reshape(*x.shape[:-1], *shape)


def reinterpret(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[…, s k] bytes → […, k] numbers of s bytes. Blocks may begin at any byte of a buffer, and so may ``x``: torch
    wants it at a multiple of s."""
    x = x.contiguous()
    if any(n % dtype.itemsize for n in (x.storage_offset(), *x.stride()[:-1])):  # of one block the stride may be any
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(dtype)


def half(x: Tensor) -> Tensor:
    """[…, 2 k] bytes → […, k] float32, read as float16."""
    return reinterpret(x, torch.float16).float()


def words(x: Tensor) -> Tensor:
    """[…, 2 k] bytes → […, k] int32, read as unsigned integers of 16 bits."""
    return reinterpret(x, torch.int16).int() & 0xFFFF


def as_bytes(x: Tensor) -> Tensor:
    """[…, k] numbers of s bytes → […, s k] bytes."""
    return x.contiguous().view(torch.uint8)


def as_half(x: Tensor) -> Tensor:
    """[…, k] float32 → […, 2 k] bytes of float16."""
    return as_bytes(x.half())


def _shifts(width: int, x: Tensor) -> Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=x.device)


def unpack(x: Tensor, width: int) -> Tensor:
    """[…, k] bytes → […, k, 8 / width]: the fields of each byte, the lowest first."""
    return (x[..., None] >> _shifts(width, x)) & ((1 << width) - 1)


def pack(x: Tensor, width: int) -> Tensor:
    """[…, k, 8 / width] small numbers → […, k] bytes: what :func:`unpack` reads."""
    return (x.to(torch.uint8) << _shifts(width, x)).sum(-1, dtype=torch.uint8)


def planes(x: Tensor, width: int) -> Tensor:
    """[…, k] bytes → […, 8 / width, k]: for each field, the lowest first, that field of every byte."""
    return (x[..., None, :] >> _shifts(width, x)[:, None]) & ((1 << width) - 1)


def pack_planes(x: Tensor, width: int) -> Tensor:
    """[…, 8 / width, k] small numbers → […, k] bytes: what :func:`planes` reads."""
    return (x.to(torch.uint8) << _shifts(width, x)[:, None]).sum(-2, dtype=torch.uint8)


@cache
def constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """``values`` as float32 in the memory of ``device``, where they stay: a copy to an accelerator makes it wait, and
    can't be part of a recording. (All that is ever asked for stands in this package.)"""
    return torch.tensor(values, dtype=torch.float32, device=device)


def table(values: tuple[float, ...], x: Tensor) -> Tensor:
    """``values`` at the positions ``x``."""
    return constants(values, x.device)[x.long()]


def power(exponent: Tensor) -> Tensor:
    """[…] bytes → 2^(exponent - 128) as float32; the two smallest exponents give denormals."""
    e = exponent.int()
    raw = torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1) << 23)
    return raw.contiguous().view(torch.float32)


def _ue4m3(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    if code == UE4M3_NAN:
        return 0.0
    return mantissa * 2.0**-10 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 11)


UE4M3 = tuple(_ue4m3(code) for code in range(256))
"""Half of what each byte means as a number of four bits of exponent and three of mantissa: the values that it scales
are doubled."""


def as_ue4m3(x: Tensor) -> Tensor:
    """Float32, not negative → bytes whose entries in :data:`UE4M3` are half of it. What ggml rounds to 256 or more
    becomes the largest number, 448."""
    bits = x.contiguous().view(torch.int32)
    normal = (bits >> 20) - (UE4M3_BIAS << 3) + (bits >> 19 & 1)
    code = torch.where(bits >> 23 <= UE4M3_BIAS, (x * 512 + 0.5).int().clamp(max=7), normal)
    return torch.where(normal >= 15 << 3, UE4M3_LARGEST, code).to(torch.uint8)
