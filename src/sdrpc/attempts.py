"""How often an address may try to get in. State without IO."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from threading import Lock

ADDRESSES = 1024
"""That are remembered; the ones that tried last stay."""


class Attempts:
    """Failed attempts by address, ``most`` within ``seconds``. For any thread.

    An address of IPv6 counts alone, though a machine has as many as it likes: those of its neighbours look the same,
    and nobody shall be kept out for what they do."""

    def __init__(self, most: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._seconds, self._clock = most, seconds, clock
        self._failed: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = Lock()

    def failed(self, address: str) -> int:
        """Note one; how many are left."""
        with self._lock:
            times = self._failed.setdefault(address, deque(maxlen=self._most))
            times.append(self._clock())
            self._failed.move_to_end(address)
            if len(self._failed) > ADDRESSES:
                self._failed.popitem(last=False)
            return self._most - self._recent(address)

    def exhausted(self, address: str) -> bool:
        """Whether there are none left for now."""
        with self._lock:
            return self._recent(address) >= self._most

    def _recent(self, address: str) -> int:
        since = self._clock() - self._seconds
        return sum(time > since for time in self._failed.get(address, ()))
