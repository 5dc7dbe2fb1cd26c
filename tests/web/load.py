"""Many users at one sd-server: each asks for one picture after the other and follows its events until it is there.

They are one thread that sends bytes which were made before and notes when bytes came; nothing is read of them before
all is over, so that what is measured is the server's time and not that of fifty programs on its processors.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import sqlite3
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from tests.web.process import DRAW_SECONDS, WebServer

HOST = "127.0.0.1"


class Seen(NamedTuple):
    """What a user saw of a job: times in seconds since the epoch, when the last byte of the request was sent, when it
    was accepted, and when its picture was there."""

    id: str
    seed: int
    asked: float
    accepted: float
    there: float
    picture: bytes


class _Heard(NamedTuple):
    """An answer to the last byte, and when the request was sent and the answer's last byte came."""

    sent: float
    came: float
    data: bytes


class _Asking(asyncio.Protocol):
    """Sends ``request`` and keeps what comes until the server hangs up."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._parts: list[bytes] = []
        self._sent = self._came = 0.0
        self.heard: asyncio.Future[_Heard] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._sent = time.time()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._came = time.time()
        self._parts.append(data)

    def connection_lost(self, error: Exception | None) -> None:
        if self.heard.done():
            return
        if error is None:
            self.heard.set_result(_Heard(self._sent, self._came, b"".join(self._parts)))
        else:
            self.heard.set_exception(error)


async def _ask(port: int, method: str, path: str, body: bytes = b"") -> _Heard:
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    transport, asking = await asyncio.get_running_loop().create_connection(
        lambda: _Asking(head.encode() + body), HOST, port
    )
    try:
        return await asyncio.wait_for(asking.heard, DRAW_SECONDS)
    finally:
        transport.close()


def crowd(server: WebServer, users: int, requests: int, body: Mapping[str, Any]) -> list[Seen]:
    """What ``users`` saw who asked for ``requests`` pictures each, with the seeds 1, 2 … Raises what one met."""
    bodies = {seed: json.dumps({**body, "seed": seed}).encode() for seed in range(1, requests + 1)}
    port = server.port

    async def use() -> list[tuple[int, _Heard, _Heard]]:
        met = []
        for seed, wanted in bodies.items():
            accepted = await _ask(port, "POST", "/sdcpp/v1/img_gen", wanted)
            link = re.search(rb'"poll_url": ?"([^"]+)"', accepted.data)
            assert link, accepted.data
            met.append((seed, accepted, await _ask(port, "GET", f"{link[1].decode()}/events")))
        return met

    async def everybody() -> list[list[tuple[int, _Heard, _Heard]]]:
        return await asyncio.gather(*(use() for _ in range(users)))

    return [_seen(*job) for met in asyncio.run(everybody()) for job in met]


def _seen(seed: int, accepted: _Heard, events: _Heard) -> Seen:
    assert accepted.data.startswith(b"HTTP/1.1 202 "), accepted.data
    told = [line[6:] for line in events.data.splitlines() if line.startswith(b"data: ")]
    last = json.loads(told[-1])
    assert last["status"] == "completed", last["error"]
    picture = base64.b64decode(last["result"]["images"][0]["b64_json"])
    return Seen(last["id"], seed, accepted.sent, accepted.came, events.came, picture)


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
