"""The dtype that a weight is used in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sdrpc.engine.fuse import fuse
from sdrpc.engine.operations import EngineOp
from sdrpc.engine.precision import EXACT, FEW, Precision, assign
from sdrpc.engine.values import trace
from sdrpc.engine.weights import WeightFormat
from sdrpc.ggml import build as b
from sdrpc.ggml.params import PREC_F32, Conv2D, FlashAttn, SoftMax
from sdrpc.ggml.tensor import Graph, Tensor
from sdrpc.ggml.types import F16, F32, Type
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


def convolution(prec: int) -> Tensor:
    kernel, image = b.leaf(F32, 3, 3, 4, 8, buffer=1), b.leaf(F32, 8, 8, 4, buffer=1, offset=1 << 16)
    return b.node("CONV_2D", kernel, image, params=Conv2D(1, 1, 1, 1, 1, 1, prec))


def flash_attention(prec: int, keys: Type = F32) -> Tensor:
    q, k, v = (b.leaf(t, 64, 4, buffer=1, offset=i << 16) for i, t in enumerate((F32, keys, keys)))
    return b.node("FLASH_ATTN_EXT", q, k, v, params=FlashAttn(1.0, prec=prec))


@pytest.mark.parametrize(
    ("make", "wide"),
    [
        (lambda prec: b.mul_mat(b.leaf(F32, 64, 8, buffer=1), b.leaf(F32, 64, 4, buffer=1, offset=1 << 16), prec=prec),
         True),
        (convolution, True), (flash_attention, True),
        (lambda prec: flash_attention(prec, F16), False),  # as native clients mark theirs
    ],
    ids=["product", "convolution", "attention", "attention over narrow keys"],
)  # fmt: skip
def test_what_is_marked_is_computed_in_float32(make: Callable[[int], Tensor], wide: bool) -> None:
    def dtype(prec: int) -> torch.dtype | None:
        (value,) = assign(trace(Graph((at(make(prec), 1, 1 << 20),))).roots, NARROW)
        return value.dtype

    assert dtype(0) is torch.bfloat16
    assert dtype(PREC_F32) is (torch.float32 if wide else torch.bfloat16)


@pytest.mark.parametrize("precs", [(PREC_F32, PREC_F32), (PREC_F32, 0)])
def test_attention_in_products_is_float32_where_both_are_marked(precs: tuple[int, int]) -> None:
    """Native clients mark the first one. Each result takes the memory of the one before, as graphs have it."""
    q, k, v = (b.leaf(F32, 64, 4, buffer=1, offset=i << 16) for i in range(3))
    scores = at(b.mul_mat(k, q, prec=precs[0]), 1, 1 << 20)
    weights = at(b.node("SOFT_MAX", scores, params=SoftMax(1.0)), 1, 1 << 20)
    turned = at(b.node("CONT", b.transpose(v)), 1, 1 << 22)
    mixed = at(b.mul_mat(turned, weights, prec=precs[1]), 1, 1 << 20)
    roots, fired = fuse(trace(Graph((scores, weights, turned, mixed))).roots)
    assert fired["attention"] == 1
    value = assign(roots, NARROW)[-1]
    assert value.dtype is (torch.float32 if precs[1] else torch.bfloat16)
