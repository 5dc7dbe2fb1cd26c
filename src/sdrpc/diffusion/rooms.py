"""What of a device's memory the weights of components may take."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from ..device import Device
from ..device_names import folded
from ..errors import Room

WORKING_ROOM = 1 << 30
"""Bytes that should stay free beside a component's weights, for what it computes with."""


def limit_of(device: Device, limits: Mapping[str, int]) -> int:
    """Bytes of weights that a device may have at one time, with ``limits`` by name ("": all others)."""
    named = {folded(name): limit for name, limit in limits.items()}
    return named.get(folded(device.name), named.get("", sys.maxsize))


def weights_room(device: Device, limits: Mapping[str, int]) -> Room:
    """What of a device's memory weights may take now."""
    room, limit = beside_work(device.memory().free), limit_of(device, limits)
    return Room(min(room, limit), limit < room)


def beside_work(free: int) -> int:
    """What of so many free bytes weights may take, so that there is room to compute with them."""
    return max(free - WORKING_ROOM, free // 2)
