"""Tensors of 8-bit floats, plain or with scales beside them, as tensors of a type that devices compute in.

Every number of both formats is exactly one of F16 (or of BF16). Scaled checkpoints store ``X.weight`` as F8_E4M3 with
``X.scale_weight`` or ``X.weight_scale``: one F32 number, or one for each row, by which the numbers are multiplied.
``X.scale_input`` and ``X.input_scale`` are for computing in 8 bits, and of no use here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from math import prod

import numpy as np

from ..errors import CheckpointError
from ..ggml.types import BF16, F16, F32, Type
from ..ggml.weight import Pieces, Weight
from .expressions import BUFFER, Made, converted, joined, whole_array
from .numbers import converter

FORMATS = ("F8_E4M3", "F8_E5M2")
MARKER = "scaled_fp8"
"""A tensor whose presence says that the others have scales."""
SCALES = (".scale_weight", ".weight_scale")
UNUSED = (".scale_input", ".input_scale")

LARGEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}
F16_RANGE = (2.0**-8, 65504.0)
"""The largest scaled number lies in this range if F16 holds the tensor about as precisely as 8 bits did; else BF16."""


@cache
def values(format: str) -> np.ndarray:
    """The 256 numbers of a format, float32. E5M2 is the upper half of a float16; E4M3 has no infinities, and its bits
    are sign, exponent (bias 7) and fraction."""
    bits = np.arange(256, dtype=np.uint16)
    if format == "F8_E5M2":
        return (bits << 8).view("<f2").astype(np.float32)
    exponent, fraction = (bits >> 3 & 15).astype(np.int32), (bits & 7).astype(np.float32)
    normal = np.ldexp(1 + fraction / 8, exponent - 7)
    numbers = np.where(exponent == 0, np.ldexp(fraction / 8, -6), normal)
    numbers[(bits & 0x7F) == 0x7F] = np.nan
    return np.where(bits & 0x80, -numbers, numbers).astype(np.float32)


def plain(raw: Weight, format: str) -> Weight:
    """``raw``, a tensor of bytes (I8), as F16."""
    look_up = partial(_look_up, _table(format, 1.0, F16))
    return _made(raw, F16, converted(raw.pieces, look_up, 1, 2, 1, prod(raw.shape)), "")


def scaled(raw: Weight, format: str, scale: Weight) -> Weight:
    """``raw`` times its scale, in F16, or BF16 where that would overflow or lose too much.

    Raises :class:`CheckpointError` for scales of another shape than one number, or one for each row.
    """
    per_row = bool(raw.shape) and scale.shape in ((raw.shape[0],), (raw.shape[0], 1))
    if scale.type != F32 or (prod(scale.shape) != 1 and not per_row):
        reason = f"has scales {scale.type} {list(scale.shape)}; one F32 number, or one for each row, is understood"
        raise CheckpointError(raw.file, reason, raw.name)
    factors = whole_array(scale).view("<f4")
    largest = LARGEST[format] * float(np.max(np.abs(factors), initial=0.0))
    target = F16 if F16_RANGE[0] <= largest <= F16_RANGE[1] else BF16
    what = f" × {scale.origin.part}" if scale.origin else ""
    if factors.size == 1:
        look_up = partial(_look_up, _table(format, float(factors[0]), target))
        return _made(raw, target, converted(raw.pieces, look_up, 1, 2, 1, prod(raw.shape)), what)
    row = prod(raw.shape[1:])
    numbers, encode = values(format), converter(F32, target)

    def make(first: int, last: int) -> np.ndarray:
        codes = joined(raw.pieces, first * row, last * row)
        product = numbers[codes].reshape(last - first, row) * factors[first:last, None]
        return encode(product.reshape(-1).view(np.uint8))

    step = max(1, BUFFER // max(4 * row, 1))
    return _made(raw, target, Made(2 * prod(raw.shape), max(2 * row, 1), step, make), what)


def assembled(tensors: Mapping[str, Weight], raw: Mapping[str, tuple[str, Weight]]) -> dict[str, Weight]:
    """A file's ``tensors`` together with its ``raw`` ones (name → format and bytes), which are unpacked; without the
    scales, which are part of them then."""
    if not raw:
        return dict(tensors)
    result = {name: w for name, w in tensors.items() if name != MARKER and not name.endswith(UNUSED)}
    for name, (kind, codes) in raw.items():
        stem = name.removesuffix(".weight")
        scale = next((found for end in SCALES if (found := tensors.get(stem + end))), None)
        if scale is not None:
            result[name] = scaled(codes, kind, scale)
            result.pop(scale.name, None)
        elif name != MARKER:
            result[name] = plain(codes, kind)
    return result


def _table(format: str, scale: float, target: Type) -> np.ndarray:
    """The bits of each of the 256 numbers times the scale."""
    with np.errstate(all="ignore"):
        scaled = (values(format) * np.float32(scale)).astype(np.float32)
    return converter(F32, target)(scaled.view(np.uint8)).view("<u2")


def _look_up(table: np.ndarray, codes: np.ndarray) -> np.ndarray:
    found: np.ndarray = table[codes]
    return found.view(np.uint8)


def _made(raw: Weight, target: Type, pieces: Pieces, scales: str) -> Weight:
    origin = raw.origin and raw.origin.made(f"{target}{scales}")
    return Weight(raw.name, target, raw.shape, pieces, origin, raw.file)
