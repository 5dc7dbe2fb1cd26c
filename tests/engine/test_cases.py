"""The small graphs that all interpreters and compilers are tested over, on a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sdrpc.engine import LocalDevice
from sdrpc.engine.memory import LocalBuffer, Storage
from sdrpc.engine.operations import EngineOp
from sdrpc.engine.ops import KERNELS
from sdrpc.engine.precision import EXACT, Precision
from sdrpc.engine.program import Bound, compile_graph
from sdrpc.engine.weights import Weights
from sdrpc.ggml.ops import ALIASES, OPS
from sdrpc.ggml.tensor import OUTPUT, Tensor, rewrite
from tests.engine.compare import same
from tests.support import reference
from tests.support.cases import CASES
from tests.support.feed import Feed, graph


@pytest.mark.parametrize("name", CASES)
def test_case(device: LocalDevice, name: str) -> None:
    feed = Feed()
    last = CASES[name](feed)
    steps = graph(last)
    buffers = {key: device.allocate(len(data)) for key, data in feed.memory.items()}
    keep = device.allocate(last.nbytes)

    def placed(tensor: Tensor) -> dict[str, Any]:
        if tensor.buffer:
            return {"buffer": buffers[tensor.buffer].key}
        return {"buffer": keep.key, "flags": OUTPUT} if tensor is last else {}

    used = [*buffers.values(), keep]
    try:
        for key, data in feed.memory.items():
            device.write(buffers[key], 0, data.tobytes())
        graph_there = rewrite(steps, placed)
        device.compile(graph_there, {buffer.key: buffer for buffer in used}).run()
        memory = {b.key: np.frombuffer(device.read(b, 0, b.size), np.uint8) for b in used}
        same(device, graph_there.nodes[-1], reference.read(graph_there.nodes[-1], memory), feed.run(*steps.nodes))
    finally:
        for buffer in used:
            device.free(buffer)


@pytest.mark.parametrize(
    "precision", [EXACT, Precision("fast", torch.bfloat16, channels_last=True)], ids=lambda precision: precision.name
)
def test_no_case_asks_a_device_for_numbers(precision: Precision) -> None:
    """An accelerator would wait for all that is queued, and could not be recorded. A device without memory has no
    numbers to give."""
    nowhere = torch.device("meta")
    for case in CASES.values():
        feed = Feed()
        last = case(feed)
        steps = rewrite(graph(last), lambda t, last=last: {"buffer": 1 << 20, "flags": OUTPUT} if t is last else {})
        sizes = {**{key: len(data) for key, data in feed.memory.items()}, 1 << 20: last.nbytes}
        compiled = compile_graph(steps, precision, {key: key for key in sizes})
        memory = {key: torch.empty(size, dtype=torch.uint8, device=nowhere) for key, size in sizes.items()}
        buffers = [LocalBuffer(key, sizes[key], Storage(memory[key])) for key in compiled.buffers]
        Bound(compiled, buffers, Weights(0), nowhere).steps()


def test_every_operation_has_a_case() -> None:
    computed = set(OPS) - ALIASES
    assert computed == {name.split("-")[0] for name in CASES} - ALIASES
    assert computed <= set(KERNELS)


def test_both_tables_say_the_same_of_parameters() -> None:
    """Kernels read their parameters by the class that their row names; values have those of ggml's row."""
    assert {op: kernel.params for op, kernel in KERNELS.items() if isinstance(op, str)} == {
        name: op.params for name, op in OPS.items() if not op.alias
    }


def test_every_operation_of_the_engine_has_a_kernel() -> None:
    elsewhere = {EngineOp.LEAF, EngineOp.WEIGHT, EngineOp.OPPORTUNISTIC_WEIGHT}
    assert {op for op in KERNELS if isinstance(op, EngineOp)} == set(EngineOp) - elsewhere
