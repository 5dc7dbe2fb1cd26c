"""Every family through ggml's own RPC server, its components on two of its devices, is the picture of diffusers' own
pipeline."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import sdrpc
from sdrpc.device import Device
from sdrpc.diffusion.session import Session
from sdrpc.runtime.cache import Cache
from tests.interop.conftest import NativeServer
from tests.support.pictures import BOUNDS, NATIVE_CASES, Case, Checkpoints, distance, request
from tests.support.references.draw import psnr

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


def test_blocks_are_left_out_there_as_well(
    folder: Path, devices: list[Device], caplog: pytest.LogCaptureFixture
) -> None:
    """What is between them stays with a server that does not find memory for values itself."""
    asked = replace(request(Case("flux1-dev", "safetensors")), steps=4, cache_mode="dbcache")
    files = Checkpoints(folder).files(Case("flux1-dev", "safetensors"))
    with Session.open(files, devices[0], Cache(folder / "graphs")) as session:
        (whole,) = session.generate(replace(asked, cache_option="Fn=1,warmup=0,threshold=0"))
        (none,) = session.generate(replace(asked, cache_mode="disabled"))
        with caplog.at_level(logging.INFO, "sdrpc"):
            (less,) = session.generate(replace(asked, cache_option="Fn=1,Bn=1,warmup=0,threshold=9"))
    assert psnr(whole.image, none.image) >= BOUNDS["exact"]
    assert (less.image != none.image).any()
    assert "2 of 4 blocks were not computed in 3 of 4 evaluations" in caplog.text
