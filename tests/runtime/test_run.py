"""Lowered modules on devices: weights, inputs, sharing, and what is refused."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sdrpc.checkpoints.expressions import concat, rows
from sdrpc.device import Buffer, Target
from sdrpc.errors import CaptureError, CheckpointError, OutOfMemory, UsageError
from sdrpc.ggml.types import TYPES, Type
from sdrpc.ggml.weight import View, Weight, Whole
from sdrpc.lowering.capture import capture, without_weights
from sdrpc.lowering.lower import lower
from sdrpc.lowering.weights import weights_of
from sdrpc.runtime.lowered import Lowered
from sdrpc.runtime.run import Executable, WeightStore
from sdrpc.targets import PORTABLE, SDRPC
from tests.lowering.compare import TOLERANCE, error
from tests.lowering.devices import ReferenceDevice


class Small(nn.Module):
    """A matrix, a kernel of one tap, a table, a bias; two inputs."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.table = nn.Embedding(8, 256)
        self.matrix = nn.Linear(256, 256)
        self.kernel = nn.Conv2d(256, 4, 1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0, 0.1, generator)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        hidden = self.matrix(self.table(ids) + x)
        picture: Tensor = self.kernel(hidden.transpose(1, 2).unsqueeze(-1))
        return picture


def inputs(batch: int = 2, length: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 8, (batch, length), generator=generator)
    return {"ids": ids, "x": torch.randn((batch, length, 256), generator=generator)}


def arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def lowered(module: nn.Module, batch: int = 2, target: Target = SDRPC, types: dict[str, Type] | None = None) -> Lowered:
    return lower(capture(module, inputs(batch), lambda m, ids, x: (m(ids, x),)), target, types or {})


def weights(module: nn.Module) -> dict[str, Weight]:
    return {weight.name: weight for weight in weights_of(module)}


@pytest.mark.parametrize("target", [SDRPC, PORTABLE], ids=lambda target: target.name)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_K", "Q4_K"])
def test_weights_of_any_type_are_read_as_they_are(kind: str, target: Target) -> None:
    """The result is that of the module with the weights rounded to the type; vectors arrive as F32."""
    module, stored = Small(), {}
    for name, parameter in module.named_parameters():
        chosen = kind if parameter.ndim > 1 or kind in FLOATS else "F16"
        data = encoded(np.squeeze(parameter.detach().numpy()), chosen)
        rounded = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[chosen])
        parameter.data = torch.from_numpy(rounded.astype(np.float32)).reshape(parameter.shape)
        stored[name] = Weight(name, TYPES[chosen], tuple(parameter.shape), View(memoryview(data.tobytes())))
    graph = lowered(module, target=target, types={name: weight.type for name, weight in stored.items()})
    kinds = {weight.name: weight.leaf.type.name for weight in graph.weights}
    assert kinds == {name: kind if weight.shape[1:] else "F32" for name, weight in stored.items()}
    with Executable(graph, ReferenceDevice(target), stored) as run, torch.no_grad():
        (got,) = run(**arrays(inputs()))
        assert error(got, module(**inputs()).numpy()) <= TOLERANCE["exact"]


FLOATS = ("F32", "F16", "BF16")


