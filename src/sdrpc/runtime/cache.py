"""Lowered modules on disk, so that a second run neither captures nor imports torch.

A file per module, named by a digest of everything that decides the graph. Damaged files are as good as none.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

from ..device import Target
from ..errors import GraphError
from ..places import cache_folder
from .lowered import Lowered, from_bytes, to_bytes

log = logging.getLogger(__name__)

BUDGET = 256 * 2**20
"""Bytes that the files may take in all; the ones used longest ago go first."""
SUFFIX = ".lowered"
NOTE_SUFFIX = ".json"
PACKAGES = ("sdrpc", "torch", "diffusers", "transformers", "huggingface_hub")
"""Whose code decides what a graph looks like."""


def default_folder() -> Path:
    """``$SDRPC_CACHE``, or a folder in the user's cache directory."""
    chosen = os.environ.get("SDRPC_CACHE")
    return Path(chosen) if chosen else cache_folder("graphs")


def key(target: Target, **facts: Any) -> str:
    """A digest of ``facts`` (of JSON's types), of the target and of the versions of the packages that capture."""
    versions = {name: _version(name) for name in PACKAGES}
    about = [target.name, sorted(target.ops), target.managed]
    text = json.dumps([versions, about, facts], sort_keys=True)
    return blake2b(text.encode(), digest_size=20).hexdigest()


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

    def get(self, key: str) -> Lowered | None:
        """The module under ``key``; None when there is none or its file is damaged."""
        path = self.folder / (key + SUFFIX)
        try:
            found = from_bytes(path.read_bytes())
            os.utime(path)
        except (OSError, GraphError):
            return None
        return found

    def put(self, key: str, lowered: Lowered) -> None:
        """Keep ``lowered``: the file appears whole or not at all. Raises :class:`OSError` when the disk refuses."""
        self._write(key + SUFFIX, to_bytes(lowered))

    def note(self, key: str) -> Any:
        """What :meth:`put_note` kept beside a module, JSON's types; None when there is none or its file is damaged."""
        path = self.folder / (key + NOTE_SUFFIX)
        try:
            found = json.loads(path.read_bytes())
            os.utime(path)
        except (OSError, ValueError, RecursionError):
            return None
        return found

    def put_note(self, key: str, note: Any) -> None:
        """Keep a value of JSON's types. Raises :class:`OSError` when the disk refuses."""
        self._write(key + NOTE_SUFFIX, json.dumps(note).encode())

    def _write(self, name: str, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=self.folder, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(part, self.folder / name)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise
        self._shrink()

    def load(self, key: str, make: Callable[[], Lowered]) -> Lowered:
        """The module under ``key``, made and kept if it is not there. A disk that refuses costs the next run time, not
        this one its picture: it is logged."""
        found = self.get(key)
        if found is None:
            found = make()
            try:
                self.put(key, found)
            except OSError as error:
                log.warning(
                    "%s: graphs are not kept, the next run captures them again: %s", self.folder, error.strerror
                )
        return found

    def _shrink(self) -> None:
        files = []
        for path in chain(self.folder.glob(f"*{SUFFIX}"), self.folder.glob(f"*{NOTE_SUFFIX}")):
            try:
                facts = path.stat()
            except OSError:  # another process was faster
                continue
            files.append((facts.st_mtime_ns, facts.st_size, path))
        total = 0
        for _, size, path in sorted(files, reverse=True):
            total += size
            if total > self.budget:
                path.unlink(missing_ok=True)
