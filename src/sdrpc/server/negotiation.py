"""The protocol version that a client is offered: a fixed one, or what its address is known to want.

What is learnt stays in a small file, so that a server that is started again need not learn it again. Several servers
may share the file: each change is made to what stands there at that moment. It is treated as untrusted input.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from ..errors import RemoteProtocolError
from ..ggml.dialect import Dialect, dialects, newest
from ..storage import read_own, state_folder, write_whole
from ..wire.hello import NATIVE, Hello
from .version_memory import Offer, VersionMemory, accepting

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 17
"""Of the file: several times what as many addresses as are remembered need."""


class Protocol(ABC):
    """Decides what HELLO is answered with. For any thread. ``dialect`` is what a client of ours is offered."""

    dialect: Dialect

    @abstractmethod
    def offer(self, address: str, hello: Hello) -> Offer:
        """What to answer. Raises :class:`RemoteProtocolError` when nothing fits."""

    @abstractmethod
    def accepted(self, address: str, hello: Hello, version: str) -> None:
        """The client at ``address`` went on; ``version`` is, as far as it shows yet, what it speaks."""

    @abstractmethod
    def refused(self, address: str, hello: Hello, offer: Offer) -> str:
        """The client at ``address`` left right after the ``offer``: what a user can do about that."""


class Fixed(Protocol):
    """``dialect`` for everybody."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        self._offer = Offer(dialect, accepting(dialect))

    def __str__(self) -> str:
        return f"v{self.dialect.version}"

    def offer(self, _address: str, hello: Hello) -> Offer:
        expected = self.dialect.hello_request_bytes > 0
        if hello.with_caps == expected:
            return self._offer
        fitting = [d.version for d in dialects().values() if (d.hello_request_bytes > 0) == hello.with_caps]
        raise RemoteProtocolError(
            f"the client speaks one of the protocols {fitting[0]} to {fitting[-1]}, this server "
            f"{self.dialect.version}; start the server with --protocol auto, or --protocol {fitting[-1]}, to serve it"
        )

    def accepted(self, address: str, hello: Hello, version: str) -> None:
        pass

    def refused(self, _address: str, _hello: Hello, offer: Offer) -> str:
        return f"{_unlike(offer)} (see --protocol)"


class Learning(Protocol):
    """What each address wants, kept in the file ``path``; without one, as long as this object lives."""

    def __init__(self, path: Path | None = None) -> None:
        self.dialect = newest()
        self._path, self._lock = path, Lock()
        self._learnt = self._read() or VersionMemory()

    def __str__(self) -> str:
        versions = [*dialects()]
        return f"v{versions[0]} to v{versions[-1]}, as each client wants it"

    def offer(self, address: str, hello: Hello) -> Offer:
        with self._lock:
            return self._learnt.offer(address, hello)

    def accepted(self, address: str, hello: Hello, version: str) -> None:
        if hello.capabilities == NATIVE and self._change(lambda learnt: learnt.accepted(address, version)):
            log.info("%s: speaks protocol %s", address, version)

    def refused(self, address: str, hello: Hello, offer: Offer) -> str:
        if hello.capabilities != NATIVE:
            return "though it is a client of ours"
        self._change(lambda learnt: learnt.refused(address, hello, offer))
        return (
            f"{_unlike(offer)}; the next one from {address} is offered {self.offer(address, hello).name}: start the "
            "client again (--protocol with its version saves the search)"
        )

    def _change(self, event: Callable[[VersionMemory], bool]) -> bool:
        """Let ``event`` happen, here and in the file; whether it changed anything."""
        with self._lock:
            if not event(self._learnt):
                return False
            if (kept := self._read()) is not None:
                event(kept)
                self._learnt = kept
            self._write()
            return True

    def _read(self) -> VersionMemory | None:
        """What the file says; None when it can't be used."""
        if self._path is None:
            return None
        try:
            if not self._path.exists():
                return VersionMemory()
            if (data := read_own(self._path, MAX_BYTES)) is None:
                raise ValueError(f"not a file of this user's of at most {MAX_BYTES} bytes")
            return VersionMemory.parse(data.decode())
        except (OSError, ValueError) as error:
            log.warning("%s: not used, what it knew about clients is learnt again: %s", self._path, error)
            return None

    def _write(self) -> None:
        """The file appears whole or not at all; a disk that refuses costs what was learnt when the server ends."""
        if self._path is None:
            return
        try:
            write_whole(self._path, self._learnt.dump().encode())
        except OSError as error:
            log.warning("%s: what is learnt about clients is not kept: %s", self._path, error.strerror)
            self._path = None


def default_path() -> Path:
    """Where what is learnt is kept for this user."""
    return state_folder() / "clients.json"


def _unlike(offer: Offer) -> str:
    return f"as clients do that speak another protocol version than {offer.name}"
