"""Components on devices that somebody chose while the server runs."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from sdrpc.device import Memory
from sdrpc.web.devices import Devices
from tests.support.null import NullDevice
from tests.support.process import ServerProcess
from tests.web.process import SMALL, WebServer

OPTIONS = ("--precision", "exact", "--device", "CPU")


def test_components_move_between_two_pictures(tmp_path: Path, models: Path) -> None:
    """From a server to this machine and to another server: the same picture; another start finds them there."""
    with ServerProcess(*OPTIONS) as one, ServerProcess(*OPTIONS) as other:
        rpc = f"127.0.0.1:{one.port},127.0.0.1:{other.port}"
        options = ("--models-dir", str(models), "--rpc", rpc)
        with WebServer(tmp_path, *options) as server:

            def drawn() -> tuple[dict[str, Any], set[str]]:
                job = server.until(server.submit(), "completed")
                busy = {device["name"] for device in server.ask("/sdcpp/v1/devices").json() if device["load"]}
                return job["result"], busy

            names = [device["name"] for device in server.ask("/sdcpp/v1/devices").json()]
            assert names[-2:] == ["RPC0", "RPC1"]
            before = server.ask("/sdcpp/v1/placement?model=tiny").json()
            assert (set(before["components"]), before["chosen"]) == ({"clip_l", "diffusion", "vae"}, {})
            first, busy = drawn()
            assert busy <= {"RPC0", "RPC1"}
            chosen = {"model": "tiny", "components": {"diffusion": ["RPC1"], "clip_l": ["CPU"], "vae": ["RPC0"]}}
            placed = server.ask("/sdcpp/v1/placement", chosen, "PUT").json()
            assert placed["components"] == chosen["components"]
            assert drawn() == (first, {"CPU", "RPC0", "RPC1"})
        with WebServer(tmp_path, *options) as again:
            kept = again.ask("/sdcpp/v1/placement?model=tiny").json()
            assert kept["components"] == kept["chosen"] == chosen["components"]
            nothing = again.ask("/sdcpp/v1/placement", {"model": "tiny", "components": {}}, "PUT").json()
            assert nothing == before


def test_components_on_several_devices_and_where_a_plan_says(tmp_path: Path, models: Path) -> None:
    """As ``--backend`` has it: layers one after the other, which is the same picture to the bit; side by side; in order
    of preference; and a plan, which is made when it is drawn with."""
    with ServerProcess(*OPTIONS) as one, ServerProcess(*OPTIONS) as other:
        rpc = f"127.0.0.1:{one.port},127.0.0.1:{other.port}"
        with WebServer(tmp_path, "--models-dir", str(models), "--rpc", rpc) as server:

            def put(**components: list[str]) -> dict[str, Any]:
                answer = server.ask("/sdcpp/v1/placement", {"model": "tiny", "components": components}, "PUT")
                assert answer.status == 200, answer.body
                placed: dict[str, Any] = answer.json()
                return placed

            def drawn() -> Any:
                return server.until(server.submit(), "completed")["result"]

            put(all=["RPC0"])
            whole = drawn()
            cut = put(unet=["rpc0 & RPC1"], te=["RPC1", "cpu"])
            assert cut["chosen"] == {"diffusion": ["RPC0&RPC1"], "clip_l": ["RPC1", "CPU"]}
            assert cut["components"]["diffusion"] == ["RPC0&RPC1"]
            assert drawn() == whole
            busy = {device["name"] for device in server.ask("/sdcpp/v1/devices").json() if device["load"]}
            assert {"RPC0", "RPC1"} <= busy
            assert put(diffusion=["RPC0|RPC1"])["components"]["diffusion"] == ["RPC0|RPC1"]
            drawn()
            assert put(diffusion=["auto"], vae=["CPU"])["components"] | {"clip_l": []} == {
                "clip_l": [], "diffusion": ["auto"], "vae": ["CPU"]
            }  # fmt: skip
            drawn()
            planned = server.ask("/sdcpp/v1/placement?model=tiny").json()
            assert planned["chosen"] == {"diffusion": ["auto"], "vae": ["CPU"]}
            assert planned["components"]["diffusion"] != ["auto"]
            assert planned["components"]["vae"] == ["CPU"]


class Shared(NullDevice):
    """Notes whether its memory was asked for by whoever had the turn."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[bool] = []

    def memory(self) -> Memory:
        other = Thread(target=lambda: self.turns.later(lambda: free.append(True)))
        free: list[bool] = []
        other.start()
        other.join()
        self.asked.append(not free)
        return super().memory()


def test_a_device_that_is_drawn_on_is_asked_between_two_turns() -> None:
    """Its connection is the one that pictures are drawn over."""
    device = Shared()
    assert [said["total"] for said in Devices([device]).said()] == [device.total]
    assert device.asked == [True]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"components": {"control": ["CPU"]}}, "components control: this model has clip_l, diffusion, vae"),
        ({"components": {"mouth": ["CPU"]}}, "components mouth: no such component; there are clip_l"),
        ({"components": {"unet": ["CPU"], "diffusion": ["CPU"]}}, "components diffusion: is placed twice"),
        ({"components": {"diffusion": []}}, "components diffusion: no device is named; leave a component out"),
        ({"components": {"vae": ["RPC7"]}}, "components RPC7: there is no such device; there are CPU"),
        ({"components": {"vae": ["CPU&RPC7"]}}, "components RPC7: there is no such device"),
        ({"components": {"vae": ["CPU&CPU"]}}, "components CPU&CPU: '&' and '|' stand between different devices"),
        ({"components": {"vae": ["CPU&"]}}, "components CPU&: a device is named before and after each '&'"),
        ({"components": {"vae": ["CPU", "auto"]}}, "components CPU,auto: auto stands alone"),
        ({"components": {"vae": ["CPU|auto"]}}, "components CPU|auto: auto stands alone"),
        ({"components": {"vae": ["CPU"] * 17}}, "components.vae: List should have at most 16 items"),
        ({"components": {"vae": "CPU"}}, "components.vae: "),
        ({"model": "../tiny"}, "model ../tiny: there is no such model"),
    ],
)
def test_refusals(server: WebServer, changes: dict[str, Any], says: str) -> None:
    answer = server.ask("/sdcpp/v1/placement", {"model": "tiny", "components": {}} | changes, "PUT")
    assert (answer.status, says in answer.error) == (400, True), answer.body
    assert server.ask("/sdcpp/v1/img_gen", SMALL).status == 202
