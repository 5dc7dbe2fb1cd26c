"""ggml's tensor types and the sizes of their blocks.

The sizes are those of ggml's ``type_traits`` (ggml.c, ggml-common.h); the numbers by which peers name the types differ
between versions and stand in ``dialects.json``. Beside them are types of our own, for formats of files that ggml has
no type for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Type:
    """A tensor type: ``block`` elements are stored in ``size`` bytes (plain types have blocks of one element)."""

    name: str
    block: int
    size: int

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[object, ...]:
        """In another process it is the type of that name there, not a copy."""
        return _named, (self.name,)

    @property
    def plain(self) -> bool:
        """Whether each element is a number of its own (not part of a quantized block)."""
        return self.block == 1

    def row_bytes(self, elements: int) -> int:
        """Bytes of a row of ``elements``, which must be a multiple of the block."""
        return elements // self.block * self.size


_SIZES = {
    # plain
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "F64": (1, 8),
    "I8": (1, 1), "I16": (1, 2), "I32": (1, 4), "I64": (1, 8),
    # blocks of 32 and 64
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "Q8_1": (32, 36),
    "IQ4_NL": (32, 18), "MXFP4": (32, 17), "NVFP4": (64, 36), "Q1_0": (128, 18), "Q2_0": (64, 18),
    # super-blocks of 256
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "Q8_K": (256, 292), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82), "IQ3_XXS": (256, 98),
    "IQ3_S": (256, 110), "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ4_XS": (256, 136), "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
}  # fmt: skip

_OWN_SIZES = {
    # 8-bit floats: as they are; with the scale of their tensor or row (F32) before each block; with one of E8M0
    "F8_E4M3": (32, 32), "F8_E5M2": (32, 32), "F8_E4M3_SCALED": (64, 68), "F8_E5M2_SCALED": (64, 68),
    "MXFP8": (32, 33),
    # 4 bits: NVFP4 with the scale of its tensor (F32) before each block; bitsandbytes' types with that of a block (F32)
    "NVFP4_SCALED": (64, 40), "NF4": (64, 36), "FP4": (64, 36),
    # 8-bit integers of rotated rows, after the scale of their row (F32)
    "I8_CONVROT": (256, 260),
}  # fmt: skip
"""Types that ggml does not have and files do: how our own peers hold them. :mod:`sdrpc.engine.blocks.foreign` says what
an element is."""

TYPES: dict[str, Type] = {name: Type(name, block, size) for name, (block, size) in {**_SIZES, **_OWN_SIZES}.items()}


def _named(name: str) -> Type:
    return TYPES[name]


OWN_TYPES: dict[int, Type] = {1000 + i: TYPES[name] for i, name in enumerate(_OWN_SIZES)}
"""Our own types by the numbers that our own peers have for them, in every dialect, far from any that ggml may come
to have."""

OF_GGML = frozenset(_SIZES)
"""The names of ggml's own types."""

F32, F16, BF16, I32, I64, I8 = (TYPES[name] for name in ("F32", "F16", "BF16", "I32", "I64", "I8"))

NUMPY_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "F64": np.dtype("<f8"),
    "I8": np.dtype("i1"), "I16": np.dtype("<i2"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8"),
}  # fmt: skip
"""The plain types that numpy has, by name (it has no BF16)."""
