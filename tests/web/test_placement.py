"""Components on devices that somebody chose while the server runs."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from sdrpc.device import Memory
from sdrpc.web.places import Places
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
            assert (set(before["components"]), before["chosen"]) == ({"clip_l", "diffusion", "vae"}, [])
            first, busy = drawn()
            assert busy <= {"RPC0", "RPC1"}
            chosen = {"model": "tiny", "components": {"diffusion": ["RPC1"], "clip_l": ["CPU"], "vae": ["RPC0"]}}
            placed = server.ask("/sdcpp/v1/placement", chosen, "PUT").json()
            assert placed["components"] == chosen["components"]
            assert drawn() == (first, {"CPU", "RPC0", "RPC1"})
        with WebServer(tmp_path, *options) as again:
            kept = again.ask("/sdcpp/v1/placement?model=tiny").json()
            assert kept["components"] == chosen["components"]
            nothing = again.ask("/sdcpp/v1/placement", {"model": "tiny", "components": {}}, "PUT").json()
            assert nothing == before


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


def test_a_device_that_is_drawn_on_is_asked_between_two_turns(tmp_path: Path) -> None:
    """Its connection is the one that pictures are drawn over."""
    device = Shared()
    places = Places([device], tmp_path / "places.json")
    assert [said["total"] for said in places.said()] == [device.total]
    assert device.asked == [True]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"components": {"unet": ["CPU"]}}, "components unet: this model has clip_l, diffusion, vae"),
        ({"components": {"vae": ["RPC7"]}}, "components RPC7: there is no such device; CPU"),
        (
            {"components": {"vae": ["CPU&RPC0"]}},
            "components CPU&RPC0: what is cut or side by side is placed with --backend",
        ),
        ({"components": {"vae": "CPU"}}, "components.vae: "),
        ({"model": "../tiny"}, "model ../tiny: there is no such model"),
    ],
)
def test_refusals(server: WebServer, changes: dict[str, Any], says: str) -> None:
    answer = server.ask("/sdcpp/v1/placement", {"model": "tiny", "components": {}} | changes, "PUT")
    assert (answer.status, says in answer.error) == (400, True), answer.body
    assert server.ask("/sdcpp/v1/img_gen", SMALL).status == 202
