"""Weights that lie in their buffer as they are computed with, so that there is no second copy of them.

A program wants kernels of convolutions with their channels together, or on a CPU bfloat16 for float16. Both take as
many bytes as what came, so these can be changed where they lie, if they can be changed back: of what rounding to
bfloat16 loses, four bits a number are kept beside. Who reads the bytes gets them as they came; who writes to some of
them finds the others as they came. A program that wants them otherwise has them changed back, and then they stay so.

All of that happens behind one lock for each storage, in which whatever is done to its bytes is also queued: on a GPU,
which does it later, the order is that of its one stream, and so that of the lock. Nobody waits for the GPU.
"""

from __future__ import annotations

import mmap
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from threading import Condition
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdrpc.ggml.tensor import contiguous_strides

from .dtypes import DTYPES, shape_of
from .intervals import Intervals

if TYPE_CHECKING:
    from .memory import Storage
    from .weights import CachedWeight, Source

ALIGNMENT = 64
"""Of buffers, and of weights that are computed with where they lie: vector units, and compiled code, want a multiple of
it."""
PIECE = 1 << 18
"""Numbers that are changed at a time: what lies between stays in a processor's cache."""
MAPPED = 1 << 18
"""Bytes from which on memory is a mapping of its own. A process may have 65,530 (vm.max_map_count), so less comes from
the heap."""
LEAST = 1 << 12
"""Bytes below which a weight is not worth the bookkeeping."""
MOST = 1 << 14
"""Weights of a buffer that were wanted otherwise, after which no more of it are changed."""
MAGNITUDE, INFINITE = 0x7FFF, 0x7C00
"""Bits of a float16: all but the sign, and what they are of infinity."""
LOW = 0xF
"""The bits of a float16 that are kept of it when it becomes a bfloat16, which is at most four away from it (counted in
float16's own steps): they say which of the numbers around the bfloat16 it was."""


def fits(source: Source) -> bool:
    """Whether the weight that is made of ``source`` can lie where that is, and is large enough for it to pay."""
    dtype, (wanted, together, packed) = DTYPES.get(source.type), source.format
    if dtype is None or packed or source.nb != contiguous_strides(source.type, source.ne):
        return False
    if source.start % ALIGNMENT or source.end - source.start < LEAST:
        return False
    return (dtype is wanted and together) or _loses(source)


def rest_bytes(source: Source) -> int:
    """What has to be kept beside it."""
    return prod(source.ne) // 2 if _loses(source) else 0


def _loses(source: Source) -> bool:
    """Whether it is rounded."""
    types = DTYPES.get(source.type), source.format.dtype
    return types == (torch.float16, torch.bfloat16) and prod(source.ne) % 2 == 0


