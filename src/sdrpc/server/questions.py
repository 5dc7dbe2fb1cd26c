"""The threads that look for what clients ask for by its name. Clients take turns (:mod:`sdrpc.fair_queue`): one
question may take as long as hashing a gigabyte does, and an owner may have thousands under way."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock
from typing import Any, NamedTuple, TypeVar

from ..fair_queue import FairQueue, Path
from .threads import Threads

T = TypeVar("T")


class _Question(NamedTuple):
    client: Path
    look: Callable[[], Any]
    answer: Future[Any]


class Questions:
    """So many ``threads`` for the questions of all clients. For any thread."""

    def __init__(self, threads: int) -> None:
        self._threads = Threads(threads, "sdrpc-questions")
        self._lock = Lock()
        self._waiting: FairQueue[_Question] = FairQueue()

    def ask(self, client: Path, look: Callable[[], T]) -> Future[T]:
        """The answer to a question of ``client`` (:class:`sdrpc.device.Client`): what ``look`` gives or raises."""
        answer = Future[T]()
        with self._lock:
            self._waiting.put(client, _Question(client, look, answer))
        self._threads.submit(self._answer_next)
        return answer

    def _answer_next(self) -> None:
        with self._lock:
            client, look, answer = self._waiting.take()
        began = time.perf_counter()
        try:
            answer.set_result(look())
        except BaseException as error:  # for who waits for the answer
            answer.set_exception(error)
        finally:
            del look, answer  # the error refers to this frame, which must not refer to the error
            with self._lock:
                self._waiting.spent(client, time.perf_counter() - began)
