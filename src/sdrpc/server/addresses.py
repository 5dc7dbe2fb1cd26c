"""What a client sees of our memory: handles and addresses that mean nothing outside its session.

The native server hands out pointers of its process. Ours counts: the first buffer of every session has handle 1 and
starts at the same address, so a client that does the same thing again sends the same bytes, and learns nothing.
Neither a handle nor an address is used twice in a session, and between two buffers lies room that belongs to none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..device import Buffer
from ..errors import RemoteProtocolError

_FIRST = 1 << 32
_GAP = 1 << 20  # also what bases are multiples of: more than any device's alignment
_LAST = 1 << 63


class Region(NamedTuple):
    """A client's buffer: ``size`` bytes from address ``base`` on, kept in ``buffer`` of device number ``device``."""

    handle: int
    base: int
    size: int
    device: int
    buffer: Buffer

    def offset(self, address: int, size: int) -> int:
        """Where ``size`` bytes at ``address`` lie in the buffer. Raises :class:`RemoteProtocolError` if they don't."""
        offset = address - self.base
        if offset < 0 or offset + size > self.size:
            raise RemoteProtocolError(
                f"{size} bytes at address {address:#x} are not inside buffer {self.handle} "
                f"({self.size} bytes at {self.base:#x})"
            )
        return offset


class AddressSpace:
    """The buffers of one session, by handle."""

    def __init__(self) -> None:
        self._regions: dict[int, Region] = {}
        self._next_handle, self._next_base = 1, _FIRST
        self.held = 0
        """Bytes of all buffers."""

    def __len__(self) -> int:
        return len(self._regions)

    def __iter__(self) -> Iterator[Region]:
        return iter(self._regions.values())

    def has_room(self, size: int) -> bool:
        """Whether there are addresses left for ``size`` bytes."""
        return self._next_base + size <= _LAST

    def add(self, device: int, size: int, buffer: Buffer) -> Region:
        region = Region(self._next_handle, self._next_base, size, device, buffer)
        self._regions[region.handle] = region
        self.held += size
        self._next_handle += 1
        self._next_base += (size // _GAP + 2) * _GAP
        return region

    def __getitem__(self, handle: int) -> Region:
        """The buffer of that handle. Raises :class:`RemoteProtocolError` when there is none (any more)."""
        try:
            return self._regions[handle]
        except KeyError:
            was = "has been freed" if 0 < handle < self._next_handle else "does not exist"
            raise RemoteProtocolError(f"buffer {handle:#x} {was}") from None

    def remove(self, handle: int) -> Region:
        region = self[handle]
        del self._regions[handle]
        self.held -= region.size
        return region
