"""The queue and its pictures on disk: what was accepted is drawn, also after the process was killed.

A table of SQLite holds the jobs, a folder their pictures. A job that was being drawn when the process ended is queued
again when the store is opened; its seed is in it, so the same picture comes out. A general queue would give us neither
a place in the line nor turns between users.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from threading import Condition

from ..errors import SdrpcError, UsageError
from ..storage import make_own, remove, write_whole
from .jobs import SUFFIXES, Job, Kind, State, Task, chosen, in_turn

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, user TEXT NOT NULL, task TEXT NOT NULL,
  state TEXT NOT NULL, created REAL NOT NULL, started REAL, finished REAL, seeds TEXT NOT NULL DEFAULT '[]', error TEXT,
  begun INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS by_state ON jobs (state);
"""
COLUMNS = "id, user, task, state, created, started, finished, seeds, error"

SAME_MODEL = 8
"""Jobs of the model that is loaded may go before others this many times in a row."""


KEPT = 10_000
"""Jobs that are over, at most: those that were cancelled have no pictures, and would be as many as somebody likes."""


class QueueFull(SdrpcError):
    """There are as many jobs in the queue as it takes."""


class NotKept(SdrpcError):
    """The disk does not keep what it is given, or has not what it was given: it is full, read-only, or gone."""


