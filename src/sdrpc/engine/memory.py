"""The memory of a device: buffers of bytes, and typed views of them."""

from __future__ import annotations

import itertools
import mmap
import weakref
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from sdrpc.errors import GraphError

from .dtypes import DTYPES, shape_of
from .forms import ALIGNMENT, MAPPED, Forms
from .marks import Marks
from .pages import Pages, pages
from .values import Place

HUGE = 1 << 22
"""From this size on memory is asked for in huge pages: touching gigabytes page by page takes seconds."""


@dataclass(eq=False)
class Storage:
    """Bytes of a device: ``data`` is one tensor of uint8. ``host`` is the same memory where the CPU can touch it,
    ``pages`` where others can have parts of it as well. ``forms`` knows what lies in it otherwise than it came.
    ``users`` are the buffers that have these bytes (:mod:`sdrpc.engine.sharing`), one while there are ``claims``: data
    that comes without the lock of ``forms``. It is ``freed`` when there are no users any more, and then lives as long
    as programs that use it."""

    data: Tensor
    host: memoryview | None = None
    pages: Pages | None = None
    forms: Forms = field(default_factory=Forms)
    users: set[LocalBuffer] = field(default_factory=set, repr=False)
    claims: int = 0
    freed: bool = False
    key: int = field(default_factory=partial(next, itertools.count(1)))

    def may_change(self, start: int, end: int) -> bool:
        """Whether bytes ``[start, end)`` may be changed where they lie: nobody else has these pages."""
        return self.pages is None or not self.pages.is_private(start, end)


@dataclass(eq=False)
class LocalBuffer:
    """A client's range of bytes, which are in ``storage`` at the time. ``marks`` tell what was written to it. ``twin``:
    another buffer that may hold the same bytes."""

    key: int
    size: int
    storage: Storage
    marks: Marks = field(default_factory=Marks)
    twin: weakref.ref[LocalBuffer] | None = None


def new_storage(device: torch.device, size: int) -> Storage:
    """Zeroed memory of ``device``."""
    if device.type == "cpu":
        return host_storage(size)
    return Storage(torch.zeros(size, dtype=torch.uint8, device=device))


def host_storage(size: int) -> Storage:
    """Zeroed memory of the CPU that nobody used before; a large one costs nothing until it is touched."""
    if size < MAPPED:
        return Storage(*_from_heap(size))
    shared = pages(size) if size >= HUGE else None
    mapped = None if shared is None else shared.map()
    if mapped is None:
        shared, mapped = None, mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE") and size >= HUGE:
        mapped.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(mapped, dtype=torch.uint8, count=size)
    return Storage(data, memoryview(mapped)[:size], shared)


def _from_heap(size: int) -> tuple[Tensor, memoryview]:
    memory = bytearray(size + ALIGNMENT)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % ALIGNMENT
    return whole[start : start + size], memoryview(memory)[start : start + size]


def typed(data: Tensor, place: Place) -> Tensor:
    """The tensor at ``place`` of the memory ``data``, no copy. Blocks come as [n3, n2, n1, bytes of a row] of uint8.

    Raises :class:`GraphError` where torch can't address it (offset or strides that are no whole elements).
    """
    dtype = DTYPES.get(place.type)
    if dtype is None:
        shape = (place.ne[3], place.ne[2], place.ne[1], place.type.row_bytes(place.ne[0]))
        return data.as_strided(shape, (place.nb[3], place.nb[2], place.nb[1], 1), data.storage_offset() + place.offset)
    size = dtype.itemsize
    if place.offset % size or any(b % size for b, n in zip(place.nb, place.ne, strict=True) if n > 1):
        raise GraphError(
            f"offset {place.offset} or strides {list(place.nb)} are no multiple of {place.type}'s {size} bytes"
        )
    elements = data[place.offset : place.end].view(dtype)
    strides = tuple(b // size for b in shape_of(place.nb))
    return elements.as_strided(shape_of(place.ne), strides, elements.storage_offset())
