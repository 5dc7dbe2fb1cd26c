"""Operations that only the engine has, beside ggml's: they never come over the wire.

Tracing (:mod:`.values`) makes leaves, views and snapshots of memory; rounding and fusion (:mod:`.rounding`,
:mod:`.fuse`) say several of ggml's operations as one; :mod:`.precision` adds conversions. A value's operation is one of
these or the name of one of ggml's.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class EngineOp(Enum):
    """An operation of the engine's own. What its operands are and what it computes:"""

    LEAF = "memory that exists: a weight or an input"
    VIEW = "elements of a value, by strides (parameters: Strided)"
    SNAPSHOT = "a copy of memory that is overwritten before all who want it have read it"
    CAST = "a value in another dtype"
    DEQUANTIZE = "the floats of a value in quantized blocks"
    WEIGHT = "a leaf converted for its readers (parameters: WeightFormat), kept as long as memory allows"
    OPPORTUNISTIC_WEIGHT = "the same if there is room to keep it, else the leaf as it is"
    LINEAR = "MUL_MAT with a matrix, and ADD of a row"
    ATTENTION = "softmax(scale · q kᵀ + mask) v"
    NORM_AFFINE = "NORM, MUL by a row, ADD of a row"
    RMS_NORM_AFFINE = "RMS_NORM and MUL by a row"
    GROUP_NORM_AFFINE = "GROUP_NORM, MUL and ADD of one number a channel, perhaps SILU"
    MUL_MAT_I8 = "MUL_MAT of weights in I8 with scales, computed in integers"
    PRODUCT_8BIT = "MUL_MAT or LINEAR with a weight of 8 bits a number as it is"
    ADAMW_MEAN = "the first moment that OPT_STEP_ADAMW updates in memory"
    ADAMW_SQUARE = "the second one"
    FLASH_ATTN_F16_SUMS = "FLASH_ATTN_EXT, added up in F16 as ggml's CPU backend does it"

    def __str__(self) -> str:
        return self.name


OpName = str | EngineOp
"""The name of one of ggml's operations, or one of the engine's own."""


class Attention(NamedTuple):
    """softmax(scale · q kᵀ + mask) v; with ``max_bias`` the mask is multiplied with each head's slope (ALiBi).
    ``prec`` is that of both products."""

    scale: float
    max_bias: float = 0.0
    prec: int = 0


class AffineNorm(NamedTuple):
    """A norm with weight and bias; ``groups`` are zero where it goes over rows. ``silu``: followed by that."""

    eps: float
    groups: int = 0
    silu: bool = False
