"""The keys that a client has for servers: those that the user just gave, and those with which it was let in before.

A server is known by the name that the user has for it, ``host:port``. What is kept of it is the key and the fingerprint
of its certificate: from then on that name is never talked to without encryption, nor with another certificate.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import UsageError
from ..key import Key
from ..storage import read_secret, state_folder, write_whole
from ..wire.key_exchange import MAX_KEYS
from .endpoint import Endpoint, parse_endpoint

log = logging.getLogger(__name__)

VARIABLE = "SDRPC_RPC_KEY"
FORMAT = 1
MAX_BYTES = 1 << 18
MAX_SERVERS = 1 << 10

_FINGERPRINT = re.compile("[0-9a-f]{64}")


class Credential(NamedTuple):
    """A key for a server, and the ``fingerprint`` of the certificate that the server showed when it was let in by it
    (None: that remains to be seen)."""

    key: Key
    fingerprint: bytes | None = None


class Keychain:
    """Keys ``given`` by the user, each for one server or (None) for all that have none of their own; and those that are
    kept in the file ``path``, which is written when a server has let us in."""

    def __init__(self, given: Sequence[tuple[Endpoint | None, Key]] = (), path: Path | None = None) -> None:
        self._given, self._path = tuple(given), path or default_path()
        self._found: dict[Endpoint, Credential] = {}

    def credentials(self, endpoint: Endpoint) -> list[Credential]:
        """What may get us into the server at ``endpoint``; nothing where it is to be talked to without encryption.
        Raises :class:`UsageError` for a file of keys that can't be used."""
        endpoint = named(endpoint)
        kept = self._found.get(endpoint) or self._read().get(endpoint)
        own = [key for where, key in self._given if where is not None and named(where) == endpoint]
        keys = own or [*([kept.key] if kept else []), *(key for where, key in self._given if where is None)]
        return [
            kept if kept is not None and key == kept.key else Credential(key)
            for key in list(dict.fromkeys(keys))[:MAX_KEYS]
        ]

    def plus(self, endpoint: Endpoint, key: Key) -> Keychain:
        """These, and ``key`` for the server at ``endpoint``."""
        chain = Keychain([*self._given, (endpoint, key)], self._path)
        chain._found = self._found
        return chain

    def by_certificate(self, beginning: bytes) -> Credential | None:
        """What let us into the server whose certificate's fingerprint begins so; None for none of ours."""
        kept = self._read().values() if beginning else ()
        return next((each for each in kept if each.fingerprint and each.fingerprint.startswith(beginning)), None)

    def where(self, endpoint: Endpoint, credential: Credential) -> Keychain:
        """These, for a server that we know under another name and that says to be at ``endpoint`` now."""
        chain = Keychain(self._given, self._path)
        chain._found = {**self._found, named(endpoint): credential}
        return chain

    def accepted(self, endpoint: Endpoint, key: Key, fingerprint: bytes) -> None:
        """The server at ``endpoint`` proved that it has ``key``, and let us in. A disk that refuses means that the user
        will be asked again; it is logged."""
        endpoint, new = named(endpoint), Credential(key, fingerprint)
        try:
            known = self._read()
            if self._found.get(endpoint) != new and known.pop(endpoint, None) != new:
                self._write({**dict(list(known.items())[-MAX_SERVERS + 1 :]), endpoint: new})
        except (OSError, UsageError) as error:
            log.warning("the key of %s is not kept: %s", endpoint, getattr(error, "strerror", None) or error)

    def _read(self) -> dict[Endpoint, Credential]:
        data = read_secret(self._path, MAX_BYTES)
        if data is None:
            return {}
        try:
            table = json.loads(data)
            if table["format"] != FORMAT or len(table["servers"]) > MAX_SERVERS:
                raise ValueError
            return {named(parse_endpoint(where)): _kept(entry) for where, entry in table["servers"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UsageError):
            raise UsageError(
                f"{self._path}: not a file of servers' keys as sdrpc writes it; move it away to begin anew"
            ) from None

    def _write(self, known: Mapping[Endpoint, Credential]) -> None:
        servers = {
            str(endpoint): {"key": each.key.code, "certificate": each.fingerprint.hex()}
            for endpoint, each in known.items()
            if each.fingerprint is not None
        }
        write_whole(self._path, json.dumps({"format": FORMAT, "servers": servers}, indent=1).encode())


def default_path() -> Path:
    """Where this user's keys are kept."""
    return state_folder() / "servers.json"


def named(endpoint: Endpoint) -> Endpoint:
    """One name for a server, however it is written."""
    return endpoint._replace(host=endpoint.host.lower().rstrip("."))


def given_keys(texts: Sequence[str], files: Sequence[str] = ()) -> list[tuple[Endpoint | None, Key]]:
    """The keys in ``texts`` and in ``files`` (one a line), else in ``$SDRPC_RPC_KEY``: ``KEY`` or ``HOST:PORT=KEY``
    each, several with commas in between.

    Raises :class:`UsageError`, which says where a key is wrong but never what it is.
    """
    places = [("--rpc-key", text) for text in texts]
    places += [(file, line) for file in files for line in _lines(file)]
    if not places:
        places = [(VARIABLE, os.environ.get(VARIABLE, ""))]
    entries = [(place, entry.strip()) for place, text in places for entry in text.split(",")]
    return [_given(place, entry) for place, entry in entries if entry]


def _given(place: str, entry: str) -> tuple[Endpoint | None, Key]:
    where, equals, code = entry.rpartition("=")
    try:
        key = Key.parse(code)
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from None
    try:
        return (parse_endpoint(where) if equals else None), key
    except UsageError:  # it quotes what it can't read
        raise UsageError(f"{place}: write KEY, or HOST:PORT=KEY for one of several servers") from None


def _lines(file: str) -> list[str]:
    try:
        with open(file, "rb") as opened:
            text = opened.read(MAX_BYTES).decode()
    except (OSError, ValueError) as error:
        raise UsageError(f"--rpc-key-file {file}: {getattr(error, 'strerror', None) or 'not a text'}") from None
    return [line for line in text.splitlines() if not line.lstrip().startswith("#")]


def _kept(entry: Mapping[str, str]) -> Credential:
    if not _FINGERPRINT.fullmatch(entry["certificate"]):
        raise ValueError
    return Credential(Key.parse(entry["key"]), bytes.fromhex(entry["certificate"]))
