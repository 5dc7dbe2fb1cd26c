"""The thread that computes for a device. Its clients take turns: one that queues a hundred runs delays each other
client by one of them."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
Task = tuple["Future[Any]", Callable[[], Any]]


class _Queue:
    """Tasks by owner; the first owner is the next to be served."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.waiting: OrderedDict[Hashable, deque[Task]] = OrderedDict()
        self.closed = False

    def put(self, owner: Hashable, task: Task) -> None:
        with self.changed:
            if self.closed:
                raise RuntimeError("the device is closed")
            self.waiting.setdefault(owner, deque()).append(task)
            self.changed.notify()

    def take(self) -> Task | None:
        """The next task, when there is one; None when the queue is closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.closed)
            if not self.waiting:
                return None
            owner, tasks = next(iter(self.waiting.items()))
            task = tasks.popleft()
            del self.waiting[owner]
            if tasks:
                self.waiting[owner] = tasks  # behind all others
            return task

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

    def submit(self, owner: Hashable, task: Callable[[], T]) -> Future[T]:
        """Queue ``task`` among those of ``owner``. Raises :class:`RuntimeError` when the worker is closed."""
        future: Future[T] = Future()
        self._queue.put(owner, (future, task))
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_work, args=(self._queue, self._prepare), name=self._name, daemon=True
                )
                self._thread.start()
        return future

    def close(self, seconds: float | None = None) -> bool:
        """Finish what is queued; whether that was possible within ``seconds``."""
        self._queue.close()
        if self._thread is not None:
            self._thread.join(seconds)
            return not self._thread.is_alive()
        return True


def _work(queue: _Queue, prepare: Callable[[], None]) -> None:
    prepare()
    while (task := queue.take()) is not None:
        _run(*task)
        del task  # or it would hold its memory until the next one comes


def _run(future: Future[Any], function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
