"""Weights in the form that a program computes with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdrpc.engine import LocalDevice
from sdrpc.engine.marks import Marks
from sdrpc.engine.memory import LocalBuffer, host_storage
from sdrpc.engine.precision import Precision
from sdrpc.engine.weights import PIECE, CachedWeight, Source, Weight, WeightFormat, Weights, convert
from sdrpc.ggml import build as b
from sdrpc.ggml.params import Conv2D
from sdrpc.ggml.types import F16
from tests.engine.compare import Leaves, check

BUFFER = LocalBuffer(1, 4096, host_storage(4096))


def test_float16_is_rounded_to_bfloat16_piece_by_piece() -> None:
    columns = 3 * PIECE // 100 * torch.get_num_threads()  # three pieces and a bit
    numbers = torch.randn(101, columns, generator=torch.Generator().manual_seed(0)).half()
    for x in (numbers, numbers[:, ::3], numbers.mT, numbers[:1, :1], numbers[:0]):
        found = convert(x, F16, (1, 1, 1, 1), WeightFormat(torch.bfloat16))
        assert found.is_contiguous()
        torch.testing.assert_close(found, x.to(torch.bfloat16), rtol=0, atol=0)


def source(number: int, elements: int = 10, storage: int = 1) -> Source:
    start = 100 * number
    ne, nb = (elements, 1, 1, 1), (2, 2 * elements, 2 * elements, 2 * elements)
    return Source(storage, start, start + 2 * elements, F16, ne, nb, WeightFormat(torch.float32))


def kept(weights: Weights, *numbers: int) -> list[bool]:
    """Which of these are there, in another run than before."""
    weights.begin()
    return [weights.find(source(number), Marks()) is not None for number in numbers]


def keep(weights: Weights, number: int, elements: int = 10) -> CachedWeight:
    made = source(number, elements)
    assert weights.has_room(made.nbytes)
    kept = weights.keep(made, torch.zeros(elements), BUFFER.storage, BUFFER.marks)
    assert kept is not None
    return kept


def test_what_nobody_used_for_long_makes_room_for_others() -> None:
    weights = Weights(budget=120, patience=2)
    first, second, third = (keep(weights, number) for number in range(3))
    for _ in range(2):
        weights.begin()
        third.used = weights.runs
        assert not weights.has_room(40), "those are younger than that"
    weights.begin()
    third.used = weights.runs
    assert not weights.has_room(81), "two can leave, not three"
    assert kept(weights, 0, 1, 2) == [True, True, True], "so nobody did"
    assert weights.has_room(40)
    assert kept(weights, 0, 1, 2) == [False, True, True]
    assert (first.tensor, first.written) == (None, False)
    assert second.tensor is not None
    assert weights.used == 80
    assert weights.dropped == 0, "nothing that was handed out has become wrong"


def test_what_others_keep_does_not_decide_how_a_first_run_rounds() -> None:
    """What is converted only to be kept is taken as it is in a program's first run, whoever keeps it already: one seed,
    one picture, whether somebody else draws with the same model or not."""
    weights, raw = Weights(budget=1000), torch.zeros(10, dtype=torch.float16)
    keep(weights, 0)
    weight = Weight(weights, source(0), True, BUFFER)
    assert [weight(raw).dtype for _ in range(2)] == [torch.float16, torch.float32]
    assert Weight(weights, source(0), False, BUFFER)(raw).dtype == torch.float32


def test_without_patience_all_stay() -> None:
    weights = Weights(budget=40, patience=None)
    keep(weights, 0)
    for _ in range(100):
        weights.begin()
    assert not weights.has_room(1)


def test_what_is_written_is_gone() -> None:
    weights = Weights(budget=1000, patience=2)
    first, second, third = (keep(weights, number) for number in range(3))
    weights.drop(2)
    weights.drop(1, 20, 100)  # between the first two
    assert weights.dropped == 0
    weights.drop(1, 119, 200)
    assert kept(weights, 0, 1, 2) == [True, False, True]
    assert (second.tensor, second.written) == (None, True)
    weights.drop(1)
    assert kept(weights, 0, 1, 2) == [False, False, False]
    assert first.written
    assert third.written
    assert (weights.used, weights.dropped) == (0, 3)


@pytest.mark.parametrize("budget", [1 << 20, 0])
def test_few_rows_are_right_with_weights_that_are_kept_and_as_they_are(
    budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a matrix, and places of an image, whose kernel is one too."""
    made: list[tuple[int, torch.dtype]] = []
    keep = Weights.keep

    def noticed(weights: Weights, source: Source, tensor: torch.Tensor, *of: Any) -> CachedWeight | None:
        made.append((tensor.numel(), tensor.dtype))
        return keep(weights, source, tensor, *of)

    monkeypatch.setattr(Weights, "keep", noticed)
    halves = Precision("fast", torch.bfloat16, halves=True)
    device = LocalDevice("CPU", torch.device("cpu"), halves, threads=1, dequant_cache=budget)
    try:
        leaves = Leaves()
        check(device, leaves, [b.mul_mat(leaves.normal(64, 8, type="F16"), leaves.normal(64, 3))], runs=2)
        kernel = leaves.normal(3, 3, 4, 48, type="F16", scale=0.2)
        params = Conv2D(1, 1, 1, 1, 1, 1)
        check(device, leaves, [b.node("CONV_2D", kernel, leaves.normal(3, 3, 4), params=params)], runs=2)
    finally:
        device.close()
    weights = {(64 * 8, torch.bfloat16), (9 * 4 * 48, torch.bfloat16)}
    assert weights & set(made) == (weights if budget else set())
