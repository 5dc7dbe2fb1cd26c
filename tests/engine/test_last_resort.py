"""What a device has no kernel for is computed on the CPU, and said once: by a device that refuses on purpose, here the
CPU under another name. ``SDRPC_TEST_DEVICE=CUDA0`` does it between two memories."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sdrpc.engine import LocalDevice, last_resort
from sdrpc.engine.last_resort import refuses
from sdrpc.engine.ops import KERNELS
from sdrpc.engine.precision import EXACT
from sdrpc.errors import ComputeError
from sdrpc.ggml import build as b
from sdrpc.ggml.params import Arange
from sdrpc.ggml.tensor import Graph
from sdrpc.ggml.types import F32, TYPES
from tests.engine.compare import Leaves, at, check
from tests.engine.conftest import open_device

MISSING = NotImplementedError("\"there_kernel\" not implemented for 'Float'")
Refuse = Callable[[str, Exception], list[str]]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalDevice]:
    monkeypatch.setattr(last_resort, "_said", set())
    device = open_device("exact")
    if device.torch_device.type == "cpu":
        device.close()
        device = LocalDevice("THERE", torch.device("cpu", 0), EXACT, threads=1)  # not called CPU: a device of its own
    yield device
    device.close()


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Lets an operation fail the first time that each value is computed; what it gives grows with each failure."""

    def make(op: str, error: Exception) -> list[str]:
        real, failures, seen = KERNELS[op], [], set()

        def function(value: Any, *operands: Any) -> torch.Tensor:
            if id(value) not in seen:
                seen.add(id(value))
                failures.append(op)
                raise error
            return real.function(value, *operands)

        monkeypatch.setitem(KERNELS, op, replace(real, function=function))
        return failures

    return make


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_an_operation_without_a_kernel(device: LocalDevice, refuse: Refuse, caplog: pytest.LogCaptureFixture) -> None:
    """Every run gives the right numbers; the first one says why it is slow."""
    failures = refuse("SQRT", MISSING)
    for rows in (5, 6):
        leaves = Leaves()
        x = leaves.array(np.linspace(0.1, 9, 12 * rows, dtype="f4").reshape(rows, 12))
        root = b.node("SQRT", x)
        check(device, leaves, [root, b.node("ADD", root, x)], runs=3)
    assert failures == ["SQRT"] * 2
    (said,) = [line for line in warnings(caplog) if "no kernel" in line]
    assert f"{device.torch_device} has no kernel for SQRT, which the CPU computes in its place" in said
    assert "\"there_kernel\" not implemented for 'Float'" in said


def test_one_that_writes_in_place(device: LocalDevice, refuse: Refuse) -> None:
    refuse("SET_ROWS", MISSING)
    leaves = Leaves()
    cache, rows = leaves.normal(8, 6, type="F16"), leaves.normal(8, 2)
    indices = leaves.array(np.array([4, 1], "i8"), "I64")
    check(device, leaves, [b.inplace("SET_ROWS", rows, indices, cache, into=2)])


def test_one_without_operands(device: LocalDevice, refuse: Refuse) -> None:
    failures = refuse("ARANGE", MISSING)
    check(device, Leaves(), [b.node("ARANGE", params=Arange(0.0, 6.0, 0.5))])
    assert failures


def test_one_that_makes_blocks(device: LocalDevice, refuse: Refuse) -> None:
    """The bytes are those that the CPU makes."""
    made = []
    for refused in (False, True):
        if refused:
            refuse("CPY", RuntimeError("cuDNN: unable to find an engine to execute this computation"))
        buffer = device.allocate(4096)
        device.write(buffer, 0, np.random.default_rng(1).standard_normal(192, "f4").tobytes())
        cast = b.cast(b.leaf(F32, 64, 3, buffer=buffer.key), TYPES["Q8_0"])
        placed = at(cast, buffer.key, 1024)
        device.compile(Graph((replace(placed, name=f"refused {refused}"),)), {buffer.key: buffer}).run()
        made.append(bytes(device.read(buffer, 1024, cast.nbytes)))
        device.free(buffer)
    assert made[0] == made[1] != bytes(len(made[0]))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: operation not supported"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        RuntimeError("operation not permitted when stream is capturing; not supported"),
        ValueError("not supported"),
    ],
)
def test_what_is_wrong_stays_an_error(device: LocalDevice, refuse: Refuse, error: Exception) -> None:
    refuse("SQRT", error)
    leaves = Leaves()
    with pytest.raises(ComputeError, match="SQRT"):
        check(device, leaves, [b.node("SQRT", leaves.array(np.ones((2, 2), "f4")))])


def test_how_torch_says_it() -> None:
    """Real refusals: of an operation that no CPU has for a dtype, and of a dtype that a device has not."""
    with pytest.raises(RuntimeError) as raised:
        torch.linalg.inv(torch.ones(2, 2, dtype=torch.float16))
    assert refuses(raised.value)
    assert refuses(
        TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    )
    assert not refuses(torch.OutOfMemoryError("CUDA out of memory"))
