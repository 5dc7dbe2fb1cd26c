"""The devices of this process: torch's accelerators and the CPU."""

from __future__ import annotations

import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # another one than Python's before 3.11
from contextlib import AbstractContextManager
from functools import partial
from weakref import WeakValueDictionary

import torch

from sdrpc.device import (
    NOBODY,
    Buffer,
    Client,
    ServedProgram,
    Target,
    Watch,
)
from sdrpc.errors import OutOfMemory, SdrpcError
from sdrpc.ggml import validate
from sdrpc.ggml.tensor import Graph
from sdrpc.targets import SDRPC

from .compilation import Compiler, Faster, Origin
from .convolutions import try_out
from .deadline import WATCH_SECONDS, Deadline, running
from .digest import content
from .errors import translated
from .forms import in_use
from .holdings import Holdings, holdings
from .local_memory import LocalMemory
from .memory import LocalBuffer
from .operations import EngineOp
from .precision import Precision
from .program import Bound, Compiled, compile_graph
from .programs import Programs
from .replay import Pool, Replay
from .sharing import held, is_shared
from .slow import tell_if_long
from .system import compute_alone, return_freed_memory
from .values import ordered
from .weights import CPU_CACHE, Weights
from .worker import Worker

log = logging.getLogger(__name__)

PATIENCE = 8
"""Runs of programs after which converted weights that none of them used make room for others. Programs that take turns
at the steps of a picture, or of several clients' pictures, shall not throw out each other's."""
COMPILE_SECONDS = 120.0
"""One graph may take so long to compile: ten times what the largest takes that a server lets through."""
AHEAD = 4
"""Runs that a GPU may have before it: with none it waits for us between two of them, and of many nobody could be
stopped."""
MEASURED = 1 << 26
"""Runs that take less working memory than this start without a look at what the machine has left, or had."""


class LocalProgram(ServedProgram):
    """A graph on ``buffers`` of a :class:`LocalDevice`, ``bound`` to the storages that they had last by ``bind``."""

    def __init__(self, device: LocalDevice, buffers: Sequence[LocalBuffer], bind: Callable[[], Bound | Replay]) -> None:
        self.device, self.buffers, self.bind = device, buffers, bind
        self.bound = bind()
        self.compiled = self.bound.compiled
        self.peak = self.compiled.peak
        self.written = tuple(buffers[number] for number in self.compiled.written)
        """Those that a run writes to."""

    def run(self, watch: Watch | None = None, client: Client = NOBODY) -> None:
        self.device.execute(self, watch, client)

    @property
    def fusions(self) -> Mapping[str, int]:
        """How often each fusion fired."""
        return self.compiled.fusions


