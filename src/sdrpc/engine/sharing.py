"""Buffers that hold the same bytes in one storage, until one of them is written to.

Where the CPU can touch memory, buffers share pages of it (:mod:`sdrpc.engine.pages`). On a GPU whole buffers share.
When some of a buffer's bytes were copied from the same places of another one, all of both are compared before the next
run, on the device. If they are the same, the buffer's own storage is given back and its programs are bound to the other
one, with the weights that lie there in another form. Who is about to write, a message or a program, gets a copy of its
own before, as the bytes came, and its programs are bound to that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from .memory import LocalBuffer, Storage

LEAST = 1 << 20
"""Bytes below which sharing is not worth binding programs anew."""
PIECE = 64 << 20
"""Bytes that are compared or copied at a time: as many more may be needed for what does not lie as it came."""


@contextmanager
def held(*buffers: LocalBuffer) -> Iterator[None]:
    """Nobody else reads ``buffers`` or writes to them, nor gives them another storage. Storages are taken in one order,
    so that two threads that copy to and fro don't wait for each other."""
    while True:
        storages = {buffer.storage for buffer in buffers}
        with ExitStack() as stack:
            for storage in sorted(storages, key=lambda each: each.key):
                stack.enter_context(storage.forms.held())
            if storages == {buffer.storage for buffer in buffers}:
                yield
                return


def may_share(one: LocalBuffer, other: LocalBuffer) -> bool:
    """Whether they could have one storage, if they hold the same."""
    there = one.storage.host is None and other.storage.host is None
    return there and one.size == other.size >= LEAST and one.storage is not other.storage


def is_shared(buffer: LocalBuffer) -> bool:
    """Whether others have its storage, too."""
    return not buffer.storage.users <= {buffer}


def same(one: Storage, other: Storage) -> bool:
    """Whether two storages of one size hold the same, as it came. Both are held."""
    for at, end in _pieces(len(one.data)):
        with one.forms.reading(one.data, at, end) as a, other.forms.reading(other.data, at, end) as b:
            if not torch.equal(a, b):
                return False
    return True


def copy(source: Storage, target: Storage) -> None:
    """Let ``target``, of the same size, hold what ``source`` holds, as it came. ``source`` is held."""
    for at, end in _pieces(len(source.data)):
        with source.forms.reading(source.data, at, end) as part:
            target.data[at:end].copy_(part)


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    for at in range(0, size, PIECE):
        yield at, min(at + PIECE, size)
