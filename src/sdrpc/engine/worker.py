"""The thread that computes for a device. Its clients take turns (:mod:`sdrpc.fair_queue`)."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple, TypeVar

from sdrpc.fair_queue import FairQueue

from ..device import Client
from .leaving import ends_before_python

log = logging.getLogger(__name__)

T = TypeVar("T")


class Task(NamedTuple):
    client: Client
    future: Future[Any]
    function: Callable[[], Any]


class _Queue:
    """Tasks, the next one being that of the client whose turn it is."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.waiting: FairQueue[Task] = FairQueue()
        self.closed = False

    def put(self, task: Task) -> None:
        with self.changed:
            if self.closed:
                raise RuntimeError("the device is closed")
            self.waiting.put(task.client.path, task)
            self.changed.notify()

    def spent(self, client: Client, seconds: float) -> None:
        with self.changed:
            self.waiting.spent(client.path, seconds)
        client.spent(seconds)

    def take(self) -> Task | None:
        """The next task, when there is one; None when the queue is closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.closed)
            return self.waiting.take() if self.waiting else None

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify()


class Worker:
    """A thread called ``name`` that runs tasks, one at a time; it runs ``prepare`` first. It starts with the first task
    and ends with this object. It is a daemon: a kernel that can't be stopped must not keep a process alive."""

    def __init__(self, name: str, prepare: Callable[[], None]) -> None:
        self._name, self._prepare = name, prepare
        self._queue = _Queue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        weakref.finalize(self, self._queue.close)
        ends_before_python(self)

    def submit(self, client: Client, task: Callable[[], T]) -> Future[T]:
        """Queue ``task`` among those of ``client``. Raises :class:`RuntimeError` when the worker is closed, or the
        system has no room for its thread; whoever comes next tries that again."""
        with self._starting:
            if self._thread is None:
                thread = threading.Thread(target=_work, args=(self._queue, self._prepare), name=self._name, daemon=True)
                thread.start()
                self._thread = thread
        future: Future[T] = Future()
        self._queue.put(Task(client, future, task))
        return future

    def close(self, seconds: float | None = None) -> bool:
        """Finish what is queued; whether that was possible within ``seconds``."""
        self._queue.close()
        if self._thread is not None:
            self._thread.join(seconds)
            return not self._thread.is_alive()
        return True


def _work(queue: _Queue, prepare: Callable[[], None]) -> None:
    prepared = False

    def run(function: Callable[[], Any]) -> Any:
        nonlocal prepared
        if not prepared:  # what goes wrong with that is for who waits, not the end of this thread
            prepare()
            prepared = True
        return function()

    while (task := queue.take()) is not None:
        client, future, function = task
        began = time.perf_counter()
        settle = _run(future, partial(run, function))
        try:  # before whoever waits for the result can come again
            queue.spent(client, time.perf_counter() - began)
        except Exception:  # a fault with one client must not end what computes for all
            log.exception("what was computed for a client is not counted")
        settle()
        del task, future, function, settle  # or they would hold their memory until the next one comes


def _run(future: Future[Any], function: Callable[[], Any]) -> Callable[[], None]:
    """Call ``function``; what tells ``future`` how it ended."""
    if not future.set_running_or_notify_cancel():
        return lambda: None
    try:
        return partial(future.set_result, function())
    except BaseException as error:
        return partial(future.set_exception, error)
