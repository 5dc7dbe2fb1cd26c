"""Models come to their devices, and leave them."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Event

from sdrpc.client import connect
from tests.support.process import ServerProcess
from tests.support.trouble import Passage, Trouble
from tests.web.process import DRAW_SECONDS, WebServer

OPTIONS = ("--precision", "exact", "--device", "CPU", "--max-memory", "256M", "--cache")


class Holding(Trouble):
    """Holds the first question for weights, which servers with a cache are asked, until it is let through."""

    def __init__(self, port: int) -> None:
        super().__init__(port, happens=self._hold)
        self.held, self.let_go = Event(), Event()

    def comes(self, command: int) -> bool:
        super().comes(command)
        return self.requests[-1] == "SET_RANGES_DIGEST" and not self.held.is_set()

    def _hold(self, _: Passage) -> None:
        self.held.set()
        self.let_go.wait(DRAW_SECONDS)


def test_a_model_comes_and_leaves_when_nobody_asks_for_it(tmp_path: Path, models: Path) -> None:
    """While it is sent the server is not ready, and says how far it is. Without jobs it leaves: the device's memory, as
    the rpc-server itself has it, is free again. The next picture loads it again, and is the same."""
    with (
        ServerProcess(*OPTIONS) as device,
        Holding(device.port) as proxy,
        WebServer(tmp_path, "--models-dir", str(models), "--rpc", proxy.endpoint, "--idle-unload", "1") as server,
    ):
        [looking] = connect([f"127.0.0.1:{device.port}"])
        try:
            whole = looking.memory().free
            assert server.ask("/ready").json() == {"status": "ready"}
            name = server.submit()
            assert proxy.held.wait(DRAW_SECONDS)
            assert looking.memory().free < whole
            answer = server.ask("/ready")
            told = answer.json()
            assert (answer.status, told["status"], told["model"], told["stage"]) == (503, "loading", "tiny", "upload")
            assert "Retry-After" in {header.title() for header in answer.headers}
            assert told["component"] in ("clip_l", "diffusion", "vae")
            assert 0 <= told["done"] < told["total"]
            assert told["total"] > 1 << 16  # bytes
            proxy.let_go.set()
            first = server.until(name, "completed")["result"]
            end = time.monotonic() + DRAW_SECONDS
            while looking.memory().free < whole:
                assert time.monotonic() < end
                time.sleep(0.05)
            assert server.ask("/ready").json() == {"status": "ready"}
            before = len(proxy.requests)
            assert server.until(server.submit(), "completed")["result"] == first
            assert "SET_RANGES_DIGEST" in proxy.requests[before:]
        finally:
            proxy.let_go.set()
            looking.close()
