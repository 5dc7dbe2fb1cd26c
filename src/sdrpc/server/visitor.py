"""Who a client is, once it was let in."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

from .key_ring import NamedKey


class Visitor(NamedTuple):
    """A client at ``address``, port and all ``peer``, with ``key``, or without one where it needs none."""

    address: str
    peer: str
    key: NamedKey | None = None

    @property
    def owner(self) -> str:
        """Whose are the tensors that it leaves here: its key's, wherever it comes from, else its address's."""
        return self.address if self.key is None else f"key {self.key.key.id.hex()}"

    @property
    def account(self) -> str:
        """What all that it takes is counted under: the same, but from this machine come the clients of all who use it
        or come through a tunnel, so there each connection counts for itself."""
        local = self.key is None and ipaddress.ip_address(self.address).is_loopback
        return self.peer if local else self.owner

    def __str__(self) -> str:
        return "somebody without a key" if self.key is None else self.key.name
