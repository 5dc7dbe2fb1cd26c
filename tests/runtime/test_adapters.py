"""Adapters on lowered graphs: each kind of change at each operation that reads a weight, on every target, against torch
with the weights merged."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sdrpc.checkpoints.deltas import ColumnScaling, Delta, Difference, LowRank, RowScaling
from sdrpc.device import Target
from sdrpc.errors import UnsupportedOperation
from sdrpc.ggml.types import F16, F32
from sdrpc.ggml.weight import View, Weight
from sdrpc.lowering.capture import capture
from sdrpc.lowering.lower import lower
from sdrpc.lowering.weights import weights_of
from sdrpc.runtime.adapters import STRENGTHS, Adapters, adapted, adapters
from sdrpc.runtime.lowered import Lowered, from_bytes, to_bytes
from sdrpc.runtime.run import Executable, WeightStore
from sdrpc.targets import PORTABLE, SDRPC
from tests.lowering.compare import TOLERANCE, error
from tests.lowering.devices import ReferenceDevice

SEED = torch.Generator().manual_seed(5)


class Net(nn.Module):
    """A table, two matrices that read the same, kernels of nine taps and of one, a line's kernel, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 32)
        self.query, self.key = nn.Linear(32, 24), nn.Linear(32, 24, bias=False)
        self.norm = nn.LayerNorm(24)
        self.kernel = nn.Conv2d(2, 6, 3, stride=2, padding=1)
        self.tap = nn.Conv2d(6, 4, 1)
        self.line = nn.Conv1d(24, 5, 3, padding=1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0, 0.3, SEED)

    def forward(self, ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.table(ids) + x
        both: Tensor = self.norm(self.query(hidden) * self.key(hidden))
        picture = self.tap(torch.relu(self.kernel(both.reshape(2, 2, 6, 12))))
        return picture, self.line(both.transpose(1, 2))


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    return {"ids": torch.randint(0, 8, (2, 6), generator=generator), "x": torch.randn(2, 6, 32, generator=generator)}


def lowered(module: nn.Module, target: Target) -> Lowered:
    return lower(capture(module, inputs(), lambda m, ids, x: m(ids, x)), target, {})


def weight(name: str, array: Tensor, half: bool = False) -> Weight:
    data = array.numpy().astype("<f2" if half else "<f4")
    return Weight(name, F16 if half else F32, tuple(array.shape), View(memoryview(data.tobytes())))


def random(*shape: int) -> Tensor:
    return (torch.randn(*shape, generator=SEED) * 0.3).half().float()


def low_rank(module: nn.Module, name: str, rank: int, half: bool = False) -> tuple[LowRank, Tensor]:
    """A change of a parameter, and the same as a tensor."""
    rows, *columns = module.get_parameter(name).shape
    down, up = random(rank, *columns), random(rows, rank)
    whole = 0.5 * torch.einsum("or,r...->o...", up, down)
    return LowRank(weight(f"{name} down", down, half), weight(f"{name} up", up, half), 0.5), whole


def difference(module: nn.Module, name: str) -> tuple[Difference, Tensor]:
    whole = random(*module.get_parameter(name).shape)
    return Difference(weight(name, whole)), whole


def scaling(module: nn.Module, name: str, kind: type[RowScaling | ColumnScaling]) -> tuple[Delta, Tensor]:
    whole = module.get_parameter(name).detach()
    dim = 0 if kind is RowScaling else 1
    by = random(whole.shape[dim])
    along = tuple(-1 if i == dim else 1 for i in range(whole.ndim))
    return kind(weight(f"{name} along {dim}", by)), whole * by.reshape(along)


def merged(module: Net, changes: Mapping[str, Tensor]) -> list[np.ndarray]:
    """What the module gives with its weights changed."""
    changed = {name: parameter + changes.get(name, 0) for name, parameter in module.named_parameters()}
    with torch.no_grad():
        return [part.numpy() for part in torch.func.functional_call(module, changed, tuple(inputs().values()))]


def run(program: Executable, added: Adapters) -> list[np.ndarray]:
    arrays = {name: tensor.numpy() for name, tensor in inputs().items()}
    return list(program(**arrays, **{STRENGTHS: added.strengths}))


MATRICES = ("query.weight", "key.weight", "kernel.weight", "tap.weight", "line.weight")
VECTORS = ("query.bias", "norm.weight", "norm.bias", "tap.bias")


@pytest.mark.parametrize("target", [SDRPC, PORTABLE], ids=lambda target: target.name)
@pytest.mark.parametrize("kind", ["low rank", "low rank, half", "difference"])
def test_changes_of_every_weight_that_is_multiplied_or_added(target: Target, kind: str) -> None:
    """Two adapters at once, the second of the first matrix alone and of another rank."""
    module = Net()
    first: dict[str, tuple[Delta, Tensor]] = {name: difference(module, name) for name in VECTORS}
    for name in MATRICES:
        first[name] = difference(module, name) if kind == "difference" else low_rank(module, name, 3, "half" in kind)
    second = {"query.weight": low_rank(module, "query.weight", 2)}
    added = adapters(
        [({n: [c] for n, (c, _) in changes.items()}, strength) for changes, strength in ((first, 0.8), (second, -1.5))]
    )
    wanted = {name: 0.8 * whole for name, (_, whole) in first.items()}
    wanted["query.weight"] = wanted["query.weight"] - 1.5 * second["query.weight"][1]
    graph = adapted(lowered(module, target), added)
    assert to_bytes(from_bytes(to_bytes(graph))) == to_bytes(graph), "a graph like others"
    device = ReferenceDevice(target)
    store = WeightStore(device, added.weights)
    with Executable(graph, device, {w.name: w for w in weights_of(module)}, adapters=store) as program:
        for got, whole in zip(run(program, added), merged(module, wanted), strict=True):
            assert error(got, whole) <= TOLERANCE["exact"]


@pytest.mark.parametrize("target", [SDRPC, PORTABLE], ids=lambda target: target.name)
@pytest.mark.parametrize("kinds", [(RowScaling,), (ColumnScaling,), (RowScaling, ColumnScaling)], ids=str)
def test_scalings_of_every_weight_that_is_multiplied(
    target: Target, kinds: tuple[type[RowScaling | ColumnScaling], ...]
) -> None:
    """Twice each, beside what is added; those of a weight's rows and columns do not scale each other."""
    module, changes, wanted = Net(), dict[str, list[Delta]](), dict[str, Tensor]()
    for name in MATRICES:
        found = [low_rank(module, name, 3), *(scaling(module, name, kind) for kind in kinds * 2)]
        changes[name] = [change for change, _ in found]
        wanted[name] = 0.6 * sum(whole for _, whole in found)
    added = adapters([(changes, 0.6)])
    graph, device = adapted(lowered(module, target), added), ReferenceDevice(target)
    store = WeightStore(device, added.weights)
    with Executable(graph, device, {w.name: w for w in weights_of(module)}, adapters=store) as program:
        for got, whole in zip(run(program, added), merged(module, wanted), strict=True):
            assert error(got, whole) <= TOLERANCE["exact"]


def test_strengths_and_matrices_change_in_place() -> None:
    module, device = Net(), ReferenceDevice(SDRPC)
    one, other = (low_rank(module, "query.weight", 3) for _ in "ab")
    added = adapters([({"query.weight": [one[0]]}, 1.0)])
    graph, matrices = adapted(lowered(module, SDRPC), added), dict(added.weights)
    store = WeightStore(device, matrices)
    with Executable(graph, device, {w.name: w for w in weights_of(module)}, adapters=store) as program:
        for (change, whole), strength in ((one, 1.0), (one, 0.25), (other, 0.25)):
            added = adapters([({"query.weight": [change]}, strength)])
            matrices |= added.weights
            store.renew(matrices.keys())
            wanted = merged(module, {"query.weight": strength * whole})
            for got, right in zip(run(program, added), wanted, strict=True):
                assert error(got, right) <= TOLERANCE["exact"]


def test_parts_of_a_fused_matrix_share_their_first_product() -> None:
    """Queries and keys that read the same: the shared matrix is there, and multiplied, once."""
    module = Net()
    down, ups = random(3, 32), [random(24, 3) for _ in "qk"]
    shared = weight("down", down)
    changes = {
        f"{name}.weight": [LowRank(shared, weight(name, up))] for name, up in zip(("query", "key"), ups, strict=True)
    }
    plain = lowered(module, SDRPC)
    graph = adapted(plain, adapters([(changes, 1.0)]))
    assert len(graph.weights) == len(plain.weights) + 3
    products = [[node.op for node in each.graph.nodes].count("MUL_MAT") for each in (graph, plain)]
    assert products[0] == products[1] + 3


def test_equal_shapes_have_equal_graphs() -> None:
    module = Net()
    (one, _), (same, _), (wider, _) = (low_rank(module, "key.weight", rank) for rank in (3, 3, 4))
    shapes = [adapters([({"key.weight": [change]}, 1.0)]).shape for change in (one, same, wider)]
    assert shapes[0] == shapes[1] != shapes[2]


def test_what_a_graph_does_not_read_changes_nothing() -> None:
    module = Net()
    plain, (change, _) = lowered(module, SDRPC), low_rank(module, "key.weight", 3)
    assert adapted(plain, adapters([({"another.weight": [change]}, 1.0)])) is plain
    assert adapted(plain, adapters(())) is plain


def test_a_table_is_refused_by_name() -> None:
    module = Net()
    change, _ = low_rank(module, "table.weight", 3)
    with pytest.raises(UnsupportedOperation, match=r"table\.weight is read by GET_ROWS.*immediately"):
        adapted(lowered(module, SDRPC), adapters([({"table.weight": [change]}, 1.0)]))
