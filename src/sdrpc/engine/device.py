"""The devices of this process: torch's accelerators and the CPU."""

from __future__ import annotations

import itertools
import logging
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # another one than Python's before 3.11
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from threading import RLock
from weakref import WeakValueDictionary

import torch

from sdrpc.device import (
    NOBODY,
    Buffer,
    Bytes,
    Client,
    Frozen,
    Later,
    Mark,
    Memory,
    Rows,
    ServedDevice,
    ServedProgram,
    Span,
    Target,
    Watch,
)
from sdrpc.errors import DeviceError, InvalidValue, OutOfMemory, SdrpcError
from sdrpc.ggml import validate
from sdrpc.ggml.tensor import Graph
from sdrpc.targets import SDRPC

from .compilation import Compiler, Faster, Origin, missing
from .convolutions import try_out
from .deadline import WATCH_SECONDS, Deadline, running
from .digest import content
from .discovery import CPU_CACHE, default_cache, found
from .errors import translated
from .forms import in_use
from .holdings import Holdings, holdings
from .memory import MAPPED, LocalBuffer, Storage, new_storage
from .operations import EngineOp
from .pages import Frozen as FrozenPages
from .precision import Precision, choose
from .program import Bound, Compiled, compile_graph
from .programs import Programs
from .replay import Pool, Replay
from .sharing import Storages, held, is_shared, may_share
from .slow import tell_if_long
from .staging import Reading, Staging
from .system import host_memory, return_freed_memory, shared_resident
from .values import ordered
from .weights import Weights
from .worker import Worker

log = logging.getLogger(__name__)

MAX_THREADS = 1024
"""Of a CPU. With many more the system gives none, and torch ends the process."""

PATIENCE = 8
"""Runs of programs after which converted weights that none of them used make room for others. Programs that take turns
at the steps of a picture, or of several clients' pictures, shall not throw out each other's."""
COMPILE_SECONDS = 120.0
"""One graph may take so long to compile: ten times what the largest takes that a server lets through."""
AHEAD = 4
"""Runs that a GPU may have before it: with none it waits for us between two of them, and of many nobody could be
stopped."""
SOON = 64 << 20
"""Bytes that are read without waiting, at most: they take memory of the host's that is pinned."""
MEASURED = 1 << 26
"""Runs that take less working memory than this start without a look at what the machine has left, or had."""

_keys = itertools.count(1)
"""Buffers' keys are unique in the process, so that a graph can't name another device's memory by mistake."""


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


