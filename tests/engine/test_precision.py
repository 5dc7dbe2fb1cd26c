"""The dtype that a weight is used in."""

from __future__ import annotations

import pytest
import torch

from sdrpc.engine.precision import EXACT, FEW, Precision, assign
from sdrpc.engine.values import trace
from sdrpc.ggml import build as b
from sdrpc.ggml.tensor import Graph
from sdrpc.ggml.types import F16, F32
from tests.engine.compare import at

NARROW = Precision("fast", torch.bfloat16)
HALVES = Precision("fast", torch.bfloat16, halves=True)


@pytest.mark.parametrize(
    ("precision", "rows", "dtype"),
    [
        (EXACT, FEW, torch.float32), (NARROW, FEW, torch.bfloat16), (HALVES, FEW, torch.float16),
        (HALVES, FEW + 1, torch.bfloat16),
    ],
)  # fmt: skip
def test_few_rows_are_multiplied_with_weights_as_they_are(precision: Precision, rows: int, dtype: torch.dtype) -> None:
    product = b.mul_mat(b.leaf(F16, 64, 8, buffer=1), b.leaf(F32, 64, rows, buffer=1, offset=1024))
    (value,) = assign(trace(Graph((at(product, 1, 1 << 20),))).effects, precision)
    weight, x = value.src
    assert weight is not None
    assert x is not None
    assert (weight.dtype, x.dtype) == (dtype, dtype)
    assert weight.op == ("LEAF" if dtype is torch.float16 else "WEIGHT")
