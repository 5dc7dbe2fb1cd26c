"""What operations are said to take is an upper bound of what torch's allocator is asked for, and long operations in
pieces give what whole ones give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sdrpc.engine import LocalDevice, footprint, pieces
from sdrpc.engine.deadline import Deadline
from sdrpc.engine.operations import EngineOp
from sdrpc.engine.ops import KERNELS
from sdrpc.engine.precision import EXACT
from sdrpc.errors import ComputeError, Stopped, UnsupportedOperation
from sdrpc.ggml import params
from sdrpc.ggml.ops import destination
from sdrpc.ggml.tensor import OUTPUT, Graph, Tensor, rewrite
from sdrpc.ggml.types import TYPES
from tests.engine.compare import TOLERANCE, Leaves, error
from tests.support.cases import CASES
from tests.support.feed import Feed, graph

SLACK = 1 << 16
"""Bytes that torch's kernels may take whatever the shapes are: counters, pointers, threads' sums."""


@pytest.fixture
def cpu() -> LocalDevice:
    return LocalDevice("CPU", torch.device("cpu"), EXACT, threads=1)


def peak_of(device: LocalDevice, steps: Graph, memory: dict[int, bytes]) -> tuple[int, int]:
    """Bytes that running ``steps`` takes at one time by the allocator's account, and as the program says."""
    buffers = {key: device.allocate(len(data)) for key, data in memory.items()}
    keep = device.allocate(steps.nodes[-1].nbytes)

    def placed(tensor: Tensor) -> dict[str, object]:
        if tensor.buffer:
            return {"buffer": buffers[tensor.buffer].key}
        if tensor is not steps.nodes[-1]:
            return {}
        if into := destination(tensor):
            return {"buffer": buffers[into.buffer].key, "offset": into.offset, "flags": OUTPUT}
        return {"buffer": keep.key, "flags": OUTPUT}

    for key, data in memory.items():
        device.write(buffers[key], 0, data)
    used = [*buffers.values(), keep]
    program = device.compile(rewrite(steps, placed), {buffer.key: buffer for buffer in used})
    scratch = sum(program.bound.compiled.scratch.values())
    with (
        torch.inference_mode(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler,
    ):
        program.bound.run(Deadline(None))
    live = peak = 0
    events = sorted((e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"),
                    key=lambda event: event.start_ns())  # fmt: skip
    for event in events:
        live += event.nbytes()
        peak = max(peak, live)
    for buffer in used:
        device.free(buffer)
    return peak + scratch, program.peak


@pytest.mark.parametrize("name", CASES)
def test_no_case_takes_more_than_is_said(cpu: LocalDevice, name: str) -> None:
    feed = Feed()
    steps = graph(CASES[name](feed))
    taken, said = peak_of(cpu, steps, {key: data.tobytes() for key, data in feed.memory.items()})
    assert taken <= said + SLACK


def _node(leaves: Leaves, op: str, ne: tuple[int, ...], src: list[Tensor], words: object = params.NO_PARAMS) -> Tensor:
    shape = (*ne, 1, 1, 1)[:4]
    strides = [4]
    for n in shape[:3]:
        strides.append(strides[-1] * n)
    return Tensor(TYPES["F32"], shape, tuple(strides), op=op, params=words, src=tuple(src))


LARGE = {
    "MUL_MAT": lambda x: _node(
        x, "MUL_MAT", (200, 3, 4, 50), [x.normal(300, 200, 2), x.normal(300, 3, 4, 50)], params.MulMat()
    ),
    "MUL_MAT_ID": lambda x: _node(
        x, "MUL_MAT_ID", (8, 100, 16), [x.normal(5000, 8, 4), x.normal(5000, 1, 16), x.integers(0, 4, 100, 16)],
        params.MulMat(),
    ),
    "MUL_MAT_ID of few rows, often": lambda x: _node(
        x, "MUL_MAT_ID", (1, 1000, 8), [x.normal(100000, 1, 1), x.normal(100000, 1, 8), x.integers(0, 1, 1000, 8)],
        params.MulMat(),
    ),
    "CONV_2D": lambda x: _node(
        x, "CONV_2D", (190, 130, 24), [x.normal(3, 3, 16, 24), x.normal(190, 130, 16)],
        params.Conv2D(1, 1, 1, 1, 1, 1),
    ),
    "CONV_2D of few places": lambda x: _node(
        x, "CONV_2D", (4, 4, 700), [x.normal(3, 3, 300, 700), x.normal(4, 4, 300)], params.Conv2D(1, 1, 1, 1, 1, 1)
    ),
    "CONV_2D of one channel": lambda x: _node(
        x, "CONV_2D", (81, 81), [x.normal(120, 120, 1, 1), x.normal(200, 200)], params.Conv2D(1, 1, 0, 0, 1, 1)
    ),
    "CONV_2D past its image": lambda x: _node(  # by C's division it has one place across
        x, "CONV_2D", (1, 198, 24), [x.normal(3, 3, 16, 24), x.normal(4, 200, 16)],
        params.Conv2D((1 << 31) - 1, 1, 0, 0, 1 << 30, 1),
    ),
    "CONV_TRANSPOSE_2D": lambda x: _node(
        x, "CONV_TRANSPOSE_2D", (401, 401, 8), [x.normal(3, 3, 8, 4), x.normal(200, 200, 4)], params.ConvTranspose2D(2)
    ),
    "IM2COL": lambda x: _node(
        x, "IM2COL", (9, 3, 3), [x.normal(3, 3, 1), x.normal(100, 100)], params.Im2Col(9999, 9999, 9999, 9999, 1, 1, 1)
    ),
    "FLASH_ATTN_EXT": lambda x: _node(
        x, "FLASH_ATTN_EXT", (64, 64, 16), [x.normal(64, 16, 64), x.normal(64, 3000, 2), x.normal(64, 3000, 2)],
        params.FlashAttn(0.1),
    ),
    "SOFT_MAX": lambda x: _node(x, "SOFT_MAX", (1000, 1000), [x.normal(1000, 1000)], params.SoftMax(1.0, 0.0)),
    "UNARY": lambda x: _node(x, "UNARY", (1000, 1000), [x.normal(1000, 1000)], params.Unary("GELU_QUICK")),
    "ARGSORT": lambda x: _node(x, "ARGSORT", (1 << 20,), [x.normal(1 << 20)], params.ArgSort(1)),
    "UPSCALE": lambda x: _node(x, "UPSCALE", (700, 700), [x.normal(70, 70)], params.Upscale(2)),
    "POOL_2D": lambda x: _node(
        x, "POOL_2D", (500, 500), [x.normal(1000, 1000)], params.Pool2D(0, 2, 2, 2, 2, 0, 0)
    ),
    "ROPE": lambda x: _node(
        x, "ROPE", (128, 32, 100), [x.normal(128, 32, 100), x.integers(0, 50, 100)],
        params.Rope(0, 128, 0, 0, 0, 1e4, 1.0, 0.0, 1.0, 32.0, 1.0),
    ),
    "OPT_STEP_ADAMW": lambda x: _node(
        x, "OPT_STEP_ADAMW", (1000, 1000), [*(x.normal(1000, 1000) for _ in range(2)),
        *(x.array(np.ones((1000, 1000), "f4")) for _ in range(2)), x.normal(7)],
    ),
    "GROUP_NORM": lambda x: _node(x, "GROUP_NORM", (300, 300, 32), [x.normal(300, 300, 32)], params.GroupNorm(8, 1e-6)),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_no_large_operation_takes_more_than_is_said(cpu: LocalDevice, name: str) -> None:
    leaves = Leaves()
    node = LARGE[name](leaves)
    if node.op == "ARGSORT":
        node = Tensor(TYPES["I32"], node.ne, node.nb, op=node.op, params=node.params, src=node.src)
    taken, said = peak_of(cpu, Graph((node,)), {1: bytes(leaves.memory)})
    assert taken <= said + SLACK
    assert taken > 0, "the profiler saw nothing"
    assert said <= 30 * taken + (1 << 28), "a bound that says nothing"


def test_the_tables_know_the_engines_operations() -> None:
    ours = {EngineOp.LEAF, EngineOp.WEIGHT, EngineOp.OPPORTUNISTIC_WEIGHT}  # those without a kernel
    for table in (footprint.WORKING, footprint.WORK, footprint.ALIASES, pieces.SPLITTERS, pieces.LOOPS):
        assert {*table} <= {*KERNELS} | ours


PIECES = [
    "MUL_MAT", "CONV_2D", "CONV_2D of few places", "CONV_2D of one channel", "CONV_2D past its image",
    "CONV_TRANSPOSE_2D", "FLASH_ATTN_EXT", "POOL_2D",
]  # fmt: skip


@pytest.mark.parametrize("name", PIECES)
def test_pieces_give_what_the_whole_gives(cpu: LocalDevice, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def result() -> np.ndarray:
        leaves = Leaves(3)
        node = LARGE[name](leaves)
        source, target = cpu.allocate(len(leaves.memory)), cpu.allocate(node.nbytes)
        cpu.write(source, 0, bytes(leaves.memory))
        steps = rewrite(
            Graph((node,)),
            lambda t: {"buffer": source.key} if t.buffer else {"buffer": target.key, "flags": OUTPUT},
        )
        cpu.compile(steps, {source.key: source, target.key: target}).run()
        return np.frombuffer(cpu.read(target, 0, target.size), "f4").copy()

    whole = result()
    steps: list[int] = []
    monkeypatch.setattr(pieces, "PIECE", footprint.SLOW * 3000)
    monkeypatch.setattr(pieces, "checkpoint", lambda: steps.append(1))
    assert error(result(), whole) < TOLERANCE["exact"]
    assert len(steps) > 4


def test_what_can_neither_be_split_nor_waited_for_is_refused(cpu: LocalDevice) -> None:
    n = 1 << 22
    leaf = Tensor(TYPES["F32"], (n, 1, 1, 1), (4, 4 * n, 4 * n, 4 * n), buffer=1)
    for taps, reason in ((n // 2, "where it can't be interrupted"),):
        pool = params.Pool1D(0, taps, 1, 0)
        node = Tensor(TYPES["F32"], (n - taps + 1, 1, 1, 1), (4, 4 * n, 4 * n, 4 * n), op="POOL_1D", params=pool,
                      src=(leaf,))  # fmt: skip
        buffer, keep = cpu.allocate(4 * n), cpu.allocate(4 * n)
        steps = rewrite(Graph((node,)), lambda t, b=buffer, k=keep: {"buffer": b.key if t.buffer else k.key})
        with pytest.raises(UnsupportedOperation, match=reason):
            cpu.compile(steps, {buffer.key: buffer, keep.key: keep})


def test_a_deadline_asks_its_watch_and_tells_apart_why_it_ends() -> None:
    reasons = ["its client is gone"]
    deadline = Deadline(None, "CPU", reasons.pop)
    with pytest.raises(Stopped, match="CPU: stopped: its client is gone") as stopped:
        deadline.check()
    assert stopped.value.reason == "its client is gone"
    late = Deadline(-1.0, "CPU")
    late.start()
    with pytest.raises(ComputeError, match="longer than") as error_:
        late.check()
    assert not isinstance(error_.value, Stopped)
