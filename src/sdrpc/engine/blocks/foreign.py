"""Types of files that ggml does not have (:data:`sdrpc.ggml.types.OWN_TYPES`): 8-bit floats, bitsandbytes' four bits,
NVIDIA's with two scales, and rotated integers. They are only read: nobody computes in them.

The docstring of each reader gives the bytes of a block, in order, and what an element is, as in
:mod:`sdrpc.engine.blocks.legacy_quants`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdrpc.ggml.codebooks import E2M1, NORMAL4, PARTS_OF_TWELVE

from ..arithmetic import turned
from .bits import Blocks, reinterpret, shaped, table


def _single(x: Tensor) -> Tensor:
    return reinterpret(x, torch.float32)


def _e4m3(x: Tensor) -> Tensor:
    return reinterpret(x, torch.float8_e4m3fn).float()


def _e5m2(x: Tensor) -> Tensor:
    return reinterpret(x, torch.float8_e5m2).float()


def power(x: Tensor) -> Tensor:
    """Bytes as powers of two, float32: 2^(x - 127); 255 is NaN."""
    e = x.int()
    bits = torch.where(e == 0, 0x00400000, torch.where(e == 255, 0x7FC00000, e << 23))
    return bits.contiguous().view(torch.float32)


def _pairs(x: Tensor) -> Tensor:
    """[…, k / 2] bytes → […, k] of four bits: of each byte first the high ones."""
    return torch.stack((x >> 4, x & 15), -1).flatten(-2)


def read_f8_e4m3(b: Blocks) -> Tensor:
    """32 of e4m3."""
    return _e4m3(b)


def read_f8_e5m2(b: Blocks) -> Tensor:
    """32 of e5m2."""
    return _e5m2(b)


def read_f8_e4m3_scaled(b: Blocks) -> Tensor:
    """d f32 | 64 of e4m3: d q."""
    return _single(b[:, :4]) * _e4m3(b[:, 4:])


def read_f8_e5m2_scaled(b: Blocks) -> Tensor:
    """d f32 | 64 of e5m2: d q."""
    return _single(b[:, :4]) * _e5m2(b[:, 4:])


def read_mxfp8(b: Blocks) -> Tensor:
    """exponent, 1 byte | 32 of e4m3: 2^(exponent - 127) q."""
    return power(b[:, :1]) * _e4m3(b[:, 1:])


def read_nvfp4_scaled(b: Blocks) -> Tensor:
    """d f32 | 4 scales (e4m3), each of 16 elements | 32 bytes of float4 (e2m1), the high half of a byte first:
    (d scale) q."""
    scales = _single(b[:, :4]) * _e4m3(b[:, 4:8])
    return (scales[..., None] * shaped(table(E2M1, _pairs(b[:, 8:])), 4, 16)).flatten(1)


def read_nf4(b: Blocks) -> Tensor:
    """d f32 | 32 bytes, the high half of a byte first: d times the number of :data:`sdrpc.ggml.codebooks.NORMAL4`."""
    return _single(b[:, :4]) * table(NORMAL4, _pairs(b[:, 4:]))


def read_fp4(b: Blocks) -> Tensor:
    """d f32 | 32 bytes, the high half of a byte first: d times the number of
    :data:`sdrpc.ggml.codebooks.PARTS_OF_TWELVE`."""
    return _single(b[:, :4]) * table(PARTS_OF_TWELVE, _pairs(b[:, 4:]))


def read_i8_convrot(b: Blocks) -> Tensor:
    """d f32 | 256 of int8: d q, rotated back, all 256 together (:func:`sdrpc.engine.arithmetic.turned`)."""
    return turned(b[:, 4:].view(torch.int8).float(), 256) * _single(b[:, :4])


READ = {
    "F8_E4M3": read_f8_e4m3, "F8_E5M2": read_f8_e5m2, "F8_E4M3_SCALED": read_f8_e4m3_scaled,
    "F8_E5M2_SCALED": read_f8_e5m2_scaled, "MXFP8": read_mxfp8, "NVFP4_SCALED": read_nvfp4_scaled, "NF4": read_nf4,
    "FP4": read_fp4, "I8_CONVROT": read_i8_convrot,
}  # fmt: skip
