"""Real sd-server processes."""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.process import Listening

DRAW_SECONDS = 240.0

SMALL: dict[str, Any] = {
    "model": "tiny", "prompt": "a cat", "width": 64, "height": 64, "seed": 1, "sample_params": {"sample_steps": 1},
}  # fmt: skip
"""A request that is drawn in no time."""

LONG = SMALL | {"sample_params": {"sample_steps": 500}}
"""One that is drawn until it is cancelled."""


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json()["error"]["message"])


class WebServer(Listening):
    """``sd-server`` on a free port."""

    def __init__(self, data: Path, *options: str) -> None:
        usual = ("--listen-port", "0", "-t", "1", "--precision", "exact", "--data", str(data))
        super().__init__([sys.executable, "-m", "sdrpc", "sd-server", *usual, *options], r"^https?://\S+:(\d+)\b")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, path: str, body: Any = None, method: str | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """``body``: bytes as they are, anything else as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        for name, value in (headers or {}).items():
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=DRAW_SECONDS) as answer:
                return Answer(answer.status, dict(answer.headers), answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, dict(error.headers), error.read())

    def submit(self, **changes: Any) -> str:
        """The job of a small request."""
        answer = self.ask("/sdcpp/v1/img_gen", SMALL | changes)
        assert answer.status == 202, answer.body
        return str(answer.json()["id"])

    def job(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask(f"/sdcpp/v1/jobs/{name}").json()
        return found

    def until(self, name: str, *states: str) -> dict[str, Any]:
        """The job when it is in one of ``states``."""
        end = time.monotonic() + DRAW_SECONDS
        while time.monotonic() < end:
            job = self.job(name)
            if job["status"] in states:
                return job
            assert job["status"] in ("queued", "generating"), job["error"]
            time.sleep(0.05)
        raise AssertionError(f"{name} is {job['status']}")

    def until_said(self, words: str) -> None:
        """Wait for a line of its log."""
        end = time.monotonic() + DRAW_SECONDS
        while not any(words in line for line in list(self.lines)):
            assert time.monotonic() < end, self.lines
            time.sleep(0.05)
