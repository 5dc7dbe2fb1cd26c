"""Work of clients in threads of their own, of which one is at work at a time: clients take turns
(:mod:`sdrpc.fair_queue`)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition

from sdrpc.device import Client
from sdrpc.fair_queue import FairQueue

from .deadline import WATCH_SECONDS, Deadline


@dataclass(eq=False)
class _Ticket:
    """Of a thread that works for ``client``, and waits until that has its turn, unless it ``left``."""

    client: Client
    left: bool = False


class InTurn:
    """For any thread."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._waiting: FairQueue[_Ticket] = FairQueue()
        self._at_work: _Ticket | None = None

    @contextmanager
    def turn(self, client: Client, deadline: Deadline) -> Iterator[None]:
        """A turn of ``client``; ``deadline`` may end the wait for it."""
        ticket = _Ticket(client)
        with self._changed:
            self._waiting.put(client.path, ticket)
        began = None
        try:
            while not self._is_turn_of(ticket):
                deadline.check()
            began = time.perf_counter()
            yield
        finally:
            with self._changed:
                ticket.left = True
                if self._at_work is ticket:
                    self._waiting.spent(client.path, time.perf_counter() - began if began else 0.0)
                    self._at_work = None
                    self._changed.notify_all()

    def _is_turn_of(self, ticket: _Ticket) -> bool:
        """Whether it is, or becomes soon."""
        with self._changed:
            self._changed.wait_for(lambda: self._next() is ticket, WATCH_SECONDS)
            return self._at_work is ticket

    def _next(self) -> _Ticket | None:
        """Who is at work, or begins now."""
        while self._at_work is None and self._waiting:
            ticket = self._waiting.take()
            if ticket.left:
                self._waiting.spent(ticket.client.path, 0.0)
            else:
                self._at_work = ticket
                self._changed.notify_all()
        return self._at_work
