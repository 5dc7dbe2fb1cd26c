"""How a bound program that repeats runs: compiled where that is possible, and recorded as a CUDA graph on CUDA.

A program reads its inputs from buffers and writes its outputs to buffers, whose addresses stay: so the launches of one
run are those of the next one, and the second run of a program is recorded. Converted weights are baked into a recording
by address; where one has been dropped since (its bytes were written), the recording is made anew.

Compiled code comes when it is ready, between two runs. The run in which it comes is computed in both ways; where the
results agree, the code takes over, and is recorded in its turn.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from threading import Lock
from typing import Any

import torch

from .compilation import CompiledProgram, Faster
from .deadline import Deadline
from .memory import Storage
from .program import Bound, Compiled
from .slow import tell_if_long

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""Recordings of one program that are started before it runs step by step for good."""
_RECORDING = Lock()
"""torch records one graph of a process at a time, on whatever device."""


class Pool:
    """The memory that recordings of ``device`` share. They may: none runs while another does, and no value outlives a
    run, since what is wanted is in buffers then. For any thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._handle: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._keeper: torch.cuda.CUDAGraph | None = None
        self._users: weakref.WeakSet[Replay] = weakref.WeakSet()

    @contextmanager
    def recording(self, user: Replay, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Record what the context launches as ``graph``, for ``user``."""
        with _RECORDING:
            handle = self._handled()
            with self._into(graph, handle):
                yield
            self._users.add(user)

    def give_back(self) -> None:
        """Give back what torch has and nobody uses; that of recordings if there are none any more."""
        with _RECORDING:  # torch can't while anything is recorded
            if not self._users:
                self._keeper = self._handle = None
            torch.cuda.empty_cache()

    def _handled(self) -> Any:
        """The pool's handle. The first recording in it is of nothing much and is kept: torch gives a pool up with the
        last of its recordings, and then refuses its handle."""
        if self._keeper is None:
            keeper, handle = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
            with self._into(keeper, handle):
                torch.zeros(1, device=self._device)
            self._keeper, self._handle = keeper, handle
        return self._handle

    def _into(self, graph: torch.cuda.CUDAGraph, handle: Any) -> AbstractContextManager[None]:
        """A recording. Other threads may allocate and copy meanwhile; that must not break it. Its stream is one of this
        device: torch's own is of the first device that anything was recorded on, and what another one launches is then
        in no recording, without a word."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return torch.cuda.graph(graph, pool=handle, stream=self._stream, capture_error_mode="thread_local")


class Replay:
    """Runs of one bound program. ``pool``: for recordings, on a CUDA (or ROCm) device. ``faster``: where it may be
    compiled."""

    def __init__(self, bound: Bound, pool: Pool | None, faster: Faster | None = None) -> None:
        self.bound, self._pool, self._faster = bound, pool, faster
        self._body: Bound | CompiledProgram = bound
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False
        self._attempts = 0

    @property
    def compiled(self) -> Compiled:
        return self.bound.compiled

    @property
    def storages(self) -> Sequence[Storage]:
        return self.bound.storages

    def __str__(self) -> str:
        how = "as it is" if self._body is self.bound else "compiled"
        return f"a program of {len(self.bound)} steps, {how},"

    @property
    def is_new(self) -> bool:
        """Whether it never ran."""
        return not self._warm

    def run(self, deadline: Deadline) -> None:
        if self.bound.begin():
            self._graph = None
            if self._body is not self.bound:  # it holds weights that are gone
                self._body, self._warm = self.bound, False
            if self._faster is not None:
                self._faster.unsettled()
        found = self._faster.found() if self._faster is not None and self._body is self.bound else None
        if self._faster is not None and found is not None and self._faster.tried(found, lambda: self._run(deadline)):
            self._body, self._graph, self._attempts = found, None, 0
        elif found is None:
            self._run(deadline)

    def _run(self, deadline: Deadline) -> None:
        began = time.monotonic()
        if self._pool is not None and self._graph is None and self._warm and self._attempts < ATTEMPTS:
            self._record(self._pool)
            tell_if_long(log, f"a recording of {self}", began)
        if self._graph is not None:
            self._graph.replay()
            self.bound.stored()
        else:
            self._body.steps(deadline)
            if not self._warm:
                tell_if_long(log, f"the first run of {self}", began)
            self._warm = True

    def _record(self, pool: Pool) -> None:
        self._attempts += 1
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            with pool.recording(self, graph):
                self._body.record()
        except Exception as error:
            # a kernel that waits for the host can't be recorded; the same program runs step by step
            log.warning("a graph of %d steps is not recorded: %s", len(self.bound), str(error).split("\n")[0])
            self._attempts = ATTEMPTS
            torch.cuda.set_stream(stream)  # a recording that fails to start leaves its own stream behind
            torch.cuda.synchronize()
        else:
            self._graph = graph
