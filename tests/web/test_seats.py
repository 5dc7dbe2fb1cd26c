"""Several servers draw at once, and one that is lost takes no job with it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from sdrpc.client import connect
from sdrpc.errors import ConnectionLost
from sdrpc.runtime.chain import Lanes
from sdrpc.web.seats import OwnSeat
from tests.server.conftest import eventually
from tests.support.process import ServerProcess
from tests.support.trouble import Restartable
from tests.web.process import SMALL, WebServer

OPTIONS = ("--precision", "exact", "--device", "CPU")


def test_each_server_is_a_seat_and_a_lost_one_loses_nothing(tmp_path: Path, models: Path) -> None:
    """Two jobs at once on two servers; then one server is killed while it draws, and the other one draws its job: the
    same picture as ever."""
    with ServerProcess(*OPTIONS) as one, ServerProcess(*OPTIONS) as other:
        rpc = f"127.0.0.1:{one.port},127.0.0.1:{other.port}"
        with WebServer(tmp_path, "--models-dir", str(models), "--rpc", rpc, "--rpc-retry", "1") as server:
            assert [each["name"] for each in server.ask("/sdcpp/v1/devices").json()][-2:] == ["RPC0", "RPC1"]
            steps = {"sample_steps": 40}
            names = [server.submit(seed=1, sample_params=steps) for _ in range(2)]
            at_once = [server.until(name, "generating") for name in names]
            assert {job["progress"]["seat"] for job in at_once} == {"RPC0", "RPC1"}
            first = [server.until(name, "completed") for name in names]
            assert first[0]["result"] == first[1]["result"]
            again = [server.submit(seed=1, sample_params=steps) for _ in range(3)]
            for name in again[:2]:
                server.until(name, "generating")
            one.process.kill()
            done = [server.until(name, "completed") for name in again]
            assert [job["result"] for job in done] == [first[0]["result"]] * 3
            assert server.ask("/sdcpp/v1/img_gen", SMALL).status == 202


def test_a_seat_whose_server_is_gone_takes_no_job_until_it_is_back() -> None:
    """It would take the same one again and again, until that counts as what ends servers, while others are busy."""

    def unused(*_: object) -> dict[str, list[Lanes]]:
        raise AssertionError

    with Restartable(*OPTIONS) as server, ExitStack() as stack:
        (device,) = connect([f"127.0.0.1:{server.port}"])
        stack.callback(device.close)
        seat = OwnSeat("RPC0", unused, lambda: device, unused)
        seat.lose([device])
        assert seat.ready(), "it was another one"
        server.kill()
        with pytest.raises(ConnectionLost):
            device.memory()
        seat.lose([device])
        assert not seat.ready()
        server.start()
        assert seat.ready()
        assert device.memory().total > 0


def test_the_log_says_when_a_server_is_lost_and_when_it_is_back(tmp_path: Path, models: Path) -> None:
    """By default, once each, while a job waits for it; meanwhile nothing is said of its memory. The job is drawn when
    it is back."""
    with Restartable(*OPTIONS) as device:
        rpc = f"127.0.0.1:{device.port}"
        with WebServer(tmp_path, "--models-dir", str(models), "--rpc", rpc, "--rpc-retry", "600") as server:

            def free() -> object:
                return server.ask("/sdcpp/v1/devices").json()[-1]["free"]

            server.until(server.submit(), "completed")
            assert free() is not None
            device.kill()
            name = server.submit()
            server.until_said("RPC0 is not there: ")
            assert eventually(lambda: free() is None)
            device.start()
            server.until(name, "completed")
            server.until_said("RPC0 is there again")
            assert eventually(lambda: free() is not None)
            for words in ("RPC0 is not there: ", "RPC0 is there again"):
                assert sum(words in line for line in server.lines) == 1, server.lines
