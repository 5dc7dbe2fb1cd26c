"""Which torch dtype holds which ggml type, and shapes between the two orders of dimensions."""

from __future__ import annotations

import torch

from sdrpc.ggml.tensor import Dims
from sdrpc.ggml.types import TYPES, Type

DTYPES: dict[Type, torch.dtype] = {
    TYPES[name]: dtype
    for name, dtype in {
        "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
        "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    }.items()
}  # fmt: skip
"""The plain types; a tensor of any other type is held as its bytes, uint8."""

Shape = tuple[int, int, int, int]


def shape_of(ne: Dims) -> Shape:
    """``ne`` in torch's order: the fastest dimension last. Every value here has four dimensions."""
    return ne[3], ne[2], ne[1], ne[0]
