"""The keys that a server lets clients in with, each with a name: a file that is read again when it changes.

Who has the file can use the server, as who has its private key can be it: both are their user's alone, and whoever can
read one of them is refused, not warned of. The commands ``rpc-server keys …`` write it; a server only reads, so that a
key that is revoked is of no use from the next second on.
"""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from ..errors import InvalidValue, UsageError
from ..key import Key
from ..storage import read_secret, state_folder, write_whole

FORMAT = 1
MAX_BYTES = 1 << 18
MAX_KEYS = 1 << 10
FIRST = "default"
"""The name of the key that a server makes itself when it has none."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")


class NamedKey(NamedTuple):
    """A key, what its user calls it, and since which day (ISO) it is there."""

    name: str
    key: Key
    added: str


Keys = dict[str, NamedKey]


class KeyRing:
    """The keys in the file ``path``; none if it is not there. For any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        self._state: object = None
        self._by_id: dict[bytes, NamedKey] = {}

    def find(self, id: bytes) -> NamedKey | None:
        """The key with that id. Raises :class:`UsageError` for a file that can't be used: then nobody gets in."""
        with self._lock:
            self._refresh()
            return self._by_id.get(id)

    def all(self) -> list[NamedKey]:
        """Every key, in the order in which they came. Raises as :meth:`find`."""
        with self._lock:
            self._refresh()
            return list(self._by_id.values())

    def add(self, name: str) -> NamedKey:
        """A new key of that name. Raises :class:`InvalidValue` for a name that is none, or is taken."""
        if not _NAME.fullmatch(name):
            raise InvalidValue("name", name, "up to 32 letters, digits, dots, hyphens and underscores")
        with self._lock:
            keys = read(self.path)
            if name in keys:
                raise InvalidValue("name", name, "there is a key of that name already (list shows all, show prints it)")
            if len(keys) >= MAX_KEYS:
                raise UsageError(f"there are {len(keys)} keys already: revoke those that are not used any more")
            keys[name] = made = NamedKey(name, Key.new(), date.today().isoformat())
            self._write(keys)
            return made

    def named(self, name: str) -> NamedKey:
        """The key of that name. Raises :class:`InvalidValue` when there is none."""
        return _named(read(self.path), name)

    def revoke(self, name: str) -> None:
        """Take the key of that name back. Raises :class:`InvalidValue` when there is none."""
        with self._lock:
            keys = read(self.path)
            del keys[_named(keys, name).name]
            self._write(keys)

    def _refresh(self) -> None:
        """Read the file if it is another one than before. A file that can't be used leaves no key."""
        state = _state(self.path)
        if state == self._state and state is not None:
            return
        self._by_id = {}
        self._state = None
        self._by_id = {entry.key.id: entry for entry in read(self.path).values()}
        self._state = state

    def _write(self, keys: Keys) -> None:
        entries = [{"name": each.name, "key": each.key.code, "added": each.added} for each in keys.values()]
        try:
            write_whole(self.path, json.dumps({"format": FORMAT, "keys": entries}, indent=1).encode())
        except OSError as error:
            raise UsageError(
                f"{self.path}: keys can't be kept there: {error.strerror or error}; set SDRPC_STATE to choose another "
                "place"
            ) from error
        self._state = None


def default_path() -> Path:
    """Where this user's keys are kept."""
    return state_folder() / "keys.json"


def read(path: Path) -> Keys:
    """The keys in ``path`` by name; none if it is not there. Raises :class:`UsageError` for what is no such file."""
    data = read_secret(path, MAX_BYTES)
    if data is None:
        return {}
    try:
        table = json.loads(data)
        if table["format"] != FORMAT or len(table["keys"]) > MAX_KEYS:
            raise ValueError
        return {entry.name: entry for entry in map(_parsed, table["keys"])}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UsageError):
        raise UsageError(
            f"{path}: not a file of keys as rpc-server keys writes it; move it away to begin anew"
        ) from None


def _parsed(entry: Any) -> NamedKey:
    name, added = entry["name"], entry["added"]
    if not _NAME.fullmatch(name) or date.fromisoformat(added).isoformat() != added:
        raise ValueError
    return NamedKey(name, Key.parse(entry["key"]), added)


def _named(keys: Keys, name: str) -> NamedKey:
    if name not in keys:
        raise InvalidValue("name", name, f"there is no such key; there are {', '.join(keys) or 'none'}")
    return keys[name]


def _state(path: Path) -> object:
    """What tells one state of a file from another; None for a file that is not there."""
    try:
        facts = path.lstat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size, facts.st_ino, facts.st_mode
