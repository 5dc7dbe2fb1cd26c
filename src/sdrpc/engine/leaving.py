"""The end of a process. A thread that is in torch when Python has ended can't come back: torch calls abort()."""

from __future__ import annotations

import atexit
import os
import weakref
from typing import Protocol

SECONDS = 1.0
"""For what is still at work when Python ends."""


class AtWork(Protocol):
    """What has a thread that calls torch."""

    def close(self, seconds: float) -> bool:
        """Begin nothing more; whether the thread has ended within ``seconds``."""


_at_work: weakref.WeakSet[AtWork] = weakref.WeakSet()


def ends_before_python(work: AtWork) -> None:
    """Wait for ``work`` a moment before Python ends, if it still exists then."""
    _at_work.add(work)


if hasattr(os, "register_at_fork"):  # a child has none of the threads, and its parent goes on
    os.register_at_fork(after_in_child=_at_work.clear)


@atexit.register
def _leave() -> None:
    for work in list(_at_work):
        work.close(SECONDS)
