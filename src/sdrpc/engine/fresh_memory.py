"""Memory that nobody touched before, made ready in a thread of its own.

The system gives a process its pages one by one, zeroed, when they are first touched. For what comes through TLS that is
a third of the time of a thread that has all the rest to do, so another one goes ahead of it.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

LEAST, MOST = 1 << 22, 1 << 26
"""Bytes for which a thread is worthwhile, and that are more than our clients send at once: who only says that many are
on their way should not make us work."""
_PART = 1 << 22
"""Bytes at a time: other threads that ask for memory wait as long."""
_POPULATE_WRITE = 23
"""Linux's MADV_POPULATE_WRITE (mman.h, since 5.14): as if each page was written to, and what is there stays."""


@contextmanager
def made_ready(memory: memoryview) -> Iterator[None]:
    """Meanwhile, the pages of ``memory`` come. Where the system can't do that they come when they are touched."""
    madvise = _madvise()
    if madvise is None or not LEAST <= len(memory) <= MOST:
        yield
        return
    thread = threading.Thread(target=_populate, args=(madvise, memory), name="sdrpc fresh memory", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the system has no room for another thread
        yield
        return
    try:
        yield
    finally:
        thread.join()


def _populate(madvise: Callable[[int, int, int], int], memory: memoryview) -> None:
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    first, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + len(memory)) // mmap.PAGESIZE * mmap.PAGESIZE
    for address in range(first, end, _PART):
        if madvise(address, min(_PART, end - address), _POPULATE_WRITE):
            return  # an older kernel


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The system's madvise; called without the GIL."""
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
