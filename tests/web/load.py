"""Many users at one sd-server: each asks for one picture after the other and follows its events until it is there."""

from __future__ import annotations

import base64
import http.client
import json
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from tests.web.process import DRAW_SECONDS, WebServer


class Seen(NamedTuple):
    """What a user saw of a job: times in seconds since the epoch, before it was asked for, when it was accepted, and
    when its picture was there."""

    id: str
    seed: int
    asked: float
    accepted: float
    there: float
    picture: bytes


def crowd(server: WebServer, users: int, requests: int, body: dict[str, Any]) -> list[Seen]:
    """What ``users`` saw who asked for ``requests`` pictures each, with the seeds 1, 2 … Raises what one met."""
    seen, trouble = list[Seen](), list[BaseException]()

    def use() -> None:
        try:
            for seed in range(1, requests + 1):
                seen.append(_drawn(server.port, body | {"seed": seed}))
        except BaseException as error:
            trouble.append(error)

    threads = [threading.Thread(target=use) for _ in range(users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if trouble:
        raise trouble[0]
    return seen


def _drawn(port: int, body: dict[str, Any]) -> Seen:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DRAW_SECONDS)
    try:
        asked = time.time()
        connection.request("POST", "/sdcpp/v1/img_gen", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        job = json.loads(answer.read())
        accepted = time.time()
        assert answer.status == 202, job
        connection.request("GET", f"{job['poll_url']}/events")
        stream = connection.getresponse()
        last: dict[str, Any] = {}
        there = 0.0
        for line in stream:
            if line.startswith(b"data: "):
                there, last = time.time(), json.loads(line[6:])
        assert last["status"] == "completed", last["error"]
        picture = base64.b64decode(last["result"]["images"][0]["b64_json"])
        return Seen(job["id"], body["seed"], asked, accepted, there, picture)
    finally:
        connection.close()


def wrong(seen: Sequence[Seen]) -> int:
    """How many pictures are none of their request: each says its seed, and one seed has one picture."""
    pixels: dict[int, bytes] = {}
    count = 0
    for each in seen:
        with Image.open(BytesIO(each.picture)) as image:
            told = f"Seed: {each.seed}," in image.info["parameters"]
            same = pixels.setdefault(each.seed, image.tobytes()) == image.tobytes()
        count += not (told and same)
    return count


class Overhead(NamedTuple):
    """Seconds that the queue took of a job: to accept it, to begin it when its seat was free, and to tell that it is
    there; and those in which it was drawn."""

    accept: float
    begin: float
    tell: float
    drawn: float

    @property
    def whole(self) -> float:
        return self.accept + self.begin + self.tell


def overheads(data: Path, seen: Sequence[Seen]) -> list[Overhead]:
    """The same of each job, from the queue in the folder ``data`` of a server with one seat that has ended."""
    table = sqlite3.connect(data / "jobs.sqlite")
    try:
        rows = table.execute("SELECT id, created, started, finished FROM jobs ORDER BY started").fetchall()
    finally:
        table.close()
    free, found = 0.0, defaultdict[str, list[float]](list)
    for name, created, started, finished in rows:
        found[name] = [started - max(created, free), finished, finished - started]
        free = finished
    return [
        Overhead(each.accepted - each.asked, found[each.id][0], each.there - found[each.id][1], found[each.id][2])
        for each in seen
    ]
