"""How many devices each server had when it was last there, so that devices keep their names while one is away."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from ..errors import SdrpcError
from ..storage import cache_folder, read_own, write_whole
from .endpoint import Endpoint

log = logging.getLogger(__name__)

MAX_FILE = 1 << 20
MOST_SERVERS, MOST_DEVICES = 256, 256


def remembered(endpoint: Endpoint) -> int | None:
    """The devices of a server when it was last there; None where nobody knows."""
    return _read(_path()).get(str(endpoint))


def remember(endpoint: Endpoint, count: int) -> None:
    """A server has so many devices now."""
    path, name = _path(), str(endpoint)
    known = _read(path)
    if known.get(name) == count or not 1 <= count <= MOST_DEVICES:
        return
    others = [entry for entry in known.items() if entry[0] != name]
    newest = dict([*others, (name, count)][-MOST_SERVERS:])
    try:
        write_whole(path, json.dumps(newest).encode())
    except (OSError, SdrpcError) as error:
        log.info("how many devices %s has is not kept: %s", name, error)


def _path() -> Path:
    return cache_folder("servers") / "devices.json"


def _read(path: Path) -> dict[str, int]:
    """Server → its devices. What makes no sense is not there."""
    try:
        known = json.loads(read_own(path, MAX_FILE) or b"{}")
    except (ValueError, RecursionError):
        return {}
    entries = known.items() if isinstance(known, dict) else ()
    return {name: count for name, count in entries if type(count) is int and 1 <= count <= MOST_DEVICES}