class LocalDevice(LocalMemory):
    """A device of torch. Safe to share between threads: one worker computes for all of them, in turn.

    ``compute_limit``: seconds that one run may take (None: no limit). ``dequant_cache``: bytes of weights that are kept
    in the dtype that they are computed in. ``compiler``: of programs that repeat, in *fast* precision.
    """

    def __init__(
        self,
        name: str,
        torch_device: torch.device,
        precision: Precision,
        *,
        description: str = "",
        threads: int | None = None,
        compute_limit: float | None = None,
        dequant_cache: int = CPU_CACHE,
        compiler: Compiler | None = None,
    ) -> None:
        # recordings use weights without asking for them: there none may leave
        patience = PATIENCE if torch_device.type != "cuda" else None
        super().__init__(name, torch_device, Weights(dequant_cache, patience))
        self.description, self.precision, self.compute_limit = description or name, precision, compute_limit
        self._programs = Programs()
        # a bound program holds buffers and scratch memory: it lives as long as somebody has a LocalProgram of it
        self._bound: WeakValueDictionary[Hashable, Bound | Replay] = WeakValueDictionary()
        self._runs: set[Deadline] = set()
        self._stopped = ""
        self.queues = torch_device.type == "cuda"
        self._under_way: deque[torch.cuda.Event] = deque()
        self._pool = Pool(torch_device) if torch_device.type == "cuda" else None
        self._compiler = compiler if precision.narrow is not None else None
        self._threads = threads
        self._worker = Worker(f"sdrpc-{name}", partial(_start, torch_device, threads))

    @property
    def target(self) -> Target:
        return SDRPC

    def begin_serving(self) -> None:
        """Where the system has no room for another thread, which OpenMP needs for the first run, it ends the process:
        so they begin now, and stay."""
        if self.torch_device.type == "cpu":
            with translated(self.name, "beginning"):
                self._worker.submit(NOBODY, _use_threads)

    def serve_here(self) -> None:
        if self.torch_device.type == "cpu":
            compute_alone()

    def compile(
        self,
        graph: Graph,
        buffers: Mapping[int, Buffer],
        name: bytes | None = None,
        watch: Watch | None = None,
        client: Client = NOBODY,
    ) -> LocalProgram:
        mine = {key: self._range(buffer, 0, 0) for key, buffer in buffers.items()}
        sizes = {key: buffer.size for key, buffer in mine.items()}
        keys = dict(enumerate(sizes))
        if name is None:
            name, keys = content(graph, sizes)

        def make() -> Compiled:
            began = time.monotonic()
            validate.check(graph, sizes, max_bytes=self.memory().free)
            with translated(self.name, "compiling a graph"):
                made = compile_graph(graph, self.precision, {key: number for number, key in keys.items()})
            tell_if_long(log, f"{self.name}: a graph of {len(graph.tensors)} tensors is a program", began)
            if eights := sum(value.op is EngineOp.PRODUCT_8BIT for value in ordered(made.roots)):
                log.info(
                    "%s: %d products of a graph multiply weights of 8 bits a number as they are", self.name, eights
                )
            return made

        deadline = Deadline(COMPILE_SECONDS, f"{self.name}: compiling a graph", watch)
        compiled = self._programs.get(name, make, len(graph.tensors), deadline, client)
        self._check_room(compiled.peak)
        used = [mine[keys[number]] for number in compiled.buffers]
        origin = None
        if self._compiler is not None:
            origin = Origin(graph, self.precision, sizes, {key: n for n, key in keys.items()})
        return LocalProgram(self, used, partial(self._bind, name, compiled, used, origin))

    def _bind(
        self, name: bytes, compiled: Compiled, used: Sequence[LocalBuffer], origin: Origin | None
    ) -> Bound | Replay:
        """The graph of that ``name`` on the storages that its buffers have now."""
        known = name, tuple((buffer.key, buffer.storage.key) for buffer in used)
        with self._lock:
            bound = self._bound.get(known)
        if bound is None:
            began = time.monotonic()
            with translated(self.name, "binding a graph"):
                steps = Bound(compiled, used, self._weights, self.torch_device)
            tell_if_long(log, f"{self.name}: a program of {len(steps)} steps has its memory", began)
            self._promise(steps, sum(compiled.scratch.values()))
            bound = self._repeating(steps, origin)
            with self._lock:
                self._bound[known] = bound
        return bound

    def warm(self) -> bool:
        """Have ready what the first runs would wait for; whether this device compiles programs, without which there is
        nothing. In the background: torch's libraries, and the compiled programs that were used last. What loads these
        is there when this returns: clients that are served meanwhile would take turns with it at the interpreter, and
        both would take far longer."""
        if self._compiler is None:
            return False
        computed = self._compiler.convolutions(self.torch_device, self._compiling_threads)
        works: list[Callable[[], None]] = [self._use_libraries]
        works += [partial(try_out, each, self.torch_device) for each in reversed(computed)]
        for work in works:  # one by one, so that a client who comes meanwhile has its turn
            self._worker.submit(NOBODY, partial(self._first_use, work))
        self._worker.submit(NOBODY, partial(self._warmed, len(computed), time.monotonic()))
        self._compiler.warm(self.torch_device, self._compiling_threads)
        return True

    def _use_libraries(self) -> None:
        """What products, attention and convolutions come from: the first use loads hundreds of megabytes."""
        x = torch.ones(1, 8, 16, 16, dtype=self.precision.narrow, device=self.torch_device)
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
        torch.nn.functional.conv2d(x, x[..., :3, :3].expand(8, -1, -1, -1))
        (x @ x).sum().item()

    def _first_use(self, work: Callable[[], None]) -> None:
        try:
            with torch.inference_mode(), self._libraries(), translated(self.name, "loading torch's libraries"):
                work()
        except SdrpcError as error:  # nobody has asked for it yet
            log.warning("%s", error)

    def _warmed(self, convolutions: int, began: float) -> None:
        what = f"{self.name}: torch's libraries are there, and the fastest of {convolutions} convolutions,"
        tell_if_long(log, what, began)
        if self._pool is not None and not self._buffers:
            self._pool.give_back()

    def _libraries(self) -> AbstractContextManager[None]:
        """How torch's libraries compute. Its own default lets convolutions in float32 round to TF32."""
        exact = self.precision.narrow is None
        flags: AbstractContextManager[None] = torch.backends.cudnn.flags(
            enabled=True, benchmark=not exact, allow_tf32=False
        )
        return flags

    @property
    def _compiling_threads(self) -> int:
        return self._threads or torch.get_num_threads()

    def _repeating(self, bound: Bound, origin: Origin | None) -> Bound | Replay:
        """``bound`` as it is run: recorded or compiled when it repeats, where this device does that."""
        faster = None
        if self._compiler is not None and origin is not None:
            faster = Faster(bound, origin, self._compiler, self._compiling_threads)
        return bound if self._pool is None and faster is None else Replay(bound, self._pool, faster)

    def _check_room(self, peak: int) -> None:
        """Raise :class:`OutOfMemory` where a run needs more memory than there is. (An accelerator says so itself, and
        nothing is lost then; where the CPU's memory ends, the system kills the process.)"""
        if self.torch_device.type != "cpu" or peak < MEASURED or peak <= self.memory().free:
            return
        return_freed_memory()
        if peak > (free := self.memory().free):
            raise OutOfMemory(self.name, peak, "the graph's working memory", free)

    def execute(self, program: LocalProgram, watch: Watch | None = None, client: Client = NOBODY) -> None:
        """Run ``program`` in the device's worker and wait for it."""
        deadline = Deadline(self.compute_limit, self.name)
        with self._lock:
            self._runs.add(deadline)
        if self._stopped:
            deadline.stop(self._stopped)
        try:
            with translated(self.name, "computing"):
                under_way = self._worker.submit(client, partial(self._run, program, deadline))
        except SdrpcError:  # the system has no room for the worker's thread, or the device is closed
            with self._lock:
                self._runs.discard(deadline)
            raise
        try:
            while watch is not None and not _is_over(under_way):
                if reason := watch():
                    deadline.stop(reason)
                    break
            under_way.result()
        except BaseException as error:
            deadline.stop("nobody waits for its result any more")  # Ctrl-C comes to who waits
            _forget_frames(error)
            raise
        finally:
            # the error refers to this frame, which must not refer to the error: such a circle keeps all that the
            # frames of the run refer to, buffers among them, until Python looks for circles
            del under_way
            with self._lock:
                self._runs.discard(deadline)

    def _run(self, program: LocalProgram, deadline: Deadline) -> None:
        deadline.start()
        self._check_room(program.peak)
        with running(deadline), translated(self.name, "computing"):
            bound = self._settled(program)
            new = isinstance(bound, Replay) and bound.is_new
            with (
                torch.inference_mode(),
                self._libraries(),
                in_use(bound.storages),
            ):
                bound.run(deadline)
            if self.torch_device.type == "cuda":
                self._queued()
                large = program.peak >= MEASURED
                if new and large and log.isEnabledFor(logging.DEBUG):  # step by step, which takes the most memory
                    log.debug("%s: after a first run: %s", self.name, self._holdings())

    def _settled(self, program: LocalProgram) -> Bound | Replay:
        """``program`` as it is bound to the storages that its buffers have for this run: those that it writes to are
        their own."""
        given_up = [self._storages.share(buffer) for buffer in program.buffers if buffer.twin is not None]
        for buffer in program.written:
            if is_shared(buffer):
                with held(buffer), self._storages.own(buffer):
                    pass
        storages = program.bound.storages
        if any(buffer.storage is not storage for buffer, storage in zip(program.buffers, storages, strict=True)):
            program.bound = program.bind()
        if any(given_up):
            del storages  # the last that has them
            self.trim()
        return program.bound

    def _holdings(self) -> Holdings:
        with self._lock:
            buffers = sum(len(storage.data) for storage in {each.storage for each in self._buffers.values()})
        return holdings(self.torch_device, buffers, self._weights.used)

    def _queued(self) -> None:
        """A run was queued on the GPU: wait until at most ``AHEAD`` runs are."""
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        self._under_way.append(done)
        while len(self._under_way) > AHEAD:
            self._under_way.popleft().synchronize()

    def trim(self) -> None:
        if self._pool is not None:
            self._pool.give_back()
        elif self.torch_device.type == "cpu":
            return_freed_memory()
        else:
            (torch.mps if self.torch_device.type == "mps" else torch.xpu).empty_cache()

    def stop(self, seconds: float) -> bool:
        """End what is computed, for good; whether that was possible within ``seconds``."""
        with self._lock:
            self._stopped = "the server is stopping"
            for deadline in self._runs:
                deadline.stop(self._stopped)
        if not self._worker.close(seconds) or (self._compiler is not None and not self._compiler.close(seconds)):
            return False
        self.close()
        return True

    def close(self) -> None:
        self._worker.close()
        with self._lock:
            left = list(self._buffers.values())
        for buffer in left:
            self.free(buffer)
        self._programs.clear()


def _is_over(work: Future[None]) -> bool:
    """Whether ``work`` ends within the time after which somebody looks whether it shall go on."""
    try:
        work.exception(WATCH_SECONDS)
    except FutureTimeoutError:
        return False
    return True


def _forget_frames(error: BaseException) -> None:
    """Drop the local variables of all frames that ``error`` and its causes passed: the operands of a failed run."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            waiting += [one.__cause__, one.__context__]


def _start(device: torch.device, threads: int | None) -> None:
    """In the worker: torch keeps the number of threads, and CUDA its current device, for each thread."""
    if threads is not None:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _use_threads() -> None:
    torch.zeros(1 << 20).add_(1)  # enough numbers for all threads to have a part
