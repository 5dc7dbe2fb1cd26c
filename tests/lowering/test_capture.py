"""What a captured graph holds, what it does not, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import UMT5Config, UMT5EncoderModel

from sdrpc.errors import CaptureError
from sdrpc.lowering.capture import capture
from sdrpc.lowering.lower import lower
from sdrpc.lowering.rules import attention
from sdrpc.lowering.tracer import DataDependent, Results
from sdrpc.runtime.run import Executable
from sdrpc.targets import PORTABLE, SDRPC
from tests.lowering.compare import TOLERANCE, captured, check, error
from tests.lowering.devices import ReferenceDevice


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_the_module_stays_as_it_is() -> None:
    class Busy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.register_buffer("table", torch.zeros(3), persistent=False)
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.table += 1  # type: ignore[operator,misc]
            self.seen.append(x)
            self.latest = self.linear(x) + self.table
            return self.latest

    module = Busy()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    graph = capture(module, {"x": numbers(2, 3)}, lambda m, x: (m(x),))
    assert module.table.tolist() == [0, 0, 0]
    assert module.seen == []
    assert not hasattr(module, "latest")
    assert not module.linear._forward_hooks
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert sorted(graph.weights.values()) == ["linear.bias", "linear.weight"]
    assert [tensor.tolist() for tensor in graph.known.values()] == [[1, 1, 1]]


def test_constants_keep_the_numbers_that_they_were_read_with() -> None:
    def counting(x: Tensor) -> tuple[Tensor, ...]:
        table = torch.arange(3.0)
        first = x + table
        table[1:].mul_(10)
        second = x + table
        table.view(3, 1)[0] = x[2]  # from here on nobody knows it
        third = x * table
        table += 1
        return first, second, third, table, table[1:] + x[:2]

    check(counting, numbers(3))


def test_zeros_are_one_element() -> None:
    graph, inputs, call = captured(
        lambda x: (F.pad(x, (40, 40, 40, 40)), torch.zeros_like(x) + x), numbers(2, 3, 30, 30)
    )
    for target in (SDRPC, PORTABLE):
        lowered = lower(graph, target, {})
        assert sum(constant.array.nbytes for constant in lowered.constants) <= 16
        with Executable(lowered, ReferenceDevice(target), {}) as run:
            for mine, theirs in zip(run(x0=inputs["x0"].numpy()), call(nn.Module(), inputs["x0"]), strict=True):
                np.testing.assert_array_equal(mine, theirs.numpy())


def test_native_servers_add_rows_whose_elements_lie_side_by_side() -> None:
    """Also those of one element: ggml's CPU backend ends itself where it finds another stride."""
    graph = check(lambda x: x.permute(0, 2, 1) + x.mean(), numbers(4, 1, 6))
    nodes = lower(graph, PORTABLE, {}).graph.nodes
    added = [node for node in nodes if node.op == "ADD"]
    assert added
    assert all(source is None or source.nb[0] == source.type.size for node in added for source in node.src)


def test_undefined_tensors_take_no_memory() -> None:
    """Where there is only room for what is small, as rotary embeddings of a film are written into a large one."""

    def filled(x: Tensor) -> Tensor:
        made = torch.empty(1 << 20, 1 << 20, dtype=torch.bfloat16, device=x.device)
        made[:2, :3] = x
        return made[:3, :4].float()

    graph, inputs, _ = captured(filled, numbers(2, 3))
    lowered = lower(graph, SDRPC, {})
    assert sum(constant.array.nbytes for constant in lowered.constants) <= 16
    small, inputs, _ = captured(lambda x: torch.empty_like(x).copy_(x) + torch.empty_like(x) * 0, numbers(2, 3))
    with Executable(lower(small, SDRPC, {}), ReferenceDevice(), {}) as run:
        np.testing.assert_array_equal(run(x0=inputs["x0"].numpy())[0], inputs["x0"].numpy())