class LocalDevice(ServedDevice):
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
        self.name, self.torch_device, self.precision = name, torch_device, precision
        self.description = description or name
        self.compute_limit = compute_limit
        # recordings use weights without asking for them: there none may leave
        self._weights = Weights(dequant_cache, PATIENCE if torch_device.type != "cuda" else None)
        self._storages = Storages(partial(new_storage, torch_device), self._weights)
        self._buffers: dict[int, LocalBuffer] = {}
        self._promised = 0  # bytes of buffers and scratch memory that take memory when they are touched
        self._programs = Programs()
        # a bound program holds buffers and scratch memory: it lives as long as somebody has a LocalProgram of it
        self._bound: WeakValueDictionary[Hashable, Bound | Replay] = WeakValueDictionary()
        self._runs: set[Deadline] = set()
        self._stopped = ""
        self._staging = Staging(torch_device) if torch_device.type == "cuda" else None
        self.queues = torch_device.type == "cuda"
        self._under_way: deque[torch.cuda.Event] = deque()
        self._pool = Pool(torch_device) if torch_device.type == "cuda" else None
        self._compiler = compiler if precision.narrow is not None else None
        self._threads = threads
        self._lock = RLock()
        self._worker = Worker(f"sdrpc-{name}", partial(_start, torch_device, threads))

    # what it is

    @property
    def target(self) -> Target:
        return SDRPC

    @property
    def alignment(self) -> int:
        return 64

    def memory(self) -> Memory:
        """Free and total bytes; what is promised to buffers but was never touched does not count as free, nor what
        those that share would take, each for itself."""
        kind = self.torch_device.type
        if kind == "cpu":
            free, total = host_memory()
            touched = shared_resident()
            if touched is None:
                return Memory(max(min(free, total - self._promised), 0), total)
            return Memory(max(free - max(self._promised - touched, 0), 0), total)
        with translated(self.name, "asking for its memory"):
            if kind == "mps":
                total = torch.mps.recommended_max_memory()
                return Memory(max(total - torch.mps.driver_allocated_memory() - self._storages.spared, 0), total)
            module = torch.xpu if kind == "xpu" else torch.cuda
            free, total = module.mem_get_info(self.torch_device)
            cached = module.memory_reserved(self.torch_device) - module.memory_allocated(self.torch_device)
            return Memory(max(free + cached - self._storages.spared, 0), total)

    # bytes

    def allocate(self, size: int) -> LocalBuffer:
        """A new buffer, zeroed: what it holds was never anybody else's."""
        if size < 0:
            raise DeviceError(f"{self.name}: a buffer of {size} bytes")
        if size > (free := self.memory().free):
            raise OutOfMemory(self.name, size, free=free)
        with translated(self.name, "allocating a buffer", size):
            buffer = self._storages.allocate(next(_keys), size)
        with self._lock:
            self._buffers[buffer.key] = buffer
            self._promised += size if size >= MAPPED else 0
        return buffer

    def free(self, buffer: Buffer) -> None:
        """Give ``buffer`` back. A program that uses it keeps its memory until it is dropped itself."""
        with self._lock:
            mine = self._buffers.pop(buffer.key, None)
            if mine is None:
                return
            self._promised -= mine.size if mine.size >= MAPPED else 0
        self._storages.free(mine)

    def write(self, buffer: Buffer, offset: int, data: Bytes) -> None:
        source = memoryview(data).cast("B")
        with self._writing(buffer, offset, len(source)) as storage:
            if storage.host is not None:
                storage.host[offset : offset + len(source)] = source
            elif len(source):
                part = storage.data[offset : offset + len(source)]
                if self._staging is None:
                    part.copy_(_as_tensor(source))
                else:
                    self._staging.write(part, source)

    def read(self, buffer: Buffer, offset: int, size: int) -> Bytes:
        """``size`` bytes; on the CPU a view of the memory itself, which later computing changes."""
        mine = self._range(buffer, offset, size)
        if not size:
            return b""
        with self._reading(mine, offset, size) as part:
            if mine.storage.host is not None:
                return part.numpy().data.toreadonly()
            if self._staging is None:
                return memoryview(part.cpu().numpy().tobytes())
            soon = self._staging.read_soon(part)
        return soon.wait()

    def read_soon(self, buffer: Buffer, offset: int, size: int) -> Reading | None:
        self._range(buffer, offset, size)
        if self._staging is None or not 0 < size <= SOON:
            return None
        with self._reading(buffer, offset, size) as part:
            return self._staging.read_soon(part)

    def read_later(self, buffer: Buffer, offset: int, size: int) -> Later:
        soon = self.read_soon(buffer, offset, size)
        return super().read_later(buffer, offset, size) if soon is None else soon

    def copy_to(self, source: Span, target: Span) -> bool:
        """Between two of one kind. GPUs queue it, each behind what it has to do."""
        _, buffer, offset, size = source
        other, there, at, _ = target
        if not isinstance(other, LocalDevice) or other.torch_device.type != self.torch_device.type:
            return False
        doing = f"copying to {other.name}"
        with (
            translated(self.name, doing),
            held(self._range(buffer, offset, size), other._range(there, at, size)),
            self._reading(buffer, offset, size, doing) as part,
            other._writing(there, at, size, doing) as storage,
        ):
            storage.data[at : at + size].copy_(part, non_blocking=True)
        return True

    def window(self, buffer: Buffer, offset: int, size: int) -> memoryview | None:
        """Writable memory of ``buffer``, to receive into; None where the CPU can't touch it: then use ``write``. Until
        all of it was written, what is there is nobody's to read or to compute with."""
        if self._range(buffer, offset, size).storage.host is None:
            return None
        with self._writing(buffer, offset, size) as storage:
            assert storage.host is not None  # noqa: S101
            return storage.host[offset : offset + size]

    def receive(self, buffer: Buffer, offset: int, size: int, fill: Callable[[memoryview], None]) -> None:
        if self._staging is not None:
            self._range(buffer, offset, size)
            with translated(self.name, "writing"), self._staging.filled(size, fill) as memory:
                if memory is not None:
                    with self._writing(buffer, offset, size) as storage:
                        storage.data[offset : offset + size].copy_(memory, non_blocking=True)
                    return
        super().receive(buffer, offset, size, fill)

    def clear(self, buffer: Buffer, value: int = 0) -> None:
        self.fill(buffer, 0, buffer.size, value)

    def fill(self, buffer: Buffer, offset: int, size: int, value: int) -> None:
        """Set ``size`` bytes from ``offset`` on to ``value``."""
        with self._writing(buffer, offset, size, "filling") as storage:
            storage.data[offset : offset + size].fill_(value)

    def write_rows(self, buffer: Buffer, rows: Rows, data: Bytes) -> None:
        """Write ``data`` to ``rows``, one row behind the other."""
        dense = rows.size == rows.stride
        with self._writing(buffer, rows.offset, rows.extent, "writing rows", all_of_it=dense) as storage:
            _row_view(storage.data[rows.offset : rows.offset + rows.extent], rows).copy_(
                _as_tensor(memoryview(data)).view(rows.copies, rows.size)
            )

    def read_rows(self, buffer: Buffer, rows: Rows) -> Bytes:
        """The bytes of ``rows``, one row behind the other."""
        with self._reading(buffer, rows.offset, rows.extent, "reading rows") as part:
            return _row_view(part, rows).contiguous().cpu().numpy().data.cast("B")

    def copy(self, source: Buffer, source_offset: int, target: Buffer, target_offset: int, size: int) -> None:
        """Copy ``size`` bytes, also within one buffer."""
        one, other = self._range(source, source_offset, size), self._range(target, target_offset, size)
        overlaps = one is other and abs(source_offset - target_offset) < size
        with (
            translated(self.name, "copying"),
            held(one, other),
            self._reading(source, source_offset, size, "copying") as part,
        ):
            data = part.clone() if overlaps else part
            with self._writing(target, target_offset, size, "copying") as storage:
                storage.data[target_offset : target_offset + size].copy_(data)

    # what several buffers have together

    def mark(self, buffer: Buffer, offset: int, size: int) -> Mark:
        return self._weights.mark(self._range(buffer, offset, size), offset, offset + size)

    def identify(self, buffer: Buffer, mark: Mark, name: Hashable) -> None:
        mine = self._buffers.get(buffer.key)
        if mine is not None:  # else its client has just freed it
            self._weights.identify(mine, mark, name)

    def freeze(self, buffer: Buffer, offset: int, size: int) -> Frozen | None:
        storage = self._range(buffer, offset, size).storage
        if storage.pages is None or storage.host is None:
            return None
        with storage.forms.as_they_came(storage.data, offset, offset + size):
            self._weights.move(storage, offset, offset + size, moved=False)
            return storage.pages.freeze(storage.host, offset, size)

    def take(self, buffer: Buffer, offset: int, frozen: Frozen) -> bool:
        with self._writing(buffer, offset, frozen.size) as storage:
            if storage.pages is None or storage.host is None or not isinstance(frozen, FrozenPages):
                return False
            return storage.pages.take(storage.host, offset, frozen)

    def may_be_same(self, buffer: Buffer, other: Buffer) -> None:
        mine, theirs = self._range(buffer, 0, 0), self._range(other, 0, 0)
        if may_share(mine, theirs):
            mine.twin = weakref.ref(theirs)

    def _range(self, buffer: Buffer, offset: int, size: int) -> LocalBuffer:
        mine = self._buffers.get(buffer.key)
        if mine is None:
            raise DeviceError(f"{self.name}: a buffer that it does not have")
        if offset < 0 or size < 0 or offset + size > mine.size:
            raise DeviceError(f"{self.name}: bytes {offset} … {offset + size} of a buffer of {mine.size}")
        return mine

    @contextmanager
    def _writing(
        self, buffer: Buffer, offset: int, size: int, doing: str = "writing", all_of_it: bool = True
    ) -> Iterator[Storage]:
        """Within the context ``size`` bytes, or some of them, are written, to the storage that it gives: what was made
        of them is forgotten, and nobody reads them or makes anything of them meanwhile."""
        mine = self._range(buffer, offset, size)
        with translated(self.name, doing), held(mine), self._storages.own(mine) as storage:
            storage.forms.give_way(storage.data, offset, offset + size, all_of_it)
            self._weights.unmark(mine, offset, offset + size)
            self._weights.drop(storage.key, offset, offset + size)
            yield storage

    @contextmanager
    def _reading(self, buffer: Buffer, offset: int, size: int, doing: str = "reading") -> Iterator[torch.Tensor]:
        """Within the context those bytes, as they came, stay as they are."""
        mine = self._range(buffer, offset, size)
        with translated(self.name, doing), held(mine):
            yield mine.storage.forms.read(mine.storage.data, offset, offset + size)

    # graphs

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

    def _promise(self, bound: Bound, scratch: int) -> None:
        """Count the scratch memory of ``bound`` for as long as it lives."""
        if scratch:
            with self._lock:
                self._promised += scratch
            weakref.finalize(bound, self._take_back, scratch)

    def _take_back(self, size: int) -> None:
        with self._lock:
            self._promised -= size

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
        under_way = self._worker.submit(client, partial(self._run, program, deadline))
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
        if not self._worker.close(seconds):
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