@contextmanager
def on_disk() -> Iterator[None]:
    """Something is written to the disk or read from it. Raises :class:`NotKept`."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise NotKept(f"this server's disk refuses ({reason}); try again later") from error


class JobStore:
    """Jobs and pictures below ``folder``, which one process has at a time. For any thread.

    ``max_pending``: jobs that may wait; ``keep_seconds`` and ``keep_bytes``: how long, and how much of, what is over
    stays. Raises :class:`UsageError` where the folder can't be used.
    """

    def __init__(self, folder: Path, max_pending: int, keep_seconds: float, keep_bytes: int) -> None:
        self._pictures = folder / "pictures"
        self.folder = folder
        make_own(folder)
        make_own(self._pictures)
        self.max_pending, self.keep_seconds, self.keep_bytes = max_pending, keep_seconds, keep_bytes
        self._changed = Condition()
        self._served: dict[str, float] = {}
        self._arriving = 0
        """Jobs whose files are being written."""
        self._queued: dict[str, Job] | None = None
        """Jobs that wait, by id, oldest first; None: as the table has them."""
        self._order: list[Job] | None = None
        """The same in turn, until the queue changes."""
        self._in_a_row: dict[str, int] = {}
        try:
            self._table = sqlite3.connect(folder / "jobs.sqlite", check_same_thread=False, isolation_level=None)
            self._table.executescript(
                "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA locking_mode=EXCLUSIVE;"
            )
            self._table.executescript(SCHEMA)
            self._table.execute(
                "UPDATE jobs SET state=?, started=NULL, seeds='[]' WHERE state=?", (State.QUEUED, State.RUNNING)
            )
        except sqlite3.Error as error:
            hint = "another sd-server uses it" if "locked" in str(error) else "name another folder with --data"
            raise UsageError(f"{folder}: its queue can't be opened ({error}); {hint}") from error

    def close(self) -> None:
        """Nothing more is read or written; who waits in :meth:`take` is let go."""
        with self._changed:
            self._table.close()
            self._changed.notify_all()

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Within the context the table is this thread's. Raises :class:`NotKept`."""
        with self._changed, on_disk():
            yield

    # --- the queue

    def submit(self, user: str, task: Task, inputs: Mapping[str, Sequence[bytes]]) -> Job:
        """A new job at the end of its user's, with the files of pictures that it begins with, by the request's fields.
        Raises :class:`QueueFull` and :class:`NotKept`."""
        task = replace(task, inputs={field: len(files) for field, files in inputs.items() if files})
        with self._using():
            pending = len(self._waiting()) + self._arriving
            if pending >= self.max_pending:
                raise QueueFull(f"{pending} jobs are waiting, more are not taken; try again later")
            self._arriving += 1
        job = Job(f"job_{secrets.token_hex(10)}", user, task, State.QUEUED, time.time())
        try:
            self._write_inputs(job, inputs)
            with self._using():
                row = (job.id, user, json.dumps(asdict(task)), job.state, job.created)
                waiting = self._waiting()
                self._table.execute("INSERT INTO jobs (id, user, task, state, created) VALUES (?, ?, ?, ?, ?)", row)
                waiting[job.id] = job
                self._moved()
        except NotKept:  # nobody would delete them
            for path in self._files(job):
                remove(path)
            raise
        return job

    def _write_inputs(self, job: Job, inputs: Mapping[str, Sequence[bytes]]) -> None:
        """The files of a job that arrives, while others use the table."""
        try:
            with on_disk():
                for field, files in inputs.items():
                    for index, data in enumerate(files):
                        write_whole(self._input(job, field, index), data)
        finally:
            with self._changed:
                self._arriving -= 1

    def take(
        self, seat: str, loaded: str | None, seconds: float, mine: Callable[[Job], bool] = lambda _: True
    ) -> Job | None:
        """The job that ``seat``, which has the model ``loaded``, draws next, of those that are for it (``mine``); None
        when there was none for so many ``seconds``."""
        with self._using():
            order = list(filter(mine, self._in_turn()))
            if not order:
                self._changed.wait(seconds)
                order = list(filter(mine, self._in_turn()))
            in_a_row = self._in_a_row.get(seat, 0)
            job = chosen(order, loaded, in_a_row, SAME_MODEL)
            if job is None:
                return None
            self._in_a_row[seat] = in_a_row + 1 if job is not order[0] else 0
            now = time.time()
            self._served[job.user] = now
            self._table.execute(
                "UPDATE jobs SET state=?, started=?, begun=begun+1 WHERE id=?", (State.RUNNING, now, job.id)
            )
            del self._waiting()[job.id]
            self._moved()
            return replace(job, state=State.RUNNING, started=now)

    def add_picture(self, job: Job, seed: int, data: bytes) -> None:
        """The next picture of ``job``, in its format. Raises :class:`NotKept`."""
        now = self.get(job.id)
        if now is None:
            return
        seeds, path = (*now.seeds, seed), self._path(job, len(now.seeds))
        with on_disk():
            write_whole(path, data)  # by its seat alone, while others use the table
        try:
            with self._using():
                self._table.execute("UPDATE jobs SET seeds=? WHERE id=?", (json.dumps(seeds), job.id))
        except NotKept:
            remove(path)
            raise

    def finish(self, job: Job, state: State, error: str | None = None) -> None:
        """``job`` is over, as ``state``."""
        with self._using():
            row = (state, time.time(), error, job.id)
            self._table.execute("UPDATE jobs SET state=?, finished=?, error=? WHERE id=?", row)

    def put_back(self, job: Job, tries: int = 1 << 30) -> bool:
        """``job`` was not drawn to its end: it is in the queue again, in its old place, without pictures. Not where
        it was begun as often as ``tries``; whether it is."""
        with self._using():
            now = self._job(job.id)
            for index in range(len(now.seeds) if now else 0):
                remove(self._path(job, index))
            row = (State.QUEUED, job.id, tries)
            put = "UPDATE jobs SET state=?, started=NULL, seeds='[]' WHERE id=? AND begun < ?"
            done = self._table.execute(put, row).rowcount > 0
            self._queued = None
            self._moved()
            return done

    def cancel(self, id: str) -> bool:
        """Take a queued job out of the queue; whether it was in it."""
        with self._using():
            row = (State.CANCELLED, time.time(), id, State.QUEUED)
            done = self._table.execute("UPDATE jobs SET state=?, finished=? WHERE id=? AND state=?", row).rowcount > 0
            self._waiting().pop(id, None)
            self._moved()
            return done

    # --- what is known

    def get(self, id: str) -> Job | None:
        with self._using():
            return self._job(id)

    def place(self, job: Job) -> int:
        """Where ``job`` is in the line, from 1; 0 where it is not waiting."""
        with self._using():
            return next((place for place, other in enumerate(self._in_turn(), 1) if other.id == job.id), 0)

    def jobs(self, states: Iterable[State] = tuple(State), most: int = 1000) -> list[Job]:
        """The newest jobs in any of ``states``, newest first."""
        names = list(states)
        with self._using():
            marks = ",".join("?" * len(names))
            query = f"SELECT {COLUMNS} FROM jobs WHERE state IN ({marks}) ORDER BY number DESC LIMIT ?"  # noqa: S608
            return [_job(row) for row in self._table.execute(query, (*names, most))]

    def pending(self) -> int:
        """How many jobs wait."""
        with self._using():
            return len(self._waiting())

    def waiting(self) -> list[Job]:
        """The queue, in the order in which it is drawn."""
        with self._using():
            return list(self._in_turn())

    def last_over(self) -> float:
        """When a job was last over, in seconds since the epoch; 0 where none was."""
        with self._using():
            (when,) = self._table.execute("SELECT max(finished) FROM jobs").fetchone()
            return float(when or 0.0)

    def picture(self, job: Job, index: int) -> bytes | None:
        """A picture's file; None where it is not there."""
        if not 0 <= index < len(job.seeds):
            return None
        with suppress(OSError):
            return self._path(job, index).read_bytes()
        return None

    def inputs(self, job: Job, field: str) -> list[bytes]:
        """The files of the pictures that ``job`` has for ``field``. Raises :class:`NotKept`."""
        with on_disk():
            return [self._input(job, field, index).read_bytes() for index in range(job.task.inputs.get(field, 0))]

    def input(self, job: Job, field: str, index: int) -> bytes | None:
        """One of them; None where it is not there."""
        if not 0 <= index < job.task.inputs.get(field, 0):
            return None
        with suppress(OSError):
            return self._input(job, field, index).read_bytes()
        return None

    def forget(self, id: str) -> bool:
        """Delete a job that is over, with its pictures; whether it was there."""
        with self._using():
            job = self._job(id)
            if job is None or not job.state.over:
                return False
            self._delete([job])
            return True

    def prune(self) -> None:
        """Delete what is over and older, or more, than is kept."""
        oldest = time.time() - self.keep_seconds
        with self._using():
            total, gone = 0, list[Job]()
            for number, job in enumerate(self.jobs((State.DONE, State.FAILED, State.CANCELLED), most=1 << 30)):
                total += sum(map(_size, self._files(job)))
                if number >= KEPT or (job.finished or job.created) < oldest or total > self.keep_bytes:
                    gone.append(job)
            self._delete(gone)

    def _delete(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            for path in self._files(job):
                remove(path)
            self._table.execute("DELETE FROM jobs WHERE id=?", (job.id,))

    def _waiting(self) -> dict[str, Job]:
        if self._queued is None:
            query = f"SELECT {COLUMNS} FROM jobs WHERE state=? ORDER BY number"  # noqa: S608
            self._queued = {job.id: job for job in map(_job, self._table.execute(query, (State.QUEUED,)))}
        return self._queued

    def _in_turn(self) -> list[Job]:
        if self._order is None:
            self._order = in_turn(list(self._waiting().values()), self._served)
        return self._order

    def _moved(self) -> None:
        """The queue is another one."""
        self._order = None
        self._changed.notify_all()

    def _job(self, id: str) -> Job | None:
        row = self._table.execute(f"SELECT {COLUMNS} FROM jobs WHERE id=?", (id,)).fetchone()  # noqa: S608
        return None if row is None else _job(row)

    def _path(self, job: Job, index: int) -> Path:
        return self._pictures / f"{job.id}-{index}{SUFFIXES[job.task.output_format]}"

    def _input(self, job: Job, field: str, index: int) -> Path:
        return self._pictures / f"{job.id}-{field}-{index}"

    def _files(self, job: Job) -> list[Path]:
        inputs = [self._input(job, field, index) for field, count in job.task.inputs.items() for index in range(count)]
        return [self._path(job, index) for index in range(len(job.seeds))] + inputs


@lru_cache(1024)
def _task(written: str) -> Task:
    """A task as it was written. Nobody changes one, so a job that is looked at often is read once."""
    fields = json.loads(written)
    return Task(**{**fields, "kind": Kind(fields.get("kind", Kind.PICTURES))})


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _job(row: tuple[str, str, str, str, float, float | None, float | None, str, str | None]) -> Job:
    name, user, written, state, created, started, finished, seeds, error = row
    return Job(name, user, _task(written), State(state), created, started, finished, tuple(json.loads(seeds)), error)
