"""What DoRAs make of weights, against the formulas of PEFT and LyCORIS in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import gguf
import numpy as np
import pytest

from sdrpc.checkpoints import dora
from sdrpc.checkpoints.deltas import Delta, Difference, LowRank, Product, merged, numbers
from sdrpc.checkpoints.dora import with_columns, with_rows
from sdrpc.errors import CheckpointError
from sdrpc.ggml.types import F32, TYPES
from sdrpc.ggml.weight import View, Weight

RANDOM = np.random.default_rng(7)
ROWS, CHANNELS, RANK, FACTOR = 12, 32, 3, 0.5
SHAPES = {"matrix": (ROWS, CHANNELS), "kernel": (ROWS, CHANNELS, 3, 3)}


def weight(array: np.ndarray, kind: str = "F32") -> Weight:
    stored = gguf.quants.quantize(array.astype(np.float32), gguf.GGMLQuantizationType[kind])
    return Weight("w", TYPES[kind], array.shape, View(memoryview(stored.tobytes())))


def product(shape: tuple[int, ...], low_rank: bool) -> Product:
    if not low_rank:
        return Difference(weight(RANDOM.normal(size=shape)), FACTOR)
    down, up = RANDOM.normal(size=(RANK, *shape[1:])), RANDOM.normal(size=(shape[0], RANK))
    return LowRank(weight(down), weight(up), FACTOR)


def formula(base: np.ndarray, change: Product, lengths: np.ndarray, strength: float, of_columns: bool) -> np.ndarray:
    base = base.astype(float)
    added = base + change.rows(0, len(base)).reshape(base.shape).astype(float)
    across = tuple(dim for dim in range(base.ndim) if dim != of_columns)
    norm = np.sqrt(np.square(added).sum(across, keepdims=True))
    found: np.ndarray = base + strength * (lengths.reshape(norm.shape) * added / norm - base)
    return found


def deltas(base: Weight, change: Product, lengths: Weight, of_columns: bool) -> tuple[Delta, ...]:
    if of_columns:
        (only,) = with_columns([(base, change)], lengths)
        return only
    return with_rows((base, change), lengths)


@pytest.fixture(autouse=True)
def _in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are read five rows of a matrix at a time, or fewer."""
    monkeypatch.setattr(dora, "NUMBERS", 5 * CHANNELS)


@pytest.mark.parametrize("of_columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("low_rank", [True, False], ids=["low rank", "difference"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula(shape: str, low_rank: bool, of_columns: bool) -> None:
    values = RANDOM.normal(size=SHAPES[shape])
    base, change = weight(values), product(values.shape, low_rank)
    lengths = RANDOM.uniform(1, 9, CHANNELS if of_columns else ROWS).astype(np.float32)
    found = deltas(base, change, weight(lengths), of_columns)
    for strength in (1.0, 0.7, -0.5):
        got = numbers(merged(base, [(each, strength) for each in found]))
        wanted = formula(values.astype(np.float32), change, lengths, strength, of_columns)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("of_columns", [False, True], ids=["rows", "columns"])
def test_lengths_are_those_of_the_numbers_that_a_quantized_weight_has(of_columns: bool) -> None:
    base = weight(RANDOM.normal(size=(ROWS, CHANNELS)), "Q4_0")
    change, lengths = product(base.shape, True), RANDOM.uniform(1, 9, CHANNELS if of_columns else ROWS)
    plain = weight(numbers(base))
    got = numbers(merged(plain, [(each, 1.0) for each in deltas(base, change, weight(lengths), of_columns)]))
    wanted = formula(numbers(base), change, lengths, 1.0, of_columns)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_what_has_no_length_stays_without() -> None:
    change = Difference(weight(-np.ones((ROWS, CHANNELS))))
    base = weight(np.ones((ROWS, CHANNELS)))
    for of_columns, count in ((False, ROWS), (True, CHANNELS)):
        found = deltas(base, change, weight(np.ones(count)), of_columns)
        assert not numbers(merged(base, [(each, 1.0) for each in found])).any()


@pytest.mark.parametrize("of_columns", [False, True], ids=["rows", "columns"])
def test_numbers_that_are_too_large_are_no_warnings(of_columns: bool) -> None:
    huge, base = np.full((ROWS, CHANNELS), 3e38), weight(np.full((ROWS, CHANNELS), 3e38))
    lengths = weight(np.full(CHANNELS if of_columns else ROWS, np.inf))
    for change in (Difference(weight(huge), 2.0), LowRank(weight(huge[:RANK]), weight(huge[:, :RANK]))):
        found = deltas(base, change, lengths, of_columns)
        for each in found:
            assert all(len(part.data()) == part.nbytes for part in each.weights)
        assert not np.isfinite(numbers(merged(base, [(each, 1.0) for each in found]))).any()


def test_a_weight_is_read_once_and_late() -> None:
    """For all of the deltas' bytes together, when the first of them are asked for."""
    base, asked = weight(RANDOM.normal(size=(ROWS, CHANNELS))), list[tuple[int, int | None]]()

    def pieces(start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
        asked.append((start, stop))
        return base.pieces(start, stop)

    found = with_rows((replace(base, pieces=pieces), product(base.shape, True)), weight(np.ones(ROWS)))
    assert not asked
    for _ in range(2):
        for each in found:
            for part in each.weights:
                assert len(part.data()) == part.nbytes
    stride = CHANNELS * F32.size
    assert sorted(asked) == [(0, 5 * stride), (5 * stride, 10 * stride), (10 * stride, 12 * stride)]


def test_lengths_of_another_number_are_refused() -> None:
    base, change = weight(np.ones((ROWS, CHANNELS))), product((ROWS, CHANNELS), True)
    with pytest.raises(CheckpointError, match=r"'w': has 13 lengths for rows of \[12, 32\]"):
        with_rows((base, change), weight(np.ones(ROWS + 1)))
    with pytest.raises(CheckpointError, match=r"'w': has 12 lengths for rows of \[12\]"):
        with_rows((weight(np.ones(ROWS)), Difference(weight(np.ones(ROWS)))), weight(np.ones(ROWS)))
    with pytest.raises(CheckpointError, match=r"'w': has 12 lengths for columns of \[12, 32\]"):
        with_columns([(base, change)], weight(np.ones(ROWS)))
