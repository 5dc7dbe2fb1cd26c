"""Threads that work for all clients of a server, where the system may have no room for more of them."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor


class Threads(ThreadPoolExecutor):
    """Up to ``most`` threads, which begin when they are first needed. Where the system gives none, those that are there
    do the work: the first one is there from the start. (Python's own would raise then, with the work in the queue and
    nobody who knows of it.)"""

    def __init__(self, most: int, name: str) -> None:
        super().__init__(most, thread_name_prefix=name)
        self.submit(int).result()

    def _adjust_thread_count(self) -> None:
        if not self._threads:
            super()._adjust_thread_count()
        else:
            with contextlib.suppress(RuntimeError):
                super()._adjust_thread_count()
