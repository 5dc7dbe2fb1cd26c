"""Real sd-server processes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

START_SECONDS = 120.0
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


class WebServer:
    """``sd-server`` on a free port; as a context manager it is killed at the end."""

    def __init__(self, data: Path, *options: str) -> None:
        words = [
            sys.executable,
            "-m",
            "sdrpc",
            "sd-server",
            "--listen-port",
            "0",
            "-t",
            "1",
            "--precision",
            "exact",
            "--data",
            str(data),
            *options,
        ]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines: list[str] = []
        self._port: int | None = None
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def port(self) -> int:
        if not self._listening.wait(START_SECONDS) or self._port is None:
            raise AssertionError("sd-server did not start:\n" + "".join(self.lines))
        return self._port

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

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        status = self.process.wait(60)
        self._reader.join(60)
        return status

    def __enter__(self) -> WebServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if match := re.match(r"https?://\S+:(\d+)\b", line):
                self._port = int(match[1])
                self._listening.set()
        self._listening.set()
