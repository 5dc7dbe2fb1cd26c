"""Memory of the CPU that several buffers can have together: one copy of the weights that two clients use.

A large buffer is a mapping of a file that exists in memory only. Bytes of it can be frozen: where they are mapped, they
are mapped anew as pages that are copied when somebody writes to them (``MAP_PRIVATE``), so that the file's own can't
change any more, whoever writes what. Another buffer that is to have the same bytes maps the same pages in the same way.
What of the file nobody maps any more is given back, range by range. Linux only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Sequence
from functools import cache
from threading import RLock
from typing import Any

from sdrpc.device import Bytes

PAGE = mmap.PAGESIZE
LEAST = 1 << 16
"""Bytes of whole pages below which freezing them is not worth a mapping."""
MAPPINGS = 1 << 13
"""Ranges that are mapped for their own at one time: each splits mappings in up to three, of which a process may have
65,530 (vm.max_map_count)."""
_MAP_NORESERVE = 0x4000
_MAY_MOVE_TO_FIXED = 3
_FAILED = ctypes.c_void_p(-1).value
_KEEP_SIZE_AND_PUNCH_HOLE = 3
_READ_WRITE = 3


@cache
def _libc() -> Any:
    """What Python's own modules don't have; None where it can't be used."""
    if sys.platform != "linux" or sys.maxsize < 1 << 32 or not hasattr(os, "memfd_create"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mremap.restype = ctypes.c_void_p
    libc.mremap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 2, ctypes.c_int, ctypes.c_void_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    return libc


@cache
def _most_files() -> int:
    """Files that may be there at one time: half of the descriptors are for clients, and each file takes two."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (1 << 16 if soft == resource.RLIM_INFINITY else soft) // 4


class Counter:
    """What there is at one time, up to a limit. For any thread."""

    def __init__(self) -> None:
        self.count, self._lock = 0, RLock()  # a finalizer may come in the middle

    def take(self, most: int) -> bool:
        """Whether there is room for one more, which is counted then."""
        with self._lock:
            if self.count >= most:
                return False
            self.count += 1
            return True

    def give_back(self, count: int = 1) -> None:
        with self._lock:
            self.count -= count


_files, _mappings = Counter(), Counter()


class Pages:
    """``size`` bytes of zeroes, in a file without a name. ``memory`` maps them, and is handed out once: what keeps it
    keeps the mapping."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor, self._size = descriptor, size
        self._lock = RLock()  # a finalizer may come in the middle
        self._base = 0
        self._memory: weakref.ref[mmap.mmap] | None = None
        self._mapped: list[tuple[int, int]] = []
        self._frozen: set[tuple[int, int]] = set()
        self._abandoned = False
        _at_end(self, _close, descriptor)

    def map(self) -> mmap.mmap | None:
        """The memory. When it is gone, pages that were not frozen are given back. None where the system refuses: Python
        keeps a descriptor of its own for it, and there may be no more."""
        try:
            memory = mmap.mmap(self._descriptor, self._size)
        except OSError:
            return None
        view = ctypes.c_char.from_buffer(memory)
        self._base = ctypes.addressof(view)
        del view
        self._memory = weakref.ref(memory)
        _at_end(memory, self._abandon)
        return memory

    def freeze(self, host: memoryview, offset: int, size: int) -> Frozen | None:
        """The ``size`` bytes from ``offset`` on as they are now, for good; ``host`` is the memory. None where that
        can't be, or was done with some of them before."""
        first, last = -(-offset // PAGE) * PAGE, (offset + size) // PAGE * PAGE
        with self._lock:
            if not self._map_private(self._descriptor, first, first, last - first):
                return None
            self._frozen.add((first, last))
            frozen = Frozen(self, offset, size, first, last)
        _at_end(frozen, self._release, first, last)
        frozen.head, frozen.tail = bytes(host[offset:first]), bytes(host[last : offset + size])
        self._keep(frozen)
        return frozen

    def take(self, host: memoryview, offset: int, frozen: Frozen) -> bool:
        """Let the bytes from ``offset`` on be those of ``frozen``; whether that is possible."""
        first = offset + len(frozen.head)
        length = frozen.last - frozen.first
        with self._lock:
            if not self._map_private(frozen.pages._descriptor, frozen.first, first, length):
                return False
            self._punch(first, first + length)
        self._keep(frozen)
        host[offset:first] = frozen.head
        host[first + length : offset + frozen.size] = frozen.tail
        return True

    def is_private(self, start: int, end: int) -> bool:
        """Whether some of bytes ``[start, end)`` were frozen, or taken from elsewhere: to write there takes memory."""
        with self._lock:
            return any(start < last and first < end for first, last in self._mapped)

    def read(self, at: int, size: int) -> bytes:
        """Bytes of the file."""
        return os.pread(self._descriptor, size, at)

    def _map_private(self, descriptor: int, at: int, offset: int, length: int) -> bool:
        """Map the file ``descriptor`` from ``at`` on at ``offset`` of the memory, as pages that are copied when they
        are written to: at once, for whoever uses them meanwhile."""
        end = offset + length
        if offset % PAGE or length < LEAST or any(offset < last and first < end for first, last in self._mapped):
            return False
        if not _mappings.take(MAPPINGS):
            return False
        if not _mapped_at(self._base + offset, length, descriptor, at):
            _mappings.give_back()
            return False
        self._mapped.append((offset, end))
        return True

    def _keep(self, frozen: Frozen) -> None:
        """``frozen`` lives as long as the memory, which has its pages."""
        memory = None if self._memory is None else self._memory()
        assert memory is not None  # noqa: S101
        _at_end(memory, _nothing, frozen)

    def _abandon(self) -> None:
        """Nobody has the memory any more: what was not frozen is of no use."""
        with self._lock:
            self._abandoned = True
            start = 0
            for first, last in sorted(self._frozen):
                self._punch(start, first)
                start = last
            self._punch(start, self._size)
            _mappings.give_back(len(self._mapped))

    def _release(self, first: int, last: int) -> None:
        with self._lock:
            self._frozen.discard((first, last))
            if self._abandoned:
                self._punch(first, last)

    def _punch(self, first: int, last: int) -> None:
        """Give the file's pages back, which read as zeroes then."""
        if first < last:
            _libc().fallocate(self._descriptor, _KEEP_SIZE_AND_PUNCH_HOLE, first, last - first)


class Frozen:
    """``size`` bytes that nobody can change: ``head``, whole pages ``first`` to ``last`` of a file, and ``tail``."""

    head = tail = b""

    def __init__(self, pages: Pages, offset: int, size: int, first: int, last: int) -> None:
        self.pages, self.size = pages, size
        self.first, self.last = first, last
        self._offset = offset

    def read(self, at: int, size: int) -> Sequence[Bytes]:
        """``size`` of the bytes, from ``at`` on, in up to three parts."""
        start, end = self._offset + at, self._offset + at + size
        head = self.head[at : at + size]
        inside = self.pages.read(max(start, self.first), max(min(end, self.last) - max(start, self.first), 0))
        behind = self.tail[max(start - self.last, 0) : max(end - self.last, 0)]
        return head, inside, behind


def pages(size: int) -> Pages | None:
    """New memory of ``size`` bytes; None where the system has no such thing, or no more of it."""
    if _libc() is None or not _files.take(_most_files()):
        return None
    try:
        descriptor = os.memfd_create("sdrpc")
    except OSError:
        _files.give_back()
        return None
    made = Pages(descriptor, size)
    try:
        os.ftruncate(descriptor, size)
    except OSError:
        return None
    return made


def _mapped_at(target: int, length: int, descriptor: int, at: int) -> bool:
    """Whether ``target`` now maps that part of a file, privately. It is mapped elsewhere first: where the system
    refuses that, what is at ``target`` stays."""
    libc = _libc()
    flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
    made = libc.mmap(None, length, _READ_WRITE, flags, descriptor, at)
    if made == _FAILED:
        return False
    if libc.mremap(made, length, length, _MAY_MOVE_TO_FIXED, target) == _FAILED:
        libc.munmap(made, length)
        return False
    return True


def _close(descriptor: int) -> None:
    os.close(descriptor)
    _files.give_back()


def _nothing(_: object) -> None:
    pass


def _at_end(of: object, action: Any, *arguments: object) -> None:
    """Call ``action`` when ``of`` is gone, unless the process ends before."""
    weakref.finalize(of, action, *arguments).atexit = False