def _as_tensor(data: memoryview) -> torch.Tensor:
    """``data``, which is not written to, as bytes of torch's."""
    return torch.frombuffer(data if not data.readonly else bytearray(data), dtype=torch.uint8)


def _row_view(part: torch.Tensor, rows: Rows) -> torch.Tensor:
    """``rows`` of the bytes from their first on."""
    return part.as_strided((rows.copies, rows.size), (rows.stride, 1), part.storage_offset())


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


def devices(
    precision: str = "auto",
    threads: int | None = None,
    *,
    compute_limit: float | None = None,
    dequant_cache: int | None = None,
    compile: str = "auto",
) -> list[LocalDevice]:
    """Every accelerator that torch finds, then the CPU.

    ``precision``: exact, fast, ggml, or auto: fast where the hardware has narrow arithmetic. ``threads``: of the
    CPU (default: torch's). ``dequant_cache``: bytes per device (default: 448 MiB, or a quarter of an
    accelerator's memory). ``compile``: of programs that repeat in *fast* precision; auto: on GPUs, where there is a
    compiler; off. Raises :class:`sdrpc.errors.UsageError` for another precision, and more than :data:`MAX_THREADS`.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise InvalidValue("threads", threads, f"it can be 1 … {MAX_THREADS}")
    compiler = Compiler() if compile == "auto" else None
    return [
        LocalDevice(
            name,
            device,
            choose(precision, device),
            description=description,
            threads=threads if device.type == "cpu" else None,
            compute_limit=compute_limit,
            dequant_cache=default_cache(device) if dequant_cache is None else dequant_cache,
            compiler=compiler if _compiles(device, precision) else None,
        )
        for name, device, description in found()
    ]


def _compiles(device: torch.device, precision: str) -> bool:
    """Whether programs are compiled on ``device`` unless somebody says otherwise; what is missing for that is logged.
    A CPU gains little by it (bench/README.md)."""
    if device.type != "cuda" or choose(precision, device).narrow is None:
        return False
    if lacking := missing(device):
        log.warning("%s: programs are not compiled, which would make them faster: %s", device, lacking)
    return not lacking
