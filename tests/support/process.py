"""Real rpc-server processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

START_SECONDS = 240.0


class ServerProcess:
    """``rpc-server`` on a free port; as a context manager it is killed at the end. ``lines`` is what it printed.

    It knows nothing of the clients of other servers, unless they share ``state``, a folder."""

    def __init__(
        self,
        *options: str,
        python: Sequence[str] = (sys.executable, "-m", "sdrpc.server"),
        state: Path | None = None,
    ) -> None:
        self._own = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen(
            [*python, "--port", "0", "--threads", "1", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"SDRPC_STATE": str(state or self._own.name)},
        )
        self.lines: list[str] = []
        self._port: int | None = None
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def port(self) -> int:
        if not self._listening.wait(START_SECONDS) or self._port is None:
            raise AssertionError("rpc-server did not start:\n" + "".join(self.lines))
        return self._port

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait(self, seconds: float = 20.0) -> int:
        """Its exit status, with all of its output read."""
        status = self.process.wait(seconds)
        self._reader.join(seconds)
        return status

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._own.cleanup()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if match := re.search(r"endpoint\s*:\s*\S+:(\d+)\s*$", line):
                self._port = int(match[1])
                self._listening.set()
        self._listening.set()
