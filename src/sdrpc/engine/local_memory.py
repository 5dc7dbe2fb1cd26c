"""The memory of a device of torch: buffers, their bytes, and what several of them have together."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from threading import RLock
from typing import TypeVar

import torch

from sdrpc.device import Buffer, Bytes, Frozen, Later, Mark, Memory, Receive, Rows, ServedDevice, Span
from sdrpc.errors import DeviceError, OutOfMemory

from .errors import translated
from .forms import ALIGNMENT, MAPPED
from .fresh_memory import made_ready
from .memory import LocalBuffer, Storage, new_storage
from .pages import Frozen as FrozenPages
from .sharing import Storages, held, may_share
from .staging import Reading, Staging
from .system import host_memory, shared_resident
from .weights import Weights

SOON = 64 << 20
"""Bytes that are read without waiting, at most: they take memory of the host's that is pinned."""

T = TypeVar("T")

_keys = itertools.count(1)
"""Buffers' keys are unique in the process, so that a graph can't name another device's memory by mistake."""


class LocalMemory(ServedDevice):
    """The half of :class:`sdrpc.engine.device.LocalDevice` that knows nothing of graphs but that they use ``weights``,
    which are forgotten when their bytes change. Safe to share between threads."""

    def __init__(self, name: str, torch_device: torch.device, weights: Weights) -> None:
        self.name, self.torch_device = name, torch_device
        self._weights = weights
        self._storages = Storages(partial(new_storage, torch_device), weights)
        self._buffers: dict[int, LocalBuffer] = {}
        self._promised = 0  # bytes of buffers and scratch memory that take memory when they are touched
        self._staging = Staging(torch_device) if torch_device.type == "cuda" else None
        self._lock = RLock()

    @property
    def alignment(self) -> int:
        return ALIGNMENT

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

    def _promise(self, holder: object, size: int) -> None:
        """Count ``size`` bytes of scratch memory for as long as their ``holder`` lives."""
        if size:
            with self._lock:
                self._promised += size
            weakref.finalize(holder, self._take_back, size)

    def _take_back(self, size: int) -> None:
        with self._lock:
            self._promised -= size

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

    def look(self, buffer: Buffer, offset: int, size: int, see: Callable[[Bytes], T]) -> T:
        if self._staging is None or not size:
            return super().look(buffer, offset, size, see)
        with translated(self.name, "reading"), self._staging.lent(size) as slot:
            if slot is None:
                return super().look(buffer, offset, size, see)
            with self._reading(buffer, offset, size) as part:
                self._staging.read_to(slot, part)
            slot.free.synchronize()
            return see(slot.memory.numpy().data[:size])

    def read_later(self, buffer: Buffer, offset: int, size: int) -> Later:
        soon = self.read_soon(buffer, offset, size)
        return super().read_later(buffer, offset, size) if soon is None else soon

    def copy_to(self, source: Span, target: Span) -> bool:
        """Between two of one kind. GPUs queue it, each behind what it has to do."""
        _, buffer, offset, size = source
        other, there, at, _ = target
        if not isinstance(other, LocalMemory) or other.torch_device.type != self.torch_device.type:
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

    @contextmanager
    def receiving(self, buffer: Buffer, places: Sequence[tuple[int, int]], ahead: bool = False) -> Iterator[Receive]:
        with ExitStack() as stack:
            receive = stack.enter_context(super().receiving(buffer, places))
            with self._writing_to(buffer, places) as storage:
                storage.claims += 1
            stack.callback(self._received, storage)
            if storage.host is not None:
                receive = partial(_receive_in_place, storage.host)
                for offset, size in places if ahead else ():
                    stack.enter_context(made_ready(storage.host[offset : offset + size]))
            elif self._staging is not None:
                receive = partial(self._receive, self._staging, storage, receive)
            yield receive

    @staticmethod
    def _received(storage: Storage) -> None:
        with storage.forms.lock:
            storage.claims -= 1

    def _receive(
        self,
        staging: Staging,
        storage: Storage,
        usual: Receive,
        places: Sequence[tuple[int, int]],
        fill: Callable[[memoryview], None],
    ) -> None:
        """Receive through pinned memory, or else in the ``usual`` way. The storage's lock is not needed, which many
        threads would wait for."""
        with translated(self.name, "writing"), staging.filled(sum(size for _, size in places), fill) as memory:
            if memory is None:
                usual(places, fill)
                return
            at = 0
            for offset, size in places:
                storage.data[offset : offset + size].copy_(memory[at : at + size], non_blocking=True)
                at += size

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

    def _writing(
        self, buffer: Buffer, offset: int, size: int, doing: str = "writing", all_of_it: bool = True
    ) -> AbstractContextManager[Storage]:
        """Within the context ``size`` bytes, or some of them, are written, to the storage that it gives: what was made
        of them is forgotten, and nobody reads them or makes anything of them meanwhile."""
        return self._writing_to(buffer, [(offset, size)], doing, all_of_it)

    @contextmanager
    def _writing_to(
        self, buffer: Buffer, places: Sequence[tuple[int, int]], doing: str = "writing", all_of_it: bool = True
    ) -> Iterator[Storage]:
        """The same of several ``places`` (offset, size)."""
        mine = self._range(buffer, 0, 0)
        for place in places:
            self._range(buffer, *place)
        with translated(self.name, doing), held(mine), self._storages.own(mine) as storage:
            for offset, size in places:
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


def _receive_in_place(host: memoryview, places: Sequence[tuple[int, int]], fill: Callable[[memoryview], None]) -> None:
    """Into memory that the CPU and the device have together."""
    for offset, size in places:
        fill(host[offset : offset + size])


def _as_tensor(data: memoryview) -> torch.Tensor:
    """``data``, which is not written to, as bytes of torch's."""
    return torch.frombuffer(data if not data.readonly else bytearray(data), dtype=torch.uint8)


def _row_view(part: torch.Tensor, rows: Rows) -> torch.Tensor:
    """``rows`` of the bytes from their first on."""
    return part.as_strided((rows.copies, rows.size), (rows.stride, 1), part.storage_offset())
