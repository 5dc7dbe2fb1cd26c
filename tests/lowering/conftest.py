"""Devices that offloaded modules are on, and what is captured of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import sdrpc
from sdrpc.client import RemoteDevice
from sdrpc.device import Device
from sdrpc.lowering import remote_module
from tests.support.process import ServerProcess


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """It multiplies in bfloat16 where nobody asks for more, as a server with a GPU does."""
    with ServerProcess("--precision", "fast", "--device", "CPU") as process:
        yield process


@pytest.fixture
def remote(server: ServerProcess) -> Iterator[RemoteDevice]:
    device = sdrpc.devices(rpc=f"127.0.0.1:{server.port}")["RPC0"]
    assert isinstance(device, RemoteDevice)
    yield device
    device.close()


@pytest.fixture
def cpu() -> Iterator[Device]:
    device = sdrpc.devices(precision="fast", threads=1)["CPU"]
    yield device
    device.close()


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[type]:
    """The classes of the modules that were captured, with nothing to be found on disk before."""
    monkeypatch.setenv("SDRPC_CACHE", str(tmp_path))
    seen: list[type] = []
    real = remote_module.capture

    def counted(module: nn.Module, *args: Any) -> Any:
        seen.append(type(module))
        return real(module, *args)

    monkeypatch.setattr(remote_module, "capture", counted)
    return seen
