"""When programs are recorded and replayed, with a recorder that needs no GPU."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch

from sdrpc.engine import LocalDevice
from sdrpc.engine.deadline import Deadline
from sdrpc.engine.precision import Precision
from sdrpc.engine.program import Bound
from sdrpc.engine.replay import Pool, Replay
from sdrpc.ggml import build as b
from sdrpc.ggml.tensor import Graph
from sdrpc.ggml.types import F16, F32
from tests.engine.compare import at

N = 32
WEIGHT, OUT = 4096, 8192
KEEPER = 1
"""A pool's own recording."""


class Recorder:
    """Stands for torch.cuda: a recording is replayed by running the program's steps. ``pools`` are the memories that
    recordings have."""

    def __init__(self) -> None:
        self.recorded = self.replayed = self.emptied = 0
        self.fails = False
        self.bound: Bound | None = None
        self.pools: weakref.WeakSet[Handle] = weakref.WeakSet()
        self.streams: list[Stream] = []

    def handle(self) -> Handle:
        handle = Handle()
        self.pools.add(handle)
        return handle

    def empty_cache(self) -> None:
        self.emptied += 1

    @contextmanager
    def record(self, graph: Recording, pool: Handle, stream: Stream, **_: object) -> Iterator[None]:
        self.streams.append(stream)
        yield
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        graph.pool = pool
        self.recorded += 1


class Stream:
    def __init__(self, device: torch.device) -> None:
        self.device = device


class Handle:
    """Of a pool."""


class Recording:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.pool: Handle | None = None

    def replay(self) -> None:
        assert self.recorder.bound is not None
        self.recorder.replayed += 1
        self.recorder.bound.record()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", partial(Recording, recorder))
    monkeypatch.setattr(torch.cuda, "graph", recorder.record)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", recorder.handle)
    monkeypatch.setattr(torch.cuda, "empty_cache", recorder.empty_cache)
    return recorder


class Product:
    """w (F16) · x (F32) in fast precision: both are converted, one is a weight and one an input."""

    def __init__(self, recorder: Recorder) -> None:
        cpu = torch.device("cpu")
        self.device = LocalDevice("CPU", cpu, Precision("fast", torch.bfloat16), threads=1)
        self.buffer = self.device.allocate(16384)
        key = self.buffer.key
        product = b.mul_mat(b.leaf(F16, N, N, buffer=key, offset=WEIGHT), b.leaf(F32, N, buffer=key))
        bound = self.device.compile(Graph((at(product, key, OUT),)), {key: self.buffer}).bound
        assert isinstance(bound, Bound)
        recorder.bound = bound
        self.pool = Pool(cpu)
        self.replay = Replay(bound, self.pool)
        self.weigh(1)

    def weigh(self, factor: int) -> None:
        self.device.write(self.buffer, WEIGHT, np.full((N, N), factor, "<f2").tobytes())

    def __call__(self, x: int) -> float:
        self.device.write(self.buffer, 0, np.full(N, x, np.float32).tobytes())
        deadline = Deadline(None)
        deadline.start()
        with torch.inference_mode():
            self.replay.run(deadline)
        return float(np.frombuffer(bytes(self.device.read(self.buffer, OUT, 4)), np.float32)[0])


def test_the_second_run_is_recorded_and_further_ones_replayed(recorder: Recorder) -> None:
    product = Product(recorder)
    assert [product(x) for x in (1, 2, 3, 4)] == [N, 2 * N, 3 * N, 4 * N]
    assert (recorder.recorded, recorder.replayed) == (KEEPER + 1, 3)
    product.device.close()


def test_what_a_device_records_is_on_a_stream_of_its_own(recorder: Recorder) -> None:
    """torch's own stream is of the first device that records: what others launch would be in no recording."""
    product = Product(recorder)
    product.pool = Pool(torch.device("meta"))
    product.replay = Replay(product.replay.bound, product.pool)
    other = Product(recorder)
    for each in (product, other):
        assert [each(x) for x in (1, 2)] == [N, 2 * N]
    assert [stream.device.type for stream in recorder.streams] == ["meta", "meta", "cpu", "cpu"]
    assert len(set(recorder.streams)) == 2
    product.device.close()
    other.device.close()


def test_a_new_weight_is_seen(recorder: Recorder) -> None:
    product = Product(recorder)
    assert [product(1) for _ in range(3)] == [N] * 3
    product.weigh(2)
    assert [product(1) for _ in range(2)] == [2 * N] * 2
    product.weigh(4)
    assert product(1) == 4 * N
    assert recorder.recorded == KEEPER + 2  # the weight counts as an input from then on
    product.device.close()


def test_what_cannot_be_recorded_runs_step_by_step(recorder: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    recorder.fails = True
    product = Product(recorder)
    with caplog.at_level(logging.WARNING):
        assert [product(x) for x in (1, 2, 3)] == [N, 2 * N, 3 * N]
    assert recorder.replayed == 0
    assert len(caplog.records) == 1
    assert "not recorded" in caplog.text
    product.device.close()


def test_the_memory_of_recordings_is_given_back_when_there_are_none_any_more(recorder: Recorder) -> None:
    product = Product(recorder)
    for x in (1, 2):
        product(x)
    product.pool.give_back()
    assert len(recorder.pools) == 1
    assert product(3) == 3 * N, "a recording is used on"
    product.device.close()
    pool = product.pool
    recorder.bound = None
    del product
    pool.give_back()
    assert (len(recorder.pools), recorder.emptied) == (0, 2)
