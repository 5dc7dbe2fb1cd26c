"""Shapes of any rank: views, slices, permutations and broadcasting against torch, with shapes that nobody chose."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.lowering.compare import check

EXAMPLES = settings(max_examples=15)
sizes = st.integers(1, 4)


def tensor(shape: list[int] | tuple[int, ...]) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(prod(shape)))


@EXAMPLES
@given(st.data(), st.lists(st.integers(1, 3), min_size=1, max_size=6))
def test_permutations_and_views(data: st.DataObject, shape: list[int]) -> None:
    first, second = (data.draw(st.permutations(range(len(shape)))) for _ in range(2))
    cut = data.draw(st.integers(0, len(shape)))

    def function(x: Tensor) -> tuple[Tensor, ...]:
        moved = x.permute(first)
        flat = moved.reshape(prod(moved.shape[:cut]), -1)
        return moved, moved.permute(second), flat, flat.t() * 2, moved.reshape(-1)

    check(function, tensor(shape))


@EXAMPLES
@given(st.data(), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_slices_and_joins(data: st.DataObject, shape: list[int]) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    start = data.draw(st.integers(0, shape[dim] - 1))
    stop = data.draw(st.integers(start + 1, shape[dim]))
    step = data.draw(st.integers(1, 3))
    order = data.draw(st.permutations(range(len(shape))))

    def function(x: Tensor) -> tuple[Tensor, ...]:
        part = x.permute(order).movedim(order.index(dim), 0)[start:stop:step]
        joined = torch.cat((part, x.permute(order).movedim(order.index(dim), 0)))
        return part, part * 2, joined, x.narrow(dim, start, stop - start).sum(dim), torch.stack((x, x), dim)

    check(function, tensor(shape))


@EXAMPLES
@given(st.data(), st.lists(st.integers(1, 3), min_size=0, max_size=6))
def test_broadcasting(data: st.DataObject, shape: list[int]) -> None:
    def thinned() -> Tensor:
        kept = [n if data.draw(st.booleans()) else 1 for n in shape]
        return tensor(kept[data.draw(st.integers(0, len(kept))) :])

    check(
        lambda a, b: (a + b, a - b, a * b, a / (b.abs() + 1), a > b, a.expand(shape), b.expand(shape)),
        thinned(),
        thinned(),
    )


@EXAMPLES
@given(
    batch=st.integers(1, 3), channels=st.integers(1, 3), out=st.integers(1, 4), height=st.integers(3, 8),
    width=st.integers(3, 8), kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)), padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
)  # fmt: skip
def test_convolutions(
    batch: int, channels: int, out: int, height: int, width: int, kernel: Any, stride: Any, padding: Any
) -> None:
    inputs = tensor((batch, channels, height, width)), tensor((out, channels, *kernel)), tensor((out,))
    check(lambda x, w, b: F.conv2d(x, w, b, stride, padding), *inputs)


@EXAMPLES
@given(
    batch=st.lists(st.integers(1, 3), max_size=3), queries=st.integers(1, 5), keys=st.integers(1, 5),
    width=st.integers(1, 6), masked=st.sampled_from(["no", "causal", "shared", "own"]),
)  # fmt: skip
def test_attention(batch: list[int], queries: int, keys: int, width: int, masked: str) -> None:
    q, k, v = tensor((*batch, queries, width)), tensor((*batch, keys, width)), tensor((*batch, keys, width))
    mask = tensor((queries, keys)) if masked == "shared" else tensor((*batch, queries, keys))

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        chosen = mask if masked in ("shared", "own") else None
        return F.scaled_dot_product_attention(q, k, v, chosen, is_causal=masked == "causal")

    check(function, q, k, v, mask)


@EXAMPLES
@given(height=st.integers(1, 7), width=st.integers(1, 7), to=st.tuples(st.integers(1, 20), st.integers(1, 20)))
def test_nearest_neighbours_of_any_size(height: int, width: int, to: tuple[int, int]) -> None:
    check(lambda x: F.interpolate(x, size=to), tensor((1, 2, height, width)))
