"""The devices of this process: torch's accelerators and the CPU."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from threading import RLock
from typing import TypeVar

import torch

from sdrpc.device import Buffer, Bytes, Device, Memory, Program, Target
from sdrpc.errors import DeviceError, OutOfMemory
from sdrpc.ggml import validate
from sdrpc.ggml.tensor import Graph
from sdrpc.targets import SDRPC

from .deadline import Deadline
from .digest import content
from .errors import translated
from .memory import LocalBuffer, host_bytes
from .precision import Precision, choose
from .program import Bound, Compiled, compile_graph
from .replay import Pool, Replay
from .system import host_memory, processor
from .weights import Weights

T = TypeVar("T")
Watch = Callable[[], str]
"""Says why a run shall stop, or nothing."""

CPU_CACHE = 256 * 2**20
"""Bytes of converted weights that the CPU keeps unless told otherwise: memory is other programs' as well there, and
converting float16 again takes a twentieth of a step."""
PATIENCE = 8
"""Runs of programs after which converted weights that none of them used make room for others. Programs that take turns
at the steps of a picture, or of several clients' pictures, shall not throw out each other's."""
WATCH_SECONDS = 0.2
"""How often a run's watch is asked."""
PROGRAMS = 32
"""Graphs that are kept compiled, and kept bound to buffers."""

_keys = itertools.count(1)
"""Buffers' keys are unique in the process, so that a graph can't name another device's memory by mistake."""


class LocalProgram(Program):
    """A graph bound to buffers of a :class:`LocalDevice`."""

    def __init__(self, device: LocalDevice, bound: Bound | Replay) -> None:
        self.device, self.bound = device, bound

    def run(self, watch: Watch | None = None) -> None:
        """Compute all nodes. ``watch`` is asked now and then whether there is a reason to stop, in words.

        Raises :class:`sdrpc.errors.ComputeError`, :class:`sdrpc.errors.OutOfMemory`."""
        self.device.execute(self.bound, watch)

    @property
    def fusions(self) -> Mapping[str, int]:
        """How often each fusion fired."""
        return self.bound.compiled.fusions


