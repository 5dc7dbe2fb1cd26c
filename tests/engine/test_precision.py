"""The dtype that a weight is used in."""

from __future__ import annotations

import pytest
import torch

from sdrpc.engine.operations import EngineOp
from sdrpc.engine.precision import EXACT, FEW, Precision, assign
from sdrpc.engine.values import trace
from sdrpc.engine.weights import WeightFormat
from sdrpc.ggml import build as b
from sdrpc.ggml.tensor import Graph
from sdrpc.ggml.types import F16, F32
from tests.engine.compare import at

NARROW = Precision("fast", torch.bfloat16)
HALVES = Precision("fast", torch.bfloat16, halves=True)


@pytest.mark.parametrize(
    ("precision", "rows", "op", "dtype"),
    [
        (EXACT, FEW, EngineOp.WEIGHT, torch.float32), (NARROW, FEW, EngineOp.WEIGHT, torch.bfloat16),
        (HALVES, FEW + 1, EngineOp.WEIGHT, torch.bfloat16),
        (HALVES, FEW, EngineOp.OPPORTUNISTIC_WEIGHT, torch.bfloat16),
        (HALVES, 2, EngineOp.OPPORTUNISTIC_WEIGHT, torch.bfloat16),
    ],
)  # fmt: skip
def test_few_rows_spare_their_weights_a_conversion(
    precision: Precision, rows: int, op: str, dtype: torch.dtype
) -> None:
    product = b.mul_mat(b.leaf(F16, 64, 8, buffer=1), b.leaf(F32, 64, rows, buffer=1, offset=1024))
    (value,) = assign(trace(Graph((at(product, 1, 1 << 20),))).roots, precision)
    weight, x = value.src
    assert weight is not None
    assert x is not None
    assert (weight.op, weight.params, x.dtype) == (op, WeightFormat(dtype), dtype)


def test_a_single_row_takes_its_weight_as_it_is() -> None:
    product = b.mul_mat(b.leaf(F16, 64, 8, buffer=1), b.leaf(F32, 64, buffer=1, offset=1024))
    (value,) = assign(trace(Graph((at(product, 1, 1 << 20),))).roots, HALVES)
    assert [s and (s.op, s.dtype) for s in value.src] == [
        (EngineOp.LEAF, torch.float16),
        (EngineOp.WEIGHT, torch.bfloat16),
    ]