def changed(data: Tensor, source: Source) -> tuple[Tensor, Tensor | None] | None:
    """Change ``data``, the bytes of ``source``, to its format where they lie: the weight, which is a view of them, and
    what else it takes to change them back. None for numbers that could not be changed back (NaN). Nothing is changed
    where an accelerator has no memory to do it."""
    dtype, (wanted, together, _) = DTYPES[source.type], source.format
    shape, numbers, target, rest = shape_of(source.ne), data.view(dtype), data.view(wanted), None
    if _loses(source):
        if any(int((piece & MAGNITUDE).max()) > INFINITE for piece in torch.split(data.view(torch.int16), PIECE)):
            return None
        rest = _lasting(len(numbers) // 2, data.device)
    step = _step(source, data.device)
    for at in range(0, len(numbers), step):
        piece = numbers[at : at + step]
        if rest is not None:
            pairs = piece.view(torch.int32)
            rest[at // 2 : (at + step) // 2] = (pairs & LOW) | ((pairs >> 12) & (LOW << 4))
            piece = piece.float()  # torch has no vector code for the way without
        if together:
            images = piece.view(-1, *shape[1:]).to(wanted, memory_format=torch.channels_last)
            piece = images.permute(0, 2, 3, 1).reshape(-1)
        target[at : at + step].copy_(piece)
    return target.as_strided(shape, _strides(shape, together), target.storage_offset()), rest


def changed_back(data: Tensor, source: Source, rest: Tensor | None) -> Tensor:
    """The bytes of ``source`` as they were, of what :func:`changed` has made of them: a copy."""
    numbers = data.view(source.format.dtype)
    if source.format.channels_last:
        shape = shape_of(source.ne)
        numbers = numbers.as_strided(shape, _strides(shape)).contiguous().view(-1)
    if rest is None:
        return numbers.view(torch.uint8)
    result = torch.empty(len(numbers), dtype=torch.float16, device=data.device)
    for at in range(0, len(numbers), PIECE):
        near = numbers[at : at + PIECE].float().half().view(torch.int16)
        pairs = rest[at // 2 : (at + PIECE) // 2].to(torch.int32)
        low = ((pairs & LOW) | ((pairs >> 4) << 16)).view(torch.int16)
        result[at : at + PIECE].view(torch.int16).copy_(near + ((low - near + 8) & LOW) - 8)
    return result.view(torch.uint8)


def _lasting(size: int, device: torch.device) -> Tensor:
    """Memory of ``size`` bytes that will be used for long. The CPU's is not the heap's, where it would lie between what
    a run takes and gives back: gaps as large as the largest weights would stay."""
    if device.type != "cpu" or size < MAPPED or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(size, dtype=torch.uint8, device=device)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size)


def _step(source: Source, device: torch.device) -> int:
    """Numbers that are changed at a time, so many outputs of a kernel: each has the same bytes in both orders. On a CPU
    few: gaps as large as the largest weights would stay in its heap. An accelerator may lack memory for a piece when
    others are changed already, so there it is all of them."""
    if device.type != "cpu":
        return prod(source.ne)
    output = prod(source.ne[:3]) if source.format.channels_last else 1
    pair = output * (1 + output % 2)  # float16 are looked at two by two
    return pair * max(PIECE // pair, 1)


def _strides(shape: tuple[int, int, int, int], together: bool = True) -> tuple[int, int, int, int]:
    """Of a tensor whose channels lie ``together``, or of a dense one."""
    _, channels, height, width = shape
    if together:
        return channels * height * width, 1, width * channels, channels
    return channels * height * width, height * width, width, 1


@dataclass(eq=False)
class Laid:
    """A weight that lies in a buffer as it is computed with. ``kept``: what programs have of it, without a tensor when
    it was changed back. ``rest``: what that takes; ``give_back`` is called when it is of no use any more."""

    source: Source
    kept: CachedWeight
    rest: Tensor | None
    give_back: Callable[[], None]


class Forms:
    """Which weights of one storage lie in it in another form than they came in. For any thread; the storage's ``data``
    is given along."""

    def __init__(self) -> None:
        self.version = 0
        """Changes with them."""
        self._starts: list[int] = []
        self._laid: list[Laid] = []
        self._stay: set[Source] = set()
        self._runs = self._waiting = 0
        self._freed = False
        self.lock = Condition()
        """Whoever has it is the only one to read the bytes or to write to them."""

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """A run uses the storage."""
        with self.lock:
            self.lock.wait_for(lambda: not self._waiting)
            self._runs += 1
        try:
            yield
        finally:
            with self.lock:
                self._runs -= 1
                self.lock.notify_all()

    def find(self, source: Source) -> CachedWeight | None:
        """The weight that is made of ``source``, if it lies there."""
        with self.lock:
            laid = self._at(source)
            return None if laid is None else laid.kept

    def may_lie(self, storage: Storage, source: Source) -> bool:
        """Whether nobody has wanted ``source``, which is in ``storage``, otherwise or has the same pages."""
        if source in self._stay or len(self._stay) >= MOST:
            return False
        if storage.may_change(source.start, source.end):
            return True
        self._stay.add(source)
        return False

    def typed(self, data: Tensor, source: Source, raw: Tensor) -> Tensor:
        """``raw``, the typed view of ``source``; a copy as it came if it lies there otherwise."""
        with self.lock:
            laid = self._at(source)
            if laid is None:
                return raw
            bytes_ = changed_back(data[source.start : source.end], source, laid.rest)
        return bytes_.view(raw.dtype).view(raw.shape)

    def lay(
        self,
        storage: Storage,
        source: Source,
        keep: Callable[[Tensor], CachedWeight],
        give_back: Callable[[], None],
    ) -> CachedWeight | None:
        """Change what ``source`` is made of where it lies; ``keep`` makes of the weight what programs have of it. None
        where that can't be."""
        with self.lock:
            made = None
            if self._freed:
                return None
            if self.may_lie(storage, source) and not self._overlapping(source.start, source.end):
                made = changed(storage.data[source.start : source.end], source)
            if made is None:
                self._stay.add(source)
                return None
            i = bisect_left(self._starts, source.start)
            self._starts.insert(i, source.start)
            self._laid.insert(i, Laid(source, keep(made[0]), made[1], give_back))
            self.version += 1
            return self._laid[i].kept

    def read(self, data: Tensor, start: int, end: int) -> Tensor:
        """Bytes ``[start, end)`` as they came: the buffer's own where they lie so, else a copy. To be called with the
        lock, which is kept until they are used."""
        laid = self._overlapping(start, end)
        if not laid:
            return data[start:end]
        result = data[start:end].clone()
        for each in laid:
            source = each.source
            first, last = max(start, source.start), min(end, source.end)
            bytes_ = changed_back(data[source.start : source.end], source, each.rest)
            result[first - start : last - start] = bytes_[first - source.start : last - source.start]
        return result

    def give_way(self, data: Tensor, start: int, end: int, all_of_it: bool = True) -> None:
        """Bytes ``[start, end)``, or with ``all_of_it`` false some of them, are about to be written, or queued to be.
        To be called with the lock, which is kept until that is done: nobody sees what is there meanwhile, and what else
        is queued comes before or behind."""
        for each in self._overlapping(start, end):
            covered = all_of_it and start <= each.source.start and each.source.end <= end
            self._remove(data, each, back=not covered)
            each.kept.written = True
        if all_of_it and self._stay:
            self._stay = {each for each in self._stay if each.start < start or end < each.end}

    @contextmanager
    def as_they_came(self, data: Tensor, start: int, end: int) -> Iterator[None]:
        """Within the context bytes ``[start, end)`` lie as they came. It begins when nobody computes with them if they
        lie otherwise; then all of the buffer is changed back, since who wants some of a model wants the rest, too, and
        would wait for a run each time."""
        with self.lock:
            self._waiting += 1
            try:
                self.lock.wait_for(lambda: not (self._runs and self._overlapping(start, end)))
                if self._overlapping(start, end):
                    self._change_back(data, list(self._laid))
                yield
            finally:
                self._waiting -= 1
                self.lock.notify_all()

    def suit(self, data: Tensor, sources: Collection[Source], touched: Intervals) -> None:
        """A program is about to run that uses ``sources`` where they lie, and of the rest what is ``touched`` as it
        came."""
        with self.lock:
            wrong = [
                each
                for each in self._laid
                if each.source not in sources and touched.touches(each.source.start, each.source.end)
            ]
            self._change_back(data, wrong)

    def free(self) -> None:
        """Nobody has the storage any more; programs that use it may run on. No more is changed: nobody would give back
        what that takes."""
        with self.lock:
            self._freed = True
            for each in self._laid:
                each.give_back()
                each.give_back = _nothing

    def _change_back(self, data: Tensor, laid: list[Laid]) -> None:
        for each in laid:
            self._stay.add(each.source)
            self._remove(data, each, back=True)

    def _remove(self, data: Tensor, laid: Laid, back: bool) -> None:
        source = laid.source
        if back:
            data[source.start : source.end] = changed_back(data[source.start : source.end], source, laid.rest)
        i = bisect_left(self._starts, source.start)
        del self._starts[i], self._laid[i]
        laid.kept.tensor = None
        laid.give_back()
        self.version += 1

    def _at(self, source: Source) -> Laid | None:
        i = bisect_left(self._starts, source.start)
        return self._laid[i] if i < len(self._laid) and self._laid[i].source == source else None

    def _overlapping(self, start: int, end: int) -> list[Laid]:
        if not self._laid or start >= end:
            return []
        first = max(bisect_right(self._starts, start) - 1, 0)
        if self._laid[first].source.end <= start:
            first += 1
        return self._laid[first : bisect_left(self._starts, end)]


@contextmanager
def in_use(storages: Collection[Storage]) -> Iterator[None]:
    """A run uses ``storages``."""
    with ExitStack() as stack:
        for storage in storages:
            stack.enter_context(storage.forms.in_use())
        yield


def _nothing() -> None:
    pass