class LocalDevice(Device):
    """A device of torch. Safe to share between threads: one worker computes for all of them, in turn.

    ``compute_limit``: seconds that one run may take (None: no limit). ``dequant_cache``: bytes of weights that are kept
    in the dtype that they are computed in.
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
    ) -> None:
        self.name, self.torch_device, self.precision = name, torch_device, precision
        self.description = description or name
        self.compute_limit = compute_limit
        # recordings use weights without asking for them: there none may leave
        self._weights = Weights(dequant_cache, PATIENCE if torch_device.type != "cuda" else None)
        self._buffers: dict[int, LocalBuffer] = {}
        self._promised = 0  # bytes of all buffers
        self._compiled: OrderedDict[bytes, Compiled] = OrderedDict()
        self._bound: OrderedDict[tuple[bytes, tuple[int, ...]], Bound | Replay] = OrderedDict()
        self._pool = Pool() if torch_device.type == "cuda" else None
        self._lock = RLock()
        self._worker = ThreadPoolExecutor(
            1, thread_name_prefix=f"sdrpc-{name}", initializer=_start, initargs=(torch_device, threads)
        )

    # what it is

    @property
    def target(self) -> Target:
        return SDRPC

    @property
    def alignment(self) -> int:
        return 64

    def memory(self) -> Memory:
        """Free and total bytes; what is promised to buffers but was never touched does not count as free."""
        kind = self.torch_device.type
        if kind == "cpu":
            free, total = host_memory()
            return Memory(max(min(free, total - self._promised), 0), total)
        with translated(self.name, "asking for its memory"):
            if kind == "mps":
                total = torch.mps.recommended_max_memory()
                return Memory(max(total - torch.mps.driver_allocated_memory(), 0), total)
            module = torch.xpu if kind == "xpu" else torch.cuda
            free, total = module.mem_get_info(self.torch_device)
            cached = module.memory_reserved(self.torch_device) - module.memory_allocated(self.torch_device)
            return Memory(free + cached, total)

    # bytes

    def allocate(self, size: int) -> LocalBuffer:
        """A new buffer, zeroed: what it holds was never anybody else's."""
        if size < 0:
            raise DeviceError(f"{self.name}: a buffer of {size} bytes")
        if size > self.memory().free:
            raise OutOfMemory(self.name, size)
        with translated(self.name, "allocating a buffer", size):
            if self.torch_device.type == "cpu":
                data, host = host_bytes(size)
                buffer = LocalBuffer(next(_keys), size, data, host)
            else:
                data = torch.zeros(size, dtype=torch.uint8, device=self.torch_device)
                buffer = LocalBuffer(next(_keys), size, data, None)
        with self._lock:
            self._buffers[buffer.key] = buffer
            self._promised += size
        return buffer

    def free(self, buffer: Buffer) -> None:
        """Give ``buffer`` back; programs that used it are forgotten."""
        with self._lock:
            if self._buffers.pop(buffer.key, None) is not None:
                self._promised -= buffer.size
            for key in [key for key in self._bound if buffer.key in key[1]]:
                del self._bound[key]
        self._weights.drop(buffer.key)

    def write(self, buffer: Buffer, offset: int, data: Bytes) -> None:
        source = memoryview(data).cast("B")
        mine = self._range(buffer, offset, len(source))
        self._weights.drop(buffer.key, offset, offset + len(source))
        if mine.host is not None:
            mine.host[offset : offset + len(source)] = source
        elif len(source):
            with translated(self.name, "writing"):
                writable = source if not source.readonly else memoryview(bytearray(source))
                mine.data[offset : offset + len(source)].copy_(torch.frombuffer(writable, dtype=torch.uint8))

    def read(self, buffer: Buffer, offset: int, size: int) -> Bytes:
        """``size`` bytes; on the CPU a view of the memory itself, which later computing changes."""
        mine = self._range(buffer, offset, size)
        if mine.host is not None:
            return mine.host[offset : offset + size].toreadonly()
        if not size:
            return b""
        with translated(self.name, "reading"):
            return memoryview(mine.data[offset : offset + size].cpu().numpy().tobytes())

    def window(self, buffer: Buffer, offset: int, size: int) -> memoryview | None:
        """Writable memory of ``buffer``, to receive into; None where the CPU can't touch it: then use ``write``."""
        mine = self._range(buffer, offset, size)
        if mine.host is None:
            return None
        self._weights.drop(buffer.key, offset, offset + size)
        return mine.host[offset : offset + size]

    def clear(self, buffer: Buffer, value: int = 0) -> None:
        self.fill(buffer, 0, buffer.size, value)

    def fill(self, buffer: Buffer, offset: int, size: int, value: int) -> None:
        """Set ``size`` bytes from ``offset`` on to ``value``."""
        mine = self._range(buffer, offset, size)
        self._weights.drop(buffer.key, offset, offset + size)
        with translated(self.name, "filling"):
            mine.data[offset : offset + size].fill_(value)

    def copy(self, source: Buffer, source_offset: int, target: Buffer, target_offset: int, size: int) -> None:
        """Copy ``size`` bytes, also within one buffer."""
        a, b = self._range(source, source_offset, size), self._range(target, target_offset, size)
        self._weights.drop(target.key, target_offset, target_offset + size)
        with translated(self.name, "copying"):
            part = a.data[source_offset : source_offset + size]
            b.data[target_offset : target_offset + size].copy_(part.clone() if a is b else part)

    def _range(self, buffer: Buffer, offset: int, size: int) -> LocalBuffer:
        mine = self._buffers.get(buffer.key)
        if mine is None:
            raise DeviceError(f"{self.name}: a buffer that it does not have")
        if offset < 0 or size < 0 or offset + size > mine.size:
            raise DeviceError(f"{self.name}: bytes {offset} … {offset + size} of a buffer of {mine.size}")
        return mine

    # graphs

    def compile(self, graph: Graph, buffers: Mapping[int, Buffer]) -> LocalProgram:
        mine = {key: self._range(buffer, 0, 0) for key, buffer in buffers.items()}
        sizes = {key: buffer.size for key, buffer in mine.items()}
        digest, keys = content(graph, sizes)
        with self._lock:
            compiled = _recent(self._compiled, digest)
        if compiled is None:
            validate.check(graph, sizes, max_bytes=self.memory().free)
            with translated(self.name, "compiling a graph"):
                compiled = compile_graph(graph, self.precision, {key: number for number, key in keys.items()})
            with self._lock:
                _remember(self._compiled, digest, compiled)
        used = [mine[keys[number]] for number in compiled.buffers]
        name = (digest, tuple(buffer.key for buffer in used))
        with self._lock:
            bound = _recent(self._bound, name)
        if bound is None:
            with translated(self.name, "binding a graph"):
                steps = Bound(compiled, used, self._weights, self.torch_device)
                bound = steps if self._pool is None else Replay(steps, self._pool)
            with self._lock:
                _remember(self._bound, name, bound)
        return LocalProgram(self, bound)

    def execute(self, bound: Bound | Replay, watch: Watch | None = None) -> None:
        """Run ``bound`` in the device's worker and wait for it."""
        deadline = Deadline(self.compute_limit)
        running = self._worker.submit(self._run, bound, deadline)
        while watch is not None and not wait([running], WATCH_SECONDS).done:
            if reason := watch():
                deadline.stop(reason)
                break
        running.result()

    def _run(self, bound: Bound | Replay, deadline: Deadline) -> None:
        deadline.start()
        exact = self.precision.narrow is None
        with (
            torch.inference_mode(),
            # torch's own default lets convolutions round to TF32
            torch.backends.cudnn.flags(enabled=True, benchmark=not exact, allow_tf32=not exact),
            translated(self.name, "computing"),
        ):
            bound.run(deadline)
            if self.compute_limit is not None and self.torch_device.type == "cuda":
                torch.cuda.synchronize(self.torch_device)

    def close(self) -> None:
        self._worker.shutdown(wait=True)
        with self._lock:
            for buffer in list(self._buffers.values()):
                self.free(buffer)
            self._compiled.clear()
            self._bound.clear()


