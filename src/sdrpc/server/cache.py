"""Tensors on disk, so that a client that comes again need not send them again.

A folder that is this user's alone. ``<digest>.blake3`` holds a tensor's bytes and nothing else, under the digest that
our own clients ask for (:mod:`sdrpc.content`); they are on disk once, and whoever has sent them finds them again: an
empty file ``<digest>-<owner>.owner`` says so. Others have to send them, too, so nobody learns by asking what a
neighbour draws with, nor gets it by knowing its digest. Native clients ask by FNV-1a 64, which anybody can aim at:
those names are ``<hash>-<size>-<owner>.fnv1a``, each a file with the digest that it stands for. A name that has stood
for two contents stands for none.

An owner is a key, wherever its client comes from, or the address of clients without one.

Files appear whole or not at all, and what is read is checked against its digest in the very memory that it was read to
(:mod:`sdrpc.server.client_cache`): one that was cut, extended or changed is a miss. Several servers may share the
folder: each throws out what was used longest ago when there is more than its budget.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path
from typing import BinaryIO

from .. import storage
from ..content import DIGEST_BYTES
from ..errors import UsageError

log = logging.getLogger(__name__)

FILES = 1 << 16
"""Tensors in the folder at most: looking through them must not take long."""
STEPS = 16
"""What part of the budget comes between two looks through the folder, which take a second where there are many files: a
full one gets so much room at a time."""
LEAST = 1 << 16
"""Bytes that a file counts for at least when it is decided whether it is time to look."""
STALE_SECONDS = 3600.0
"""After that long nobody is still writing a file: who began it has died."""

_TENSOR, _NAME, _OWNER = ".blake3", ".fnv1a", ".owner"
_FORMER = (".tensor", ".name")
"""Tensors under their SHA-256, and names for those: nobody asks for them any more, and a name that stood for one would
seem to stand for two contents when its tensor comes again."""


class Cache:
    """The tensors in ``folder``, ``budget`` bytes of them at most. One thread at a time may :meth:`commit`,
    :meth:`add_owner`, :meth:`add_alias` and :meth:`shrink`; the rest is for any.

    Raises :class:`UsageError` for a folder that others can write to, or that can't be made.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget = folder, budget
        self._room = 0
        self._complained = False
        try:
            storage.make_own(folder)
        except UsageError as error:
            raise UsageError(f"--cache: {error}") from None

    def open(self, digest: bytes, size: int) -> BinaryIO | None:
        """The bytes of ``digest``, if there is such a file of ``size`` bytes; they remain to be checked. A file of
        another size stays: it is replaced when its content comes again."""
        file = storage.open_own(self._path(digest))
        if file is not None and os.fstat(file.fileno()).st_size != size:  # or it is the question that is wrong
            file.close()
            return None
        return file

    def used(self, digest: bytes) -> None:
        """Note that it was worth keeping."""
        storage.mark_used(self._path(digest))

    def drop(self, digest: bytes) -> None:
        """Forget a file that is not what its name says."""
        log.warning("%s: damaged, and so thrown out; its client sends it again", self._path(digest))
        storage.remove(self._path(digest))

    def create(self) -> tuple[BinaryIO, Path]:
        """A new file, for :meth:`commit` when it is complete. Raises :class:`OSError`."""
        return storage.create(self.folder)

    def commit(self, part: Path, digest: bytes, size: int) -> None:
        """Let a complete file appear under its digest, in the place of any other. Raises :class:`OSError`."""
        storage.commit(part, self._path(digest))
        self._complained = False
        self._room -= max(size, LEAST)
        if self._room < 0:
            self.shrink()

    def owned(self, digest: bytes, owner: str) -> bool:
        """Whether ``owner`` has sent these bytes."""
        file = storage.open_own(self._owner_path(digest, owner))
        if file is not None:
            file.close()
        return file is not None

    def add_owner(self, digest: bytes, owner: str) -> None:
        """Note that ``owner`` has sent these bytes. Raises :class:`OSError`."""
        if not self.owned(digest, owner):
            file, part = self.create()
            file.close()
            storage.commit(part, self._owner_path(digest, owner))

    def lookup(self, name: int, size: int, owner: str) -> bytes | None:
        """The digest that ``owner``'s FNV-1a 64 ``name`` of ``size`` bytes stands for; None if unknown or ambiguous."""
        return _read_name(self._name_path(name, size, owner)) or None

    def add_alias(self, digest: bytes, name: int, size: int, owner: str) -> None:
        """Note that ``owner`` calls that content ``name``, too. Raises :class:`OSError`."""
        path = self._name_path(name, size, owner)
        known = _read_name(path)
        if known == digest or known == b"":
            return
        file, part = self.create()
        with file:
            file.write(digest.hex().encode() if known is None else b"")
        storage.commit(part, path)
        if known is not None:
            log.warning(
                "two tensors of %d bytes have the FNV-1a hash %016x: neither is found by it any more", size, name
            )

    def complain(self, error: OSError) -> None:
        """Say what the disk said, once until something can be kept again."""
        if not self._complained:
            self._complained = True
            log.warning("%s: weights are not kept: %s", self.folder, error.strerror or error)

    def shrink(self) -> None:
        """Throw out what was used longest ago beyond the budget, and what is of no use any more. Raises
        :class:`OSError`."""
        tensors = storage.shrink(self.folder, _TENSOR, self.budget, FILES, self.budget // STEPS)
        for entry in storage.entries(self.folder, storage.PART):
            if entry.used < (time.time() - STALE_SECONDS) * 1e9:
                storage.remove(entry.path)
        for entry in storage.entries(self.folder, _FORMER):
            storage.remove(entry.path)
        kept = {entry.path.stem for entry in tensors}
        for entry in storage.entries(self.folder, _NAME):
            digest = _read_name(entry.path)
            if digest is None or (digest and digest.hex() not in kept):
                storage.remove(entry.path)
        for entry in storage.entries(self.folder, _OWNER):
            if entry.path.stem.partition("-")[0] not in kept:
                storage.remove(entry.path)
        total = sum(entry.size for entry in tensors)
        # When to look again: soon enough to see what other servers wrote.
        self._room = min(self.budget - total, self.budget // STEPS)

    def _path(self, digest: bytes) -> Path:
        return self.folder / (digest.hex() + _TENSOR)

    def _owner_path(self, digest: bytes, owner: str) -> Path:
        return self.folder / f"{digest.hex()}-{owner}{_OWNER}"

    def _name_path(self, name: int, size: int, owner: str) -> Path:
        return self.folder / f"{name:016x}-{size:x}-{owner}{_NAME}"


def _read_name(path: Path) -> bytes | None:
    """The digest in a name's file; empty for a name of several contents, None for no name."""
    file = storage.open_own(path)
    if file is None:
        return None
    with file, contextlib.suppress(OSError, ValueError):
        digest = bytes.fromhex(file.read(2 * DIGEST_BYTES + 1).decode("ascii"))
        return digest if len(digest) in (0, DIGEST_BYTES) else None
    return None
