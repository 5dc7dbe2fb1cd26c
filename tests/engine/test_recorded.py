"""The graphs that a real sd-cli sent, in both precisions, against the unfused reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pytest

from sdrpc.engine import LocalDevice
from sdrpc.engine.values import trace
from tests.engine import recorded
from tests.engine.compare import error
from tests.support import reference

# The reference computes in float32 here. What IM2COL and CPY round to float16 differs where the last bit of a float32
# decides, and the graphs are deep: the difference settles near float16's own precision.
TOLERANCE = {"exact": 2e-3, "fast": 2e-2}
UNET_FUSIONS = {
    "convolution": 95, "conv_bias": 95, "group_norm": 61, "norm_silu": 45, "layer_norm": 48, "linear": 88,
}  # fmt: skip


class Run(NamedTuple):
    part: str
    memory: Mapping[int, np.ndarray]
    wanted: np.ndarray


@pytest.fixture(scope="module", params=recorded.PARTS)
def run(request: pytest.FixtureRequest) -> Run:
    """A recording with random leaves, and what it computes."""
    part = request.param
    graph, sizes = recorded.load(part)
    memory = {number: np.zeros(size, np.uint8) for number, size in sizes.items()}
    rng = np.random.default_rng(0)
    for leaf in graph.leaves:
        data = recorded.contents(leaf, rng).reshape(-1).view(np.uint8)
        memory[leaf.buffer][leaf.offset : leaf.offset + data.size] = data
    last = graph.nodes[-1]
    filled = {number: data.copy() if number == last.buffer else data for number, data in memory.items()}
    wanted = reference.run(graph, filled, dtype=np.float32)[last]
    return Run(part, memory, wanted)


@pytest.mark.parametrize("precision", ["exact", "fast"])  # not the fixture of both: a run is made once for the two
def test_recorded_graph(run: Run, precision: str, request: pytest.FixtureRequest) -> None:
    device: LocalDevice = request.getfixturevalue(precision)
    _, sizes = recorded.load(run.part)
    buffers = {number: device.allocate(size) for number, size in sizes.items()}
    try:
        graph, _ = recorded.load(run.part, {number: buffer.key for number, buffer in buffers.items()})
        for number, data in run.memory.items():
            device.write(buffers[number], 0, data.data)
        program = device.compile(graph, {buffer.key: buffer for buffer in buffers.values()})
        program.run()
        last = graph.nodes[-1]
        buffer = next(buffer for buffer in buffers.values() if buffer.key == last.buffer)
        held = {last.buffer: np.frombuffer(device.read(buffer, 0, buffer.size), np.uint8)}
        assert error(reference.read(last, held, dtype=np.float32), run.wanted) <= TOLERANCE[precision]
        if run.part == "unet":
            assert UNET_FUSIONS.items() <= dict(program.fusions).items()
    finally:
        for buffer in buffers.values():
            device.free(buffer)


@pytest.mark.parametrize(("part", "survivors"), [("clip", 4), ("unet", 11), ("vae-decoder", 8)])
def test_only_what_can_still_be_read_is_stored(part: str, survivors: int) -> None:
    graph, _ = recorded.load(part)
    assert len(trace(graph).roots) == survivors