def _start(device: torch.device, threads: int | None) -> None:
    """In the worker: torch keeps the number of threads, and CUDA its current device, for each thread."""
    if threads is not None:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)


K = TypeVar("K")


def _recent(cache: OrderedDict[K, T], key: K) -> T | None:
    if key in cache:
        cache.move_to_end(key)
        return cache[key]
    return None


def _remember(cache: OrderedDict[K, T], key: K, value: T) -> None:
    cache[key] = value
    while len(cache) > PROGRAMS:
        cache.popitem(last=False)


def devices(
    precision: str = "auto",
    threads: int | None = None,
    *,
    compute_limit: float | None = None,
    dequant_cache: int | None = None,
) -> list[LocalDevice]:
    """Every accelerator that torch finds, then the CPU.

    ``precision``: exact, fast, ggml, or auto: fast where the hardware has narrow arithmetic. ``threads``: of the
    CPU (default: torch's). ``dequant_cache``: bytes per device (default: 256 MiB, or a quarter of an
    accelerator's memory). Raises :class:`sdrpc.errors.UsageError` for another precision.
    """
    return [
        LocalDevice(
            name,
            torch_device,
            choose(precision, torch_device),
            description=description,
            threads=threads if torch_device.type == "cpu" else None,
            compute_limit=compute_limit,
            dequant_cache=_default_cache(torch_device) if dequant_cache is None else dequant_cache,
        )
        for name, torch_device, description in _found()
    ]


def _default_cache(device: torch.device) -> int:
    """A little of the CPU's memory; an accelerator's is there to be used."""
    if device.type not in ("cuda", "xpu"):
        return CPU_CACHE
    _, total = (torch.cuda if device.type == "cuda" else torch.xpu).mem_get_info(device)
    return int(total) // 4


def _found() -> list[tuple[str, torch.device, str]]:
    kind = "ROCm" if torch.version.hip else "CUDA"
    cuda = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    xpu = range(torch.xpu.device_count() if torch.xpu.is_available() else 0)
    found = [(f"{kind}{i}", torch.device("cuda", i), torch.cuda.get_device_name(i)) for i in cuda]
    found += [(f"XPU{i}", torch.device("xpu", i), torch.xpu.get_device_name(i)) for i in xpu]
    if torch.backends.mps.is_available():
        found.append(("MPS", torch.device("mps"), processor()))
    found.append(("CPU", torch.device("cpu"), processor()))
    return found
