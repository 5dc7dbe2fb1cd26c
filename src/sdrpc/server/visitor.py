"""Who a client is, once it was let in."""

from __future__ import annotations

from typing import NamedTuple

from .key_ring import NamedKey


class Visitor(NamedTuple):
    """A client at ``address`` with ``key``, or without one where it needs none."""

    address: str
    key: NamedKey | None = None

    @property
    def owner(self) -> str:
        """What all that it has is counted and kept under: its key, wherever it comes from, else its address."""
        return self.address if self.key is None else f"key {self.key.key.id.hex()}"

    def __str__(self) -> str:
        return "somebody without a key" if self.key is None else self.key.name
