"""Numbers of one tensor type as numbers of another one: plain types by numpy, ggml's blocks by the gguf library, those
of formats that ggml does not have by :mod:`sdrpc.checkpoints.foreign`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np

from ..ggml.types import BF16, F16, F32, NUMPY_DTYPES, TYPES, Type
from . import foreign

Convert = Callable[[np.ndarray], np.ndarray]
"""Bytes (uint8, 1-D) of whole blocks of one type → bytes of another type."""

BLOCKS = 128
"""That the gguf library gets as one row: with one a row it takes ten times as long, a hundred times for BF16."""

_ORDER = ("I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64")
"""Plain types; of two, the later one holds both, except F16 and BF16: these need F32."""


def common(types: Iterable[Type]) -> Type:
    """The type to which tensors of these types are cast before they are joined. Blocks count as what they unpack to."""
    found = set(types)
    if len(found) == 1:
        return found.pop()
    plain = {unpacked(each) for each in found}
    highest = max(plain, key=lambda each: _ORDER.index(each.name))
    return F32 if highest == BF16 and F16 in plain else highest


def unpacked(type: Type) -> Type:
    """The plain type that a tensor has after its blocks were broken up: F16; BF16 where scales are powers of two of
    any size (MXFP4, MXFP8), which F16 does not hold and BF16 holds exactly."""
    if type.plain:
        return type
    return BF16 if type.name in ("MXFP4", "MXFP8") else F16


def converter(source: Type, target: Type) -> Convert:
    """How bytes of ``source`` become bytes of ``target``. Raises :class:`ValueError` where that is not possible."""
    decode, encode = _decoder(source), _encoder(target)

    def convert(data: np.ndarray) -> np.ndarray:
        # what a type can't hold becomes infinite or its nearest number, as everywhere
        with np.errstate(all="ignore"):
            return np.ascontiguousarray(encode(decode(data))).reshape(-1).view(np.uint8)

    return convert


def _decoder(type: Type) -> Convert:
    if type == BF16:
        return lambda data: (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if type.plain:
        return lambda data: data.view(NUMPY_DTYPES[type.name])
    if read := foreign.READ.get(type.name):
        return lambda data: read(data.reshape(-1, type.size)).reshape(-1)
    if not _supported(type.name)[0]:
        raise ValueError(f"{type} can't be unpacked: the gguf library does not read it")
    return lambda data: _gguf().quants.dequantize(in_rows(data, type.size), _kind(type)).reshape(-1)


def _encoder(type: Type) -> Convert:
    if type == BF16:
        return _bfloat16
    if type.plain:
        return lambda values: values.astype(NUMPY_DTYPES[type.name], copy=False)
    if type.name in foreign.READ or not _supported(type.name)[1]:
        raise ValueError(f"{type} can't be made: nothing here writes it")
    return lambda values: _gguf().quants.quantize(in_rows(values.astype(np.float32), type.block), _kind(type))


def in_rows(data: np.ndarray, block: int) -> np.ndarray:
    """Blocks of so many numbers or bytes in long rows, for the gguf library, which goes through 16 rows at a time."""
    row = block * BLOCKS
    return data.reshape(-1, data.size if data.size % row else row)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to nearest, ties to even; NaN stays NaN."""
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype("<u2")


@cache
def _supported(name: str) -> tuple[bool, bool]:
    """Whether the gguf library reads and writes a type of blocks: found out with one block."""
    blocks, quants = TYPES[name], _gguf().quants
    block, numbers = np.zeros((1, blocks.size), np.uint8), np.zeros((1, blocks.block), np.float32)
    found = []
    for function, data in ((quants.dequantize, block), (quants.quantize, numbers)):
        try:
            with np.errstate(all="ignore"):
                function(data, _kind(blocks))
        except (NotImplementedError, KeyError):
            found.append(False)
        else:
            found.append(True)
    return found[0], found[1]


def _kind(type: Type) -> Any:
    return _gguf().GGMLQuantizationType[type.name]


def _gguf() -> Any:
    import gguf  # takes a while to load, and most files need nothing of it

    return gguf
