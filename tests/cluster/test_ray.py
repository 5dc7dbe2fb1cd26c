"""sd-server in a Ray cluster of two nodes that each reach a server: real processes of all of them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.cluster.process import cluster, until_there
from tests.support.process import ServerProcess
from tests.web.conftest import models as models
from tests.web.process import WebServer

pytest.importorskip("ray", reason="ray is not installed: pip install -c constraints.txt '.[ray]'")

SECONDS = 120.0
SERVER = ("--precision", "exact", "--device", "CPU")
STEPS = {"sample_steps": 60}
"""Enough that something can happen in the middle."""


def actors() -> list[psutil.Process]:
    """The processes that draw, of the cluster that this process has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Painter"):
                found.append(process)
    return found


def test_where_no_cluster_answers_that_is_said_at_once(tmp_path: Path) -> None:
    with WebServer(tmp_path, "--ray", "127.0.0.1:1") as server:
        assert server.process.wait(SECONDS) == 2
        server.stop()
    assert "no Ray cluster can be joined at 127.0.0.1:1: Connection refused; start one" in server.lines[-1]


def test_actors_draw_and_those_that_end_are_started_again(tmp_path: Path, models: Path) -> None:
    """Two jobs at once on two nodes; all actors are killed in the middle and draw the same pictures when they are there
    again; then a server is killed, and the other node draws what it had."""
    with ServerProcess(*SERVER) as one, ServerProcess(*SERVER) as other:
        names = [f"127.0.0.1:{process.port}" for process in (one, other)]
        with (
            cluster(*(f"rpc:{name}" for name in names)) as address,
            WebServer(tmp_path, "--models-dir", str(models), "--ray", address, "--rpc-retry", "1") as server,
        ):
            until_there(server, *names)
            first = [server.submit(sample_params=STEPS) for _ in range(2)]
            at_once = [server.until(name, "generating") for name in first]
            assert {job["progress"]["seat"] for job in at_once} == set(names)
            drawn = [server.until(name, "completed")["result"] for name in first]
            assert drawn[0] == drawn[1]

            killed = [server.submit(sample_params=STEPS) for _ in range(2)]
            for name in killed:
                server.until(name, "generating")
            assert len(actors()) == 2
            for process in actors():
                process.kill()
            assert [server.until(name, "completed")["result"] for name in killed] == drawn

            cancelled = server.submit(sample_params={"sample_steps": 500})
            server.until(cancelled, "generating")
            assert server.ask(f"/sdcpp/v1/jobs/{cancelled}/cancel", method="POST").status == 200
            assert server.until(cancelled, "cancelled")["result"] is None

            again = [server.submit(sample_params=STEPS) for _ in range(2)]
            for name in again:
                server.until(name, "generating")
            one.process.kill()
            assert [server.until(name, "completed")["result"] for name in again] == drawn

            with WebServer(tmp_path / "second", "--models-dir", str(models), "--ray", address) as second:
                job = second.submit(sample_params=STEPS)
                second.until_said("waits for its devices: another sd-server has them")
                assert second.job(job)["status"] == "queued"
                assert server.stop() == 0  # whose leases are free then
                assert second.until(job, "completed")["result"] == drawn[0]
                assert second.stop() == 0