def encoded(values: np.ndarray, kind: str) -> np.ndarray:
    """Bytes of the type; gguf reads blocks of 256 but does not write them: any bytes with small scales will do."""
    if not kind.endswith("_K"):
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])  # type: ignore[no-any-return]
    blocks = np.random.default_rng(4).integers(0, 256, (values.size // 256, TYPES[kind].size), np.uint8)
    blocks[:, :4] = np.frombuffer(np.array([2e-4, 1e-4], "<f2").tobytes(), np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)


def test_modules_are_captured_before_their_weights_exist() -> None:
    with without_weights():
        empty = Small()
    assert all(parameter.is_meta for parameter in empty.parameters())
    module = Small()
    with Executable(lowered(empty), ReferenceDevice(), weights(module)) as run, torch.no_grad():
        np.testing.assert_allclose(run(**arrays(inputs()))[0], module(**inputs()), rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match=r"parameter table\.weight has no numbers"):
        Executable(lowered(empty), ReferenceDevice(), weights(empty))


def test_only_what_changed_is_sent_again() -> None:
    device = ReferenceDevice()
    with Executable(lowered(Small()), device, weights(Small())) as run:
        given = arrays(inputs())
        first = run(**given)
        sizes = {name: array.astype("<f4" if name == "x" else "<i4").nbytes for name, array in given.items()}
        device.written.clear()
        again = run(**given)
        assert device.written == []
        np.testing.assert_array_equal(first[0], again[0])
        given["x"] = given["x"] + 1
        assert not np.array_equal(run(**given)[0], first[0])
        assert device.written == [sizes["x"]]


def test_progress_counts_the_weights_bytes() -> None:
    seen: list[tuple[int, int]] = []
    module = Small()
    with Executable(
        lowered(module), ReferenceDevice(), weights(module), lambda done, total: seen.append((done, total))
    ):
        total = 4 * sum(parameter.numel() for parameter in module.parameters())
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_graphs_share_one_set_of_weights() -> None:
    module, device, asked = Small(), ReferenceDevice(), []

    def counted(weight: Weight) -> Weight:
        def data() -> memoryview:
            asked.append(weight.name)
            return weight.data()

        return Weight(weight.name, weight.type, weight.shape, Whole(data))

    store = WeightStore(device, {name: counted(weight) for name, weight in weights(module).items()})
    for batch in (1, 2, 3):
        with Executable(lowered(module, batch), device, store) as run, torch.no_grad():
            given = inputs(batch)
            np.testing.assert_allclose(run(**arrays(given))[0], module(**given), rtol=1e-4, atol=1e-5)
    assert sorted(asked) == sorted(weights(module))
    store.close()
    assert device.memory_of == {}


@pytest.mark.parametrize("target", [SDRPC, PORTABLE], ids=lambda target: target.name)
def test_weights_lie_in_several_buffers_where_one_can_not_hold_them(target: Target) -> None:
    module, device = Small(), ReferenceDevice(target)
    graph = lowered(module, target=target)
    needed = WeightStore(device, weights(module)).needed(graph.weights)
    largest = max(weight.leaf.nbytes for weight in graph.weights)
    assert needed >= sum(weight.leaf.nbytes for weight in graph.weights)
    device.max_size = largest
    seen: list[int] = []
    store = WeightStore(device, weights(module), lambda done, total: seen.append(done))
    assert store.needed(graph.weights) <= needed + 32 * len(graph.weights)
    places = store.places(graph.weights)
    assert {buffer.key for buffer, _ in places.values()} == device.memory_of.keys()
    assert 1 < len(device.memory_of) < len(graph.weights)
    assert max(map(len, device.memory_of.values())) <= largest
    assert store.needed(graph.weights) == 0
    assert seen == sorted(seen)
    with Executable(graph, device, store) as run, torch.no_grad():
        np.testing.assert_allclose(run(**arrays(inputs()))[0], module(**inputs()), rtol=1e-4, atol=1e-5)


def test_a_weight_larger_than_any_buffer_is_refused_and_nothing_stays() -> None:
    class Limited(ReferenceDevice):
        def allocate(self, size: int) -> Buffer:
            if size > self.max_size:
                raise OutOfMemory(self.name, size)
            return super().allocate(size)

    device = Limited()
    device.max_size = 5000
    with pytest.raises(OutOfMemory):
        Executable(lowered(Small()), device, weights(Small()))
    assert device.memory_of == {}


def test_weights_that_were_given_up_are_uploaded_again() -> None:
    module, device = Small(), ReferenceDevice()
    graph, store = lowered(module), WeightStore(device, weights(module))
    needed = store.needed(graph.weights)
    with Executable(graph, device, store) as run:
        first = run(**arrays(inputs()))
        store.release()
        assert store.needed(graph.weights) == needed
        held = len(device.memory_of)
        np.testing.assert_array_equal(run(**arrays(inputs()))[0], first[0])
        assert len(device.memory_of) == held + 1
        device.written.clear()
        run(**arrays(inputs()))
        assert device.written == []
    store.close()
    assert device.memory_of == {}


def test_a_weight_in_pieces_is_written_in_pieces() -> None:
    module, device = Small(), ReferenceDevice()
    stored = weights(module)
    matrix = stored["matrix.weight"]
    halves = concat([rows(matrix, 0, 100), rows(matrix, 100, 256)])
    with Executable(lowered(module), device, stored | {"matrix.weight": halves}) as run, torch.no_grad():
        assert {100 * 1024, 156 * 1024} <= set(device.written)
        assert matrix.nbytes not in device.written
        np.testing.assert_allclose(run(**arrays(inputs()))[0], module(**inputs()), rtol=1e-4, atol=1e-5)


def test_everything_is_freed() -> None:
    device = ReferenceDevice(PORTABLE)
    module = Small()
    Executable(lowered(module, target=PORTABLE), device, weights(module)).close()
    assert device.memory_of == {}


def test_weights_that_are_missing_or_wrong_are_named_and_nothing_stays() -> None:
    module, device = Small(), ReferenceDevice()
    graph, good = lowered(module), weights(module)
    bias = good["matrix.bias"]
    without = {name: weight for name, weight in good.items() if name != "matrix.bias"}
    for wrong, message in (
        (without, "the model: tensor 'matrix.bias': missing"),
        (
            good | {"matrix.bias": Weight(bias.name, bias.type, (2, 128), bias.pieces)},
            r"has the shape \[2, 128\], not \[256\]",
        ),
        (
            good | {"matrix.bias": Weight(bias.name, bias.type, (256,), View(memoryview(b"1234")))},
            "has 4 bytes, not 1024",
        ),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            Executable(graph, device, wrong)
        assert caught.value.tensor == "matrix.bias"
        assert device.memory_of == {}
    wide = lowered(module, types={"matrix.weight": TYPES["F16"]})
    with pytest.raises(CheckpointError, match="is F32, not F16"):
        Executable(wide, device, good)


def test_inputs_that_do_not_fit_are_refused() -> None:
    module = Small()
    with Executable(lowered(module), ReferenceDevice(), weights(module)) as run:
        good = arrays(inputs())
        for wrong, message in (
            ({"x": good["x"]}, "input ids is missing"),
            (good | {"y": good["x"]}, "no input y"),
            (good | {"x": good["x"][:1]}, r"input x has the shape \[1, 3, 256\], not \[2, 3, 256\]"),
            (good | {"ids": good["ids"] + (1 << 40)}, "input ids must be integers of 32 bits"),
            (good | {"ids": good["ids"] + 0.5}, "input ids must be integers of 32 bits, not float64"),
        ):
            with pytest.raises(UsageError, match=message):
                run(**wrong)


def test_a_graph_that_computes_nothing_gives_its_inputs_and_constants() -> None:
    def call(_: nn.Module, x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        return x, i, torch.arange(3), torch.tensor([True, False]), x.shape[0] * torch.ones(2)

    given = {"x": torch.randn(2, 3), "i": torch.tensor([4, 5])}
    with Executable(lower(capture(nn.Module(), given, call), SDRPC, {}), ReferenceDevice(), {}) as run:
        got = run(**arrays(given))
    for mine, theirs in zip(got, call(nn.Module(), *given.values()), strict=True):
        np.testing.assert_array_equal(mine, theirs.numpy())
        assert mine.dtype == theirs.numpy().dtype


def test_all_operations_without_a_rule_are_listed_with_their_place() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(torch.cummax(torch.linalg.inv(torch.cummax(x, 0)[0]), 1)[0]).abs()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Odd()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.inner(x + 1)
            return result

    graph = capture(Outer(), {"x": torch.randn(3, 3)}, lambda m, x: (m(x),))
    with pytest.raises(CaptureError) as caught:
        lower(graph, SDRPC, {})
    assert "aten.cummax.default (2×, first in inner (Odd))" in str(caught.value)
    assert "aten.linalg_inv_ex.default (1×, first in inner (Odd))" in str(caught.value)
    assert "aten._fft_r2c.default" in str(caught.value)


def test_an_operation_that_can_not_be_expressed_names_its_place() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x**0.3

    graph = capture(nn.Sequential(nn.SiLU(), Root()), {"x": torch.randn(1, 2, 3)}, lambda m, x: (m(x),))
    with pytest.raises(CaptureError, match=r"^1 \(Root\): aten\.pow\.Tensor_Scalar: power 0\.3"):
        lower(graph, SDRPC, {})


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.reshape(-1).add_(1) + x[0, 0], "writes into input x"),
        (lambda x: x * x.sum().item(), "the numbers of x decide what is computed"),
        (lambda x: nn.functional.dropout(x, 0.5, training=True), r"call eval\(\)"),
        (lambda x: torch.view_as_complex(x).abs(), "complex|no rule for"),
        (lambda x: x.pow(0.3), "power 0.3"),
        (lambda x: torch.div(x, 2, rounding_mode="floor"), "rounded to floor"),
    ],
)
def test_what_has_no_meaning_as_a_graph_is_refused(function: object, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        lower(capture(nn.Module(), {"x": torch.randn(3, 2)}, lambda _, x: (function(x),)), SDRPC, {})  # type: ignore[operator]
