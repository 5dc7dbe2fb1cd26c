"""How often an address may try to get in. State without IO."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from threading import Lock

ADDRESSES = 1024
"""That are remembered; the ones that tried last stay."""


class Attempts:
    """Failed attempts by address, ``most`` within ``seconds``. Networks of IPv6 count as one address: each of their
    machines has as many as it likes. For any thread."""

    def __init__(self, most: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._seconds, self._clock = most, seconds, clock
        self._failed: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = Lock()

    def failed(self, address: str) -> int:
        """Note one; how many are left."""
        with self._lock:
            times = self._failed.setdefault(_network(address), deque(maxlen=self._most))
            times.append(self._clock())
            self._failed.move_to_end(_network(address))
            if len(self._failed) > ADDRESSES:
                self._failed.popitem(last=False)
            return self._most - self._recent(address)

    def exhausted(self, address: str) -> bool:
        """Whether there are none left for now."""
        with self._lock:
            return self._recent(address) >= self._most

    def _recent(self, address: str) -> int:
        since = self._clock() - self._seconds
        return sum(time > since for time in self._failed.get(_network(address), ()))


def _network(address: str) -> str:
    """What one user can have all of: an IPv4 address, the /64 of an IPv6 address."""
    parsed = ipaddress.ip_address(address)
    return str(ipaddress.ip_network((parsed, 64), strict=False)) if parsed.version == 6 else address
