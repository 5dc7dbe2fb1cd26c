"""What was accepted is drawn, in turn, also after the server was killed."""

from __future__ import annotations

import base64
import errno
import os
import secrets
import signal
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdrpc.diffusion.upscaling import Upscalers
from sdrpc.errors import UsageError
from sdrpc.web.api.described import PIXEL
from sdrpc.web.board import Board
from sdrpc.web.devices import Devices
from sdrpc.web.jobs import Job, State, Task, chosen, in_turn
from sdrpc.web.metrics import Metrics
from sdrpc.web.placements import Placements
from sdrpc.web.seats import OwnSeat
from sdrpc.web.store import JobStore, NotKept, QueueFull, on_disk
from sdrpc.web.studio import Studio
from sdrpc.web.warm import Adapters
from tests.server.conftest import eventually
from tests.web.load import crowd, overheads, wrong
from tests.web.process import LONG, SMALL, WebServer

TASK = Task("tiny", {"prompt": "a cat", "seed": 1})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    opened = JobStore(tmp_path / "queue", 8, 3600, 1 << 20)
    yield opened
    opened.close()


def job(name: str, user: str, model: str = "a", created: float = 0.0) -> Job:
    return Job(name, user, replace(TASK, model=model), State.QUEUED, created)


@given(st.lists(st.sampled_from("abc"), max_size=12), st.dictionaries(st.sampled_from("abc"), st.floats(0, 9)))
def test_users_take_turns(users: list[str], served: dict[str, float]) -> None:
    """Everybody's jobs are there, in their own order; between two of one user's no other waits who has any."""
    queued = [job(str(number), user, created=number) for number, user in enumerate(users)]
    order = in_turn(queued, served)
    assert sorted(order, key=lambda each: each.created) == queued
    for user in set(users):
        mine = [each.created for each in order if each.user == user]
        assert mine == sorted(mine)
    for position, (one, next_one) in enumerate(pairwise(order)):
        if one.user == next_one.user:
            assert {each.user for each in order[position:]} == {one.user}


def test_the_queue_is_what_the_table_has(store: JobStore) -> None:
    """What is kept of it in memory follows each change; a job that is put back has its old place."""
    first, second, third = (store.submit("anna", TASK, {}) for _ in range(3))
    taken = store.take("CPU", None, 0)
    assert taken is not None
    assert taken.id == first.id
    assert store.cancel(second.id)
    assert not store.cancel(second.id)
    assert store.waiting() == [third]
    assert store.put_back(taken)
    assert store.waiting() == [first, third]
    assert (store.pending(), store.place(first), store.place(third), store.place(second)) == (2, 1, 2, 0)


def test_the_loaded_model_goes_first_but_not_for_ever() -> None:
    order = [job("1", "a", "x"), job("2", "b", "y")]
    assert chosen(order, "y", 0, 8) is order[1]
    assert chosen(order, "y", 8, 8) is order[0]
    assert chosen(order, None, 0, 8) is order[0]
    assert chosen([], "y", 0, 8) is None


def test_a_full_queue(store: JobStore) -> None:
    for _ in range(8):
        store.submit("anna", TASK, {})
    with pytest.raises(QueueFull, match="8 jobs are waiting"):
        store.submit("anna", TASK, {})


def test_pictures_and_inputs_are_kept_until_they_are_old(store: JobStore) -> None:
    made = store.submit("anna", TASK, {"init_image": [b"begin"]})
    taken = store.take("CPU", None, 0)
    assert taken is not None
    assert (taken.id, taken.state) == (made.id, State.RUNNING)
    store.add_picture(taken, 1, b"first")
    store.add_picture(taken, 2, b"second")
    store.finish(taken, State.DONE)
    done = store.get(made.id)
    assert done is not None
    assert (done.seeds, store.picture(done, 1), store.picture(done, 2)) == ((1, 2), b"second", None)
    assert store.inputs(done, "init_image") == [b"begin"]
    store.prune()
    assert store.get(made.id)
    store.keep_seconds = -1
    store.prune()
    assert store.get(made.id) is None
    assert list(store._pictures.iterdir()) == []


