"""Files mapped into memory, and what a file is that holds no model."""

from __future__ import annotations

import mmap
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
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

SHOWN_TEXT = 160
"""The same of a file that is text: what a server said in the place of the file, perhaps."""

UNFINISHED = (".crdownload", ".part", ".partial", ".opdownload", ".download", ".incomplete", ".aria2")
"""What browsers and other programs call a file while they download it. It may have its size already."""

PACKED = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "7-Zip", b"Rar!\x1a\x07": "RAR",
}  # fmt: skip
"""What the files of programs that pack others begin with."""

OTHERS = {
    b"\x89PNG": "a picture (PNG)", b"\xff\xd8\xff": "a picture (JPEG)", b"GIF8": "a picture (GIF)",
    b"RIFF": "a picture or a sound (RIFF)", b"%PDF": "a document (PDF)", b"MZ": "a program (EXE)",
    b"\x7fELF": "a program (ELF)", b"\x89HDF\r\n\x1a\n": "of Keras (HDF5; convert it to safetensors)",
}  # fmt: skip
"""What other files begin with that are taken for models, such as the preview beside one."""

_TAR = slice(257, 262), b"ustar"

TAIL = 1 << 20
"""Bytes at the end of a model that are hardly ever all zeros."""

HEAD = 1024
"""Bytes of a file that tell what it is."""


@dataclass(frozen=True, slots=True)
class Section(View):
    """Bytes of a mapped file, up to its byte ``end``.

    Who reads what a file has lost since it was mapped is ended by the system. So they are not given once the file has
    become shorter, as it does when another one is copied over it; :class:`CheckpointError` is raised in their place.
    """

    path: Path
    end: int

    def __call__(self, start: int = 0, stop: int | None = None, /) -> Iterator[memoryview]:
        if self.data.obj.size() < self.end:  # type: ignore[attr-defined]  # a mapping, whose file this asks
            raise CheckpointError(self.path, "has become shorter while it was in use; is it being written?")
        return View.__call__(self, start, stop)

    def part(self, start: int, stop: int) -> Section:
        data = self.data[start:stop]
        return Section(data, self.path, self.end - len(self.data) + start + len(data))


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
        pieces = Section(self.data[begin:end], self.path, end)
        return Weight(name, kind, shape, pieces, self.origin(begin, end), self.path)

    def origin(self, begin: int, end: int) -> Origin | None:
        return Origin(self.state, f"{begin}-{end}") if self.state else None


def mapped(path: Path) -> Mapped:
    """Raises :class:`CheckpointError` for what is no file, an empty one or one that is still downloaded, and
    :class:`OSError`."""
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
        raise CheckpointError(path, "is a pipe or a device; a model is read here and there, so it has to be a file")
    if path.name.lower().endswith(UNFINISHED):
        raise CheckpointError(path, "is a download that has not ended, as its name says; rename it if it has")
    with path.open("rb") as file:
        facts = os.fstat(file.fileno())
        if not facts.st_size:
            raise CheckpointError(path, "is empty")
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    changed = max(facts.st_mtime_ns, facts.st_ctime_ns)
    state = [path.resolve(), facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]
    return Mapped(path, data, "" if time.time_ns() - changed < YOUNG else " ".join(map(str, state)))


def ends_in_zeros(data: memoryview) -> bool:
    """Whether a file's last :data:`TAIL` bytes are zeros: some programs give a file its size before they fill it."""
    return len(data) > TAIL and bytes(data[-TAIL:]).count(0) == TAIL


def no_model(data: memoryview) -> str:
    """What a file without any known form seems to be, as the reason of an error."""
    head = bytes(data[:HEAD])
    if said := mistaken(head, "a model"):
        return said
    other = next((what for magic, what in OTHERS.items() if head.startswith(magic)), "")
    if other:
        return f"is {other}, not a model"
    shown = SHOWN_TEXT if head.isascii() and head.decode("ascii").replace("\n", "").isprintable() else SHOWN
    return f"is neither safetensors nor GGUF nor a torch checkpoint: it begins with {_shown(head, shown)}"


def mistaken(head: bytes, wanted: str) -> str:
    """What a file that begins with ``head`` seems to be where it is taken for ``wanted``, and what to do, as the reason
    of an error; "" where nobody knows."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        size = re.search(rb"\nsize (\d{1,15})\s", head)
        amount = f" of {int(size[1]) / 1e9:,.1f} GB" if size else ""
        return f"is a Git LFS pointer to a file{amount}, not that file; fetch it with: git lfs pull"
    if text.startswith(b"/annex/objects/"):
        return "is a git-annex pointer to a file, not that file; fetch it with: git annex get"
    if text.startswith((b"<!doctype", b"<!--", b"<html", b"<head", b"<body")):
        return f"is a web page, not {wanted}: the download gave {_shown(head)}; download it again, logged in if need be"
    if text.startswith(b"<?xml"):
        return f"is XML text, such as a server's refusal, not {wanted}: {_shown(head, SHOWN_TEXT)}"
    if text.startswith((b"{", b"[")):
        return f"is JSON text, not {wanted}: {_shown(head, SHOWN_TEXT)}"
    if head and not any(head):
        return "begins with zeros: the download is not finished"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "was written as UTF-16 text, as PowerShell's > does with what is downloaded: use -o or -OutFile"
    packed = next((name for magic, name in PACKED.items() if head.startswith(magic)), "")
    if packed or head[_TAR[0]] == _TAR[1]:
        return f"is an archive ({packed or 'tar'}), not {wanted}: unpack it first"
    return ""


def _shown(head: bytes, size: int = SHOWN) -> str:
    """The beginning of a file, safe to print."""
    return ascii(head[:size].decode("latin-1"))
