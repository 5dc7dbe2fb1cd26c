"""What of a device's memory the weights of components may take."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from ..device import Device
from ..device_names import folded
from ..errors import Room

WORKING_ROOM = 1 << 30
"""Bytes that should stay free beside a component's weights, for what it computes with."""


NO_LIMIT = sys.maxsize
"""Of the bytes of a device that weights may take."""


def limited(device: Device, room: int, limits: Mapping[str, int]) -> Room:
    """So many bytes of a device's memory, or as many of them as weights may take with ``limits`` by name ("": all
    others). One below 0 says how much of what is free stays so."""
    named = {folded(name): limit for name, limit in limits.items()}
    limit = named.get(folded(device.name), named.get("", NO_LIMIT))
    if limit < 0:
        limit = max(room + limit, 0)
    return Room(min(room, limit), limit < room)


def weights_room(device: Device, limits: Mapping[str, int]) -> Room:
    """What of a device's memory weights may take now."""
    return limited(device, beside_work(device.memory().free), limits)


def beside_work(free: int) -> int:
    """What of so many free bytes weights may take, so that there is room to compute with them."""
    return max(free - WORKING_ROOM, free // 2)
