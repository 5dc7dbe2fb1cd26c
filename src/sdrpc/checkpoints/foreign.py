"""Types of files that ggml does not have (:data:`sdrpc.ggml.types.OWN_TYPES`) as float32, by numpy: for devices that do
not take them. :mod:`sdrpc.engine.blocks.foreign` says what a block consists of, and does the same on a device.

A reader gets blocks, uint8 [n, bytes of a block], and gives float32 [n, elements of a block].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from ..ggml.codebooks import E2M1, NORMAL4, PARTS_OF_TWELVE

H4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float32) / 2


@cache
def float8(format: str) -> np.ndarray:
    """The 256 numbers of F8_E4M3 or F8_E5M2, float32. E5M2 is the upper half of a float16; E4M3 has no infinities, and
    its bits are sign, exponent (bias 7) and fraction."""
    bits = np.arange(256, dtype=np.uint16)
    if format == "F8_E5M2":
        return (bits << 8).view("<f2").astype(np.float32)
    exponent, fraction = (bits >> 3 & 15).astype(np.int32), (bits & 7).astype(np.float32)
    normal = np.ldexp(1 + fraction / 8, exponent - 7)
    numbers = np.where(exponent == 0, np.ldexp(fraction / 8, -6), normal)
    numbers[(bits & 0x7F) == 0x7F] = np.nan
    return np.where(bits & 0x80, -numbers, numbers).astype(np.float32)


@cache
def hadamard(size: int) -> np.ndarray:
    """ConvRot's rotation of ``size`` numbers, a power of 4 (arXiv:2512.03673): symmetric, and its own inverse."""
    return H4 if size == 4 else np.kron(hadamard(size // 4), H4)


def pairs(x: np.ndarray) -> np.ndarray:
    """[…, k / 2] bytes → […, k] of four bits: of each byte first the high ones."""
    return np.stack((x >> 4, x & 15), -1).reshape(*x.shape[:-1], -1)


def _single(b: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(b).view("<f4")


def _power(b: np.ndarray) -> np.ndarray:
    """2^(exponent - 127); 255 is no number."""
    e = b.astype(np.uint32)
    bits: np.ndarray = np.where(e == 0, np.uint32(0x00400000), np.where(e == 255, np.uint32(0x7FC00000), e << 23))
    return bits.view(np.float32)


def _coded(numbers: tuple[float, ...], codes: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.array(numbers, np.float32)[codes]
    return found


def _nvfp4(b: np.ndarray) -> np.ndarray:
    scales = _single(b[:, :4]) * float8("F8_E4M3")[b[:, 4:8]]
    numbers = _coded(E2M1, pairs(b[:, 8:])).reshape(-1, 4, 16)
    found: np.ndarray = (scales[..., None] * numbers).reshape(len(b), 64)
    return found


READ: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F8_E4M3": lambda b: float8("F8_E4M3")[b],
    "F8_E5M2": lambda b: float8("F8_E5M2")[b],
    "F8_E4M3_SCALED": lambda b: _single(b[:, :4]) * float8("F8_E4M3")[b[:, 4:]],
    "F8_E5M2_SCALED": lambda b: _single(b[:, :4]) * float8("F8_E5M2")[b[:, 4:]],
    "MXFP8": lambda b: _power(b[:, :1]) * float8("F8_E4M3")[b[:, 1:]],
    "NVFP4_SCALED": _nvfp4,
    "NF4": lambda b: _single(b[:, :4]) * _coded(NORMAL4, pairs(b[:, 4:])),
    "FP4": lambda b: _single(b[:, :4]) * _coded(PARTS_OF_TWELVE, pairs(b[:, 4:])),
    "I8_CONVROT": lambda b: (_single(b[:, :4]) * b[:, 4:].view(np.int8)) @ hadamard(256),
}
