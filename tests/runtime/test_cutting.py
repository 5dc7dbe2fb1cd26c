"""Graphs cut into parts: where, and that the parts compute what the whole does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sdrpc.errors import GraphError
from sdrpc.ggml import build
from sdrpc.ggml.tensor import Graph
from sdrpc.ggml.types import F32
from sdrpc.lowering.capture import capture
from sdrpc.lowering.lower import lower
from sdrpc.lowering.weights import weights_of
from sdrpc.runtime.chain import Chained
from sdrpc.runtime.cutting import Profile, parts, positions, profile, whole
from sdrpc.runtime.lowered import Lowered
from sdrpc.runtime.run import Executable, WeightStore
from sdrpc.targets import PORTABLE, SDRPC
from tests.lowering.devices import ReferenceDevice


class Residual(nn.Module):
    """Four layers around a stream, with one value that is read far behind where it is computed, and integers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        early = x = self.table(ids) + x
        for layer in self.layers:
            x = x + layer(torch.nn.functional.layer_norm(x, (32,)))
        middle = x.transpose(1, 2) * 2
        return torch.cat([x, early]), middle


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 8, (2, 3), generator=generator)
    return {"ids": ids, "x": torch.randn((2, 3, 32), generator=generator)}


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(1)
    return Residual().eval()


def lowered(module: nn.Module, managed: bool = True) -> Lowered:
    return lower(capture(module, inputs(), lambda m, ids, x: m(ids, x)), SDRPC if managed else PORTABLE, {})


def run(cut: Lowered, cuts: tuple[int, ...], module: nn.Module, managed: bool = True) -> list[np.ndarray]:
    device = ReferenceDevice(SDRPC if managed else PORTABLE)
    stores = [WeightStore(device, {w.name: w for w in weights_of(module)}) for _ in (*cuts, 0)]
    found = parts(cut, cuts) if cuts else [whole(cut)]
    program = Chained(
        [(part, Executable(part.lowered, device, store)) for part, store in zip(found, stores, strict=True)],
        lambda part: stores[part].release(),
    )
    given = {name: tensor.numpy() for name, tensor in inputs().items()}
    first = list(program.results(given))
    again = list(program.results(given))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    program.close()
    return first


@pytest.mark.parametrize("managed", [True, False])
def test_parts_compute_what_the_whole_does(module: nn.Module, managed: bool) -> None:
    """Wherever it is cut, in two and in three."""
    graph = lowered(module, managed)
    expected = run(graph, (), module, managed)
    last = len(graph.graph.nodes)
    for cuts in [(at,) for at in range(1, last, 4)] + [(at, at + 5) for at in range(3, last - 5, 11)]:
        for one, other in zip(run(graph, cuts, module, managed), expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_each_weight_goes_with_its_readers(module: nn.Module) -> None:
    graph = lowered(module)
    facts = profile(graph)
    sizes = dict(zip(facts.names, facts.sizes.tolist(), strict=True))
    half = sum(sizes.values()) // 2 + 4096
    (cut,) = positions(facts, (half, half)) or pytest.fail("it fits")
    first, second = parts(graph, (cut,))
    names = [{weight.name for weight in part.lowered.weights} for part in (first, second)]
    assert not names[0] & names[1]
    assert names[0] | names[1] == set(sizes)
    assert all(sum(sizes[name] for name in some) <= half for some in names)
    assert sum(entry.leaves[0].nbytes for entry in second.lowered.inputs) == facts.crossing[cut]
    assert second.lowered.inputs, "the stream crosses"


def test_other_graphs_of_a_module_are_cut_between_the_same_weights(module: nn.Module) -> None:
    facts = profile(lowered(module))
    (cut,) = positions(facts, (10**9, 10**9)) or pytest.fail("it fits")
    placed = {name: int(at >= cut) for name, at in zip(facts.names, facts.first.tolist(), strict=True)}
    assert positions(facts, (0, 0), placed) == (cut,)
    other = {name: int(name != facts.names[0]) for name in facts.names}
    (moved,) = positions(facts, (0, 0), other) or pytest.fail("it fits")
    assert {name for name, at in zip(facts.names, facts.first.tolist(), strict=True) if at < moved} == {facts.names[0]}


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=12),
    st.lists(st.integers(0, 120), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_where_it_is_cut_fits_and_is_found(sizes: list[int], rooms: list[int], random: object) -> None:
    """Compared with all ways to deal rows of weights to devices in order."""
    crossing = np.array([0, *(random.choice([-1, 5, 9]) for _ in sizes[1:]), 0], np.int64)  # type: ignore[attr-defined]
    facts = Profile(crossing, tuple(map(str, range(len(sizes)))), np.arange(len(sizes)), np.array(sizes))

    def ways(start: int, left: list[int]) -> bool:
        if len(left) == 1:
            return sum(sizes[start:]) <= left[0]
        return any(
            crossing[stop] >= 0 and sum(sizes[start:stop]) <= left[0] and ways(stop, left[1:])
            for stop in range(start + 1, len(sizes))
        )

    found = positions(facts, rooms)
    assert (found is not None) == ways(0, rooms)
    assert found == positions(facts, rooms)
    if found is not None:
        ends = [0, *found, len(sizes)]
        assert all(sum(sizes[a:b]) <= room for a, b, room in zip(ends, ends[1:], rooms, strict=False))
        assert all(crossing[cut] >= 0 for cut in found)


def test_little_crosses_where_shares_are_about_right() -> None:
    sizes = np.full(20, 10)
    crossing = np.array([0, *[100] * 19, 0])
    crossing[9], crossing[2] = 50, 1
    facts = Profile(crossing, tuple(map(str, range(20))), np.arange(20), sizes)
    assert positions(facts, (1000, 1000)) == (9,)
    assert positions(facts, (1000, 3000)) == (5,)
    assert positions(facts, (1000, 5000)) == (2,)


def test_what_writes_in_place_is_not_cut() -> None:
    x = build.leaf(F32, 4)
    doubled = build.node("ADD", x, x)
    over = build.inplace("ADD", doubled, x)
    with pytest.raises(GraphError, match="over its own values"):
        profile(replace(lowered(Residual().eval()), graph=Graph((doubled, over))))