def test_the_oldest_jobs_go_when_there_are_too_many(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were cancelled have no pictures that count."""
    monkeypatch.setattr("sdrpc.web.store.KEPT", 2)
    made = [store.submit("anna", TASK, {}) for _ in range(4)]
    for each in made[:3]:
        store.cancel(each.id)
    store.prune()
    assert [each.id for each in store.jobs()] == [each.id for each in reversed(made[1:])]


def test_the_oldest_pictures_go_when_there_are_too_many(store: JobStore) -> None:
    for seed in range(3):
        store.submit("anna", TASK, {})
        taken = store.take("CPU", None, 0)
        assert taken is not None
        store.add_picture(taken, seed, bytes(400 << 10))
        store.finish(taken, State.DONE)
    store.prune()
    assert [each.seeds for each in store.jobs()] == [(2,), (1,)]


@contextmanager
def full(store: JobStore) -> Iterator[None]:
    """Within the context its table takes nothing more."""
    table = store._table
    (pages,) = table.execute("PRAGMA page_count").fetchone()
    for name in ("a" * 20000, "b" * 40, "c"):  # what is left of the last pages
        with suppress(sqlite3.Error):
            table.execute(f"PRAGMA max_page_count={pages}")
            while True:
                table.execute("INSERT INTO jobs (id, user, task, state, created) VALUES (?, ?, '', 'x', 0)", (
                    f"{name}{secrets.token_hex(4)}", name
                ))  # fmt: skip
    yield
    table.execute("DELETE FROM jobs WHERE state='x'")
    table.execute("PRAGMA max_page_count=1000000")


def test_a_full_disk_takes_no_job(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks is told so, nothing of it stays, and nothing is lost; when there is room again, all goes on."""
    first = store.submit("anna", TASK, {})
    with full(store):
        with pytest.raises(NotKept, match=r"disk refuses \(database or disk is full\)"):
            store.submit("anna", TASK, {"init_image": [b"begin"]})
        assert list(store._pictures.iterdir()) == []
        assert store.waiting() == [first]
    monkeypatch.setattr("sdrpc.web.store.write_whole", broken)
    with pytest.raises(NotKept, match="No space left"):
        store.submit("anna", TASK, {"init_image": [b"begin"]})
    monkeypatch.undo()
    store.max_pending = 2
    store.submit("anna", TASK, {"init_image": [b"begin"]})
    assert store.pending() == 2


def broken(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def not_kept(*_: object) -> None:
    with on_disk():
        broken()


def test_a_seat_outlives_a_full_disk(store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended with the first job that could not be written down, and all behind it waited for ever."""
    monkeypatch.setattr("sdrpc.web.studio.PAUSE_SECONDS", 0.01)
    unused: Any = None
    devices, placements = Devices([]), Placements([], tmp_path / "placement.json")
    studio = Studio(
        store, unused, [OwnSeat("CPU", unused, unused, unused)], devices, placements, Board(),
        Metrics(store, devices), 0, 0, Adapters(tmp_path, "auto"), Upscalers(None),
    )  # fmt: skip
    pixel = {"image": [base64.b64decode(PIXEL)]}

    def enlarged() -> Job:
        return store.submit("anna", studio.enlarged("Lanczos", 2, 2), pixel)

    def is_drawn(job: Job) -> bool:
        now = store.get(job.id)
        return now is not None and now.state.over

    waits = enlarged()
    with full(store):
        studio.start()
        time.sleep(0.1)
    try:
        assert eventually(lambda: is_drawn(waits))
        with monkeypatch.context() as patched:
            patched.setattr(store, "finish", not_kept)
            under_way = enlarged()
            assert eventually(lambda: store.jobs((State.RUNNING,)))
        assert eventually(lambda: is_drawn(under_way))
        with monkeypatch.context() as patched:
            patched.setattr(store, "take", broken)  # a fault of ours
            time.sleep(0.05)
        behind = enlarged()
        assert eventually(lambda: is_drawn(behind))
    finally:
        studio.stop()


def test_one_folder_has_one_server(store: JobStore, tmp_path: Path) -> None:
    store.submit("anna", TASK, {})
    with pytest.raises(UsageError, match="another sd-server uses it"):
        JobStore(tmp_path / "queue", 8, 3600, 1 << 20)


def test_a_killed_server_goes_on(tmp_path: Path, models: Path) -> None:
    """kill -9 while one is drawn and two wait: all three are drawn when it comes back, with the pictures that they
    would have had."""
    options = ("--models-dir", str(models))
    with WebServer(tmp_path, *options) as first:
        first.until(first.submit(seed=1), "completed")
        drawn = first.submit(seed=5, sample_params={"sample_steps": 60}, batch_count=2)
        waiting = [first.submit(seed=1), first.submit(seed=7)]
        first.until(drawn, "generating")
        first.stop(signal.SIGKILL)
    with WebServer(tmp_path, *options) as second:
        jobs = [second.until(name, "completed") for name in (drawn, *waiting)]
        assert [each["seeds"] for each in jobs] == [[5, 6], [1], [7]]
        same = second.until(second.submit(seed=1), "completed")
        assert same["result"]["images"] == jobs[1]["result"]["images"]


def test_sigterm_puts_back_what_is_drawn(tmp_path: Path, models: Path) -> None:
    """Who waits for another picture is told so, and that stays in the queue as well."""
    options = ("--models-dir", str(models))
    asked = {"model": "tiny", "prompt": "a cat", "size": "64x64"}
    with WebServer(tmp_path, *options) as server, ThreadPoolExecutor(1) as pool:
        name = server.submit(**{key: value for key, value in LONG.items() if key != "model"}, model="tiny")
        server.until(name, "generating")
        waits = pool.submit(server.ask, "/v1/images/generations", asked)
        while len(server.ask("/sdcpp/v1/jobs").json()) < 2:
            assert not waits.done()
        assert server.stop(signal.SIGTERM) == 0
        answer = waits.result()
        assert (answer.status, "the job stays in its queue" in answer.error) == (503, True)
        assert "Traceback" not in "".join(server.lines)
    store = JobStore(tmp_path, 8, 3600, 1 << 20)
    assert [each.state for each in store.jobs()] == [State.QUEUED] * 2
    assert store.jobs()[1].id == name
    store.close()


def test_a_crowd_loses_nothing(tmp_path: Path) -> None:
    """Each of eight users gets each of their pictures, and the right one; nobody's queue runs backwards. ``python -m
    bench queue`` is the same with fifty, and says how long it takes."""
    body = {"prompt": "a cat", "width": 64, "height": 64, "sample_params": {"sample_steps": 1}}
    with WebServer(tmp_path) as server:
        seen = crowd(server, 8, 3, body)
        assert server.stop() == 0
    assert len({each.id for each in seen}) == 24
    assert wrong(seen) == 0
    assert all(took.begin >= 0 for took in overheads(tmp_path, seen))


def test_many_users_at_once(server: WebServer) -> None:
    """T61: more than the queue takes get 429 and when to come again; the rest are drawn."""
    begin = server.submit(**LONG)
    answers = [server.ask("/sdcpp/v1/img_gen", SMALL | {"seed": number}) for number in range(70)]
    refused = [answer for answer in answers if answer.status == 429]
    taken = [answer.json()["id"] for answer in answers if answer.status == 202]
    assert len(refused) == len(answers) - len(taken) > 0
    assert refused[0].headers["retry-after"] == "5"
    server.ask(f"/sdcpp/v1/jobs/{begin}/cancel", {})
    for name in taken[:60]:
        server.ask(f"/sdcpp/v1/jobs/{name}/cancel", {})
    for name in taken[60:]:
        server.until(name, "completed")
