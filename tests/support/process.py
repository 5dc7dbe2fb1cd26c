"""Real server processes."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

START_SECONDS = 240.0

P = TypeVar("P", bound="Listening")

PORTS = range(15_000, 30_000)
"""Below those that systems give to who asks for any (on Linux 32768 and on)."""


def lasting_port() -> int:
    """A free port of this machine that it gives to nobody else meanwhile: for a server that starts later, or again."""
    while True:
        port = random.SystemRandom().choice(PORTS)  # hypothesis seeds the others alike in all processes
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port


class Listening:
    """A process that says at which port it listens, in a line that matches ``says``; as a context manager it is killed
    at the end. ``lines`` is what it printed, ``times`` when each came (:func:`time.perf_counter`)."""

    def __init__(self, words: Sequence[str], says: str, env: Mapping[str, str] | None = None) -> None:
        self._says = says
        self.process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | (env or {})
        )
        self.lines: list[str] = []
        self.times: list[float] = []
        self._port: int | None = None
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def port(self) -> int:
        if not self._listening.wait(START_SECONDS) or self._port is None:
            raise AssertionError(f"{self.process.args} did not start:\n{self.output}")
        return self._port

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait(self, seconds: float = 120.0) -> int:
        """Its exit status, with all of its output read."""
        status = self.process.wait(seconds)
        self._reader.join(seconds)
        return status

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Its exit status after a signal."""
        self.process.send_signal(number)
        return self.wait()

    def __enter__(self: P) -> P:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.times.append(time.perf_counter())
            self.lines.append(line)
            if match := re.search(self._says, line):
                self._port = int(match[1])
                self._listening.set()
        self._listening.set()


class ServerProcess(Listening):
    """``rpc-server`` on a free port. It knows nothing of the clients of other servers, unless they share ``state``, a
    folder."""

    def __init__(
        self,
        *options: str,
        python: Sequence[str] = (sys.executable, "-m", "sdrpc.server"),
        state: Path | None = None,
    ) -> None:
        self._own = tempfile.TemporaryDirectory()
        words = [*python, "--port", "0", "--threads", "1", *options]
        super().__init__(words, r"endpoint\s*:\s*\S+:(\d+)\s*$", {"SDRPC_STATE": str(state or self._own.name)})

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        super().__exit__(kind, error, at)
        self._own.cleanup()