@pytest.mark.parametrize("masked", ["no", "known", "input", "blind"])
@pytest.mark.parametrize("steps", [1, 7, 12])
def test_attention_in_chunks(masked: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many queries at a time as the bound allows; it need not divide them."""
    monkeypatch.setattr(attention, "MAX_SCORES", 4 * 2 * 3 * 9 * 5)
    known = numbers(1, 1, steps, 9) > 0
    known[..., 0, :] = masked != "blind"  # a query that sees no key gives zeros

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        mask = {"no": None, "known": known, "blind": known, "input": bias}[masked]
        return F.scaled_dot_product_attention(q, k, v, mask)

    inputs = numbers(2, 3, steps, 4), numbers(2, 3, 9, 4), numbers(2, 3, 9, 5), numbers(2, 3, steps, 9)
    graph = check(function, *inputs)
    nodes = lower(graph, PORTABLE, {}).graph.nodes
    scores = [node for node in nodes if node.op == "SOFT_MAX"]
    assert len(scores) == -(-steps // 5)
    assert all(node.nbytes <= attention.MAX_SCORES for node in scores)
    assert not any(node.op == "SOFT_MAX" for node in lower(graph, SDRPC, {}).graph.nodes)


@pytest.mark.parametrize("flag", [True, False])
def test_transformers_builds_masks_without_numbers(flag: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch's flag it asks as its versions before 5.20 do."""
    if not flag:
        monkeypatch.delattr(torch.compiler, "_is_exporting_flag")
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: False)
    sizes = {"vocab_size": 7, "d_model": 4, "d_kv": 2, "d_ff": 4, "num_layers": 1, "num_heads": 2}
    module = UMT5EncoderModel(UMT5Config(**sizes)).eval()

    def call(module: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return (module(input_ids=ids, attention_mask=mask).last_hidden_state,)

    inputs = {"ids": torch.tensor([[1, 2, 0]]), "mask": torch.tensor([[1, 1, 0]])}
    capture(module, inputs, call)


def test_known_inputs_become_part_of_the_graph() -> None:
    def call(_: nn.Module, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return (x[mask.bool()] * mask.sum().item(),)

    inputs = {"x": numbers(2, 3), "mask": torch.tensor([[1, 0, 1], [0, 0, 1]])}
    with pytest.raises(DataDependent, match="the numbers of mask decide") as refused:
        capture(nn.Module(), inputs, call)
    assert refused.value.inputs == ("mask",)
    lowered = lower(capture(nn.Module(), inputs, call, known=["mask"]), SDRPC, {})
    with Executable(lowered, ReferenceDevice(), {}) as run:
        (mine,) = run(x=inputs["x"].numpy(), mask=inputs["mask"].numpy())
    assert error(mine, call(nn.Module(), *inputs.values())[0].numpy()) <= TOLERANCE["operation"]
    with pytest.raises(CaptureError, match="the numbers of input mask must be known, but it is on the meta device"):
        capture(nn.Module(), {**inputs, "mask": inputs["mask"].to("meta")}, call, known=["mask"])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: torch.randn(3) + x, "draws random numbers"),
        (lambda x: x + torch.randn_like(x), "draws random numbers"),
        (lambda x: x if x.sum() > 0 else -x, "the numbers of x0 decide"),
        (lambda x: x * float(x[0, 0]), "the numbers of x0 decide"),
        (lambda x: x[x > 0], "the numbers of x0 decide"),
        (lambda x: torch.tensor(x.tolist()), "the numbers of x0 decide"),
        (lambda x: x.clone().as_strided((2,), (1,)).fill_(1), "writes into a view made by as_strided"),
        (lambda x: torch.add(x, 1, out=torch.empty_like(x)), "writes into its argument 'out'"),
        (lambda x: x.mul_(2), "writes into input x0: write into a clone"),
        (lambda x: x[:1].zero_() + 1, "writes into input x0"),
    ],
)
def test_what_can_not_be_captured_is_refused(function: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        captured(function, numbers(2, 3))


def test_weights_are_not_written() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.weight.mul_(2)

    with pytest.raises(CaptureError, match=r"the module \(Writing\): aten\.mul_\.Tensor writes into a weight"):
        capture(Writing(), {"x": numbers(3)}, lambda m, x: (m(x),))


def test_a_module_without_numbers_says_how_it_should_be_built() -> None:
    with torch.device("meta"):
        module = nn.BatchNorm1d(3)
    with pytest.raises(CaptureError, match=r"num_batches_tracked has no numbers: build the module under"):
        capture(module, {"x": numbers(2, 3)}, lambda m, x: (m(x),))


def test_blocks_that_are_alike_are_worked_out_once() -> None:
    asked: list[str] = []
    mul = torch.ops.aten.mul.Tensor
    results, whole = Results(), torch.empty(2, 3, dtype=torch.int64, device="meta")

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Counted():
        one, other = (results.of(mul, (whole, 3), {}) for _ in "ab")
        assert asked.count("mul") == 1
        assert one is not other
        assert (other.shape, other.stride(), other.dtype, other.device) == ((2, 3), (3, 1), torch.int64, one.device)
        assert results.of(mul, (whole, 3.0), {}).dtype == torch.float32  # equal to 3, which it is not
        turned = torch.empty(3, 2, dtype=torch.int64, device="meta").T
        assert results.of(mul, (turned, 3), {}).stride() == (1, 2)
        for _ in "ab":
            assert results.of(torch.ops.aten.mul_.Tensor, (whole, 3), {}) is whole
            assert results.of(torch.ops.aten.t.default, (whole,), {})._is_view()
    assert (asked.count("mul"), asked.count("mul_"), asked.count("t")) == (3, 2, 2)
