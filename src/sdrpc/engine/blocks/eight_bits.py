"""Weights of 8 bits a number for products that take them as they are: rows that each have one scale.

Packed rows are bytes: all numbers, row after row, then each row's scale in float32. Of types whose blocks have scales
that is the largest one of the row: where all are the same, as in most files, no number changes; others are rounded
again.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from sdrpc.ggml.tensor import Dims
from sdrpc.ggml.types import Type

from ..deadline import checkpoint
from .bits import reinterpret
from .foreign import power

CHUNK = 1 << 24
"""Numbers that are packed at once, as floats."""
SCALE_BYTES = 4


class EightBits(NamedTuple):
    """What a type's numbers are. ``head``: bytes of the scale before each block, E8M0 or float32. ``group``: so many of
    a row were rotated together (:func:`sdrpc.engine.arithmetic.rotated`)."""

    dtype: torch.dtype
    head: int
    group: int = 1


EIGHT_BITS = {
    "F8_E4M3_SCALED": EightBits(torch.float8_e4m3fn, 4), "F8_E5M2_SCALED": EightBits(torch.float8_e5m2, 4),
    "MXFP8": EightBits(torch.float8_e4m3fn, 1), "I8_CONVROT": EightBits(torch.int8, 4, 256),
}  # fmt: skip
"""The types that products take as they are, by name: those of files whose makers meant that, as ComfyUI does it. 8-bit
floats without scales are what somebody saved memory with; their products are as good as those of any floats."""


def packed_bytes(ne: Dims) -> int:
    """What packed rows of a matrix take."""
    return prod(ne) + SCALE_BYTES * prod(ne[1:])


def pack(raw: Tensor, type: Type, ne: Dims) -> Tensor:
    """``raw`` [1, 1, rows, bytes of a row] of uint8, of a type of :data:`EIGHT_BITS` → packed rows."""
    kind, (k, rows) = EIGHT_BITS[type.name], ne[:2]
    packed = torch.empty(packed_bytes(ne), dtype=torch.uint8, device=raw.device)
    numbers, scales = packed[: rows * k].view(rows, k), packed[rows * k :].view(rows, SCALE_BYTES)
    blocks = raw.reshape(rows, k // type.block, type.size)
    step = max(1, CHUNK // k)
    for start in range(0, rows, step):
        checkpoint()
        some = blocks[start : start + step]
        factors = _scales(some[..., : kind.head])
        largest = factors.abs().amax(1, keepdim=True)
        codes = (
            some[..., kind.head :].contiguous().view(kind.dtype).float()
            * torch.nan_to_num(factors / largest)[..., None]
        )
        if kind.dtype is torch.int8:
            codes = codes.round()
        numbers[start : start + step] = codes.to(kind.dtype).view(torch.uint8).reshape(len(some), k)
        scales[start : start + step] = largest.view(torch.uint8)
    return packed


def unpack(packed: Tensor, kind: EightBits, k: int) -> tuple[Tensor, Tensor]:
    """The numbers of packed rows, [rows, k], and their scales, [rows]."""
    rows = packed.numel() // (k + SCALE_BYTES)
    flat = packed.reshape(-1)
    return flat[: rows * k].view(kind.dtype).view(rows, k), flat[rows * k :].view(torch.float32)


def _scales(heads: Tensor) -> Tensor:
    """[rows, blocks, bytes] → the scale of each block, float32."""
    if heads.shape[-1] == SCALE_BYTES:
        return reinterpret(heads, torch.float32).squeeze(-1)
    return power(heads.squeeze(-1))
