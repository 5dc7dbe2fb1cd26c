"""Files mapped into memory, and what a file is that holds no model."""

from __future__ import annotations

import mmap
import os
import re
import time
from math import prod
from pathlib import Path
from typing import NamedTuple

from ..errors import CheckpointError
from ..ggml.types import TYPES
from ..ggml.weight import Origin, View, Weight

YOUNG = 2_000_000_000
"""Nanoseconds after a change in which a file system may give another change the same time."""

SHOWN = 24
"""Bytes of a file's beginning that an error shows."""


class Mapped(NamedTuple):
    """A file's bytes, and a name for the state that it is in; "" when it is too young to tell the next change by its
    times."""

    path: Path
    data: memoryview
    state: str

    def weight(self, name: str, type_name: str, shape: tuple[int, ...], begin: int, end: int) -> Weight:
        """Bytes ``begin`` to ``end`` as a tensor. Raises :class:`CheckpointError` where they are not as many as the
        shape needs."""
        kind = TYPES[type_name]
        if shape and shape[-1] % kind.block:
            reason = f"rows of {shape[-1]} are no whole number of {kind}'s blocks of {kind.block}"
            raise CheckpointError(self.path, reason, name)
        expected = kind.row_bytes(prod(shape))
        if end - begin != expected or end > len(self.data):
            reason = (
                f"{kind} {list(shape)} is {expected} bytes, the file has {max(min(end, len(self.data)) - begin, 0)}"
            )
            raise CheckpointError(self.path, reason, name)
        return Weight(name, kind, shape, View(self.data[begin:end]), self.origin(begin, end), self.path)

    def origin(self, begin: int, end: int) -> Origin | None:
        return Origin(self.state, f"{begin}-{end}") if self.state else None


def mapped(path: Path) -> Mapped:
    """Raises :class:`CheckpointError` for an empty file, and :class:`OSError`."""
    with path.open("rb") as file:
        facts = os.fstat(file.fileno())
        if not facts.st_size:
            raise CheckpointError(path, "is empty")
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    changed = max(facts.st_mtime_ns, facts.st_ctime_ns)
    state = [path.resolve(), facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]
    return Mapped(path, data, "" if time.time_ns() - changed < YOUNG else " ".join(map(str, state)))


def no_model(data: memoryview) -> str:
    """What a file without any known form seems to be, as the reason of an error."""
    head = bytes(data[:1024])
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        size = re.search(rb"\nsize (\d{1,15})\s", head)
        amount = f" of {int(size[1]) / 1e9:,.1f} GB" if size else ""
        return f"is a Git LFS pointer to a file{amount}, not that file; fetch it with: git lfs pull"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return f"is a web page, not a model: the download gave {_shown(head)}; download it again, logged in if need be"
    if text.startswith((b"{", b"[")):
        return f"is JSON text, not a model: {_shown(head, 120)}"
    if not any(head):
        return "begins with zeros: the download is not finished"
    return f"is neither safetensors nor GGUF nor a torch checkpoint: it begins with {_shown(head)}"


def _shown(head: bytes, size: int = SHOWN) -> str:
    """The beginning of a file, safe to print."""
    return ascii(head[:size].decode("latin-1"))
