"""What hostile or long inputs make of attention and of products by number."""

from __future__ import annotations

import pytest

from sdrpc.engine import LocalDevice
from sdrpc.engine.ops import attention, products
from sdrpc.errors import ComputeError
from sdrpc.ggml import build as b
from sdrpc.ggml.params import FlashAttn, MulMat
from sdrpc.ggml.tensor import Tensor
from tests.engine.compare import Leaves, check, place


def many_queries(leaves: Leaves, bias: float, cap: float, sinks: bool) -> list[Tensor]:
    q, k, v = leaves.normal(8, 29, 4, 2), leaves.normal(8, 7, 2, 2), leaves.normal(6, 7, 2, 2)
    extra = [leaves.normal(7, 32, 2, 1, type="F16"), leaves.normal(4) if sinks else None]
    return [b.node("FLASH_ATTN_EXT", q, k, v, *extra, params=FlashAttn(0.3, bias, cap))]


@pytest.mark.parametrize(("bias", "cap", "sinks"), [(8.0, 0.0, False), (0.0, 3.0, False), (8.0, 3.0, True)])
def test_queries_in_parts(
    device: LocalDevice, monkeypatch: pytest.MonkeyPatch, bias: float, cap: float, sinks: bool
) -> None:
    monkeypatch.setattr(attention, "SCORES", 5 * 2 * 4 * 7)  # of five queries at a time
    leaves = Leaves()
    check(device, leaves, many_queries(leaves, bias, cap, sinks))


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_products_by_number_in_parts(device: LocalDevice, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Long rows that are named often are gathered a few at a time."""
    monkeypatch.setattr(products, "TILE", rows * 16)
    leaves = Leaves()
    ids = leaves.integers(0, 2, 4, 11)
    check(
        device, leaves, [b.node("MUL_MAT_ID", leaves.normal(16, 5, 2), leaves.normal(16, 1, 11), ids, params=MulMat())]
    )


@pytest.mark.parametrize("number", [-1, 4, 2**31 - 1])
@pytest.mark.parametrize("op", ["MUL_MAT_ID", "ADD_ID"])
def test_numbers_of_nothing(exact: LocalDevice, op: str, number: int) -> None:
    """The CPU says so; an accelerator takes the nearest one."""
    leaves = Leaves()
    ids = leaves.integers(number, number + 1, 2, 3)
    if op == "ADD_ID":
        node = b.node(op, leaves.normal(8, 2, 3), leaves.normal(8, 4), ids)
    else:
        node = b.node(op, leaves.normal(8, 5, 4), leaves.normal(8, 2, 3), ids, params=MulMat())
    buffer = exact.allocate(len(leaves.memory) + 4096)
    graph, _, _ = place([node], buffer.key, len(leaves.memory), [node])
    exact.write(buffer, 0, leaves.memory)
    program = exact.compile(graph, {buffer.key: buffer})
    if exact.torch_device.type == "cpu":
        with pytest.raises(ComputeError, match=rf"node 0 \({op}\).*of 4"):
            program.run()
    else:
        program.run()
    exact.free(buffer)
