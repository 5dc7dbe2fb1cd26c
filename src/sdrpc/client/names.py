"""Persistent cache of tensor digests: a second start need not read a model's file to say what is in it.

There is a file for each state of each model's file. One that is damaged or gone is computed again.
"""

from __future__ import annotations

import json
import logging
import re
from hashlib import blake2b
from pathlib import Path

from ..ggml.weight import Origin
from ..storage import cache_folder, mark_used, read_own, shrink, write_whole

log = logging.getLogger(__name__)

FILES = 64
"""Models that are remembered; the ones used longest ago go first."""
MAX_BYTES = 1 << 24
"""Of a file: many times what the largest model needs."""
_SUFFIX = ".json"
_HEX = re.compile("(?:[0-9a-f]{16}|[0-9a-f]{64})")


class Names:
    """Origin → name: a digest, or eight bytes of FNV-1a. Changes reach the disk with :meth:`save`."""

    def __init__(self, place: Path | None = None) -> None:
        self.folder = cache_folder("digests") if place is None else place
        self._known: dict[str, dict[str, str]] = {}
        self._changed: set[str] = set()

    def get(self, origin: Origin) -> bytes | None:
        """The name of these bytes, if it is known."""
        name = self._of(origin.file).get(origin.part)
        return None if name is None else bytes.fromhex(name)

    def put(self, origin: Origin, name: bytes) -> None:
        self._of(origin.file)[origin.part] = name.hex()
        self._changed.add(origin.file)

    def save(self) -> None:
        """Keep what is new for the next run. A disk that refuses costs that run time; it is logged."""
        try:
            for file in self._changed:
                self._write(file)
            if self._changed:
                shrink(self.folder, _SUFFIX, FILES * MAX_BYTES, FILES)
        except OSError as error:
            log.warning("%s: digests of weights are not kept: %s", self.folder, error.strerror)
        self._changed.clear()

    def _of(self, file: str) -> dict[str, str]:
        if file not in self._known:
            self._known[file] = self._read(file)
        return self._known[file]

    def _path(self, file: str) -> Path:
        return self.folder / (blake2b(file.encode("utf-8", "surrogateescape"), digest_size=20).hexdigest() + _SUFFIX)

    def _read(self, file: str) -> dict[str, str]:
        path = self._path(file)
        data = read_own(path, MAX_BYTES)
        if data is None:
            return {}
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            return {}
        mark_used(path)
        if not isinstance(content, dict):
            return {}
        return {part: name for part, name in content.items() if isinstance(name, str) and _HEX.fullmatch(name)}

    def _write(self, file: str) -> None:
        write_whole(self._path(file), json.dumps(self._known[file]).encode())
