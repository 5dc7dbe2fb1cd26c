"""Lowered modules on disk, so that a second run neither captures nor imports torch.

A file per module, named by a digest of everything that decides the graph. Damaged files are as good as none.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..device import Target
from ..errors import GraphError
from ..storage import cache_folder, mark_used, read_own, shrink, write_whole
from .lowered import Lowered, from_bytes, to_bytes

log = logging.getLogger(__name__)

BUDGET = 256 * 2**20
"""Bytes that the files may take in all; the ones used longest ago go first."""
SUFFIX = ".lowered"
NOTE_SUFFIX = ".json"
PACKAGES = ("sdrpc", "torch", "diffusers", "transformers", "huggingface_hub")
"""Whose code decides what a graph looks like."""


def default_folder() -> Path:
    """Where graphs are kept for this user."""
    return cache_folder("graphs")


def key(target: Target, **facts: Any) -> str:
    """A digest of ``facts`` (of JSON's types), of the target and of the versions of the packages that capture."""
    versions = {name: _version(name) for name in PACKAGES}
    about = [target.name, sorted(target.ops), target.managed]
    text = json.dumps([versions, about, facts], sort_keys=True)
    return blake2b(text.encode(), digest_size=20).hexdigest()


@functools.cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


class Cache:
    """A folder of lowered modules. Several processes may share it."""

    def __init__(self, folder: Path | None = None, budget: int = BUDGET) -> None:
        self.folder = default_folder() if folder is None else folder
        self.budget = budget
        self._refused = False

    def get(self, key: str) -> Lowered | None:
        """The module under ``key``; None when there is none or its file is damaged."""
        path = self.folder / (key + SUFFIX)
        try:
            data = read_own(path, self.budget)
            found = None if data is None else from_bytes(data)
        except GraphError:
            return None
        if found is not None:
            mark_used(path)
        return found

    def put(self, key: str, lowered: Lowered) -> None:
        """Keep ``lowered``: the file appears whole or not at all. Raises :class:`OSError` when the disk refuses."""
        self._write(key + SUFFIX, to_bytes(lowered))

    def note(self, key: str) -> Any:
        """What :meth:`put_note` kept beside a module, JSON's types; None when there is none or its file is damaged."""
        path = self.folder / (key + NOTE_SUFFIX)
        try:
            data = read_own(path, self.budget)
            found = None if data is None else json.loads(data)
        except (ValueError, RecursionError):
            return None
        if found is not None:
            mark_used(path)
        return found

    def put_note(self, key: str, note: Any) -> None:
        """Keep a value of JSON's types. Raises :class:`OSError` when the disk refuses."""
        self._write(key + NOTE_SUFFIX, json.dumps(note).encode())

    def _write(self, name: str, data: bytes) -> None:
        write_whole(self.folder / name, data)
        shrink(self.folder, (SUFFIX, NOTE_SUFFIX), self.budget)

    def load(self, key: str, make: Callable[[], Lowered]) -> Lowered:
        """The module under ``key``, made and kept if it is not there. A disk that refuses costs the next run time, not
        this one its picture: it is logged."""
        found = self.get(key)
        if found is None:
            found = make()
            try:
                self.put(key, found)
            except OSError as error:
                again, self._refused = self._refused, True
                log.log(
                    logging.DEBUG if again else logging.WARNING,
                    "%s: graphs are not kept, the next run captures them again: %s",
                    self.folder,
                    error.strerror,
                )
        return found
