"""Every family through ggml's own RPC server, its components on two of its devices, is the picture of diffusers' own
pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import sdrpc
from sdrpc.device import Device
from tests.interop.conftest import NativeServer
from tests.support.pictures import BOUNDS, NATIVE_CASES, Case, Checkpoints, distance

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning"),  # diffusers' scheduler with numpy 2
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def devices(real_ggml: None) -> Iterator[list[Device]]:
    """Those of a server of their own: it serves one client at a time."""
    server = NativeServer(devices=2)
    opened = sdrpc.devices(rpc=[server.endpoint])
    yield [opened["RPC0"], opened["RPC1"]]
    for device in opened.values():
        device.close()
    server.kill()


@pytest.mark.parametrize("case", NATIVE_CASES, ids=str)
def test_a_picture_is_that_of_diffusers(case: Case, folder: Path, devices: list[Device]) -> None:
    assert distance(Checkpoints(folder), case, devices, folder / "graphs") >= BOUNDS["native"]
