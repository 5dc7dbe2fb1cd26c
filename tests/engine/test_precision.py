"""The dtype that a weight is used in."""

from __future__ import annotations

import pytest
import torch

from sdrpc.engine.precision import EXACT, FEW, Precision, assign
from sdrpc.engine.values import trace
from sdrpc.engine.weights import Form
from sdrpc.ggml import build as b
from sdrpc.ggml.tensor import Graph
from sdrpc.ggml.types import F16, F32
from tests.engine.compare import at

NARROW = Precision("fast", torch.bfloat16)
HALVES = Precision("fast", torch.bfloat16, halves=True)


@pytest.mark.parametrize(
    ("precision", "rows", "op", "dtype"),
    [
        (EXACT, FEW, "WEIGHT", torch.float32), (NARROW, FEW, "WEIGHT", torch.bfloat16),
        (HALVES, FEW, "SPARED", torch.bfloat16), (HALVES, FEW + 1, "WEIGHT", torch.bfloat16),
        (HALVES, 2, "SPARED", torch.bfloat16),
    ],
)  # fmt: skip
def test_few_rows_spare_their_weights_a_conversion(
    precision: Precision, rows: int, op: str, dtype: torch.dtype
) -> None:
    product = b.mul_mat(b.leaf(F16, 64, 8, buffer=1), b.leaf(F32, 64, rows, buffer=1, offset=1024))
    (value,) = assign(trace(Graph((at(product, 1, 1 << 20),))).effects, precision)
    weight, x = value.src
    assert weight is not None
    assert x is not None
    assert (weight.op, weight.params, x.dtype) == (op, Form(dtype), dtype)


def test_a_single_row_takes_its_weight_as_it_is() -> None:
    product = b.mul_mat(b.leaf(F16, 64, 8, buffer=1), b.leaf(F32, 64, buffer=1, offset=1024))
    (value,) = assign(trace(Graph((at(product, 1, 1 << 20),))).effects, HALVES)
    assert [s and (s.op, s.dtype) for s in value.src] == [("LEAF", torch.float16), ("WEIGHT", torch.bfloat16)]
